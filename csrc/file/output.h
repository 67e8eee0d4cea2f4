// SPDX-License-Identifier: Apache-2.0
// A file that bytes are written into, at their offsets. How it was made and how it gets its name is told elsewhere:
// temporary.h and publish.h for the files that this process makes.
#pragma once

#include <sys/stat.h>
#include <sys/uio.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "file/filesystem.h"
#include "file/mapping.h"

namespace fastshard {

// A file being written. write(), window() and start_writeback() may be called by several threads at once.
//
// Made by one of the public constructors, it is somebody else's file, of which other parts may be written by others
// meanwhile: bytes go to their offsets through the page cache, and nothing else happens to the file. It is not
// preallocated, cut, renamed or removed, and it keeps the size that the writes give it. Whoever made it publishes it;
// before that, sync() (when it is to be durable) or check_stored() tells whether all that was written is there.
class OutputFile {
 public:
  // The file behind a descriptor, which this object owns from here on; a caller that keeps its own gives a duplicate.
  // `path` is for messages only. `nbytes` is what will be written, 0 if that is not known: a message about a full disk
  // says so. Throws IoError for what is not a regular file, and for a descriptor whose writes would go elsewhere than
  // to their offsets (O_APPEND) or only in blocks (O_DIRECT).
  OutputFile(Descriptor file, const std::string& path, uint64_t nbytes, const Intent& intent);
  // The regular file that stands at `path`, opened for writing; a symbolic link is followed. Throws IoError, of ENOENT
  // where there is none.
  OutputFile(const std::string& path, uint64_t nbytes, const Intent& intent);
  virtual ~OutputFile() = default;
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  const std::string& path() const { return path_; }
  int descriptor() const { return fd_.get(); }
  WritePath write_path() const { return write_path_; }
  bool keep_cached() const { return keep_cached_; }
  bool memory_backed() const { return memory_backed_; }
  bool one_machine() const { return one_machine_; }
  // What the filesystem refused and what was done instead.
  const std::vector<std::string>& fallbacks() const { return fallbacks_; }
  void note_fallback(const std::string& refused, int error = errno);
  void note_fallbacks(const std::vector<std::string>& texts);
  // Throws the IoError of a call that has failed.
  [[noreturn]] void fail(const char* action, int error = errno) const;
  // Which file it is, whether it is open or not.
  std::optional<struct stat> identity() const;

  // Writes all of `parts` (changed on the way) at `offset`.
  void write(std::span<iovec> parts, uint64_t offset);
  // Returns whether store() may be used: the file's space is there and its size is set, and nobody cuts it.
  bool storable() const { return storable_; }
  // Does what write() does through a mapping, without the lock that writes to one file wait for. Returns 0, or the
  // errno of what was refused; then write() tells why, or can do it. `parts` stay as they are.
  int store(std::span<const iovec> parts, uint64_t offset, const std::optional<Mapping>& target = std::nullopt);
  // The target of a later store(), with its pages, so that nothing but the copy is left to do; none where it is
  // refused.
  std::optional<Mapping> map_for_store(uint64_t offset, uint64_t nbytes) const noexcept;
  // To be called before the first write if others may write other bytes of the same pages meanwhile. On one machine
  // the file is opened so that it can be mapped, if that is allowed, and stores_runs() says whether it is. On a
  // filesystem of several machines it is opened for nothing but writes: NFS writes a page that it has read as a whole.
  void share_pages();
  bool stores_runs() const { return stores_runs_; }
  // Throws IoError if the file is smaller.
  void check_size(uint64_t least_nbytes) const;
  // Mapped path only: the populated memory of [offset, offset + nbytes).
  Mapping window(uint64_t offset, uint64_t nbytes);
  // Direct path only: addresses, lengths and offsets of writes to descriptor() must be multiples of this. end_writing()
  // cuts off what the last block has too much.
  uint64_t block_nbytes() const { return block_nbytes_; }
  // Asks the disk to start on a written range. An error of this or of an earlier range is thrown by sync() and when the
  // file is published.
  void start_writeback(uint64_t offset, uint64_t nbytes) noexcept;
  bool has_writeback() const { return !memory_backed_ && write_path_ != WritePath::direct && !suspended_; }
  // Whether that is to be done while other ranges are written.
  bool sent_behind() const { return sent_behind_ && has_writeback(); }
  // With keep_cached == false: starts writeback of a written range, and takes out of the page cache what was written
  // some ranges before it. So neither dirty nor clean pages pile up. A save that is taken over has two writers for a
  // while.
  void evict_behind(uint64_t offset, uint64_t nbytes);
  // All chunks are written. A file of this process gets its size.
  virtual void end_writing() {}
  // Returns when the contents are on stable storage and, with keep_cached == false, nowhere else.
  virtual void sync();
  // Throws the error that starting writeback has told, if there was one.
  void check_written() const;
  // The same, and asks a filesystem of other machines, which may tell only when a descriptor is closed that it could
  // not store what was written. To be called when all is written, before the file is published.
  void check_stored() const;

  // Closes the descriptor for the time being; from here on the file can be used only while an Awake of it lives. A file
  // that was given by its descriptor has no name to open it by, and keeps the descriptor.
  virtual void suspend();

  // A suspended file has a descriptor for as long as this lives; for other files it does nothing. Several threads may
  // hold one of the same file at once.
  class Awake {
   public:
    explicit Awake(OutputFile& file);
    ~Awake();
    Awake(const Awake&) = delete;
    Awake& operator=(const Awake&) = delete;

   private:
    OutputFile& file_;
  };

 protected:
  // For a file that is yet to be made, on `filesystem`.
  OutputFile(const std::string& path, uint64_t nbytes, const Intent& intent, const FileSystem& filesystem);

  // Suspends the file, which is opened again by `name` with the access it has now and `flags`.
  void suspend_under(const std::string& name, int flags);
  // What a user needs to know about a file that does not fit, or nothing where another error is meant.
  virtual std::string space_needed(int error) const;

  const std::string path_;  // as the caller wrote it, for messages
  const uint64_t nbytes_;
  Descriptor fd_;
  WritePath write_path_ = WritePath::buffered;
  uint64_t block_nbytes_ = 1;
  bool preallocated_ = false;
  bool storable_ = false;
  bool stores_runs_ = false;

 private:
  void check_kind();

  const uint64_t save_nbytes_;  // of all files of the save
  bool memory_backed_;
  bool one_machine_;
  bool keep_cached_;
  const bool sent_behind_;
  std::string reopened_by_;  // the name of a file that was opened by its name
  // Of a file that was suspended: which one it is, under which name and how it is opened again.
  std::optional<struct stat> suspended_;
  int reopen_flags_ = 0;
  std::mutex waking_;
  size_t awake_ = 0;
  std::mutex evicting_;
  std::deque<std::pair<uint64_t, uint64_t>> behind_;  // ranges being written back: (offset, nbytes)
  std::atomic<int> writeback_error_ = 0;              // the first errno that starting or awaiting writeback has told
  std::vector<std::string> fallbacks_;
};

// Whether so many files at once would take most of the descriptors that this process may still open.
bool too_many_to_keep_open(size_t files) noexcept;

}  // namespace fastshard
