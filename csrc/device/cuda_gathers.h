// SPDX-License-Identifier: Apache-2.0
// Gathers of strided, cast and small tensors: the kernel packs them in device memory, from where they are copied, or it
// stores them over the link, or they are copied piece by piece.
#pragma once

#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "device/cuda_context.h"
#include "device/cuda_copies.h"
#include "device/cuda_kernels.h"
#include "device/cuda_link.h"
#include "device/cuda_scratch.h"
#include "device/cuda_streams.h"
#include "device/device.h"

namespace fastshard {

// The way that gathers take. For benchmarks, $FASTSHARD_GATHER chooses another one than the engine would.
enum class GatherWay {
  automatic,  // through device scratch; without any: long rows by the copy engine, the others by the kernel
  link,       // by the kernel, over the link
  pitched,    // by the copy engine
};
GatherWay chosen_gather_way();

// The ops of a chunk on one device: what is copied out of the tensors piece by piece, and what is gathered.
struct ChunkParts {
  std::vector<CopyOp> copied, gathered;

  PartNbytes nbytes() const;
};
ChunkParts parts_of(std::span<const CopyOp> ops, int ordinal, GatherWay way);

// One save's gathers out of one device. The packing of a chunk overlaps the copy of the one before. The context must be
// current. Thread-safe.
class CudaGathers {
 public:
  CudaGathers(std::shared_ptr<Context> context, std::shared_ptr<CudaKernels> kernels, std::shared_ptr<Scratch> scratch,
              GatherWay way);

  // Enqueues the gathers as part of `work`, which brings them into the staging bytes. Changes `gathers` on the way.
  void enqueue(std::vector<CopyOp>& gathers, Staging& staging, ChunkWork& work);
  // Whether the kernel does it. Without it, the CPU casts, and waits for what it casts.
  bool by_kernel() const { return way_ != GatherWay::pitched && kernels_->pack(context_) != nullptr; }
  void add_use(DeviceUse& use) const;

 private:
  class Ranges;

  bool gather_through_scratch(CUfunction kernel, std::vector<CopyOp>& gathers, Staging& staging, ChunkWork& work);
  size_t fill_and_drain(CUfunction kernel, std::vector<CopyOp>& gathers, size_t next, Scratch::Block& block,
                        Staging& staging, ChunkWork& work);
  size_t fill(std::vector<CopyOp>& gathers, size_t next, uint32_t begin, PackTable& table, Ranges& packed,
              const Staging& staging, ChunkWork& work);
  void note(const std::string& fallback);
  void gather_over_link(CUfunction kernel, const std::vector<CopyOp>& gathers, Staging& staging, ChunkWork& work);
  void gather_by_copies(std::span<const CopyOp> gathers, const Staging& staging, ChunkWork& work);
  const CudaDriver& driver() const { return context_->driver(); }

  const std::shared_ptr<Context> context_;
  const std::shared_ptr<CudaKernels> kernels_;
  const std::shared_ptr<Scratch> scratch_;
  const GatherWay way_;
  mutable std::mutex mutex_;
  bool kernel_used_ = false;
  std::set<CUdeviceptr> blocks_used_;
  std::set<std::string> fallbacks_;
};

}  // namespace fastshard
