// SPDX-License-Identifier: Apache-2.0
#include "file.h"

#include <fcntl.h>
#include <limits.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <set>

namespace fastshard {
namespace {

bool unsupported(int error) { return error == EOPNOTSUPP || error == ENOSYS || error == EINVAL; }

std::string parent_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

std::string self_path(int fd) { return "/proc/self/fd/" + std::to_string(fd); }

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

// What is on the disk, out of the page cache.
void evict(int fd) { posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED); }

// fsync; filesystems that have nothing to sync say EINVAL.
void sync_descriptor(int fd, const std::string& path) {
  if (fsync(fd) != 0 && errno != EINVAL) throw IoError(errno, path, "fsync");
}

void sync_directory(const std::string& directory) {
  const Descriptor folder(open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!folder) throw IoError(errno, directory, "open");
  sync_descriptor(folder.get(), directory);
}

}  // namespace

OutputFile::OutputFile(const std::string& path, uint64_t nbytes, const Intent& intent)
    : path_(path), nbytes_(nbytes), keep_cached_(intent.keep_cached) {
  resolve_target();
  const FileSystem filesystem = filesystem_of(directory_, path_);
  memory_backed_ = filesystem.memory_backed;
  if (memory_backed_) keep_cached_ = true;  // its files are the page cache
  write_path_ = choose_write_path(filesystem, intent).path;
  open_temporary();
  try {
    adopt_replaced_attributes();
    if (write_path_ == WritePath::direct) try_direct();
    preallocate();
  } catch (...) {
    discard();
    throw;
  }
}

OutputFile::~OutputFile() { discard(); }

void OutputFile::fail(const char* action) const { throw IoError(errno, path_, action); }

void OutputFile::note_fallback(const std::string& refused, int error) {
  fallbacks_.push_back(refused + " refused: " + std::generic_category().message(error));
}

void OutputFile::resolve_target() {
  constexpr int kMaxLinks = 40;  // as the kernel's own limit
  target_ = path_;
  struct stat info;
  for (int links = 0;; ++links) {
    if (lstat(target_.c_str(), &info) != 0) {
      if (errno != ENOENT || target_.empty()) fail("lstat");
      break;
    }
    if (!S_ISLNK(info.st_mode)) {
      replaced_ = info;
      break;
    }
    if (links == kMaxLinks) throw IoError(ELOOP, path_, "readlink");
    char text[PATH_MAX];
    const ssize_t length = readlink(target_.c_str(), text, sizeof text);
    if (length < 0) fail("readlink");
    const std::string to(text, static_cast<size_t>(length));
    target_ = to.starts_with('/') ? to : parent_of(target_) + "/" + to;
  }
  if (replaced_ && S_ISDIR(replaced_->st_mode)) throw IoError(EISDIR, path_, "open");
  // Renaming over a device or a pipe would take it from everybody else.
  if (replaced_ && !S_ISREG(replaced_->st_mode)) throw IoError(EINVAL, path_, "open");
  directory_ = parent_of(target_);
}

void OutputFile::open_temporary() {
  fd_ = Descriptor(open(directory_.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0666));
  // A nameless file can only be given a name through /proc.
  if (fd_ && access(self_path(fd_.get()).c_str(), F_OK) == 0) {
    mark_in_use(fd_.get());
    return;
  }
  if (errno != ENOENT && errno != EACCES) note_fallback("O_TMPFILE");
  const std::string name = temporary_name(directory_);
  fd_ = Descriptor(open(name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
  if (!fd_) fail("open");
  mark_in_use(fd_.get());
  temporary_ = name;
}

void OutputFile::adopt_replaced_attributes() {
  if (!replaced_) return;  // the kernel has applied the umask and the directory's default ACL
  struct stat ours;
  if (fstat(fd_.get(), &ours) != 0) fail("fstat");
  if ((ours.st_uid != replaced_->st_uid || ours.st_gid != replaced_->st_gid) &&
      fchown(fd_.get(), replaced_->st_uid, replaced_->st_gid) != 0) {
    note_fallback("fchown");  // as anybody but root: the file becomes the saver's
  }
  if (fchmod(fd_.get(), replaced_->st_mode & 07777) != 0) note_fallback("fchmod");
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
  } while (result != 0 && errno == EINTR);
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
  set_direct(fd_.get(), false);
  block_nbytes_ = 1;
  write_path_ = WritePath::buffered;
}

void require_space(std::span<OutputFile* const> files) {
  std::map<dev_t, uint64_t> wanted;
  for (const OutputFile* file : files) {
    if (file->preallocated_) continue;
    struct stat info;
    struct statvfs space;
    // No answer is no reason to refuse, and filesystems without a limit report no blocks at all.
    if (fstat(file->fd_.get(), &info) != 0 || fstatvfs(file->fd_.get(), &space) != 0 || space.f_blocks == 0) continue;
    wanted[info.st_dev] += file->nbytes_;
    if (wanted[info.st_dev] > static_cast<uint64_t>(space.f_bavail) * space.f_frsize) {
      throw IoError(ENOSPC, file->path_, "reserve");
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
  populate(window.bytes(), path_);
  return window;
}

Mapping OutputFile::map() {
  if (ftruncate(fd_.get(), static_cast<off_t>(nbytes_)) != 0) fail("ftruncate");
  return Mapping(fd_.get(), 0, nbytes_, path_);
}

void OutputFile::start_writeback(uint64_t offset, uint64_t nbytes) noexcept {
  sync_file_range(fd_.get(), static_cast<off_t>(offset), static_cast<off_t>(nbytes), SYNC_FILE_RANGE_WRITE);
}

void OutputFile::evict_behind(uint64_t offset, uint64_t nbytes) noexcept {
  start_writeback(offset, nbytes);
  behind_.emplace_back(offset, nbytes);
  while (behind_.size() > kRangesBehind) {
    const auto [begin, length] = behind_.front();
    behind_.pop_front();
    sync_file_range(fd_.get(), static_cast<off_t>(begin), static_cast<off_t>(length),
                    SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
    posix_fadvise(fd_.get(), static_cast<off_t>(begin), static_cast<off_t>(length), POSIX_FADV_DONTNEED);
  }
}

void OutputFile::end_writing() {
  if (write_path_ != WritePath::direct) return;
  set_direct(fd_.get(), false);  // whoever reads or copies it from here on is not bound to blocks
  int result;
  do {
    result = ftruncate(fd_.get(), static_cast<off_t>(nbytes_));
  } while (result != 0 && errno == EINTR);
  if (result != 0) fail("ftruncate");
}

void OutputFile::sync() {
  sync_descriptor(fd_.get(), path_);
  // Not sooner: a page that is not on the disk stays, of a direct file the last one, cut by ftruncate.
  if (!keep_cached_) evict(fd_.get());
}

void OutputFile::put_in_place(bool keep_old) {
  if (temporary_.empty()) {
    const std::string self = self_path(fd_.get());
    if (linkat(AT_FDCWD, self.c_str(), AT_FDCWD, target_.c_str(), AT_SYMLINK_FOLLOW) == 0) {
      state_ = State::created;
      return;
    }
    if (errno != EEXIST) fail("link");
    // linkat cannot replace: a hidden name first, for the moment until the rename.
    const std::string name = temporary_name(directory_);
    if (linkat(AT_FDCWD, self.c_str(), AT_FDCWD, name.c_str(), AT_SYMLINK_FOLLOW) != 0) fail("link");
    temporary_ = name;
  }
  replace_target(keep_old);
}

void OutputFile::replace_target(bool keep_old) {
  const char* from = temporary_.c_str();
  const char* to = target_.c_str();
  if (keep_old) {
    if (renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_EXCHANGE) == 0) {
      state_ = State::exchanged;
      return;
    }
    if (errno == ENOENT && renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE) == 0) {
      temporary_.clear();
      state_ = State::created;
      return;
    }
    if (!unsupported(errno) && errno != EEXIST) fail("rename");
    if (errno != EEXIST) note_fallback("renameat2");
    // Without an exchange: the old file stays reachable under a second name until all files stand.
    const std::string old = temporary_name(directory_);
    if (link(to, old.c_str()) == 0) {
      if (rename(from, to) != 0) {
        const int error = errno;
        unlink(old.c_str());
        errno = error;
        fail("rename");
      }
      temporary_ = old;
      state_ = State::exchanged;
      return;
    }
    if (errno == ENOENT) {
      if (rename(from, to) != 0) fail("rename");
      temporary_.clear();
      state_ = State::created;
      return;
    }
    note_fallback("link");
  }
  if (rename(from, to) != 0) {
    if (!unsupported(errno) || replaced_) fail("rename");
    note_fallback("rename");
    copy_to_target();
    return;
  }
  temporary_.clear();
  state_ = State::replaced;
}

// Where nothing can be renamed (some object-store mounts) and nothing would be lost.
void OutputFile::copy_to_target() {
  const Descriptor out(open(target_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
  if (!out) fail("open");
  state_ = State::created;  // undone from here on if the copy fails
  std::vector<char> buffer(4 << 20);
  for (off_t offset = 0;;) {
    const ssize_t got = pread(fd_.get(), buffer.data(), buffer.size(), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail("read");
    if (got == 0) break;
    for (ssize_t done = 0; done < got;) {
      const ssize_t put = ::write(out.get(), buffer.data() + done, static_cast<size_t>(got - done));
      if (put < 0 && errno == EINTR) continue;
      if (put < 0) fail("write");
      done += put;
    }
    offset += got;
  }
  sync_descriptor(out.get(), path_);
  if (!keep_cached_) {
    evict(out.get());
    evict(fd_.get());
  }
  unlink(temporary_.c_str());
  temporary_.clear();
}

void OutputFile::discard() noexcept {
  if (state_ == State::created) unlink(target_.c_str());
  if (state_ == State::exchanged && rename(temporary_.c_str(), target_.c_str()) == 0) temporary_.clear();
  if (!temporary_.empty()) unlink(temporary_.c_str());
  temporary_.clear();
  if (state_ != State::replaced) state_ = State::temporary;
}

bool OutputFile::has_name(const std::string& name) const {
  struct stat ours, theirs;
  return fstat(fd_.get(), &ours) == 0 && lstat(name.c_str(), &theirs) == 0 && ours.st_dev == theirs.st_dev &&
         ours.st_ino == theirs.st_ino;
}

bool OutputFile::intact() const {
  struct stat info;
  if (state_ != State::temporary || fstat(fd_.get(), &info) != 0) return false;
  return static_cast<uint64_t>(info.st_size) == nbytes_ && (temporary_.empty() || has_name(temporary_));
}

void publish(std::span<OutputFile* const> files, bool durable) {
  // Nothing can fail after the only rename of a single file, so its old contents need not be kept.
  const bool keep_old = files.size() > 1;
  for (OutputFile* file : files) file->put_in_place(keep_old);
  if (durable) {
    std::set<std::string> directories;
    for (const OutputFile* file : files) directories.insert(file->directory_);
    for (const std::string& directory : directories) sync_directory(directory);
  }
  for (OutputFile* file : files) {
    if (file->state_ == OutputFile::State::exchanged) unlink(file->temporary_.c_str());
    file->temporary_.clear();
    file->state_ = OutputFile::State::replaced;
  }
}

void swap_into_place(OutputFile& file, OutputFile* previous, bool durable) {
  file.put_in_place(true);
  const std::string old = file.state_ == OutputFile::State::exchanged ? file.temporary_ : "";
  file.temporary_.clear();
  file.state_ = OutputFile::State::replaced;
  if (!old.empty()) {
    if (previous != nullptr && previous->has_name(old)) {
      previous->temporary_ = old;
      previous->state_ = OutputFile::State::temporary;
    } else {
      unlink(old.c_str());
    }
  }
  if (durable) sync_directory(file.directory_);
}

}  // namespace fastshard
