// SPDX-License-Identifier: Apache-2.0
#include "device/page_lock.h"

#include <sys/mman.h>
#include <unistd.h>

#include <utility>

#include "device/numa.h"

namespace fastshard {
namespace {

constexpr uint64_t kHugePageNbytes = 2 << 20;

}  // namespace

// What is page-locked is all there at once, so it may as well be in huge pages, which take less time to lock. Refusals
// cost only speed.
void make_lockable(std::span<std::byte> pages) {
  if (pages.size() >= kHugePageNbytes) madvise(pages.data(), pages.size(), MADV_HUGEPAGE);
  madvise(pages.data(), pages.size(), MADV_DONTFORK);
#ifdef MADV_POPULATE_WRITE
  madvise(pages.data(), pages.size(), MADV_POPULATE_WRITE);  // here, and not under the driver's lock
#endif
}

PageLock::PageLock(Device& device, std::span<std::byte> pages) : pages_(pages), process_(getpid()) {
  prefer_node(pages, device.numa_node());
  make_lockable(pages);
  try {
    locking_ = device.page_lock(pages);
  } catch (...) {
    madvise(pages.data(), pages.size(), MADV_DOFORK);
    throw;
  }
  if (locking_.registration == nullptr) madvise(pages.data(), pages.size(), MADV_DOFORK);
}

PageLock::~PageLock() {
  if (locking_.registration == nullptr) return;
  if (getpid() != process_) {
    static_cast<void>(locking_.registration.release());  // its addresses may be those of other memory now
    return;
  }
  locking_.registration.reset();
  madvise(pages_.data(), pages_.size(), MADV_DOFORK);
}

}  // namespace fastshard
