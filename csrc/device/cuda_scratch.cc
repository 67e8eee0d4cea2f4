// SPDX-License-Identifier: Apache-2.0
#include "device/cuda_scratch.h"

#include <algorithm>

namespace fastshard {
namespace {

constexpr uint64_t kMaxBlockNbytes = 8 << 20;

// What is left for blocks beside the kernel's code, in whole units.
uint64_t units_for_blocks(uint64_t nbytes) {
  const uint64_t units = nbytes / kDeviceUnitNbytes;
  return units > 0 ? units - 1 : 0;
}

}  // namespace

Scratch::Scratch(std::shared_ptr<Context> context, uint64_t nbytes)
    : context_(std::move(context)),
      block_nbytes_(std::min(kMaxBlockNbytes, units_for_blocks(nbytes) / 2 * kDeviceUnitNbytes)),
      limit_(block_nbytes_ == 0 ? 0 : units_for_blocks(nbytes) * kDeviceUnitNbytes / block_nbytes_) {}

Scratch::~Scratch() {
  try {
    const Current current(*context_);
    for (const auto& block : blocks_) context_->driver().cuMemFree(block->memory);
  } catch (const CudaError&) {
    // The context is gone, and its memory with it.
  }
}

Scratch::Lease Scratch::acquire() {
  std::unique_lock lock(mutex_);
  const auto may_make = [&] { return !refused_ && promised_ < limit_; };
  for (;;) {
    returned_.wait(lock, [&] { return !free_.empty() || may_make() || promised_ == 0; });
    if (free_.empty() && !may_make()) return Lease(this, nullptr);
    Block* oldest = nullptr;
    if (!free_.empty()) {
      oldest = free_.front();
      free_.pop_front();
    }
    const bool make_one = may_make();
    if (make_one) ++promised_;  // given up again below where it is not needed
    lock.unlock();

    Block* made = nullptr;
    std::exception_ptr error;
    bool drained = false;
    try {
      if (oldest != nullptr) {
        const CUresult state = context_->driver().cuEventQuery(oldest->drained.get());
        drained = state != CUDA_ERROR_NOT_READY;
        if (drained) context_->driver().check(state, "cuEventQuery");
      }
      if (make_one && !drained) made = make();
    } catch (...) {
      error = std::current_exception();
    }

    lock.lock();
    if (made != nullptr) blocks_.emplace_back(made);
    if (make_one && made == nullptr) --promised_;
    if (make_one && made == nullptr && !drained && !error) refused_ = true;
    Block* const chosen = error ? nullptr : made != nullptr ? made : oldest;
    if (oldest != nullptr && chosen != oldest) free_.push_front(oldest);
    returned_.notify_all();
    if (error) std::rethrow_exception(error);
    if (chosen != nullptr) return Lease(this, chosen);
  }
}

void Scratch::fill() {
  std::unique_lock lock(mutex_);
  while (!refused_ && promised_ < limit_) {
    ++promised_;
    lock.unlock();
    Block* made = nullptr;
    std::exception_ptr error;
    try {
      made = make();
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    if (made == nullptr) {
      --promised_;
      refused_ = !error;
    } else {
      blocks_.emplace_back(made);
      free_.push_front(made);
    }
    returned_.notify_all();
    if (error) std::rethrow_exception(error);
  }
}

// Null where there is no memory for it.
Scratch::Block* Scratch::make() {
  const CudaDriver& driver = context_->driver();
  CUdeviceptr memory = 0;
  const CUresult allocated = driver.cuMemAlloc(&memory, block_nbytes_);
  if (allocated == CUDA_ERROR_OUT_OF_MEMORY) return nullptr;
  driver.check(allocated, "cuMemAlloc");
  try {
    return new Block{memory, Event(context_), Event(context_)};
  } catch (...) {
    driver.cuMemFree(memory);
    throw;
  }
}

void Scratch::give_back(Block* block) {
  {
    const std::lock_guard lock(mutex_);
    free_.push_back(block);
  }
  returned_.notify_all();
}

void Scratch::ask_again() {
  const std::lock_guard lock(mutex_);
  refused_ = false;
}

}  // namespace fastshard
