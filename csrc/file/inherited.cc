// SPDX-License-Identifier: Apache-2.0
#include "file/inherited.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <memory>
#include <new>
#include <string>
#include <string_view>

#include "file/filesystem.h"

namespace fastshard {
namespace {

// Of a file of /proc, which has no size. Returns nothing where it cannot be read.
std::string contents_of(const char* path) {
  constexpr size_t kPieceNbytes = 64 << 10;
  const Descriptor file(open(path, O_RDONLY | O_CLOEXEC));
  std::string text;
  for (;;) {
    const size_t before = text.size();
    text.resize(before + kPieceNbytes);
    const ssize_t got = read(file.get(), text.data() + before, kPieceNbytes);
    if (got < 0 && errno != EINTR) return {};
    text.resize(before + static_cast<size_t>(std::max<ssize_t>(got, 0)));
    if (got == 0) return text;
  }
}

}  // namespace

// A line is "begin-end perms ...", where the last letter of perms is "s" for what is shared.
SharedMappings::SharedMappings() {
  const std::string text = contents_of("/proc/self/maps");
  for (std::string_view rest = text; !rest.empty();) {
    const std::string_view line = rest.substr(0, rest.find('\n'));
    rest.remove_prefix(std::min(rest.size(), line.size() + 1));
    uintptr_t begin = 0, end = 0;
    const char* const first = std::to_address(line.begin());
    const char* const last = first + line.size();
    const auto dash = std::from_chars(first, last, begin, 16);
    if (dash.ptr == last || *dash.ptr != '-') continue;
    const auto space = std::from_chars(dash.ptr + 1, last, end, 16);
    if (last - space.ptr < 5) continue;
    known_ = true;
    if (space.ptr[4] == 's') ranges_.emplace_back(begin, end);
  }
}

bool SharedMappings::touched_by(std::span<const std::byte> memory) const {
  if (!known_) return true;
  const auto begin = reinterpret_cast<uintptr_t>(memory.data());
  const auto after = std::ranges::upper_bound(ranges_, begin, {}, [](const auto& range) { return range.second; });
  return after != ranges_.end() && after->first < begin + memory.size();
}

SharedMemory::SharedMemory(size_t nbytes) : nbytes_(nbytes) {
  void* const address = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<std::byte*>(address);
}

SharedMemory::~SharedMemory() { munmap(data_, nbytes_); }

}  // namespace fastshard
