// SPDX-License-Identifier: Apache-2.0
// The streams of a save on one device, and what a chunk has enqueued on them.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "device/cuda_context.h"

namespace fastshard {

// What has a stream of its own: copies out of tensors never wait for a kernel, which waits for the multiprocessors of
// the running job. Only the copies of what the kernel has packed do.
enum class Work : size_t { copying, packing, draining };
inline constexpr size_t kWorks = 3;

// The parts of a chunk whose bytes are counted and waited for apart.
enum class Part : size_t { copied, packed };
inline constexpr size_t kParts = 2;

// Each stream is made when it is first asked for: a device has few queues, which all streams of the process share.
// Thread-safe.
class SaveStreams {
 public:
  // What is enqueued on the caller's stream `producer` now comes before all that is enqueued on these.
  SaveStreams(std::shared_ptr<Context> context, CUstream producer);
  ~SaveStreams();
  SaveStreams(const SaveStreams&) = delete;
  SaveStreams& operator=(const SaveStreams&) = delete;

  // The context must be current, as for mark().
  CUstream get(Work work);
  // Events behind all that reads tensors.
  std::vector<std::unique_ptr<Event>> mark() const;
  const std::shared_ptr<Context>& context() const { return context_; }

 private:
  const std::shared_ptr<Context> context_;
  std::unique_ptr<Event> ready_;
  std::array<std::atomic<Stream*>, kWorks> made_ = {};
};

// What one pack() enqueues. One thread enqueues; when it has called record(), any may wait.
class ChunkWork {
 public:
  explicit ChunkWork(SaveStreams& streams) : streams_(streams), context_(streams.context()) {}

  // The stream to enqueue that kind of work on, where an event has been made that will be waited for: nothing is
  // enqueued unless its completion can be told. The context must be current, as for record().
  CUstream on(Work work);
  // Puts the events behind what was enqueued.
  void record();
  // Blocks until all of it is done, also where some has failed; throws what it failed with first.
  void wait() const;
  // Blocks until that part is done or has failed; of a chunk that has something packed, that part is all of it.
  void settle(Part part) const noexcept;
  // Whether settle() would not block.
  bool over(Part part) const noexcept;
  // Where not all could be enqueued or recorded: blocks until nothing of it is under way. The save has not ended.
  void abandon() const noexcept;

 private:
  struct Mark {
    Mark(CUstream on, std::shared_ptr<Context> context) : stream(on), event(std::move(context)) {}
    CUstream stream;
    Event event;
  };
  // Those of the part: the copies out of tensors come first.
  std::span<const std::optional<Mark>> marks_of(Part part) const {
    return std::span(marks_).first(part == Part::copied ? 1 : kWorks);
  }
  const CudaDriver& driver() const { return context_->driver(); }

  SaveStreams& streams_;
  const std::shared_ptr<Context> context_;
  std::array<std::optional<Mark>, kWorks> marks_;
};

}  // namespace fastshard
