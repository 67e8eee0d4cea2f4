// SPDX-License-Identifier: Apache-2.0
// The staging buffers of an engine: a fixed number of page-aligned slots, leased one at a time. Waiting for
// a slot is the only back-pressure in the pipeline, and it bounds the memory of every save.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#include "device/device.h"
#include "device/numa.h"

namespace fastshard {

// Thread-safe. Slots must not outlive their ring.
class Ring {
  struct Block {
    std::byte* memory;
    std::unique_ptr<Registration> registration;
    bool registration_tried = false;
    int node = -1;  // of its memory, if one was asked for
  };

 public:
  // Move-only lease of one slot; the destructor gives it back.
  class Slot {
   public:
    Slot(Ring* ring, Block* block) : ring_(ring), block_(block) {}
    Slot(Slot&& other) noexcept : ring_(other.ring_), block_(std::exchange(other.block_, nullptr)) {}
    Slot& operator=(Slot&&) = delete;
    ~Slot() {
      if (block_ != nullptr) ring_->release(block_);
    }

    std::span<std::byte> bytes() const { return {block_->memory, ring_->slot_nbytes_}; }
    std::span<std::byte> scratch() const { return {block_->memory + ring_->slot_nbytes_, kScratchNbytes}; }
    bool pinned() const { return block_->registration != nullptr; }

    // Page-locks the slot for `device`'s copy engine, once in its life (one registration serves all devices).
    void pin(Device& device) {
      if (std::exchange(block_->registration_tried, true)) return;
      block_->registration = device.register_staging({block_->memory, ring_->block_nbytes()});
    }

   private:
    Ring* ring_;
    Block* block_;
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
  Ring(uint64_t slot_nbytes, size_t slots) : slot_nbytes_(slot_nbytes), slots_(slots) {
    blocks_.reserve(slots);
    free_.reserve(slots);  // giving a slot back must not need memory
  }
  ~Ring() {
    for (Block& block : blocks_) {
      block.registration.reset();
      munmap(block.memory, block_nbytes());
    }
  }
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

  uint64_t slot_nbytes() const { return slot_nbytes_; }

 private:
  uint64_t block_nbytes() const { return slot_nbytes_ + kScratchNbytes; }
  bool available() const { return !free_.empty() || blocks_.size() < slots_; }

  Slot take(int node) {
    const auto near =
        std::find_if(free_.rbegin(), free_.rend(), [&](const Block* block) { return node < 0 || block->node == node; });
    const bool make = free_.empty() || (near == free_.rend() && blocks_.size() < slots_);
    if (make) {
      void* memory = mmap(nullptr, block_nbytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      prefer_node({static_cast<std::byte*>(memory), block_nbytes()}, node);
      blocks_.push_back({static_cast<std::byte*>(memory), nullptr, false, node});
      return Slot(this, &blocks_.back());
    }
    const auto chosen = near == free_.rend() ? free_.rbegin() : near;
    Block* block = *chosen;
    free_.erase(std::next(chosen).base());
    return Slot(this, block);
  }

  void release(Block* block) {
    {
      const std::lock_guard lock(mutex_);
      free_.push_back(block);
    }
    freed_.notify_one();
  }

  const uint64_t slot_nbytes_;
  const size_t slots_;
  std::mutex mutex_;
  std::condition_variable freed_;
  std::vector<Block> blocks_;
  std::vector<Block*> free_;
  std::atomic<size_t> writers_ = 0;
};

using Slot = Ring::Slot;

}  // namespace fastshard
