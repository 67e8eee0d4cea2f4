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
#include "device/cuda_scratch.h"
#include "device/device.h"

namespace fastshard {

// The way that gathers take. For benchmarks, $FASTSHARD_GATHER chooses another one than the engine would.
enum class GatherWay {
  automatic,  // through device scratch; without any: long rows by the copy engine, the others by the kernel
  link,       // by the kernel, over the link
  pitched,    // by the copy engine
};
GatherWay chosen_gather_way();

// One save's gathers out of one device. They are packed on a stream of their own and copied on the save's, so that the
// packing of a chunk overlaps the copy of the one before. The context must be current. Thread-safe.
class CudaGathers {
 public:
  // `copies` are enqueued on `stream`; both outlive this.
  CudaGathers(std::shared_ptr<Context> context, std::shared_ptr<CudaKernels> kernels, std::shared_ptr<Scratch> scratch,
              GatherWay way, CudaCopies& copies, CUstream stream);

  // Nothing is packed before `ready`. Called once, before the first enqueue().
  void order_behind(const Event& ready);
  // Enqueues the gathers; on the save's stream they are complete in the staging bytes. Changes `gathers` on the way.
  // After an exception some may be under way on that stream.
  void enqueue(std::vector<CopyOp>& gathers, Staging& staging);
  void add_use(DeviceUse& use) const;

 private:
  class Ranges;

  bool gather_through_scratch(CUfunction kernel, std::vector<CopyOp>& gathers, Staging& staging);
  size_t fill_and_drain(CUfunction kernel, std::vector<CopyOp>& gathers, size_t next, Scratch::Block& block,
                        Staging& staging);
  size_t fill(std::vector<CopyOp>& gathers, size_t next, uint32_t begin, PackTable& table, Ranges& packed,
              const Staging& staging);
  void note(const std::string& fallback);
  void gather_over_link(CUfunction kernel, const std::vector<CopyOp>& gathers, Staging& staging);
  const CudaDriver& driver() const { return context_->driver(); }

  const std::shared_ptr<Context> context_;
  const std::shared_ptr<CudaKernels> kernels_;
  const std::shared_ptr<Scratch> scratch_;
  const GatherWay way_;
  CudaCopies& copies_;
  const CUstream stream_;
  std::unique_ptr<Stream> pack_stream_;  // with scratch
  mutable std::mutex mutex_;
  std::set<CUdeviceptr> blocks_used_;
  std::set<std::string> fallbacks_;
};

}  // namespace fastshard
