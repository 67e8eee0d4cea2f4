// SPDX-License-Identifier: Apache-2.0
// Device over CUDA: the device's primary context (so that torch's pointers and streams are valid), streams for
// each save, and asynchronous copies into page-locked slots.
#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "device/cuda_context.h"
#include "device/cuda_copies.h"
#include "device/cuda_gathers.h"
#include "device/cuda_kernels.h"
#include "device/cuda_link.h"
#include "device/cuda_refusal.h"
#include "device/cuda_scratch.h"
#include "device/cuda_streams.h"
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
  CudaTicket(std::shared_ptr<const ChunkWork> work, std::shared_ptr<DeviceLink> link)
      : work_(std::move(work)), link_(std::move(link)) {}
  ~CudaTicket() override { leave(); }

  void wait() override {
    try {
      work_->wait();
    } catch (...) {
      leave();
      throw;
    }
    leave();
  }

  // Blocks until the link has a place for a part, which the ticket then holds.
  void enter(Part part, uint64_t nbytes) {
    if (nbytes != 0) passages_[static_cast<size_t>(part)] = link_->enter(part, nbytes);
  }
  void enqueued() {
    for (const auto& passage : passages_) {
      if (passage != nullptr) link_->enqueued(*passage, work_);
    }
  }

 private:
  void leave() noexcept {
    for (const auto& passage : passages_) {
      if (passage != nullptr) link_->leave(*passage);
    }
  }

  const std::shared_ptr<const ChunkWork> work_;
  const std::shared_ptr<DeviceLink> link_;
  std::array<std::shared_ptr<DeviceLink::Passage>, kParts> passages_;
};

class CudaMark final : public Mark {
 public:
  CudaMark(std::shared_ptr<Context> context, std::vector<std::unique_ptr<Event>> events)
      : context_(std::move(context)), events_(std::move(events)) {}

  void hold(uintptr_t stream, const Mark& other) const override {
    const Current current(*context_);
    for (const auto& event : static_cast<const CudaMark&>(other).events_) {  // no other device makes marks
      FASTSHARD_CUDA(context_->driver(), cuStreamWaitEvent, reinterpret_cast<CUstream>(stream), event->get(), 0);
    }
  }

 private:
  const std::shared_ptr<Context> context_;
  const std::vector<std::unique_ptr<Event>> events_;
};

// One save's copies out of one device.
class CudaStream final : public CopyStream {
 public:
  CudaStream(std::shared_ptr<Context> context, std::shared_ptr<CudaKernels> kernels, std::shared_ptr<Scratch> scratch,
             std::shared_ptr<DeviceLink> link, GatherWay gather_way, CUstream producer)
      : context_(std::move(context)),
        link_(std::move(link)),
        gather_way_(gather_way),
        streams_(context_, producer),
        gathers_(context_, std::move(kernels), std::move(scratch), gather_way) {}

  std::unique_ptr<Ticket> pack(std::span<const CopyOp> ops, Staging& staging) override {
    const Current current(*context_);
    ChunkParts parts = parts_of(ops, context_->ordinal(), gather_way_);
    auto work = std::make_shared<ChunkWork>(streams_);
    auto ticket = std::make_unique<CudaTicket>(work, link_);
    if (!staging.in_target) {
      const auto [copied, packed] = parts.nbytes();
      ticket->enter(Part::packed, packed);
      ticket->enter(Part::copied, copied);
    }
    try {
      for (const CopyOp& op : parts.copied) {
        CudaCopies(context_->driver(), work->on(Work::copying)).gather(op, staging);
      }
      if (!parts.gathered.empty()) gathers_.enqueue(parts.gathered, staging, *work);
      work->record();
    } catch (...) {
      work->abandon();  // what was enqueued must not reach the slot after it has been given away
      throw;
    }
    ticket->enqueued();
    return ticket;
  }

  PackNeeds needs(std::span<const CopyOp> ops) override {
    const Current current(*context_);
    const std::vector<CopyOp> gathered = parts_of(ops, context_->ordinal(), gather_way_).gathered;
    const bool casts = std::ranges::any_of(gathered, [](const CopyOp& op) { return op.source->cast(); });
    return {.scratch = !gathered.empty(), .waiting = casts && !gathers_.by_kernel()};
  }

  std::shared_ptr<const Mark> mark() override {
    const Current current(*context_);
    return std::make_shared<CudaMark>(context_, streams_.mark());
  }

  void add_use(DeviceUse& use) const override { gathers_.add_use(use); }

 private:
  const std::shared_ptr<Context> context_;
  const std::shared_ptr<DeviceLink> link_;
  const GatherWay gather_way_;
  SaveStreams streams_;
  CudaGathers gathers_;
};

class CudaDevice final : public Device {
 public:
  CudaDevice(int ordinal, uint64_t scratch_nbytes)
      : context_(std::make_shared<Context>(ordinal)), scratch_(std::make_shared<Scratch>(context_, scratch_nbytes)) {}

  PageLocking page_lock(std::span<std::byte> pages) override {
    const Current current(*context_);
    PageLocking locking = page_lock_in_parts(pages, kMostLockedNbytes);
    const bool retry = locking.registration == nullptr && pages.size() > kPartLockedNbytes;
    return retry ? page_lock_in_parts(pages, kPartLockedNbytes) : std::move(locking);
  }

  std::unique_ptr<CopyStream> open(uintptr_t stream) override {
    return std::make_unique<CudaStream>(context_, kernels_, scratch_, link_, gather_way_,
                                        reinterpret_cast<CUstream>(stream));
  }

  bool link_full(std::span<const CopyOp> ops) override { return link_->full(link_nbytes(ops)); }
  void await_link(std::span<const CopyOp> ops) override { link_->await(link_nbytes(ops)); }

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

  PartNbytes link_nbytes(std::span<const CopyOp> ops) const {
    return parts_of(ops, context_->ordinal(), gather_way_).nbytes();
  }

  std::shared_ptr<Context> context_;
  std::shared_ptr<CudaKernels> kernels_ = std::make_shared<CudaKernels>();
  std::shared_ptr<Scratch> scratch_;
  std::shared_ptr<DeviceLink> link_ = std::make_shared<DeviceLink>();
  const GatherWay gather_way_ = chosen_gather_way();
  const int numa_node_ = node_of_pci_device(context_->pci_address());
};

}  // namespace

std::unique_ptr<Device> make_cuda_device(int ordinal, uint64_t scratch_nbytes) {
  return std::make_unique<CudaDevice>(ordinal, scratch_nbytes);
}

}  // namespace fastshard
