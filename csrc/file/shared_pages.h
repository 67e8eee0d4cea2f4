// SPDX-License-Identifier: Apache-2.0
// Memory that this process shares with one that was forked off it, or that it was forked off itself.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "file/filesystem.h"

namespace fastshard {

// The kernel's page map of this process.
class PageMap {
 public:
  PageMap();
  // Returns whether some of the pages from number `first` to before `last` are shared until one changes them, or
  // whether that cannot be told.
  bool copied_on_read(uintptr_t first, uintptr_t last) const;
  // Returns whether all pages from an address on are in memory, and this process's alone.
  bool all_ours(uintptr_t address, size_t nbytes) const;

 private:
  // Calls visit(entry) for the entries of these pages until it returns false. Returns whether it never did, and the map
  // could be read.
  template <typename Visit>
  bool for_all(uintptr_t first, uintptr_t last, const Visit& visit) const;

  const Descriptor file_;
};

// To be called before the first save: only a process that has forked since, or before, shares memory so.
void watch_forks();
// The same for a process that is forked without the C library, which tells nobody.
void note_fork() noexcept;

// Returns whether some of the memory is shared until either process changes it, or whether that cannot be told. A
// kernel that reads such pages in the name of another process, as process_vm_readv(2) does, gives this process copies
// of its own first (Linux 5.19): memory that the save would take for good.
bool copied_on_read(std::span<const iovec> parts);

}  // namespace fastshard
