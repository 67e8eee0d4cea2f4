// SPDX-License-Identifier: Apache-2.0
// Files that tensors lie in. The engine has a mapping of its own of each, so that saving from it takes no memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "plan/plan.h"

namespace fastshard {

// A file that is mapped whole, twice. The tensors' mapping is private, so a change to a tensor is not seen by others.
// The engine reads through a second mapping, shared and read-only. It drops pages of that after each chunk, or the
// resident set would grow to the file's size; these are never the only copy of anything. No descriptor is kept, as
// offloaded models have a file for each weight.
class SourceFile {
 public:
  // `fd` leads to a regular file of `nbytes`, at least one. Throws IoError.
  SourceFile(int fd, uint64_t nbytes, std::string path);
  ~SourceFile();
  SourceFile(const SourceFile&) = delete;
  SourceFile& operator=(const SourceFile&) = delete;

  // Returns the file whose private mapping has the address, or null. It costs nothing while no such file is mapped.
  static const SourceFile* at(const std::byte* address);

  // The tensors' memory.
  std::span<std::byte> bytes() const { return {tensors_, nbytes_}; }
  const std::string& path() const { return path_; }

  // Translate an address of bytes() to the one where the engine reads its unmodified contents, and back.
  const std::byte* engine_address(const std::byte* address) const { return engine_ + (address - tensors_); }
  const std::byte* tensor_address(const std::byte* address) const {
    return is_engine_address(address) ? tensors_ + (address - engine_) : address;
  }
  bool is_engine_address(const std::byte* address) const { return address >= engine_ && address < engine_ + nbytes_; }

  // These take ranges of the engine's mapping, and act on whole pages.
  // Reads the pages, so that loads from them are safe. Throws IoError(EIO), naming the file, if it has been cut or the
  // disk fails; a load would raise SIGBUS. Does nothing before Linux 5.14.
  void bring_in(std::span<const std::byte> range) const;
  // Asks the disk for pages that will be brought in later.
  void ask_for(std::span<const std::byte> range) const noexcept;
  void drop(std::span<const std::byte> range) const noexcept;

 private:
  std::byte* tensors_ = nullptr;
  const std::byte* engine_ = nullptr;
  const uint64_t nbytes_;
  const std::string path_;
};

// Decides for each item of a plan, just before a save, where its bytes are read: through the engine's mapping of its
// file, or from the tensor's own memory if somebody has changed it. It has to be called again before the next save.
void read_from_files(SavePlan& plan);

// Returns whether two ranges of memory are equal. A range that lies in a file is read as a save reads it.
bool same_bytes(const std::byte* one, const std::byte* other, uint64_t nbytes);

}  // namespace fastshard
