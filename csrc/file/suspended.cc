// SPDX-License-Identifier: Apache-2.0
// More files in one save than the process may have open.
#include <dirent.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>

#include "file/output.h"

namespace fastshard {
namespace {

// So few files are never too many, whatever else is open.
constexpr size_t kFew = 16;
// A save may take one part in so many of the descriptors that are left, as others open files, too.
constexpr size_t kShare = 4;

size_t open_now() noexcept {
  DIR* const folder = opendir("/proc/self/fd");
  if (folder == nullptr) return 0;
  size_t count = 0;
  while (readdir(folder) != nullptr) ++count;
  closedir(folder);
  return count;
}

// The flags of an open file that it is opened with again.
int kept(int flags) { return flags & (O_ACCMODE | O_DIRECT); }

}  // namespace

bool too_many_to_keep_open(size_t files) noexcept {
  if (files <= kFew) return false;
  struct rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return false;
  const size_t open = open_now();
  return limit.rlim_cur <= open || files > (limit.rlim_cur - open) / kShare;
}

void OutputFile::suspend() {
  if (!reopened_by_.empty()) suspend_under(reopened_by_, 0);
}

void OutputFile::suspend_under(const std::string& name, int flags) {
  const int current = fcntl(fd_.get(), F_GETFL);
  struct stat ours;
  if (current < 0) fail("fcntl");
  if (fstat(fd_.get(), &ours) != 0) fail("fstat");
  reopened_by_ = name;
  reopen_flags_ = kept(current) | flags;
  suspended_ = ours;
  if (const int error = fd_.close(); error != 0) fail("close", error);
}

OutputFile::Awake::Awake(OutputFile& file) : file_(file) {
  const std::lock_guard lock(file_.waking_);
  if (file_.suspended_ && file_.awake_ == 0) {
    Descriptor opened(open(file_.reopened_by_.c_str(), file_.reopen_flags_ | O_CLOEXEC));
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
  // A file may have lost O_DIRECT meanwhile.
  const int current = fcntl(file_.fd_.get(), F_GETFL);
  if (current >= 0) file_.reopen_flags_ = (file_.reopen_flags_ & ~O_DIRECT) | (current & O_DIRECT);
  int none = 0;
  if (const int error = file_.fd_.close(); error != 0) file_.writeback_error_.compare_exchange_strong(none, error);
}

std::optional<struct stat> OutputFile::identity() const {
  if (!fd_) return suspended_;
  struct stat ours;
  return fstat(fd_.get(), &ours) == 0 ? std::optional(ours) : std::nullopt;
}

}  // namespace fastshard
