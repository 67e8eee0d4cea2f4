// SPDX-License-Identifier: Apache-2.0
#include "file/output.h"

#include <fcntl.h>
#include <limits.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <iterator>

namespace fastshard {
namespace {

// Written ranges that wait for the disk while the next one is written.
constexpr size_t kRangesBehind = 4;

// 0, or the errno of data that could not be stored. Where the call is unknown or forbidden, fsync() will tell.
int request_writeback(int fd, uint64_t offset, uint64_t nbytes, unsigned flags) {
  if (sync_file_range(fd, static_cast<off_t>(offset), static_cast<off_t>(nbytes), flags) == 0) return 0;
  return is_unsupported(errno) || errno == ESPIPE || errno == EPERM || errno == EINTR ? 0 : errno;
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

// Not O_CREAT: the file is somebody else's, and must be there.
Descriptor open_for_writing(const std::string& path) {
  Descriptor file(open(path.c_str(), O_WRONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK));
  if (!file) throw IoError(errno, path, "open");
  return file;
}

}  // namespace

OutputFile::OutputFile(Descriptor file, const std::string& path, uint64_t nbytes, const Intent& intent)
    : OutputFile(path, nbytes, intent, filesystem_of(file.get(), path)) {
  fd_ = std::move(file);
  check_kind();
}

OutputFile::OutputFile(const std::string& path, uint64_t nbytes, const Intent& intent)
    : OutputFile(open_for_writing(path), path, nbytes, intent) {
  reopened_by_ = path;
}

OutputFile::OutputFile(const std::string& path, uint64_t nbytes, const Intent& intent, const FileSystem& filesystem)
    : path_(path),
      nbytes_(nbytes),
      save_nbytes_(std::max(nbytes, intent.nbytes)),
      memory_backed_(filesystem.memory_backed),
      one_machine_(filesystem.one_machine),
      keep_cached_(intent.keep_cached || filesystem.memory_backed),
      sent_behind_(intent.sent_behind) {}  // the files of a filesystem in memory are its cache

void OutputFile::check_kind() {
  struct stat info;
  if (fstat(fd_.get(), &info) != 0) throw IoError(errno, path_, "fstat");
  if (S_ISDIR(info.st_mode)) throw IoError(EISDIR, path_, "open");
  const int flags = fcntl(fd_.get(), F_GETFL);
  if (flags < 0) throw IoError(errno, path_, "fcntl");
  if (!S_ISREG(info.st_mode) || (flags & (O_APPEND | O_DIRECT)) != 0) throw IoError(EINVAL, path_, "open");
}

void OutputFile::fail(const char* action, int error) const { throw IoError(error, path_, action, space_needed(error)); }

std::string OutputFile::space_needed(int error) const {
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
  return text;
}

void OutputFile::note_fallback(const std::string& refused, int error) {
  fallbacks_.push_back(refused + " refused: " + std::generic_category().message(error));
}

void OutputFile::note_fallbacks(const std::vector<std::string>& texts) {
  fallbacks_.insert(fallbacks_.end(), texts.begin(), texts.end());
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

int OutputFile::store(std::span<const iovec> parts, uint64_t offset, const std::optional<Mapping>& target) {
  if (target) return copy_by_kernel(target->bytes(), parts);
  uint64_t nbytes = 0;
  for (const iovec& part : parts) nbytes += part.iov_len;
  try {
    const Mapping window(fd_.get(), offset, nbytes, path_);
    return copy_by_kernel(window.bytes(), parts);
  } catch (const IoError& error) {
    return error.code().value();
  }
}

std::optional<Mapping> OutputFile::map_for_store(uint64_t offset, uint64_t nbytes) const noexcept try {
  std::optional<Mapping> target;
  target.emplace(fd_.get(), offset, nbytes, path_);
  populate(target->bytes(), path_);
  return target;
} catch (const std::exception&) {
  return std::nullopt;  // store() will tell
}

void OutputFile::share_pages() {
  const int wanted = one_machine_ ? O_RDWR : O_WRONLY;
  const int flags = fcntl(fd_.get(), F_GETFL);
  if (flags < 0) fail("fcntl");
  if ((flags & O_ACCMODE) != wanted) {
    Descriptor again(open(self_path(fd_.get()).c_str(), wanted | O_CLOEXEC | O_NOCTTY | O_NONBLOCK));
    if (!again && !one_machine_) fail("open");
    if (!again) return note_fallback("mapping the file");
    fd_ = std::move(again);
  }
  stores_runs_ = one_machine_;
}

void OutputFile::check_size(uint64_t least_nbytes) const {
  struct stat info;
  if (fstat(fd_.get(), &info) != 0) fail("fstat");
  const auto nbytes = static_cast<uint64_t>(info.st_size);
  if (nbytes >= least_nbytes) return;
  throw IoError(EIO, path_, "fstat",
                "the file was truncated while it was written: it has " + std::to_string(nbytes) + " bytes, not " +
                    std::to_string(least_nbytes));
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

void OutputFile::start_writeback(uint64_t offset, uint64_t nbytes) noexcept {
  const int error = request_writeback(fd_.get(), offset, nbytes, SYNC_FILE_RANGE_WRITE);
  int none = 0;
  if (error != 0) writeback_error_.compare_exchange_strong(none, error);
}

// The kernel tells each descriptor of an error once: fsync() will not repeat what is told here.
void OutputFile::check_written() const {
  if (const int error = writeback_error_; error != 0) fail("sync_file_range", error);
}

void OutputFile::check_stored() const {
  check_written();
  if (one_machine_) return;
  Descriptor copy(fcntl(fd_.get(), F_DUPFD_CLOEXEC, 0));
  if (!copy) fail("dup");
  if (const int error = copy.close(); error != 0) fail("close", error);
}

void OutputFile::evict_behind(uint64_t offset, uint64_t nbytes) {
  start_writeback(offset, nbytes);
  std::unique_lock lock(evicting_);
  behind_.emplace_back(offset, nbytes);
  while (behind_.size() > kRangesBehind) {
    const auto [begin, length] = behind_.front();
    behind_.pop_front();
    lock.unlock();  // for a wait of its own
    const int error = request_writeback(
        fd_.get(), begin, length, SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
    if (error != 0) fail("sync_file_range", error);
    posix_fadvise(fd_.get(), static_cast<off_t>(begin), static_cast<off_t>(length), POSIX_FADV_DONTNEED);
    lock.lock();
  }
  lock.unlock();
  check_written();
}

void OutputFile::sync() {
  // Filesystems that have nothing to sync say EINVAL.
  if (fsync(fd_.get()) != 0 && errno != EINVAL) fail("fsync");
  check_written();
  // Not sooner: a page that is not on the disk stays, of a direct file the last one, cut by ftruncate.
  if (!keep_cached_) posix_fadvise(fd_.get(), 0, 0, POSIX_FADV_DONTNEED);
}

}  // namespace fastshard
