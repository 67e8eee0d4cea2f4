// SPDX-License-Identifier: Apache-2.0
// What of this process's memory a forked one does not get a copy of.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace fastshard {

// The mappings that this process shares with forked ones: a change is seen by both. They are those of
// /proc/self/maps when this is made; what the drivers of devices have page-locked is mostly among them.
class SharedMappings {
 public:
  SharedMappings();

  // Returns whether some of the memory lies in one, or whether that cannot be told.
  bool touched_by(std::span<const std::byte> memory) const;

 private:
  bool known_ = false;
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges_;  // sorted: beginning, and end
};

// Anonymous memory that forked processes share. It is zeros at first.
class SharedMemory {
 public:
  // Throws std::bad_alloc.
  explicit SharedMemory(size_t nbytes);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  std::byte* data() const { return data_; }

 private:
  std::byte* data_;
  const size_t nbytes_;
};

}  // namespace fastshard
