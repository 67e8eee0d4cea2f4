// SPDX-License-Identifier: Apache-2.0
#include "save/changes.h"

#include <algorithm>
#include <cstring>

namespace fastshard {
namespace {

bool is_set(const std::atomic<uint8_t>& flag) { return flag.load(std::memory_order_relaxed) != 0; }
void set(std::atomic<uint8_t>& flag) { flag.store(1, std::memory_order_relaxed); }

}  // namespace

Changes::Changes(std::span<const std::byte> before, uint64_t nbytes, size_t items)
    : before_(before), nbytes_(nbytes), blocks_((nbytes + kBlockNbytes - 1) / kBlockNbytes), items_(items) {
  if (compares()) return;
  std::ranges::for_each(blocks_, set);
  std::ranges::for_each(items_, set);
}

void Changes::compare(uint32_t item, uint64_t offset, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const uint64_t nbytes = std::min<uint64_t>(bytes.size(), kBlockNbytes - offset % kBlockNbytes);
    if (std::memcmp(before_.data() + offset, bytes.data(), nbytes) != 0) {
      set(blocks_[offset / kBlockNbytes]);
      set(items_[item]);
    }
    offset += nbytes;
    bytes = bytes.subspan(nbytes);
  }
}

std::vector<uint32_t> Changes::items() const {
  std::vector<uint32_t> changed;
  for (uint32_t item = 0; item < items_.size(); ++item) {
    if (is_set(items_[item])) changed.push_back(item);
  }
  return changed;
}

std::vector<std::pair<uint64_t, uint64_t>> Changes::ranges() const {
  std::vector<std::pair<uint64_t, uint64_t>> found;
  for (auto next = blocks_.begin();;) {
    const auto first = std::find_if(next, blocks_.end(), is_set);
    if (first == blocks_.end()) return found;
    next = std::find_if_not(first, blocks_.end(), is_set);
    const uint64_t begin = static_cast<uint64_t>(first - blocks_.begin()) * kBlockNbytes;
    const uint64_t end = std::min(nbytes_, static_cast<uint64_t>(next - blocks_.begin()) * kBlockNbytes);
    found.emplace_back(begin, end - begin);
  }
}

}  // namespace fastshard
