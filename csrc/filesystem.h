// SPDX-License-Identifier: Apache-2.0
// What the filesystem of a directory can do, and which way of writing follows from it.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "error.h"

namespace fastshard {

enum class WritePath {
  automatic,
  buffered,    // pwrite into the page cache
  direct,      // past the page cache, from staging slots
  mapped,      // stores into the reserved file, mapped window by window
  registered,  // as mapped; devices copy straight into the windows, page-locked for them one by one
};
const char* name_of(WritePath path);

// Owns a file descriptor.
class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Descriptor();

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

struct FileSystem {
  std::string type;            // "ext4", "tmpfs", ...; the magic in hex where it has no name here
  bool memory_backed = false;  // no disk behind it: nothing to preallocate or to write back
  bool direct_io = false;      // O_DIRECT is known to reach the disk, several writes at a time
};

// Throws IoError, naming `path`, when the directory cannot be looked at.
FileSystem filesystem_of(const std::string& directory, const std::string& path);

// What a save asks of its files.
struct Intent {
  WritePath wanted = WritePath::automatic;
  bool durable = false;      // on stable storage when the save returns
  bool keep_cached = true;   // false: nothing left in the page cache when the save returns
  bool from_device = false;  // some of it comes from a GPU
  bool host_casts = false;   // some of it is cast by the CPU, which takes longer than writing it
  bool checksums = false;    // CRC-32 of each tensor, taken as it passes
  bool amended = false;      // some bytes follow when all chunks are written
  uint64_t nbytes = 0;       // of all its files together
  size_t writers = 1;        // threads, for each file
};

struct Choice {
  WritePath path;
  std::string reason;
};
// The write path for new files on `filesystem`; a wanted one wins where it is not automatic.
Choice choose_write_path(const FileSystem& filesystem, const Intent& intent);

// Each ability tried with a temporary file in `directory`: (ability, "yes" or why not). For `fastshard env`.
std::vector<std::pair<std::string, std::string>> probe(const std::string& directory);

// A hidden name no loader looks at: it starts with a dot and does not end in .safetensors.
std::string temporary_name(const std::string& directory);
// Tells remove_leftovers that the file behind `fd` belongs to a living process, for as long as it is open.
void mark_in_use(int fd);
// Removes the hidden files of processes that were killed. Only for filesystems that no other machine sees: a
// lock is how the living are told from the dead.
void remove_leftovers(const std::string& directory);

}  // namespace fastshard
