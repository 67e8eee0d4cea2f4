// SPDX-License-Identifier: Apache-2.0
// A little memory of a device, in which gathers are put together before the copy engine takes them to the host:
// blocks of equal size, shared by all saves of an engine.
//
// A block is leased only while work on it is enqueued. That work is ordered on the device: packing waits for `drained`,
// the copy out of the block for `packed`. So the holder of a lease never blocks, and waiting for one cannot deadlock.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>

#include "device/cuda_context.h"

namespace fastshard {

// The driver gives device memory in units of this: to blocks, and to the kernel's code.
inline constexpr uint64_t kDeviceUnitNbytes = 2 << 20;

// Thread-safe.
class Scratch {
 public:
  struct Block {
    CUdeviceptr memory;
    Event packed;   // the kernel has filled it
    Event drained;  // it has been copied out of it
  };

  // Move-only lease of one block, or of none; the destructor gives it back.
  class Lease {
   public:
    Lease(Scratch* scratch, Block* block) : scratch_(scratch), block_(block) {}
    Lease(Lease&& other) noexcept : scratch_(other.scratch_), block_(std::exchange(other.block_, nullptr)) {}
    Lease& operator=(Lease&&) = delete;
    ~Lease() {
      if (block_ != nullptr) scratch_->give_back(block_);
    }
    explicit operator bool() const { return block_ != nullptr; }
    Block* operator->() const { return block_; }

   private:
    Scratch* scratch_;
    Block* block_;
  };

  // With the kernel's code at most `nbytes` are taken, in at least two blocks, so that one is packed beside the copy of
  // another. Where that is less than three units of the driver, there are none.
  Scratch(std::shared_ptr<Context> context, uint64_t nbytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Leases a block; the context must be current. Prefers an idle block, then a new one, then the one whose copy started
  // earliest. None when the device has no memory left for the first.
  Lease acquire();
  // Makes all blocks for which the device has memory; the context must be current.
  void fill();
  // After a refusal, asks the device again: it may have memory for a later save.
  void ask_again();

  uint64_t block_nbytes() const { return block_nbytes_; }
  bool enabled() const { return limit_ != 0; }

 private:
  Block* make();
  void give_back(Block* block);

  const std::shared_ptr<Context> context_;
  const uint64_t block_nbytes_;
  const size_t limit_;
  std::mutex mutex_;
  std::condition_variable returned_;
  std::deque<std::unique_ptr<Block>> blocks_;
  std::deque<Block*> free_;  // in the order of their copies
  size_t promised_ = 0;      // blocks that exist or are being made
  bool refused_ = false;
};

}  // namespace fastshard
