// SPDX-License-Identifier: Apache-2.0
#include "file/placement.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <memory>
#include <utility>

#include "file/closing.h"
#include "file/hidden_names.h"

namespace fastshard {
namespace {

// Filesystems without hard links say EPERM.
bool without_links(int error) { return is_unsupported(error) || error == EPERM || error == EMLINK || error == EXDEV; }

}  // namespace

const std::optional<struct stat>& Placement::look_again() {
  struct stat info;
  const bool stands = lstat(target_.path.c_str(), &info) == 0;
  if (!stands && errno != ENOENT) file_.fail("lstat");
  if (stands && S_ISDIR(info.st_mode)) throw IoError(EISDIR, file_.path(), "rename");
  if (stands && S_ISREG(info.st_mode)) target_.replaced = info;
  return target_.replaced;
}

void Placement::take_hidden_name(const std::function<int(const std::string&)>& make, const char* action) {
  if (const int error = take_name(target_, file_.path(), make, hidden_); error != 0) file_.fail(action, error);
}

// Returns 0, or an errno.
int Placement::link_as(const std::string& name) const {
  const std::string self = self_path(file_.descriptor());
  return linkat(AT_FDCWD, self.c_str(), AT_FDCWD, name.c_str(), AT_SYMLINK_FOLLOW) == 0 ? 0 : errno;
}

void Placement::link_hidden() {
  take_hidden_name([this](const std::string& name) { return link_as(name); }, "link");
}

int Placement::link_refusal() {
  std::string name;
  const auto link_it = [this](const std::string& tried) { return link_as(tried); };
  const int error = take_name(target_, file_.path(), link_it, name);
  if (error == 0) {
    if (unlink(name.c_str()) != 0 && errno != ENOENT) file_.fail("unlink");
    return 0;
  }
  const bool without_proc = access(self_path(file_.descriptor()).c_str(), F_OK) != 0;
  if (!without_links(error) && !without_proc) file_.fail("link", error);
  return error;
}

void Placement::put(bool keep_old) {
  if (hidden_.empty()) {
    const int error = target_.replaced ? EEXIST : link_as(target_.path);
    if (error == 0) {
      state_ = State::created;
      return;
    }
    if (error != EEXIST) file_.fail("link", error);
    // linkat cannot replace: a hidden name first, for the moment until the rename.
    link_hidden();
  }
  if (keep_old && (exchange_with_target() || keep_old_by_link())) return;
  rename_to_target();
}

// Returns whether the filesystem can do that. Where there is nothing to exchange, the file is put there.
bool Placement::exchange_with_target() {
  const char* const from = hidden_.c_str();
  const char* const to = target_.path.c_str();
  int error = 0;
  for (int attempt = 0; attempt < 3; ++attempt) {  // should others make and remove the file meanwhile
    if (renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_EXCHANGE) == 0) {
      state_ = State::exchanged;
      return true;
    }
    error = errno;
    if (error != ENOENT) break;
    if (renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE) == 0) {
      hidden_.clear();
      state_ = State::created;
      return true;
    }
    error = errno;
    if (error != EEXIST) break;
  }
  if (!is_unsupported(error) && error != EEXIST) file_.fail("rename", error);
  if (error != EEXIST) file_.note_fallback("renameat2", error);
  return false;
}

// The way without an exchange: gives the old file a second name, under which it can be reached until all files stand.
// Returns false if there are no hard links here.
bool Placement::keep_old_by_link() {
  std::string old;
  const auto keep = [&](const std::string& name) { return link(target_.path.c_str(), name.c_str()) == 0 ? 0 : errno; };
  if (const int error = take_name(target_, file_.path(), keep, old); error != 0) {
    const bool nothing_there = error == ENOENT;
    if (!nothing_there && !without_links(error)) file_.fail("link", error);
    if (!nothing_there) file_.note_fallback("link", error);
    if (!nothing_there) return false;
    rename_to_target();
    if (state_ == State::replaced) state_ = State::created;
    return true;
  }
  if (rename(hidden_.c_str(), target_.path.c_str()) != 0) {
    const int error = errno;
    unlink(old.c_str());
    file_.fail("rename", error);
  }
  hidden_ = std::move(old);
  state_ = State::exchanged;
  return true;
}

// Holds the old file, which has this name, open, so that it is not freed by losing the name: that waits for a busy
// disk, and frees the pages of a large file. Memory is not held back, as whoever needs it may not wait for it.
// Filesystems of other machines would keep the name for as long as the file is open.
Descriptor Placement::held_old(const std::string& name) const {
  if (!target_.replaced || file_.memory_backed() || !file_.one_machine()) return Descriptor(-1);
  return Descriptor(open(name.c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC));
}

void Placement::rename_to_target() {
  Descriptor old = held_old(target_.path);
  if (rename(hidden_.c_str(), target_.path.c_str()) != 0) {
    const int error = errno;
    if (!is_unsupported(error) || target_.replaced) file_.fail("rename", error);
    file_.note_fallback("rename", error);
    copy_to_target();
    return;
  }
  hidden_.clear();
  state_ = State::replaced;
  if (old) close_soon(old.release());
}

// For filesystems that cannot rename (some object-store mounts), and only where there is no old file to be lost.
void Placement::copy_to_target() {
  Descriptor out(open(target_.path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
  if (!out) file_.fail("open");
  state_ = State::created;  // undone from here on if the copy fails
  constexpr size_t kNbytes = 4 << 20;
  const auto buffer = std::make_unique<char[]>(kNbytes);
  for (off_t offset = 0;;) {
    const ssize_t got = pread(file_.descriptor(), buffer.get(), kNbytes, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) file_.fail("read");
    if (got == 0) break;
    for (ssize_t done = 0; done < got;) {
      const ssize_t put = ::write(out.get(), buffer.get() + done, static_cast<size_t>(got - done));
      if (put < 0 && errno == EINTR) continue;
      if (put < 0) file_.fail("write");
      done += put;
    }
    offset += got;
  }
  if (fsync(out.get()) != 0 && errno != EINVAL) file_.fail("fsync");
  if (!file_.keep_cached()) {
    posix_fadvise(out.get(), 0, 0, POSIX_FADV_DONTNEED);
    posix_fadvise(file_.descriptor(), 0, 0, POSIX_FADV_DONTNEED);
  }
  if (const int error = out.close(); error != 0) file_.fail("close", error);
}

int Placement::put_back() noexcept {
  if (state_ == State::temporary || state_ == State::replaced) return 0;
  const bool copied = state_ == State::created && !hidden_.empty();
  if (copied || !lost(target_.path)) {
    const auto undo = [&] {
      return state_ == State::created ? unlink(target_.path.c_str()) : rename(hidden_.c_str(), target_.path.c_str());
    };
    const int harmless = state_ == State::created ? ENOENT : 0;
    if (undo() != 0 && errno != harmless && undo() != 0 && errno != harmless) return errno;
    if (state_ == State::exchanged) hidden_.clear();
  }
  state_ = State::temporary;
  return 0;
}

int Placement::remove_old() noexcept {
  Descriptor old = hidden_.empty() ? Descriptor(-1) : held_old(hidden_);
  const bool failed = !hidden_.empty() && unlink(hidden_.c_str()) != 0 && errno != ENOENT;
  const int error = failed ? errno : 0;
  hidden_.clear();
  settle();
  if (old) close_soon(old.release());
  return error;
}

void Placement::hand_old_to(Placement& previous) noexcept {
  if (state_ != State::exchanged || !previous.is_at(hidden_)) return;
  previous.hidden_ = std::exchange(hidden_, {});
  previous.state_ = State::temporary;
}

void Placement::discard() noexcept {
  if (state_ == State::replaced) return;
  if (put_back() == 0 && !hidden_.empty() && unlink(hidden_.c_str()) != 0 && errno != ENOENT) {
    unlink(hidden_.c_str());  // tried once more; if it fails again, the next save of this target removes it
  }
  hidden_.clear();
}

bool Placement::is_at(const std::string& name) const {
  const auto ours = file_.identity();
  struct stat theirs;
  return ours && lstat(name.c_str(), &theirs) == 0 && ours->st_dev == theirs.st_dev && ours->st_ino == theirs.st_ino;
}

bool Placement::lost(const std::string& name) const {
  struct stat theirs;
  if (lstat(name.c_str(), &theirs) != 0) return errno == ENOENT;
  const auto ours = file_.identity();
  return ours && (ours->st_dev != theirs.st_dev || ours->st_ino != theirs.st_ino);
}

PlacedFile::Site PlacedFile::site_of(const std::string& path, const Intent& intent) {
  Target target = find_target(path, intent.follow_links);
  FileSystem filesystem = filesystem_of(target.directory, path);
  return {.target = std::move(target), .filesystem = std::move(filesystem)};
}

}  // namespace fastshard
