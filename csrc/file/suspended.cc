// SPDX-License-Identifier: Apache-2.0
// More files in one save than the process may have open.
#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>

#include "file/attributes.h"
#include "file/file.h"
#include "file/temporary.h"

namespace fastshard {
namespace {

// So few need no look at what is open.
constexpr size_t kFew = 16;
// Of what is left, the part that a save may take: others open files, too.
constexpr size_t kShare = 4;

size_t open_now() noexcept {
  DIR* const folder = opendir("/proc/self/fd");
  if (folder == nullptr) return 0;
  size_t count = 0;
  while (readdir(folder) != nullptr) ++count;
  closedir(folder);
  return count;
}

}  // namespace

bool too_many_to_keep_open(size_t files) noexcept {
  if (files <= kFew) return false;
  struct rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return false;
  const size_t open = open_now();
  return limit.rlim_cur <= open || files > (limit.rlim_cur - open) / kShare;
}

void OutputFile::suspend() {
  if (temporary_.empty()) {
    struct stat made;
    if (fstat(fd_.get(), &made) != 0) fail("fstat");
    if (!target_.replaced && fchmod(fd_.get(), kStagedMode) == 0) new_mode_ = made.st_mode & 07777;
    const std::string self = self_path(fd_.get());
    const auto name_it = [&](const std::string& name) {
      return linkat(AT_FDCWD, self.c_str(), AT_FDCWD, name.c_str(), AT_SYMLINK_FOLLOW) == 0 ? 0 : errno;
    };
    if (const int error = take_name(target_, path_, name_it, temporary_); error != 0) fail("link", error);
  }
  const int flags = fcntl(fd_.get(), F_GETFL);
  struct stat ours;
  if (flags < 0) fail("fcntl");
  if (fstat(fd_.get(), &ours) != 0) fail("fstat");
  // Locks are the open file's, and it lasts as long as a mapping of it does.
  try {
    mark_.emplace(fd_.get(), 0, 1, path_);
  } catch (const IoError& error) {
    note_fallback("mmap", error.code().value());
  }
  reopen_flags_ = flags & O_DIRECT;
  suspended_ = ours;
  if (const int error = fd_.close(); error != 0) fail("close", error);
}

OutputFile::Awake::Awake(OutputFile& file) : file_(file) {
  const std::lock_guard lock(file_.waking_);
  if (file_.suspended_ && file_.awake_ == 0) {
    const std::string& name = file_.temporary_;
    Descriptor opened(open(name.c_str(), O_RDWR | O_NOFOLLOW | O_CLOEXEC | file_.reopen_flags_));
    if (!opened) file_.fail("open");
    struct stat found;
    if (fstat(opened.get(), &found) != 0) file_.fail("fstat");
    if (found.st_dev != file_.suspended_->st_dev || found.st_ino != file_.suspended_->st_ino) {
      file_.fail("open", ESTALE);  // somebody else's by now
    }
    file_.fd_ = std::move(opened);
  }
  ++file_.awake_;
}

OutputFile::Awake::~Awake() {
  const std::lock_guard lock(file_.waking_);
  if (--file_.awake_ != 0 || !file_.suspended_) return;
  const int flags = fcntl(file_.fd_.get(), F_GETFL);
  if (flags >= 0) file_.reopen_flags_ = flags & O_DIRECT;
  int none = 0;
  if (const int error = file_.fd_.close(); error != 0) file_.writeback_error_.compare_exchange_strong(none, error);
}

// Which file it is, whether it is open or not.
std::optional<struct stat> OutputFile::identity() const {
  if (!fd_) return suspended_;
  struct stat ours;
  return fstat(fd_.get(), &ours) == 0 ? std::optional(ours) : std::nullopt;
}

}  // namespace fastshard
