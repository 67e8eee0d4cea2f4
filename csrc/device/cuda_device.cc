// SPDX-License-Identifier: Apache-2.0
// Device over CUDA: the device's primary context (so that torch's pointers and streams are valid), streams for
// each save, and asynchronous copies into page-locked slots.
#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "device/cuda_context.h"
#include "device/cuda_copies.h"
#include "device/cuda_gathers.h"
#include "device/cuda_kernels.h"
#include "device/cuda_refusal.h"
#include "device/cuda_scratch.h"
#include "device/device.h"
#include "device/numa.h"

namespace fastshard {
namespace {

// What one call page-locks at most: drivers refuse very much at once (r580 from 512 GiB on). Where so much is refused,
// smaller parts may not be.
constexpr uint64_t kMostLockedNbytes = uint64_t{64} << 30;
constexpr uint64_t kPartLockedNbytes = 256 << 20;

// One registration after the other, each of `part_nbytes` but the last.
class PinnedRegion final : public Registration {
 public:
  PinnedRegion(std::shared_ptr<Context> context, std::span<std::byte> pages, uint64_t part_nbytes)
      : context_(std::move(context)), pages_(pages), part_nbytes_(part_nbytes) {}
  ~PinnedRegion() override {
    try {
      const Current current(*context_);
      for (uint64_t first = 0; first < locked_nbytes_; first += part_nbytes_) {
        context_->driver().cuMemHostUnregister(pages_.data() + first);
      }
    } catch (const CudaError&) {
      // The context is gone, and what it had page-locked with it.
    }
  }

  // Page-locks it all and returns "", or why that is refused. The context must be current.
  std::string lock() {
    const CudaDriver& driver = context_->driver();
    while (locked_nbytes_ < pages_.size()) {
      const std::span<std::byte> part =
          pages_.subspan(locked_nbytes_, std::min(part_nbytes_, pages_.size() - locked_nbytes_));
      const CUresult result = driver.cuMemHostRegister(part.data(), part.size(),
                                                       CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP);
      if (result != CUDA_SUCCESS) return describe_refusal(driver, result, "cuMemHostRegister");
      locked_nbytes_ += part.size();
    }
    return "";
  }

  const std::byte* base_of(const std::byte* address) const override {
    return address - static_cast<uint64_t>(address - pages_.data()) % part_nbytes_;
  }
  uint64_t part_nbytes() const override { return part_nbytes_ < pages_.size() ? part_nbytes_ : 0; }

 private:
  const std::shared_ptr<Context> context_;
  const std::span<std::byte> pages_;
  const uint64_t part_nbytes_;
  uint64_t locked_nbytes_ = 0;
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

  PageLocking page_lock(std::span<std::byte> pages) override {
    const Current current(*context_);
    PageLocking locking = page_lock_in_parts(pages, kMostLockedNbytes);
    const bool retry = locking.registration == nullptr && pages.size() > kPartLockedNbytes;
    return retry ? page_lock_in_parts(pages, kPartLockedNbytes) : std::move(locking);
  }

  std::unique_ptr<CopyStream> open(uintptr_t stream) override {
    return std::make_unique<CudaStream>(context_, kernels_, scratch_, gather_way_, reinterpret_cast<CUstream>(stream));
  }

  int numa_node() const override { return numa_node_; }

  void warm_up() override {
    const Current current(*context_);
    if (gather_way_ == GatherWay::pitched || kernels_->pack(context_) == nullptr) return;
    if (gather_way_ == GatherWay::automatic) scratch_->fill();
  }

 private:
  PageLocking page_lock_in_parts(std::span<std::byte> pages, uint64_t part_nbytes) {
    auto region = std::make_unique<PinnedRegion>(context_, pages, part_nbytes);
    std::string refused = region->lock();
    if (!refused.empty()) return {nullptr, std::move(refused)};
    return {std::move(region), ""};
  }

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
