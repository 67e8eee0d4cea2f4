// SPDX-License-Identifier: Apache-2.0
// The staging buffers of an engine: a fixed number of page-aligned slots, leased one at a time. Waiting for
// a slot is the only back-pressure in the pipeline, and it bounds the memory of every save.
#pragma once

#include <sys/types.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "device/device.h"

namespace fastshard {

// Thread-safe. Slots must not outlive their ring. A forked child, in which its threads are missing, may only destroy
// it; that touches neither the parent's memory nor its driver.
class Ring {
  struct Block {
    std::span<std::byte> memory;
    int node = -1;  // of its memory, if one was asked for
    bool locking_tried = false;
    PageLocking locking = {};
  };

 public:
  // Move-only lease of one slot; the destructor gives it back.
  class Slot {
   public:
    Slot(Ring* ring, Block* block, bool is_spare = false) : ring_(ring), block_(block), is_spare_(is_spare) {}
    Slot(Slot&& other) noexcept
        : ring_(other.ring_), block_(std::exchange(other.block_, nullptr)), is_spare_(other.is_spare_) {}
    Slot& operator=(Slot&&) = delete;
    ~Slot() {
      if (block_ != nullptr) ring_->release(block_, is_spare_);
    }

    std::span<std::byte> bytes() const { return block_->memory.first(ring_->slot_nbytes_); }
    std::span<std::byte> scratch() const { return block_->memory.subspan(ring_->slot_nbytes_); }
    // Both of them together, for a chunk that is not staged in the slot.
    std::span<std::byte> all() const { return block_->memory; }

    // Page-locks the slot for the copy engines of all devices, once in its life.
    void pin(Device& device);
    bool pinned() const { return block_->locking.registration != nullptr; }
    // Registration::base_of() the slot; null if it is pageable.
    const std::byte* base() const {
      return pinned() ? block_->locking.registration->base_of(block_->memory.data()) : nullptr;
    }
    // Why the driver has not page-locked it; empty if it has, or was not asked.
    const std::string& refusal() const { return block_->locking.refusal; }

   private:
    Ring* ring_;
    Block* block_;
    const bool is_spare_;
  };

  // A writer at work. It holds at most its share of the slots, so that no other writer is without one for long.
  class Share {
   public:
    explicit Share(Ring& ring) : ring_(ring) { ++ring_.writers_; }
    ~Share() { --ring_.writers_; }
    Share(const Share&) = delete;
    Share& operator=(const Share&) = delete;
    size_t slots() const { return std::max<size_t>(1, ring_.slots_ / ring_.writers_); }

   private:
    Ring& ring_;
  };

  // `slot_nbytes`: a multiple of the page size. Memory is mapped when a slot is first leased.
  Ring(uint64_t slot_nbytes, size_t slots);
  ~Ring();
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // Blocks until a slot is free. Prefers slots on memory node `node` (-1: any), and among these the one that was used
  // last, whose pages exist and may be in a cache.
  Slot acquire(int node = -1) {
    std::unique_lock lock(mutex_);
    freed_.wait(lock, [&] { return available(); });
    return take(node);
  }

  std::optional<Slot> try_acquire(int node = -1) {
    const std::lock_guard lock(mutex_);
    if (!available()) return std::nullopt;
    return take(node);
  }

  // A slot that may be kept until others have been given back: all but one are leased like this at most, so that
  // writers, which wait for slots, always come to their ends.
  std::optional<Slot> try_acquire_spare(int node) {
    const std::lock_guard lock(mutex_);
    if (!available() || spares_ + 1 >= slots_) return std::nullopt;
    ++spares_;
    return take(node, true);
  }

  // Maps, populates and page-locks all slots that nobody has leased.
  void warm_up(Device& device);

  uint64_t slot_nbytes() const { return slot_nbytes_; }
  // Of a slot with its scratch.
  uint64_t block_nbytes() const { return slot_nbytes_ + kScratchNbytes; }

 private:
  bool available() const { return !free_.empty() || blocks_.size() < slots_; }
  Slot take(int node, bool is_spare = false);
  void release(Block* block, bool is_spare) {
    {
      const std::lock_guard lock(mutex_);
      free_.push_back(block);
      spares_ -= is_spare;
    }
    freed_.notify_one();
  }

  const uint64_t slot_nbytes_;
  const size_t slots_;
  const pid_t process_;
  std::mutex mutex_;
  std::condition_variable freed_;
  std::vector<Block> blocks_;
  std::vector<Block*> free_;
  size_t spares_ = 0;
  std::atomic<size_t> writers_ = 0;
};

using Slot = Ring::Slot;

}  // namespace fastshard
