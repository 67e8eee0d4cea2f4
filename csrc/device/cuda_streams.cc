// SPDX-License-Identifier: Apache-2.0
#include "device/cuda_streams.h"

#include <algorithm>
#include <utility>

namespace fastshard {

SaveStreams::SaveStreams(std::shared_ptr<Context> context, CUstream producer) : context_(std::move(context)) {
  const Current current(*context_);
  ready_ = std::make_unique<Event>(context_);
  FASTSHARD_CUDA(context_->driver(), cuEventRecord, ready_->get(), producer);
}

SaveStreams::~SaveStreams() {
  for (const auto& stream : made_) delete stream.load();
}

// Without a lock, which would be held across calls of the driver: of two threads that make the stream at once, one
// takes the other's.
CUstream SaveStreams::get(Work work) {
  std::atomic<Stream*>& made = made_[static_cast<size_t>(work)];
  if (const Stream* const stream = made.load()) return stream->get();
  auto stream = std::make_unique<Stream>(context_, work == Work::packing ? Priority::highest : Priority::ordinary);
  FASTSHARD_CUDA(context_->driver(), cuStreamWaitEvent, stream->get(), ready_->get(), 0);
  Stream* other = nullptr;
  return made.compare_exchange_strong(other, stream.get()) ? stream.release()->get() : other->get();
}

// What has been packed is read no more.
std::vector<std::unique_ptr<Event>> SaveStreams::mark() const {
  std::vector<std::unique_ptr<Event>> events;
  for (const Work work : {Work::copying, Work::packing}) {
    const Stream* const stream = made_[static_cast<size_t>(work)];
    if (stream == nullptr) continue;
    events.push_back(std::make_unique<Event>(context_));
    FASTSHARD_CUDA(context_->driver(), cuEventRecord, events.back()->get(), stream->get());
  }
  return events;
}

CUstream ChunkWork::on(Work work) {
  std::optional<Mark>& mark = marks_[static_cast<size_t>(work)];
  if (!mark) mark.emplace(streams_.get(work), context_);
  return mark->stream;
}

void ChunkWork::record() {
  for (const auto& mark : marks_) {
    if (mark) FASTSHARD_CUDA(driver(), cuEventRecord, mark->event.get(), mark->stream);
  }
}

void ChunkWork::wait() const {
  const Current current(*context_);
  CUresult first = CUDA_SUCCESS;
  for (const auto& mark : marks_) {
    const CUresult result = mark ? driver().cuEventSynchronize(mark->event.get()) : CUDA_SUCCESS;
    if (first == CUDA_SUCCESS) first = result;
  }
  if (first == CUDA_SUCCESS) return;
  abandon();  // an event that cannot be waited for says nothing of the work before it
  driver().check(first, "cuEventSynchronize");
}

void ChunkWork::settle(Part part) const noexcept {
  try {
    const Current current(*context_);
    for (const auto& mark : marks_of(part)) {
      if (mark) driver().cuEventSynchronize(mark->event.get());
    }
  } catch (const CudaError&) {
    // The context is gone, and the work with it.
  }
}

bool ChunkWork::over(Part part) const noexcept {
  try {
    const Current current(*context_);
    return std::ranges::none_of(marks_of(part), [&](const auto& mark) {
      return mark && driver().cuEventQuery(mark->event.get()) == CUDA_ERROR_NOT_READY;
    });
  } catch (const CudaError&) {
    return true;  // as above
  }
}

void ChunkWork::abandon() const noexcept {
  try {
    const Current current(*context_);
    for (const auto& mark : marks_) {
      if (mark) driver().cuStreamSynchronize(mark->stream);
    }
  } catch (const CudaError&) {
    // As above.
  }
}

}  // namespace fastshard
