// SPDX-License-Identifier: Apache-2.0
#include "device/cuda_link.h"

#include <algorithm>
#include <iterator>
#include <utility>
#include <vector>

namespace fastshard {
namespace {

constexpr std::array kAllParts = {Part::packed, Part::copied};  // in the order in which they are entered

uint64_t of(const PartNbytes& nbytes, Part part) { return nbytes[static_cast<size_t>(part)]; }

}  // namespace

std::shared_ptr<DeviceLink::Passage> DeviceLink::enter(Part part, uint64_t nbytes) {
  auto passage = std::make_shared<Passage>(Passage{part, nbytes});
  std::unique_lock lock(mutex_);
  while (!admits(part, nbytes)) wait_for_one(part, lock);
  passages_.push_back(passage);
  under_way_[static_cast<size_t>(part)] += nbytes;
  return passage;
}

void DeviceLink::await(const PartNbytes& nbytes) {
  std::unique_lock lock(mutex_);
  for (const Part part : kAllParts) {
    while (!admits(part, of(nbytes, part))) wait_for_one(part, lock);
  }
}

// Waits for the oldest to arrive, or, while none is enqueued yet, for any change.
void DeviceLink::wait_for_one(Part part, std::unique_lock<std::mutex>& lock) {
  const auto oldest = std::ranges::find_if(
      passages_, [&](const auto& passage) { return passage->part == part && passage->work != nullptr; });
  if (oldest == passages_.end()) return changed_.wait(lock);
  // NOLINTNEXTLINE(performance-unnecessary-copy-initialization): it may leave the list meanwhile
  const std::shared_ptr<Passage> passage = *oldest;
  const std::shared_ptr<const ChunkWork> work = passage->work;
  lock.unlock();
  work->settle(part);
  leave(*passage);
  lock.lock();
}

void DeviceLink::enqueued(Passage& passage, std::shared_ptr<const ChunkWork> work) {
  const std::lock_guard lock(mutex_);
  passage.work = std::move(work);
  changed_.notify_all();
}

void DeviceLink::leave(Passage& passage) noexcept {
  const std::lock_guard lock(mutex_);
  if (std::exchange(passage.over, true)) return;
  under_way_[static_cast<size_t>(passage.part)] -= passage.nbytes;
  std::erase_if(passages_, [&](const auto& other) { return other.get() == &passage; });
  changed_.notify_all();
}

bool DeviceLink::full(const PartNbytes& nbytes) {
  return std::ranges::any_of(kAllParts, [&](Part part) { return full(part, of(nbytes, part)); });
}

bool DeviceLink::full(Part part, uint64_t nbytes) {
  std::vector<std::shared_ptr<Passage>> enqueued;
  {
    const std::lock_guard lock(mutex_);
    if (admits(part, nbytes)) return false;
    std::ranges::copy_if(passages_, std::back_inserter(enqueued),
                         [&](const auto& passage) { return passage->part == part && passage->work != nullptr; });
  }
  for (const auto& passage : enqueued) {
    if (passage->work->over(part)) leave(*passage);
  }
  const std::lock_guard lock(mutex_);
  return !admits(part, nbytes);
}

}  // namespace fastshard
