// SPDX-License-Identifier: Apache-2.0
#include "file/file.h"

#include <fcntl.h>
#include <limits.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <new>

#include "file/attributes.h"
#include "file/closing.h"
#include "file/temporary.h"

namespace fastshard {
namespace {

bool unsupported(int error) { return error == EOPNOTSUPP || error == ENOSYS || error == EINVAL; }

// What files take up that saves before have replaced may still be on its way back.
bool no_room(int error) { return error == ENOSPC || error == EDQUOT; }

// Kernels and filesystems without O_TMPFILE take it for a directory to be opened.
bool without_nameless_files(int error) { return unsupported(error) || error == EISDIR || error == ENOENT; }

uint64_t round_up(uint64_t nbytes, uint64_t unit) { return (nbytes + unit - 1) / unit * unit; }

// Direct I/O in blocks of at least a page, as smaller ones are slow where the filesystem's own are larger.
constexpr uint64_t kMinBlockNbytes = 4096;
constexpr uint64_t kMaxBlockNbytes = 64 << 10;
// Written ranges that wait for the disk while the next one is written.
constexpr size_t kRangesBehind = 4;

// 0 where there is no direct I/O that staging slots, which are aligned to pages, could do.
uint64_t direct_block_nbytes(int fd) {
#ifdef STATX_DIOALIGN  // Linux 6.1
  struct statx info;
  if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &info) == 0 && (info.stx_mask & STATX_DIOALIGN) != 0) {
    const uint64_t block = info.stx_dio_offset_align;
    if (block == 0 || block > kMaxBlockNbytes || info.stx_dio_mem_align > kMinBlockNbytes) return 0;
    return std::max(kMinBlockNbytes, block);
  }
#else
  static_cast<void>(fd);
#endif
  return kMinBlockNbytes;
}

bool set_direct(int fd, bool direct) {
  const int flags = fcntl(fd, F_GETFL);
  return flags >= 0 && fcntl(fd, F_SETFL, direct ? flags | O_DIRECT : flags & ~O_DIRECT) == 0;
}

// 0, or the errno of data that could not be stored. Where the call is unknown or forbidden, fsync() will tell.
int request_writeback(int fd, uint64_t offset, uint64_t nbytes, unsigned flags) {
  if (sync_file_range(fd, static_cast<off_t>(offset), static_cast<off_t>(nbytes), flags) == 0) return 0;
  return unsupported(errno) || errno == ESPIPE || errno == EPERM || errno == EINTR ? 0 : errno;
}

std::string in_words(uint64_t nbytes) {
  constexpr const char* kUnits[] = {"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  auto value = static_cast<double>(nbytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    ++unit;
  }
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), unit == 0 ? "%.0f %s" : "%.1f %s", value, kUnits[unit]);
  return text.data();
}

}  // namespace

OutputFile::OutputFile(const std::string& path, uint64_t nbytes, const Intent& intent)
    : path_(path),
      target_(find_target(path, intent.follow_links)),
      nbytes_(nbytes),
      save_nbytes_(std::max(nbytes, intent.nbytes)),
      keep_cached_(intent.keep_cached) {
  const FileSystem filesystem = filesystem_of(target_.directory, path_);
  memory_backed_ = filesystem.memory_backed;
  one_machine_ = filesystem.one_machine;
  if (memory_backed_) keep_cached_ = true;  // its files are the page cache
  write_path_ = choose_write_path(filesystem, intent).path;
  fallbacks_ = remove_leftovers(target_, one_machine_);  // first, as it may take the room
  open_temporary(intent.at_once);
  try {
    if (write_path_ == WritePath::direct) try_direct();
    if (nbytes_ != 0) preallocate();
  } catch (...) {
    discard();
    throw;
  }
}

OutputFile::~OutputFile() { discard(); }

void OutputFile::fail(const char* action, int error) const { throw IoError(error, path_, action, room(error)); }

// What a user needs to know of a file that does not fit.
std::string OutputFile::room(int error) const {
  if (error != ENOSPC && error != EDQUOT && error != EFBIG) return {};
  if (nbytes_ == 0) return {};  // somebody else writes it
  std::string text = in_words(nbytes_) + " needed";
  if (save_nbytes_ != nbytes_) text += " for this file (" + in_words(save_nbytes_) + " for all of the save)";
  if (error == EFBIG) return text + ", more than the filesystem or the process's limit allows a file to have";
  struct statvfs space;
  struct stat taken;
  if (error == ENOSPC && fstatvfs(fd_.get(), &space) == 0 && fstat(fd_.get(), &taken) == 0) {
    const uint64_t free = static_cast<uint64_t>(space.f_bavail) * space.f_frsize;
    text += ", " + in_words(free + static_cast<uint64_t>(taken.st_blocks) * 512) + " free";
  }
  if (target_.replaced) text += "; the old file is kept until the new one stands";
  return text;
}

void OutputFile::note_fallback(const std::string& refused, int error) {
  fallbacks_.push_back(refused + " refused: " + std::generic_category().message(error));
}

void OutputFile::open_temporary(bool at_once) {
  // Where one is replaced the file needs a hidden name in any case: given at once, it is one change of the folder less.
  const bool named = at_once && target_.replaced;
  if (!named && open_nameless()) return;
  const int error = take_name(
      target_, path_, [&](const std::string& name) { return open_named(name); }, temporary_);
  if (error != 0) fail("open", error);
  if (target_.replaced) return;
  struct stat made;
  if (fstat(fd_.get(), &made) != 0) {
    const int failed = errno;
    discard();
    fail("fstat", failed);
  }
  if (fchmod(fd_.get(), made.st_mode & kStagedMode) == 0) {
    new_mode_ = made.st_mode & 07777;
  } else {
    note_fallback("fchmod");
  }
}

// Whether there is such a thing here.
bool OutputFile::open_nameless() {
  // Of a new file the kernel makes the mode, by umask and the directory's default list.
  const mode_t mode = target_.replaced ? kStagedMode : 0666;
  fd_ = Descriptor(open(target_.directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, mode));
  if (!fd_ && !without_nameless_files(errno)) fail("open");
  // A nameless file can only be given a name through /proc.
  if (fd_ && access(self_path(fd_.get()).c_str(), F_OK) == 0) {
    mark_in_use(fd_.get());
    return true;
  }
  const int refusal = errno;
  if (fd_ && refusal != ENOENT && refusal != ENOTDIR && refusal != EACCES) fail("access", refusal);
  if (fd_ || refusal != ENOENT) note_fallback("O_TMPFILE", refusal);
  return false;
}

// Makes the file under a hidden name. 0, or an errno.
int OutputFile::open_named(const std::string& name) {
  fd_ = Descriptor(
      open(name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, target_.replaced ? kStagedMode : 0666));
  if (!fd_) return errno;
  // Until it is marked, another save may take it for a leftover.
  const int error = mark_in_use(fd_.get());
  if (error == EAGAIN || lost(name)) return EEXIST;
  if (error != 0) note_fallback("locks", error);
  return 0;
}

void OutputFile::preallocate() {
  // Makes later writes cheaper on disk filesystems and dearer on tmpfs, where it would also make small pages of
  // what could be huge ones. There only a mapping needs it, on kernels that cannot populate: a store to a page
  // that cannot be had is a SIGBUS.
  if (memory_backed_ && write_path_ == WritePath::buffered) return;
  if (memory_backed_ && can_populate()) {
    if (ftruncate(fd_.get(), static_cast<off_t>(nbytes_)) != 0) fail("ftruncate");
    return;
  }
  int result;
  do {
    result = fallocate(fd_.get(), 0, 0, static_cast<off_t>(round_up(nbytes_, block_nbytes_)));
  } while (result != 0 && (errno == EINTR || (no_room(errno) && wait_for_closing())));
  preallocated_ = result == 0;
  if (preallocated_) return;
  if (!unsupported(errno)) fail("fallocate");
  note_fallback("fallocate");
  if (write_path_ != WritePath::direct) write_path_ = WritePath::buffered;
}

// Proves direct I/O by a write, as some filesystems take the flag and refuse the writes. Where it does not work the
// file is buffered.
void OutputFile::try_direct() {
  const auto works = [&] {
    errno = EINVAL;
    if (memory_backed_) return false;  // takes the flag, too, of late, and ignores it
    block_nbytes_ = direct_block_nbytes(fd_.get());
    if (block_nbytes_ == 0 || !set_direct(fd_.get(), true)) return false;
    const std::unique_ptr<void, void (*)(void*)> block(std::aligned_alloc(kMinBlockNbytes, block_nbytes_), std::free);
    if (block == nullptr) throw std::bad_alloc();
    std::memset(block.get(), 0, block_nbytes_);
    ssize_t written;
    do {
      written = pwrite(fd_.get(), block.get(), block_nbytes_, 0);
    } while (written < 0 && errno == EINTR);
    if (written < 0 && !unsupported(errno)) fail("write");
    return written >= 0;
  };
  if (works()) return;
  note_fallback("O_DIRECT");
  if (!set_direct(fd_.get(), false)) fail("fcntl");
  block_nbytes_ = 1;
  write_path_ = WritePath::buffered;
}

void require_space(std::span<OutputFile* const> files) {
  std::map<dev_t, uint64_t> wanted;
  for (const OutputFile* file : files) {
    if (file->preallocated_) continue;
    const auto info = file->identity();
    struct statvfs space;
    // No answer is no reason to refuse, and filesystems without a limit report no blocks at all.
    if (!info || statvfs(file->target_.directory.c_str(), &space) != 0 || space.f_blocks == 0) continue;
    wanted[info->st_dev] += file->nbytes_;
    if (wanted[info->st_dev] > static_cast<uint64_t>(space.f_bavail) * space.f_frsize) {
      file->fail("reserve", ENOSPC);
    }
  }
}

void OutputFile::write(std::span<iovec> parts, uint64_t offset) {
  while (!parts.empty()) {
    const auto count = static_cast<int>(std::min<size_t>(parts.size(), IOV_MAX));
    const ssize_t written = pwritev(fd_.get(), parts.data(), count, static_cast<off_t>(offset));
    if (written < 0) {
      if (errno == EINTR) continue;
      fail("write");
    }
    if (written == 0) throw IoError(EIO, path_, "write");
    offset += static_cast<uint64_t>(written);
    auto left = static_cast<size_t>(written);
    while (!parts.empty() && left >= parts.front().iov_len) {
      left -= parts.front().iov_len;
      parts = parts.subspan(1);
    }
    if (left != 0) {
      parts.front().iov_base = static_cast<std::byte*>(parts.front().iov_base) + left;
      parts.front().iov_len -= left;
    }
  }
}

Mapping OutputFile::window(uint64_t offset, uint64_t nbytes) {
  Mapping window(fd_.get(), offset, nbytes, path_);
  try {
    populate(window.bytes(), path_);
  } catch (const IoError& error) {
    // Pages of a file in memory can be lacking; those of a disk are reserved, so that it has failed.
    const int code = error.code().value();
    fail("populate", code == ENOSPC && preallocated_ && !memory_backed_ ? EIO : code);
  }
  return window;
}

Mapping OutputFile::map() {
  if (ftruncate(fd_.get(), static_cast<off_t>(nbytes_)) != 0) fail("ftruncate");
  return Mapping(fd_.get(), 0, nbytes_, path_);
}

void OutputFile::start_writeback(uint64_t offset, uint64_t nbytes) noexcept {
  const int error = request_writeback(fd_.get(), offset, nbytes, SYNC_FILE_RANGE_WRITE);
  int none = 0;
  if (error != 0) writeback_error_.compare_exchange_strong(none, error);
}

// The kernel tells each descriptor of an error once: fsync() will not repeat what is told here.
void OutputFile::check_written() const {
  if (const int error = writeback_error_; error != 0) fail("sync_file_range", error);
}

void OutputFile::evict_behind(uint64_t offset, uint64_t nbytes) {
  start_writeback(offset, nbytes);
  behind_.emplace_back(offset, nbytes);
  while (behind_.size() > kRangesBehind) {
    const auto [begin, length] = behind_.front();
    behind_.pop_front();
    const int error = request_writeback(
        fd_.get(), begin, length, SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
    if (error != 0) fail("sync_file_range", error);
    posix_fadvise(fd_.get(), static_cast<off_t>(begin), static_cast<off_t>(length), POSIX_FADV_DONTNEED);
  }
  check_written();
}

void OutputFile::end_writing() {
  if (write_path_ != WritePath::direct) return;
  // Whoever reads or copies it from here on is not bound to blocks.
  if (!set_direct(fd_.get(), false)) fail("fcntl");
  int result;
  do {
    result = ftruncate(fd_.get(), static_cast<off_t>(nbytes_));
  } while (result != 0 && errno == EINTR);
  if (result != 0) fail("ftruncate");
}

void OutputFile::sync() {
  take_attributes();
  // Filesystems that have nothing to sync say EINVAL.
  if (fsync(fd_.get()) != 0 && errno != EINVAL) fail("fsync");
  check_written();
  // Not sooner: a page that is not on the disk stays, of a direct file the last one, cut by ftruncate.
  if (!keep_cached_) posix_fadvise(fd_.get(), 0, 0, POSIX_FADV_DONTNEED);
}

bool OutputFile::is_at(const std::string& name) const {
  const auto ours = identity();
  struct stat theirs;
  return ours && lstat(name.c_str(), &theirs) == 0 && ours->st_dev == theirs.st_dev && ours->st_ino == theirs.st_ino;
}

// Whether the name is known to be another file's, or nobody's. What cannot be looked at is not lost.
bool OutputFile::lost(const std::string& name) const {
  struct stat theirs;
  if (lstat(name.c_str(), &theirs) != 0) return errno == ENOENT;
  const auto ours = identity();
  return ours && (ours->st_dev != theirs.st_dev || ours->st_ino != theirs.st_ino);
}

bool OutputFile::intact() const {
  struct stat info;
  if (state_ != State::temporary || fstat(fd_.get(), &info) != 0) return false;
  return static_cast<uint64_t>(info.st_size) == nbytes_ && (temporary_.empty() || is_at(temporary_));
}

}  // namespace fastshard
