// SPDX-License-Identifier: Apache-2.0
// The process that a save is written by when it is to hold what the tensors were at one moment: a copy of this one,
// made by the kernel, whose memory nobody changes. Other threads may have held any lock when it was made, so nothing
// here allocates, locks, throws or calls the C library but to copy memory and to look at the clock.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "plan/schedule.h"
#include "save/crc32.h"

namespace fastshard {

// What the child tells its parent, in memory that both have.
struct ForkedTotals {
  enum class State : uint32_t {
    beginning,
    lacking,  // memory that it was to read: it has ended
    writing,
    failed,  // it has ended
    done,    // and ended
  };
  std::atomic<State> state = State::beginning;
  std::atomic<uint32_t> turn = 0;  // changes with everything else; a futex
  std::atomic<bool> stop = false;  // the parent's
  std::atomic<uint32_t> chunks = 0, files = 0;
  std::atomic<uint64_t> nbytes_written = 0, nbytes_dropped = 0;
  std::atomic<int64_t> copy_ns = 0, write_ns = 0;
  std::atomic<int> error = 0;  // errno of the write to files[files] that has failed
};

// Memory of which nothing is read any more once so many items are written.
struct ForkedExtent {
  uintptr_t begin, end;
  uint32_t items;
  uintptr_t dropped;  // up to there
  bool one_item;
};

// What the child does and what it needs for that, made before it.
struct ForkedWork {
  struct File {
    int descriptor;
    const FileSchedule* schedule;
    uint32_t first_item;  // the place of its first item among those of all files
  };
  pid_t parent;
  uintptr_t page_nbytes;
  std::vector<File> files;  // in the order in which they are written
  // By item. Those without bytes have none.
  std::vector<std::span<const std::byte>> memory;
  std::vector<uint32_t> extent_of;
  std::vector<ForkedExtent> extents;
  std::vector<iovec> parts;
  std::span<std::byte> packed;  // room for the largest chunk that has to be packed
  // Shared with the parent.
  ForkedTotals* totals;
  std::span<std::byte> lacking;  // by item: whether the child does not have its memory
  std::span<Crc32> checksums;    // by item; none if they were not asked for
};

// Sleeps until the child's turn is not `seen` any more, at most so long.
void await_turn(const ForkedTotals& totals, uint32_t seen, int64_t nanoseconds) noexcept;
void end_turn(ForkedTotals& totals) noexcept;

// Makes the child, which does the work and ends. Returns its number, or a negative errno. It is no child to those who
// wait for any, tells nobody when it ends, and is killed when the calling thread does. It has no descriptors of its
// own.
long fork_writer(ForkedWork& work) noexcept;

}  // namespace fastshard
