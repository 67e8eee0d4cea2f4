// SPDX-License-Identifier: Apache-2.0
// Files that appear under their name complete or not at all.
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
#include "file/target.h"

namespace fastshard {

// Nobody but the owner, until the file has its final mode.
inline constexpr mode_t kStagedMode = 0600;

// A file being written: a nameless or hidden sibling of its target until publish(). The destructor removes
// what was not published. write(), window() and start_writeback() may be called by several threads at once.
class OutputFile {
 public:
  // Checks the target, removes what killed saves of it have left, makes the temporary, which nobody may read who may
  // not read the target, and preallocates `nbytes` where that is of use; a full disk is IoError(ENOSPC). 0: not known.
  OutputFile(const std::string& path, uint64_t nbytes, const Intent& intent);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  WritePath write_path() const { return write_path_; }
  // What the filesystem refused and what was done instead.
  const std::vector<std::string>& fallbacks() const { return fallbacks_; }

  // Writes all of `parts` (changed on the way) at `offset`.
  void write(std::span<iovec> parts, uint64_t offset);
  // Mapped path only: the populated memory of [offset, offset + nbytes).
  Mapping window(uint64_t offset, uint64_t nbytes);
  // The memory of the whole file, which gets its size by this.
  Mapping map();
  // Asks the disk to start on a written range. What the disk has to say of ranges before comes up in sync() and when
  // the file is published.
  void start_writeback(uint64_t offset, uint64_t nbytes) noexcept;
  bool has_writeback() const { return !memory_backed_ && write_path_ != WritePath::direct && !suspended_; }
  // Direct path only: what addresses, lengths and offsets of writes to descriptor() must be multiples of. The end of
  // the last block is cut off again by end_writing().
  uint64_t block_nbytes() const { return block_nbytes_; }
  int descriptor() const { return fd_.get(); }
  const std::string& path() const { return path_; }
  // With keep_cached == false, behind a single writer: starts writeback of a written range, and takes out of the
  // page cache what was written some ranges before it. So neither dirty nor clean pages pile up.
  void evict_behind(uint64_t offset, uint64_t nbytes);
  bool keep_cached() const { return keep_cached_; }
  // All chunks are written: the file gets its size.
  void end_writing();
  // Returns when the contents are on stable storage and, with keep_cached == false, nowhere else. The file has the
  // attributes that it will be published with.
  void sync();
  // Gives the descriptor back for the time being: the file has a hidden name then, and is still marked as in use. From
  // here on only an Awake can work on it.
  void suspend();

  // A file that was suspended has its descriptor for as long as this lives; of others nothing changes. Several threads
  // may hold one on the same file at once.
  class Awake {
   public:
    explicit Awake(OutputFile& file);
    ~Awake();
    Awake(const Awake&) = delete;
    Awake& operator=(const Awake&) = delete;

   private:
    OutputFile& file_;
  };

  // Gives the file up: nothing of it remains. Nothing happens to a published file.
  void discard() noexcept;

  friend void require_space(std::span<OutputFile* const> files);
  friend void publish(std::span<OutputFile* const> files, bool durable);
  friend void swap_into_place(OutputFile& file, OutputFile* previous, bool durable);

  // For files that are published more than once: whether it can be, nobody having cut it or taken its name.
  bool intact() const;

 private:
  // How far the file has come, and so what undoing it takes. Where it is in place, temporary_ is what is to be removed
  // when all stand.
  enum class State {
    temporary,  // nameless, or under temporary_
    created,    // in place, where there was nothing
    exchanged,  // in place; temporary_ holds the old file
    replaced,   // in place; the old file is gone
  };

  void open_temporary(bool at_once);
  bool open_nameless();
  int open_named(const std::string& name);
  void preallocate();
  void try_direct();
  void take_attributes();
  void check_written() const;
  void put_in_place(bool keep_old);
  void replace_target(bool keep_old);
  bool exchange_with_target();
  bool keep_old_by_link();
  Descriptor held_old() const;
  void rename_to_target();
  void copy_to_target();
  int put_back() noexcept;
  int remove_old() noexcept;
  std::optional<struct stat> identity() const;
  bool is_at(const std::string& name) const;
  bool lost(const std::string& name) const;
  [[noreturn]] void fail(const char* action, int error = errno) const;
  std::string room(int error) const;
  void note_fallback(const std::string& refused, int error = errno);

  const std::string path_;  // as the caller wrote it, for messages
  Target target_;
  const uint64_t nbytes_;
  const uint64_t save_nbytes_;  // of all files of the save
  bool preallocated_ = false;
  Descriptor fd_;
  std::string temporary_;               // empty while the file has no name
  std::optional<mode_t> new_mode_;      // of a new file under a hidden name, where it still has less
  std::optional<struct stat> adopted_;  // of the file whose attributes it has
  // Of a file that was suspended: which one it is, how it is opened again, and its first page mapped, which keeps the
  // mark of the descriptor that is gone.
  std::optional<struct stat> suspended_;
  int reopen_flags_ = 0;
  std::optional<Mapping> mark_;
  std::mutex waking_;
  size_t awake_ = 0;
  State state_ = State::temporary;
  WritePath write_path_ = WritePath::buffered;
  bool memory_backed_ = false;
  bool one_machine_ = false;
  bool keep_cached_;
  uint64_t block_nbytes_ = 1;
  std::deque<std::pair<uint64_t, uint64_t>> behind_;  // ranges being written back: (offset, nbytes)
  std::atomic<int> writeback_error_ = 0;              // the first errno that starting or awaiting writeback has told
  std::vector<std::string> fallbacks_;
};

// Whether so many files at once would take most of the descriptors that this process may still open.
bool too_many_to_keep_open(size_t files) noexcept;

// IoError(ENOSPC) unless what could not be preallocated fits, all of it together, into what is free now.
void require_space(std::span<OutputFile* const> files);

// Makes all files visible under their targets, or none of them: when one cannot be put in place, those that
// were get their old contents back. Contents must be complete. `durable`: the names are on stable storage too.
// Between the first and the last rename a kill leaves some files new and some old, each complete. An error that comes
// when all of them stand is an IoError that says so.
void publish(std::span<OutputFile* const> files, bool durable);

// publish() for a file that will be written again: `previous`, the one published before, is a hidden file
// afterwards, to be published again. Should somebody else have taken its place, that file goes instead.
void swap_into_place(OutputFile& file, OutputFile* previous, bool durable);

}  // namespace fastshard
