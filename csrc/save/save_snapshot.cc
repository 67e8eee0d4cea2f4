// SPDX-License-Identifier: Apache-2.0
// How streams wait for a save without stopping the host.
//
// All copies out of devices are enqueued before the save begins, and events are recorded behind them: a stream is held
// by such an event, and by nothing that the host has yet to do. So it goes on whatever becomes of the save, of its
// process's threads, or of the memory that is allocated and freed meanwhile. A flag that the host sets later
// (cuStreamWaitValue32) would not do. A call that waits for the device keeps others out of the driver until then, so
// whoever frees memory behind the flag would keep this save from enqueuing what the flag waits for; and the driver,
// which does not see that order, may put copies behind the flag into one queue.
#include <ranges>
#include <utility>

#include "save/save.h"

namespace fastshard {

void Save::enqueue() {
  std::string refusal;
  for (const auto& writer : writers_) {
    if (std::string refused = writer->enqueue(early_scratch_); refusal.empty()) refusal = std::move(refused);
  }
  std::map<int, std::shared_ptr<const Mark>> marks;
  if (refusal.empty()) {
    for (const auto& [ordinal, stream] : streams_) marks.emplace(ordinal, stream->mark());
  }
  const std::lock_guard lock(mutex_);
  marks_ = std::move(marks);
  not_enqueued_ = std::move(refusal);
}

std::vector<int> Save::devices() const {
  const auto ordinals = std::views::keys(resources_.devices);
  return {ordinals.begin(), ordinals.end()};
}

std::optional<std::string> Save::hold_stream(int ordinal, uintptr_t stream) {
  std::map<int, std::shared_ptr<const Mark>> marks;
  {
    const std::lock_guard lock(mutex_);
    if (read_ || finished_) return std::nullopt;
    if (marks_.empty()) return not_enqueued_;
    marks = marks_;
  }
  const auto own = marks.find(ordinal);
  if (own == marks.end()) return "the save reads nothing on device " + std::to_string(ordinal);
  for (uint64_t left; (left = progress_.unpacked) != 0;) progress_.unpacked.wait(left);
  for (const auto& [other, mark] : marks) own->second->hold(stream, *mark);
  return std::nullopt;
}

}  // namespace fastshard
