// SPDX-License-Identifier: Apache-2.0
// Files as memory.
#pragma once

#include <sys/uio.h>

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
  // All pages that hold a part of the range, which can be page-locked.
  std::span<std::byte> pages() const { return {static_cast<std::byte*>(base_), mapped_nbytes_}; }

 private:
  void* base_;
  uint64_t mapped_nbytes_;  // whole pages
  std::span<std::byte> bytes_;
};

// Copies `parts`, one behind the other, into a mapped range of their length. The kernel makes the stores: where a page
// cannot be had, or a source cannot be read, this returns an errno and no signal is raised. Returns 0 when all is
// there. Kernels may refuse it (seccomp).
int copy_by_kernel(std::span<std::byte> target, std::span<const iovec> parts);

// The same in one call, into several ranges, of together as many bytes; at most IOV_MAX of each.
int copy_by_kernel(std::span<const iovec> targets, std::span<const iovec> parts);

// Makes the pages of a mapped range writable, with one call instead of a fault for each page. Throws IoError(ENOSPC),
// naming `path`, where a store would raise SIGBUS.
void populate(std::span<std::byte> bytes, const std::string& path);
// Returns whether this kernel can do that (Linux 5.14). populate() does nothing if it cannot.
bool can_populate();

}  // namespace fastshard
