// SPDX-License-Identifier: Apache-2.0
// Memory that is page-locked and belongs to somebody else.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "device/device.h"

namespace fastshard {

// Populates memory that is to be page-locked, in huge pages where it can be, and keeps it out of forked children.
void make_lockable(std::span<std::byte> pages);

// Whole pages that are page-locked for all devices as long as this lives. Meanwhile a forked child does not have them:
// what devices write to must stay the parent's, and the fork would copy all of it. Destroyed in such a child, it
// touches neither memory nor driver.
class PageLock {
 public:
  // Throws what Device::page_lock() throws.
  PageLock(Device& device, std::span<std::byte> pages);
  ~PageLock();
  PageLock(const PageLock&) = delete;
  PageLock& operator=(const PageLock&) = delete;

  // Why the driver does not do it; empty if it has done it.
  const std::string& refusal() const { return locking_.refusal; }
  std::span<std::byte> pages() const { return pages_; }
  // Registration::part_nbytes().
  uint64_t part_nbytes() const { return locking_.registration == nullptr ? 0 : locking_.registration->part_nbytes(); }

 private:
  const std::span<std::byte> pages_;
  const pid_t process_;
  PageLocking locking_;
};

}  // namespace fastshard
