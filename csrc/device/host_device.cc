// SPDX-License-Identifier: Apache-2.0
// CPU tensors: packing is done by the calling thread, so there is nothing to wait for.
#include "device/device.h"
#include "device/pack.h"
#include "device/streaming.h"

namespace fastshard {
namespace {

class HostStream final : public CopyStream {
 public:
  std::unique_ptr<Ticket> pack(std::span<const CopyOp> ops, Staging& staging) override {
    for (const CopyOp& op : ops) {
      std::byte* out = staging.bytes.subspan(op.chunk_offset, op.nbytes).data();
      if (staging.streaming && op.source->contiguous() && !op.source->cast()) {
        copy_streaming(out, op.source->data + op.first_byte, op.nbytes);
      } else {
        pack_bytes(*op.source, op.first_byte, op.nbytes, out);
      }
    }
    return nullptr;
  }
};

class HostDevice final : public Device {
 public:
  PageLocking page_lock(std::span<std::byte>) override { return {}; }
  std::unique_ptr<CopyStream> open(uintptr_t) override { return std::make_unique<HostStream>(); }
};

}  // namespace

std::unique_ptr<Device> make_host_device() { return std::make_unique<HostDevice>(); }

}  // namespace fastshard
