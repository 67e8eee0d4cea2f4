// SPDX-License-Identifier: Apache-2.0
// Files as memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

#include "plan/error.h"

namespace fastshard {

// A range of a file mapped for reading and writing.
class Mapping {
 public:
  Mapping(int fd, uint64_t offset, uint64_t nbytes, const std::string& path);
  Mapping(Mapping&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)), mapped_nbytes_(other.mapped_nbytes_), bytes_(other.bytes_) {}
  Mapping& operator=(Mapping&& other) noexcept {
    std::swap(base_, other.base_);
    std::swap(mapped_nbytes_, other.mapped_nbytes_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Mapping();
  std::span<std::byte> bytes() const { return bytes_; }
  // All pages that hold a part of it: what can be page-locked.
  std::span<std::byte> pages() const { return {static_cast<std::byte*>(base_), mapped_nbytes_}; }

 private:
  void* base_;
  uint64_t mapped_nbytes_;  // whole pages
  std::span<std::byte> bytes_;
};

// Makes the pages of a mapped range writable: one call instead of a fault for each, and IoError(ENOSPC), naming
// `path`, where a store would be a SIGBUS.
void populate(std::span<std::byte> bytes, const std::string& path);
// Whether this kernel has a way to (Linux 5.14); populate() does nothing where it has none.
bool can_populate();

}  // namespace fastshard
