// SPDX-License-Identifier: Apache-2.0
#include "save/file_crc32.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <stdexcept>
#include <utility>

#include "plan/error.h"
#include "save/crc32.h"

namespace fastshard {
namespace {

constexpr uint64_t kAlignment = 4096;

// The sums of consecutive ranges, whose bytes come in order.
class Sums {
 public:
  explicit Sums(std::span<const uint64_t> sizes) : sizes_(sizes) { skip_empty(); }

  void add(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      const size_t taken = std::min<uint64_t>(bytes.size(), sizes_[found_.size()] - passed_);
      sum_ = crc32_shift(sum_, taken) ^ crc32_remainder(bytes.first(taken));
      passed_ += taken;
      bytes = bytes.subspan(taken);
      skip_empty();
    }
  }
  std::vector<uint32_t> found() { return std::move(found_); }

 private:
  // Ends all ranges of which no byte is missing.
  void skip_empty() {
    while (found_.size() < sizes_.size() && passed_ == sizes_[found_.size()]) {
      found_.push_back(~sum_);
      sum_ = ~uint32_t{0};
      passed_ = 0;
    }
  }

  const std::span<const uint64_t> sizes_;
  std::vector<uint32_t> found_;
  uint32_t sum_ = ~uint32_t{0};
  uint64_t passed_ = 0;  // bytes of the range that is under way
};

}  // namespace

std::optional<std::vector<uint32_t>> crc32_of_ranges(int fd, const std::string& path, uint64_t offset,
                                                     std::span<const uint64_t> sizes, bool direct,
                                                     std::span<std::byte> block) {
  uint64_t end = offset;
  for (const uint64_t size : sizes) {
    if (size > INT64_MAX || end > INT64_MAX - size)
      throw std::invalid_argument("ranges beyond the size that a file can have");
    end += size;
  }
  if (block.empty() || (direct && (reinterpret_cast<uintptr_t>(block.data()) | block.size()) % kAlignment != 0)) {
    throw std::invalid_argument("the block cannot be read into");
  }
  Sums sums(sizes);
  for (uint64_t at = direct ? offset / kAlignment * kAlignment : offset; at < end;) {
    const size_t wanted = direct ? block.size() : std::min<uint64_t>(block.size(), end - at);
    const ssize_t done = pread(fd, block.data(), wanted, static_cast<off_t>(at));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) throw IoError(errno, path, "pread");
    const uint64_t first = std::max(at, offset), reached = at + static_cast<uint64_t>(done);
    if (reached <= first) return std::nullopt;
    sums.add(block.subspan(first - at, std::min(reached, end) - first));
    at = reached;
    // What is read past the page cache ends within a block only where the file ends.
    if (direct && at < end && at % kAlignment != 0) return std::nullopt;
  }
  return sums.found();
}

uint32_t crc32_joined(uint32_t first, uint32_t second, uint64_t nbytes) { return crc32_shift(first, nbytes) ^ second; }

}  // namespace fastshard
