// SPDX-License-Identifier: Apache-2.0
#include "file/shared_pages.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "file/filesystem.h"

namespace fastshard {
namespace {

// Parts that lie so close are looked at together, with what is between them.
constexpr uintptr_t kGapPages = 16;

// An entry of /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst).
constexpr uint64_t kPresent = uint64_t{1} << 63;
constexpr uint64_t kOfFile = uint64_t{1} << 61;  // or shared on purpose
constexpr uint64_t kOurs = uint64_t{1} << 56;    // mapped once

class PageMap {
 public:
  PageMap() : file_(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)) {}

  // Of the pages from `first` to before `last`.
  bool copied_on_read(uintptr_t first, uintptr_t last) const {
    std::array<uint64_t, 1024> entries;
    while (first < last) {
      const size_t wanted = std::min<size_t>(entries.size(), last - first) * sizeof(uint64_t);
      const ssize_t nbytes = pread(file_.get(), entries.data(), wanted, static_cast<off_t>(first * sizeof(uint64_t)));
      if (nbytes <= 0 || nbytes % sizeof(uint64_t) != 0) return true;
      const size_t count = static_cast<size_t>(nbytes) / sizeof(uint64_t);
      const bool found = std::any_of(entries.begin(), entries.begin() + count,
                                     [](uint64_t entry) { return (entry & (kPresent | kOfFile | kOurs)) == kPresent; });
      if (found) return true;
      first += count;
    }
    return false;
  }

 private:
  const Descriptor file_;
};

}  // namespace

bool copied_on_read(std::span<const iovec> parts) {
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
