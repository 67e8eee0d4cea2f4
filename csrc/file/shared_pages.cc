// SPDX-License-Identifier: Apache-2.0
#include "file/shared_pages.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <mutex>
#include <sstream>
#include <string>

namespace fastshard {
namespace {

// Parts that lie so close are looked at together, with what is between them.
constexpr uintptr_t kGapPages = 16;

// An entry of /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst).
constexpr uint64_t kPresent = uint64_t{1} << 63;
constexpr uint64_t kOfFile = uint64_t{1} << 61;  // or shared on purpose
constexpr uint64_t kOurs = uint64_t{1} << 56;    // mapped once

// Whether this process has forked, or was forked without an exec: set when it does, and at the start where it has
// children already, or is such a child.
std::atomic<bool> has_forked = false;

// The flags of this process, of which Linux tells in the ninth field of /proc/self/stat (include/linux/sched.h).
constexpr unsigned long kForkedWithoutExec = 0x40;

bool was_forked() {
  std::ifstream stat("/proc/self/stat");
  std::string text((std::istreambuf_iterator<char>(stat)), std::istreambuf_iterator<char>());
  const size_t name_end = text.rfind(')');  // a name may have spaces and brackets in it
  if (name_end == std::string::npos) return true;
  std::istringstream fields(text.substr(name_end + 1));
  std::string skipped;
  for (int field = 3; field < 9; ++field) fields >> skipped;
  unsigned long flags = 0;
  return !(fields >> flags) || (flags & kForkedWithoutExec) != 0;
}

bool has_children() {
  siginfo_t child;
  return waitid(P_ALL, 0, &child, WEXITED | WNOHANG | WNOWAIT) == 0 || errno != ECHILD;
}

}  // namespace

PageMap::PageMap() : file_(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)) {}

template <typename Visit>
bool PageMap::for_all(uintptr_t first, uintptr_t last, const Visit& visit) const {
  std::array<uint64_t, 1024> entries;
  while (first < last) {
    const size_t wanted = std::min<size_t>(entries.size(), last - first) * sizeof(uint64_t);
    const ssize_t nbytes = pread(file_.get(), entries.data(), wanted, static_cast<off_t>(first * sizeof(uint64_t)));
    if (nbytes <= 0) return false;
    const size_t count = static_cast<size_t>(nbytes) / sizeof(uint64_t);
    if (!std::all_of(entries.begin(), entries.begin() + count, visit)) return false;
    first += count;
  }
  return true;
}

bool PageMap::copied_on_read(uintptr_t first, uintptr_t last) const {
  return !for_all(first, last, [](uint64_t entry) { return (entry & (kPresent | kOfFile | kOurs)) != kPresent; });
}

bool PageMap::all_ours(uintptr_t address, size_t nbytes) const {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  return for_all(address / page, (address + nbytes) / page,
                 [](uint64_t entry) { return (entry & (kPresent | kOfFile | kOurs)) == (kPresent | kOurs); });
}

void note_fork() noexcept { has_forked = true; }

void watch_forks() {
  static std::once_flag once;
  std::call_once(once, [] {
    if (pthread_atfork(nullptr, note_fork, note_fork) != 0 || was_forked() || has_children()) note_fork();
  });
}

bool copied_on_read(std::span<const iovec> parts) {
  if (!has_forked) return false;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const PageMap map;
  uintptr_t first = 0, last = 0;  // pages that are to be looked at
  for (const iovec& part : parts) {
    const auto address = reinterpret_cast<uintptr_t>(part.iov_base);
    const uintptr_t begin = address / page, end = (address + part.iov_len + page - 1) / page;
    if (begin < first || begin > last + kGapPages) {
      if (map.copied_on_read(first, last)) return true;
      first = begin;
      last = end;
    }
    last = std::max(last, end);
  }
  return map.copied_on_read(first, last);
}

}  // namespace fastshard
