// SPDX-License-Identifier: Apache-2.0
// What of a prepared save's file differs from the generation before, found while the bytes pass.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace fastshard {

// Blocks of a file, and items in it, that differ from the same bytes of an earlier file. Any number of threads may
// compare at once, in any order.
class Changes {
 public:
  static constexpr uint64_t kBlockNbytes = 4096;

  // `before`: the earlier file, which is there and of the same size as long as anything is compared. If it is empty
  // there is none, and all of the `nbytes` count as changed.
  Changes(std::span<const std::byte> before, uint64_t nbytes, size_t items);

  // Whether there is an earlier file.
  bool compares() const { return !before_.empty(); }
  // Compares bytes of an item, which belong at `offset` of the file.
  void compare(uint32_t item, uint64_t offset, std::span<const std::byte> bytes);

  std::vector<uint32_t> items() const;
  // Offset and size of each stretch of blocks; the last may end with the file.
  std::vector<std::pair<uint64_t, uint64_t>> ranges() const;

 private:
  using Flags = std::vector<std::atomic<uint8_t>>;  // a byte each: threads set them without asking for the line's rest

  const std::span<const std::byte> before_;
  const uint64_t nbytes_;
  Flags blocks_, items_;
};

}  // namespace fastshard
