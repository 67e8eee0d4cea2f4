// SPDX-License-Identifier: Apache-2.0
// How much of what is staged may be on its way over a device's link at once. Copy engines serve their copies in turn
// and know no priorities, so what is under way is what the next copy of the running job waits for.
#pragma once

#include <array>
#include <condition_variable>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>

#include "device/cuda_streams.h"

namespace fastshard {

// Of each part of the chunks. At 50 GB/s it keeps a job's copy waiting for 0.17 ms, and two chunks overlap in it.
inline constexpr uint64_t kMaxLinkNbytes = 8 << 20;

// Bytes of a chunk, by parts.
using PartNbytes = std::array<uint64_t, kParts>;

// Of one device, shared by all saves of an engine. What is packed is counted apart, from before its kernel runs, so
// that a kernel that has to wait for the running job holds up no copy of anything else. Whoever waits for a place holds
// none that is not enqueued, but for one of what is packed, and those who wait for one of these hold none at all; so
// waiting ends. Thread-safe.
class DeviceLink {
 public:
  // The bytes of one part of a chunk, from before they are enqueued until they have arrived.
  struct Passage {
    Part part;
    uint64_t nbytes;
    std::shared_ptr<const ChunkWork> work{};  // null while it is being enqueued
    bool over = false;
  };

  // Blocks until there is a place for `nbytes`, which is then taken. A link with nothing under way has one for any
  // number. A thread enters with what is packed first.
  std::shared_ptr<Passage> enter(Part part, uint64_t nbytes);
  // All of the chunk's work has been enqueued and recorded.
  void enqueued(Passage& passage, std::shared_ptr<const ChunkWork> work);
  // Nothing of it is under way any more. Calls after the first change nothing.
  void leave(Passage& passage) noexcept;
  // Whether enter() would block for a part, and until it would for none.
  bool full(const PartNbytes& nbytes);
  void await(const PartNbytes& nbytes);

 private:
  bool admits(Part part, uint64_t nbytes) const {
    const uint64_t under_way = under_way_[static_cast<size_t>(part)];
    return nbytes == 0 || under_way == 0 || under_way + nbytes <= kMaxLinkNbytes;
  }
  void wait_for_one(Part part, std::unique_lock<std::mutex>& lock);
  bool full(Part part, uint64_t nbytes);

  std::mutex mutex_;  // never held across a call of the driver
  std::condition_variable changed_;
  PartNbytes under_way_ = {};
  std::list<std::shared_ptr<Passage>> passages_;  // the oldest first
};

}  // namespace fastshard
