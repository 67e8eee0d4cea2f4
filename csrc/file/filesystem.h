// SPDX-License-Identifier: Apache-2.0
// What the filesystem of a directory can do, and which write path follows from it.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "plan/error.h"

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
  // Closes it and returns 0, or an errno: some filesystems tell only now that what was written could not be stored (see
  // close(2)).
  int close() noexcept;
  // Gives it away. The caller closes it.
  int release() noexcept { return std::exchange(fd_, -1); }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

struct FileSystem {
  std::string type;            // "ext4", "tmpfs", ...; the magic in hex where it has no name here
  bool memory_backed = false;  // no disk behind it: nothing to preallocate or to write back
  bool direct_io = false;      // O_DIRECT is known to reach the disk, several writes at a time
  bool one_machine = false;    // no other machine can have its files open
};

// Returns the filesystem of a directory, or of an open file. Throws IoError, naming `path`, if that cannot be told.
FileSystem filesystem_of(const std::string& directory, const std::string& path);
FileSystem filesystem_of(int fd, const std::string& path);

// The options of a save that concern its files.
struct Intent {
  WritePath wanted = WritePath::automatic;
  bool durable = false;       // on stable storage when the save returns
  bool keep_cached = true;    // false: nothing left in the page cache when the save returns
  bool from_device = false;   // some of it comes from a GPU
  bool checksums = false;     // CRC-32 of each tensor, taken as it passes
  bool amended = false;       // some bytes follow when all chunks are written
  bool held = false;          // begun by Save::begin(), not by Engine::submit()
  bool tells_read = false;    // Save::wait() returns once when all bytes have been read
  bool forked = false;        // written by a forked process, through the page cache
  bool at_once = false;       // written and published by the next few calls of this thread
  bool gaps = false;          // some bytes of the file are not written
  bool gives_way = false;     // its writers get a processor when the job does not want it
  bool past_cache = false;    // new pages of the cache are worth less than they cost
  bool follow_links = false;  // the file that a symbolic link leads to is replaced, not the link itself
  bool sent_behind = true;    // the disk is asked for what is written while the rest is
  uint64_t nbytes = 0;        // of all its files together
};

// Returns whether the kernel lets so many more bytes wait in the page cache before it has them written to disks by
// itself. False where it does not tell.
bool page_cache_takes(uint64_t nbytes);

struct Choice {
  WritePath path;
  std::string reason;
};
// The write path for new files on `filesystem`; a wanted one wins where it is not automatic,
// but for a direct file with gaps.
Choice choose_write_path(const FileSystem& filesystem, const Intent& intent);

// Returns whether an errno says that the filesystem or the kernel does not have what was asked for.
bool is_unsupported(int error);

// Returns a path to the file behind a descriptor, by which the file can be given a name. It needs a mounted /proc.
std::string self_path(int fd);

}  // namespace fastshard
