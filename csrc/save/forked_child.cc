// SPDX-License-Identifier: Apache-2.0
#include "save/forked_child.h"

#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>

#include <algorithm>

#include "device/pack.h"
#include "file/raw_calls.h"
#include "save/runs.h"

namespace fastshard {
namespace {

using State = ForkedTotals::State;

// What is dropped in the middle of a tensor are whole huge pages: a part of one would have to be divided first.
constexpr uintptr_t kHugePageNbytes = 2 << 20;

[[noreturn]] void leave() noexcept {
  for (;;) raw_call(SYS_exit_group, 0);
}

int64_t now() noexcept {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

uintptr_t round_up(uintptr_t address, uintptr_t unit) { return (address + unit - 1) / unit * unit; }

class Child {
 public:
  explicit Child(ForkedWork& work) : work_(work), totals_(*work.totals) {}

  [[noreturn]] void run() noexcept {
    detach();
    look_for_memory();
    tell(State::writing);
    for (const ForkedWork::File& file : work_.files) {
      for (const Chunk& chunk : file.schedule->chunks) {
        if (totals_.stop) leave();
        write(file, chunk);
        totals_.nbytes_written += chunk.nbytes;
        totals_.chunks += 1;
        end_turn(totals_);
        drop(file, chunk);
      }
      totals_.files += 1;
    }
    tell(State::done);
    leave();
  }

 private:
  void tell(State state) noexcept {
    totals_.state = state;
    end_turn(totals_);
  }

  // It ends with its parent, and a crash of it leaves no copy of the tensors: a limit of 1 keeps the kernel from
  // writing a core, and from handing one to a program.
  void detach() noexcept {
    raw_call(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL);
    if (raw_call(SYS_getppid) != work_.parent) leave();
    const uint64_t none[] = {1, 1};
    raw_call(SYS_prlimit64, 0, RLIMIT_CORE, raw_number(none), 0);
  }

  // What drivers lock in memory is not always inherited. msync() does nothing to memory that is there.
  void look_for_memory() noexcept {
    bool lacking = false;
    uintptr_t checked = 0, checked_end = 0;
    for (size_t item = 0; item < work_.memory.size(); ++item) {
      if (work_.memory[item].empty()) continue;
      const auto address = reinterpret_cast<uintptr_t>(work_.memory[item].data());
      const uintptr_t begin = address / work_.page_nbytes * work_.page_nbytes;
      const uintptr_t end = address + work_.memory[item].size();
      if (begin >= checked && end <= checked_end) continue;  // of the same page as the one before, mostly
      const long result = raw_call(SYS_msync, static_cast<long>(begin), static_cast<long>(end - begin), MS_ASYNC);
      if (result == -ENOMEM) {
        work_.lacking[item] = std::byte{1};
        lacking = true;
      } else {
        checked = begin;
        checked_end = round_up(end, work_.page_nbytes);
      }
    }
    if (!lacking) return;
    tell(State::lacking);
    leave();
  }

  void write(const ForkedWork::File& file, const Chunk& chunk) noexcept {
    const std::span<const CopyOp> ops = file.schedule->ops_of(chunk);
    if (chunk.route == Route::in_place) return write_in_place(file, ops, chunk.file_offset);
    const int64_t began = now();
    for (const CopyOp& op : ops) {
      const std::span<std::byte> out = work_.packed.subspan(op.chunk_offset, op.nbytes);
      pack_bytes(*op.source, op.first_byte, op.nbytes, out.data());
      check(file, op, op.first_byte, out);
    }
    totals_.copy_ns += now() - began;
    work_.parts[0] = {work_.packed.data(), chunk.nbytes};
    write_parts(file, 1, chunk.file_offset);
  }

  void write_in_place(const ForkedWork::File& file, std::span<const CopyOp> ops, uint64_t offset) noexcept {
    size_t count = 0;
    uint64_t nbytes = 0;
    const int64_t began = now();
    for (const CopyOp& op : ops) {
      for_each_run(op, [&](uint64_t first, std::span<const std::byte> run) {
        if (count == work_.parts.size()) {
          write_parts(file, count, offset);
          offset += nbytes;
          nbytes = count = 0;
        }
        check(file, op, first, run);
        work_.parts[count++] = {const_cast<std::byte*>(run.data()), run.size()};
        nbytes += run.size();
      });
    }
    totals_.copy_ns += now() - began;
    write_parts(file, count, offset);
  }

  void check(const ForkedWork::File& file, const CopyOp& op, uint64_t first,
             std::span<const std::byte> bytes) noexcept {
    if (!work_.checksums.empty()) work_.checksums[file.first_item + op.item].add(first, bytes);
  }

  void write_parts(const ForkedWork::File& file, size_t count, uint64_t offset) noexcept {
    const int64_t began = now();
    iovec* part = work_.parts.data();
    iovec* const end = part + count;
    while (part != end) {
      // The offset in two halves, of which the kernel takes one where a long has 64 bits.
      const long written =
          raw_call(SYS_pwritev, file.descriptor, raw_number(part), end - part, static_cast<long>(offset), 0);
      if (written == -EINTR && !totals_.stop) continue;
      if (written <= 0) fail(written == 0 ? EIO : static_cast<int>(-written));
      offset += static_cast<uint64_t>(written);
      auto left = static_cast<size_t>(written);
      while (part != end && left >= part->iov_len) left -= (part++)->iov_len;
      if (left != 0) *part = {static_cast<std::byte*>(part->iov_base) + left, part->iov_len - left};
    }
    totals_.write_ns += now() - began;
  }

  [[noreturn]] void fail(int error) noexcept {
    totals_.error = error;
    tell(State::failed);
    leave();
  }

  // Gives back what was written and is not read again. The parent then has it for itself, and may change it without
  // getting a copy first. Pages that hold a part of something else, too, stay.
  void drop(const ForkedWork::File& file, const Chunk& chunk) noexcept {
    for (const CopyOp& op : file.schedule->ops_of(chunk)) {
      ForkedExtent& extent = work_.extents[work_.extent_of[file.first_item + op.item]];
      const uint64_t end = op.first_byte + op.nbytes;
      if (end == op.source->packed_nbytes()) --extent.items;
      if (extent.items == 0) {
        drop(extent, extent.end / work_.page_nbytes * work_.page_nbytes);
      } else if (extent.one_item && op.source->ndim == 0) {
        const uint64_t read = op.source->cast() ? end / itemsize(op.source->to) * itemsize(op.source->from) : end;
        drop(extent, (extent.begin + read) / kHugePageNbytes * kHugePageNbytes);
      }
    }
  }

  void drop(ForkedExtent& extent, uintptr_t end) noexcept {
    if (end <= extent.dropped) return;
    const uintptr_t nbytes = end - extent.dropped;
    const long refused =
        raw_call(SYS_madvise, static_cast<long>(extent.dropped), static_cast<long>(nbytes), MADV_DONTNEED);
    if (refused == 0) totals_.nbytes_dropped += nbytes;
    extent.dropped = end;
  }

  ForkedWork& work_;
  ForkedTotals& totals_;
};

}  // namespace

void await_turn(const ForkedTotals& totals, uint32_t seen, int64_t nanoseconds) noexcept {
  const timespec most{nanoseconds / 1'000'000'000, nanoseconds % 1'000'000'000};
  raw_call(SYS_futex, raw_number(&totals.turn), FUTEX_WAIT, seen, raw_number(&most));
}

void end_turn(ForkedTotals& totals) noexcept {
  totals.turn += 1;
  raw_call(SYS_futex, raw_number(&totals.turn), FUTEX_WAKE, 1);
}

// The table of descriptors is the parent's own: a copy of it would keep open what the parent closes, such as the end of
// a pipe that somebody reads. No signal when it ends, so that nobody's handler is called.
long fork_writer(ForkedWork& work) noexcept {
  const long pid = raw_call(SYS_clone, CLONE_FILES);
  if (pid == 0) Child(work).run();
  return pid;
}

}  // namespace fastshard
