// SPDX-License-Identifier: Apache-2.0
// Files that tensors lie in, mapped by us so that saving from them takes no memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "plan/plan.h"

namespace fastshard {

// A file mapped whole, twice. The tensors' mapping is private: whoever changes a tensor has the changed pages to
// himself. The engine reads through a second one, shared and read-only: what it drops of that after each chunk (or the
// resident set would grow to the file's size) is never the only copy of anything. No descriptor is kept: offloaded
// models have a file for each weight.
class SourceFile {
 public:
  // `fd`: a regular file of `nbytes`, more than none. Throws IoError.
  SourceFile(int fd, uint64_t nbytes, std::string path);
  ~SourceFile();
  SourceFile(const SourceFile&) = delete;
  SourceFile& operator=(const SourceFile&) = delete;

  // Of those that exist, the one whose private mapping holds the address, or null. Costs nothing while there is none.
  static const SourceFile* at(const std::byte* address);

  // The tensors' memory.
  std::span<std::byte> bytes() const { return {tensors_, nbytes_}; }
  const std::string& path() const { return path_; }

  // Where the engine reads what lies at an address of bytes() that is not modified, and back.
  const std::byte* engine_address(const std::byte* address) const { return engine_ + (address - tensors_); }
  const std::byte* tensor_address(const std::byte* address) const {
    return is_engine_address(address) ? tensors_ + (address - engine_) : address;
  }
  bool is_engine_address(const std::byte* address) const { return address >= engine_ && address < engine_ + nbytes_; }

  // What follows takes ranges of the engine's mapping, and acts on whole pages.
  // Makes reading them safe: IoError(EIO), naming the file, where it has been cut or the disk fails, which a load would
  // answer with SIGBUS. Does nothing before Linux 5.14.
  void bring_in(std::span<const std::byte> range) const;
  // Asks the disk for what will be brought in later.
  void ask_for(std::span<const std::byte> range) const noexcept;
  void drop(std::span<const std::byte> range) const noexcept;

 private:
  std::byte* tensors_ = nullptr;
  const std::byte* engine_ = nullptr;
  const uint64_t nbytes_;
  const std::string path_;
};

// Decides for each item of a plan where its bytes are read, just before a save: through the engine's mapping of its
// file, or, if somebody has changed the tensor, from the tensor's own memory. To be called again before the next one.
void read_from_files(SavePlan& plan);

// memcmp() == 0 of two ranges of memory, either of which may be a file's and is then read as a save would.
bool same_bytes(const std::byte* one, const std::byte* other, uint64_t nbytes);

}  // namespace fastshard
