// SPDX-License-Identifier: Apache-2.0
// Device over CUDA: the device's primary context (so that torch's pointers and streams are valid), streams for
// each save, and asynchronous copies into page-locked slots.
#include <memory>
#include <utility>
#include <vector>

#include "device/cuda_context.h"
#include "device/cuda_copies.h"
#include "device/cuda_gathers.h"
#include "device/cuda_kernels.h"
#include "device/cuda_scratch.h"
#include "device/device.h"
#include "device/numa.h"

namespace fastshard {
namespace {

class PinnedRegion final : public Registration {
 public:
  PinnedRegion(std::shared_ptr<Context> context, void* address) : context_(std::move(context)), address_(address) {}
  ~PinnedRegion() override {
    try {
      const Current current(*context_);
      context_->driver().cuMemHostUnregister(address_);
    } catch (const CudaError&) {
      // The context is gone, and what it had page-locked with it.
    }
  }

 private:
  std::shared_ptr<Context> context_;
  void* address_;
};

class CudaTicket final : public Ticket {
 public:
  explicit CudaTicket(std::shared_ptr<Context> context) : context_(std::move(context)), event_(context_) {}

  void record(CUstream stream) { FASTSHARD_CUDA(context_->driver(), cuEventRecord, event_.get(), stream); }

  void wait() override {
    const Current current(*context_);
    FASTSHARD_CUDA(context_->driver(), cuEventSynchronize, event_.get());
  }

 private:
  std::shared_ptr<Context> context_;
  Event event_;
};

// One save's copies out of one device.
class CudaStream final : public CopyStream {
 public:
  CudaStream(std::shared_ptr<Context> context, std::shared_ptr<CudaKernels> kernels, std::shared_ptr<Scratch> scratch,
             GatherWay gather_way, CUstream producer)
      : context_(std::move(context)),
        stream_(context_),
        copies_(context_, stream_.get()),
        gathers_(context_, std::move(kernels), std::move(scratch), gather_way, copies_, stream_.get()) {
    const Current current(*context_);
    const Event ready(context_);
    FASTSHARD_CUDA(driver(), cuEventRecord, ready.get(), producer);
    FASTSHARD_CUDA(driver(), cuStreamWaitEvent, stream_.get(), ready.get(), 0);
    gathers_.order_behind(ready);
  }

  std::unique_ptr<Ticket> pack(std::span<const CopyOp> ops, Staging& staging) override {
    const Current current(*context_);
    // Made first: nothing is enqueued unless its completion can be waited for.
    auto ticket = std::make_unique<CudaTicket>(context_);
    try {
      std::vector<CopyOp> gathers;
      for (const CopyOp& op : ops) {
        if (op.source->contiguous() && op.nbytes >= kEngineCopyNbytes) {
          copies_.copy(op.source->data + op.first_byte, op.nbytes, staging.bytes.data() + op.chunk_offset);
        } else {
          gathers.push_back(op);
        }
      }
      if (!gathers.empty()) gathers_.enqueue(gathers, staging);
      ticket->record(stream_.get());
    } catch (...) {
      // Whatever was enqueued must not reach the slot after it has been given away.
      driver().cuStreamSynchronize(stream_.get());
      throw;
    }
    return ticket;
  }

  void add_use(DeviceUse& use) const override { gathers_.add_use(use); }

 private:
  const CudaDriver& driver() const { return context_->driver(); }

  const std::shared_ptr<Context> context_;
  Stream stream_;
  CudaCopies copies_;
  CudaGathers gathers_;
};

class CudaDevice final : public Device {
 public:
  CudaDevice(int ordinal, uint64_t scratch_nbytes, uint64_t slot_nbytes)
      : context_(std::make_shared<Context>(ordinal)),
        scratch_(std::make_shared<Scratch>(context_, scratch_nbytes, slot_nbytes)) {}

  std::unique_ptr<Registration> register_staging(std::span<std::byte> slot) override {
    const Current current(*context_);
    const CUresult result = context_->driver().cuMemHostRegister(
        slot.data(), slot.size(), CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP);
    if (result != CUDA_SUCCESS) return nullptr;
    return std::make_unique<PinnedRegion>(context_, slot.data());
  }

  std::unique_ptr<CopyStream> open(uintptr_t stream) override {
    return std::make_unique<CudaStream>(context_, kernels_, scratch_, gather_way_, reinterpret_cast<CUstream>(stream));
  }

  int numa_node() const override { return numa_node_; }

 private:
  std::shared_ptr<Context> context_;
  std::shared_ptr<CudaKernels> kernels_ = std::make_shared<CudaKernels>();
  std::shared_ptr<Scratch> scratch_;
  const GatherWay gather_way_ = chosen_gather_way();
  const int numa_node_ = node_of_pci_device(context_->pci_address());
};

}  // namespace

std::unique_ptr<Device> make_cuda_device(int ordinal, uint64_t scratch_nbytes, uint64_t slot_nbytes) {
  return std::make_unique<CudaDevice>(ordinal, scratch_nbytes, slot_nbytes);
}

}  // namespace fastshard
