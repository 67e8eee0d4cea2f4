// SPDX-License-Identifier: Apache-2.0
#include "device/cuda_gathers.h"

#include <algorithm>
#include <cstdlib>
#include <string>
#include <utility>

namespace fastshard {
namespace {

// Without device scratch: the copy engine takes rows of at least this many bytes, where they have enough together.
constexpr uint64_t kPitchedRunNbytes = 4096;
// Blocks of a launch that stores over the link: enough to fill it, few enough to leave the device to the running job.
constexpr unsigned kMaxLinkBlocks = 64;
// Blocks on each multiprocessor of a launch that stores to device memory: as many as fit at once.
constexpr unsigned kScratchBlocks = 2;
// More copies out of scratch, and small ones, cost more than stores over the link.
constexpr uint64_t kManyPieces = 16;
// Fewer pieces of contiguous memory than this are copied one by one: a launch may have to wait until the running job
// leaves it a multiprocessor.
constexpr size_t kFewPieces = 32;

// Room for the tables of the kernel. What is left in the scratch beside them is for casts that the kernel cannot do.
uint64_t table_capacity(const Staging& staging) {
  return staging.scratch.size() > kCastNbytes ? staging.scratch.size() - kCastNbytes : 0;
}

// Whether other things lie between most of them in the slot: each piece would be a copy of its own.
bool scattered(const std::vector<CopyOp>& gathers) {
  uint64_t pieces = 1;
  uint64_t nbytes = gathers[0].nbytes;
  for (size_t i = 1; i < gathers.size(); ++i) {
    pieces += gathers[i - 1].chunk_offset + gathers[i - 1].nbytes != gathers[i].chunk_offset;
    nbytes += gathers[i].nbytes;
  }
  return pieces >= kManyPieces && nbytes / pieces < kEngineCopyNbytes;
}

bool few_and_contiguous(const std::vector<CopyOp>& gathers) {
  return gathers.size() < kFewPieces &&
         std::ranges::all_of(gathers, [](const CopyOp& op) { return op.source->contiguous(); });
}

bool long_rows(const TensorView& view) {
  return !view.cast() && !view.contiguous() && view.run_nbytes >= kPitchedRunNbytes &&
         view.run_nbytes * static_cast<uint64_t>(view.shape[view.ndim - 1]) >= kEngineCopyNbytes;
}

// Takes the first `nbytes` off an op.
void advance(CopyOp& op, uint64_t nbytes) {
  op.chunk_offset += static_cast<uint32_t>(nbytes);
  op.first_byte += nbytes;
  op.nbytes -= nbytes;
}

}  // namespace

// Ranges of a slot, in their order; neighbours count as one.
class CudaGathers::Ranges {
 public:
  void add(uint64_t first, uint64_t nbytes) {
    if (!ranges_.empty() && ranges_.back().second == first) {
      ranges_.back().second += nbytes;
    } else {
      ranges_.emplace_back(first, first + nbytes);
    }
  }
  auto begin() const { return ranges_.begin(); }
  auto end() const { return ranges_.end(); }

 private:
  std::vector<std::pair<uint64_t, uint64_t>> ranges_;  // (first, behind the last)
};

GatherWay chosen_gather_way() {
  const char* const chosen = std::getenv("FASTSHARD_GATHER");
  const std::string name = chosen == nullptr ? "" : chosen;
  return name == "link" ? GatherWay::link : name == "pitched" ? GatherWay::pitched : GatherWay::automatic;
}

PartNbytes ChunkParts::nbytes() const {
  const auto total = [](const std::vector<CopyOp>& ops) {
    uint64_t nbytes = 0;
    for (const CopyOp& op : ops) nbytes += op.nbytes;
    return nbytes;
  };
  return {total(copied), total(gathered)};
}

ChunkParts parts_of(std::span<const CopyOp> ops, int ordinal, GatherWay way) {
  ChunkParts parts;
  for (const CopyOp& op : ops) {
    if (op.source->device != ordinal) continue;
    const bool large = op.source->contiguous() && op.nbytes >= kEngineCopyNbytes;
    (large ? parts.copied : parts.gathered).push_back(op);
  }
  if (way == GatherWay::automatic && few_and_contiguous(parts.gathered)) {
    parts.copied.insert(parts.copied.end(), parts.gathered.begin(), parts.gathered.end());
    parts.gathered.clear();
  }
  return parts;
}

CudaGathers::CudaGathers(std::shared_ptr<Context> context, std::shared_ptr<CudaKernels> kernels,
                         std::shared_ptr<Scratch> scratch, GatherWay way)
    : context_(std::move(context)), kernels_(std::move(kernels)), scratch_(std::move(scratch)), way_(way) {
  scratch_->ask_again();
}

void CudaGathers::enqueue(std::vector<CopyOp>& gathers, Staging& staging, ChunkWork& work) {
  staging.lock_scratch();
  const CUfunction kernel = way_ == GatherWay::pitched ? nullptr : kernels_->pack(context_);
  const CUdeviceptr tables = device_address(*context_, staging.scratch.data(), staging.scratch_base);
  if (kernel == nullptr && way_ != GatherWay::pitched) note(kernels_->refusal() + ": gathered by pitched copies");
  if (kernel != nullptr && tables == 0 && staging.scratch_base != nullptr) {
    note("no device address of page-locked memory: gathered by pitched copies");
  }
  if (kernel == nullptr || tables == 0) return gather_by_copies(gathers, staging, work);
  {
    const std::lock_guard lock(mutex_);
    kernel_used_ = true;
  }
  const bool through_scratch = way_ == GatherWay::automatic && scratch_->enabled() && !scattered(gathers);
  if (through_scratch && gather_through_scratch(kernel, gathers, staging, work)) return;
  gather_over_link(kernel, gathers, staging, work);
}

void CudaGathers::add_use(DeviceUse& use) const {
  const std::lock_guard lock(mutex_);
  if (kernel_used_) use.scratch_nbytes += kDeviceUnitNbytes;
  use.scratch_nbytes += blocks_used_.size() * scratch_->block_nbytes();
  use.fallbacks.insert(use.fallbacks.end(), fallbacks_.begin(), fallbacks_.end());
}

void CudaGathers::note(const std::string& fallback) {
  const std::lock_guard lock(mutex_);
  fallbacks_.insert(fallback);
}

void CudaGathers::gather_by_copies(std::span<const CopyOp> gathers, const Staging& staging, ChunkWork& work) {
  if (gathers.empty()) return;
  CudaCopies copies(driver(), work.on(Work::copying));
  for (const CopyOp& op : gathers) copies.gather(op, staging);
}

// A block of device memory after the other: packed by the kernel, copied by the copy engine. False when there is
// no device memory; `gathers` then is what is left to do.
bool CudaGathers::gather_through_scratch(CUfunction kernel, std::vector<CopyOp>& gathers, Staging& staging,
                                         ChunkWork& work) {
  size_t next = 0;
  while (next < gathers.size()) {
    Scratch::Lease block = scratch_->acquire();
    if (!block) {
      gathers.erase(gathers.begin(), gathers.begin() + static_cast<std::ptrdiff_t>(next));
      note("no device memory for scratch: gathered over the link");
      return false;
    }
    {
      const std::lock_guard lock(mutex_);
      blocks_used_.insert(block->memory);
    }
    try {
      next = fill_and_drain(kernel, gathers, next, *block.operator->(), staging, work);
    } catch (...) {
      work.abandon();  // nothing may reach the block once it has been given back
      throw;
    }
  }
  return true;
}

// Packs as many of the gathers from `next` on as the block holds, and copies them out of it. Returns the first that is
// not done, of which a part may be.
size_t CudaGathers::fill_and_drain(CUfunction kernel, std::vector<CopyOp>& gathers, size_t next, Scratch::Block& block,
                                   Staging& staging, ChunkWork& work) {
  // The block is the image of a part of the slot, with the same place between multiples of 16 bytes.
  const uint32_t begin = gathers[next].chunk_offset / 16 * 16;
  PackTable table(table_capacity(staging), 0);
  Ranges packed;
  next = fill(gathers, next, begin, table, packed, staging, work);
  if (table.empty()) return next;
  const CUstream packing = work.on(Work::packing);
  const CUstream draining = work.on(Work::draining);
  FASTSHARD_CUDA(driver(), cuStreamWaitEvent, packing, block.drained.get(), 0);
  launch_pack(*context_, kernel, packing, table, block.memory, kScratchBlocks * context_->processors(), staging);
  FASTSHARD_CUDA(driver(), cuEventRecord, block.packed.get(), packing);
  FASTSHARD_CUDA(driver(), cuStreamWaitEvent, draining, block.packed.get(), 0);
  CudaCopies copies(driver(), draining);
  for (const auto& [first, last] : packed) {
    const auto* const image = reinterpret_cast<const std::byte*>(block.memory + first - begin);
    copies.copy(image, last - first, staging.bytes.data() + first);
  }
  FASTSHARD_CUDA(driver(), cuEventRecord, block.drained.get(), draining);
  return next;
}

// Puts the gathers from `next` on that lie in a block's length behind `begin` of the slot into the table, and what the
// table does not take into copies. Returns the first that is not done.
size_t CudaGathers::fill(std::vector<CopyOp>& gathers, size_t next, uint32_t begin, PackTable& table, Ranges& packed,
                         const Staging& staging, ChunkWork& work) {
  const uint64_t end = begin + scratch_->block_nbytes();
  while (next < gathers.size()) {
    CopyOp& op = gathers[next];
    uint64_t take = op.chunk_offset < end ? std::min(op.nbytes, end - op.chunk_offset) : 0;
    if (op.source->cast()) take -= take % itemsize(op.source->to);
    if (take == 0) break;
    if (table.add(*op.source, op.first_byte, take, op.chunk_offset - begin)) {
      packed.add(op.chunk_offset, take);
    } else {
      const CopyOp piece{op.source, op.item, op.chunk_offset, op.first_byte, take};
      gather_by_copies({&piece, 1}, staging, work);
    }
    advance(op, take);
    if (op.nbytes == 0) ++next;
  }
  return next;
}

// One launch that stores into the slot itself. Long rows are left to the copy engine.
void CudaGathers::gather_over_link(CUfunction kernel, const std::vector<CopyOp>& gathers, Staging& staging,
                                   ChunkWork& work) {
  const CUdeviceptr slot = device_address(*context_, staging.bytes.data(), staging.bytes_base);
  PackTable table(table_capacity(staging), slot);
  std::vector<CopyOp> others;
  for (const CopyOp& op : gathers) {
    const bool rows = way_ != GatherWay::link && long_rows(*op.source);
    if (slot == 0 || rows || !table.add(*op.source, op.first_byte, op.nbytes, op.chunk_offset)) others.push_back(op);
  }
  if (!table.empty()) launch_pack(*context_, kernel, work.on(Work::packing), table, slot, kMaxLinkBlocks, staging);
  gather_by_copies(others, staging, work);
}

}  // namespace fastshard
