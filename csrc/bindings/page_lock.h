// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <utility>

#include "bindings/python.h"
#include "device/page_lock.h"

namespace fastshard {

// Page-locked memory as Python holds it, until released.
struct PageLockHandle {
  explicit PageLockHandle(std::unique_ptr<PageLock> made) : lock(std::move(made)) {}
  PageLockHandle(const PageLockHandle&) = delete;
  PageLockHandle& operator=(const PageLockHandle&) = delete;
  ~PageLockHandle() { release(); }

  void release() {
    std::unique_ptr<PageLock> releasing = std::move(lock);
    const GilReleased unlocked;
    releasing.reset();
  }

  std::unique_ptr<PageLock> lock;
};

}  // namespace fastshard
