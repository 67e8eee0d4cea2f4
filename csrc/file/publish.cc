// SPDX-License-Identifier: Apache-2.0
// How finished files get their names.
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <exception>
#include <memory>
#include <set>
#include <utility>

#include "file/attributes.h"
#include "file/closing.h"
#include "file/file.h"
#include "file/temporary.h"

namespace fastshard {
namespace {

// What is not worth waiting for when the disk turns out to be full.
constexpr uint64_t kSmallNbytes = 1 << 20;

bool unsupported(int error) { return error == EOPNOTSUPP || error == ENOSYS || error == EINVAL; }

// Filesystems without hard links say EPERM.
bool without_links(int error) { return unsupported(error) || error == EPERM || error == EMLINK || error == EXDEV; }

bool same_state(const struct stat& one, const struct stat& other) {
  return one.st_dev == other.st_dev && one.st_ino == other.st_ino && one.st_ctim.tv_sec == other.st_ctim.tv_sec &&
         one.st_ctim.tv_nsec == other.st_ctim.tv_nsec;
}

// 0, or the errno of what failed.
int sync_directory(const std::string& directory) {
  const Descriptor folder(open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!folder) return errno;
  return fsync(folder.get()) == 0 || errno == EINVAL ? 0 : errno;  // EINVAL: there is nothing to sync
}

std::string all_of(size_t files) {
  return files == 1 ? "the new file is in place" : "all " + std::to_string(files) + " new files are in place";
}

IoError not_durable(int error, const std::string& path, size_t files) {
  return {error, path, "fsync", all_of(files) + ", but not known to be on stable storage", true};
}

IoError not_removed(int error, const std::string& path, size_t files) {
  return {error, path, "unlink", all_of(files) + ", but the old one could not be removed and still takes its room",
          true};
}

}  // namespace

// Owner, mode, list and extended attributes of the file that stands there now, or stood there when the save began.
void OutputFile::take_attributes() {
  struct stat info;
  const bool stands = lstat(target_.path.c_str(), &info) == 0;
  if (!stands && errno != ENOENT) fail("lstat");
  if (stands && S_ISDIR(info.st_mode)) throw IoError(EISDIR, path_, "rename");
  if (stands && S_ISREG(info.st_mode)) target_.replaced = info;
  if (target_.replaced) {
    if (adopted_ && same_state(*adopted_, *target_.replaced)) return;
    adopted_ = target_.replaced;
    for (std::string& refused : adopt_attributes(fd_.get(), target_.path, *adopted_, path_)) {
      fallbacks_.push_back(std::move(refused));
    }
  } else if (new_mode_) {
    if (fchmod(fd_.get(), *new_mode_) != 0) note_fallback("fchmod");
  }
  new_mode_.reset();
}

void OutputFile::put_in_place(bool keep_old) {
  const Awake awake(*this);
  check_written();
  take_attributes();
  if (!one_machine_) {
    // Filesystems of other machines may tell only a descriptor that is closed what they could not store.
    Descriptor copy(fcntl(fd_.get(), F_DUPFD_CLOEXEC, 0));
    if (!copy) fail("dup");
    if (const int error = copy.close(); error != 0) fail("close", error);
  }
  if (temporary_.empty()) {
    const std::string self = self_path(fd_.get());
    const auto name_it = [&](const std::string& name) {
      return linkat(AT_FDCWD, self.c_str(), AT_FDCWD, name.c_str(), AT_SYMLINK_FOLLOW) == 0 ? 0 : errno;
    };
    const int error = target_.replaced ? EEXIST : name_it(target_.path);
    if (error == 0) {
      state_ = State::created;
      return;
    }
    if (error != EEXIST) fail("link", error);
    // linkat cannot replace: a hidden name first, for the moment until the rename.
    if (const int refused = take_name(target_, path_, name_it, temporary_); refused != 0) fail("link", refused);
  }
  replace_target(keep_old);
}

void OutputFile::replace_target(bool keep_old) {
  if (keep_old && (exchange_with_target() || keep_old_by_link())) return;
  rename_to_target();
}

// Whether that is possible here. Puts a new file where there was nothing.
bool OutputFile::exchange_with_target() {
  const char* const from = temporary_.c_str();
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
      temporary_.clear();
      state_ = State::created;
      return true;
    }
    error = errno;
    if (error != EEXIST) break;
  }
  if (!unsupported(error) && error != EEXIST) fail("rename", error);
  if (error != EEXIST) note_fallback("renameat2", error);
  return false;
}

// Without an exchange: the old file stays reachable under a second name until all files stand. Whether it does.
bool OutputFile::keep_old_by_link() {
  std::string old;
  const auto keep = [&](const std::string& name) { return link(target_.path.c_str(), name.c_str()) == 0 ? 0 : errno; };
  if (const int error = take_name(target_, path_, keep, old); error != 0) {
    const bool nothing_there = error == ENOENT;
    if (!nothing_there && !without_links(error)) fail("link", error);
    if (!nothing_there) note_fallback("link", error);
    if (!nothing_there) return false;
    rename_to_target();
    if (state_ == State::replaced) state_ = State::created;
    return true;
  }
  if (rename(temporary_.c_str(), target_.path.c_str()) != 0) {
    const int error = errno;
    unlink(old.c_str());
    fail("rename", error);
  }
  temporary_ = std::move(old);
  state_ = State::exchanged;
  return true;
}

// The old file where it is small, so that a rename does not free it: that waits for the disk while the file is still
// being written back. Others' filesystems would keep its name for as long as it is open.
Descriptor OutputFile::held_old() const {
  const bool small = target_.replaced && static_cast<uint64_t>(target_.replaced->st_blocks) * 512 <= kSmallNbytes;
  if (!small || memory_backed_ || !one_machine_) return Descriptor(-1);
  return Descriptor(open(target_.path.c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC));
}

void OutputFile::rename_to_target() {
  Descriptor old = held_old();
  if (rename(temporary_.c_str(), target_.path.c_str()) != 0) {
    const int error = errno;
    if (!unsupported(error) || target_.replaced) fail("rename", error);
    note_fallback("rename", error);
    copy_to_target();
    return;
  }
  temporary_.clear();
  state_ = State::replaced;
  if (old) close_soon(old.release());
}

// Where nothing can be renamed (some object-store mounts) and nothing would be lost.
void OutputFile::copy_to_target() {
  Descriptor out(open(target_.path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
  if (!out) fail("open");
  state_ = State::created;  // undone from here on if the copy fails
  constexpr size_t kNbytes = 4 << 20;
  const auto buffer = std::make_unique<char[]>(kNbytes);
  for (off_t offset = 0;;) {
    const ssize_t got = pread(fd_.get(), buffer.get(), kNbytes, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail("read");
    if (got == 0) break;
    for (ssize_t done = 0; done < got;) {
      const ssize_t put = ::write(out.get(), buffer.get() + done, static_cast<size_t>(got - done));
      if (put < 0 && errno == EINTR) continue;
      if (put < 0) fail("write");
      done += put;
    }
    offset += got;
  }
  if (fsync(out.get()) != 0 && errno != EINVAL) fail("fsync");
  if (!keep_cached_) {
    posix_fadvise(out.get(), 0, 0, POSIX_FADV_DONTNEED);
    posix_fadvise(fd_.get(), 0, 0, POSIX_FADV_DONTNEED);
  }
  if (const int error = out.close(); error != 0) fail("close", error);
}

// Undoes put_in_place(), unless somebody else has replaced the file meanwhile. 0, or the errno of what failed; the new
// file stands then.
int OutputFile::put_back() noexcept {
  if (state_ == State::temporary || state_ == State::replaced) return 0;
  const bool copied = state_ == State::created && !temporary_.empty();
  if (copied || !lost(target_.path)) {
    const auto undo = [&] {
      return state_ == State::created ? unlink(target_.path.c_str()) : rename(temporary_.c_str(), target_.path.c_str());
    };
    const int harmless = state_ == State::created ? ENOENT : 0;
    if (undo() != 0 && errno != harmless && undo() != 0 && errno != harmless) return errno;
    if (state_ == State::exchanged) temporary_.clear();
  }
  state_ = State::temporary;
  return 0;
}

// Once all files stand. 0, or the errno of what failed.
int OutputFile::remove_old() noexcept {
  const bool failed = !temporary_.empty() && unlink(temporary_.c_str()) != 0 && errno != ENOENT;
  const int error = failed ? errno : 0;
  temporary_.clear();
  state_ = State::replaced;
  if (fd_) give_up(fd_.get());
  mark_.reset();
  return error;
}

void OutputFile::discard() noexcept {
  if (state_ == State::replaced) return;
  if (put_back() == 0 && !temporary_.empty() && unlink(temporary_.c_str()) != 0 && errno != ENOENT) {
    unlink(temporary_.c_str());  // once more; else the next save of this target finds it
  }
  temporary_.clear();
}

void publish(std::span<OutputFile* const> files, bool durable) {
  using State = OutputFile::State;
  std::set<std::string> directories;
  for (const OutputFile* file : files) directories.insert(file->target_.directory);
  const auto sync_directories = [&] {
    int error = 0;
    for (const std::string& directory : directories) {
      const int now = durable ? sync_directory(directory) : 0;
      if (error == 0) error = now;
    }
    return error;
  };

  // Nothing can fail after the only rename of a single file that would have to be undone.
  const bool keep_old = files.size() > 1;
  int unsynced = 0;
  try {
    for (OutputFile* file : files) file->put_in_place(keep_old);
    bool can_be_undone = keep_old;
    for (const OutputFile* file : files) can_be_undone = can_be_undone && file->state_ != State::replaced;
    unsynced = sync_directories();
    if (unsynced != 0 && can_be_undone) files.front()->fail("fsync", unsynced);
  } catch (const IoError& error) {
    std::string stands;
    for (auto file = files.rbegin(); file != files.rend(); ++file) {
      const bool irrevocable = (*file)->state_ == State::replaced;
      const int refused = (*file)->put_back();
      if (!irrevocable && refused == 0) continue;
      (*file)->state_ = State::replaced;
      stands += (stands.empty() ? "" : ", ") + (*file)->path_;
    }
    if (stands.empty()) throw;
    const std::string before = error.detail().empty() ? "" : error.detail() + "; ";
    throw IoError(error.code().value(), error.path(), "publish",
                  before + "not all files could be put back as they were, these are the new ones: " + stands);
  }

  const OutputFile* not_removed_of = nullptr;
  int refused = 0;
  for (OutputFile* file : files) {
    const int error = file->remove_old();
    if (error == 0 || refused != 0) continue;
    refused = error;
    not_removed_of = file;
  }
  if (unsynced != 0) throw not_durable(unsynced, files.front()->path_, files.size());
  if (refused != 0) throw not_removed(refused, not_removed_of->path_, files.size());
}

void swap_into_place(OutputFile& file, OutputFile* previous, bool durable) {
  using State = OutputFile::State;
  // Before it is hidden, so that nobody takes it for a leftover. A reader's lock is not in the way of anything else.
  if (previous != nullptr) mark_in_use(previous->fd_.get());
  file.put_in_place(true);
  int refused = 0;
  if (file.state_ == State::exchanged && previous != nullptr && previous->is_at(file.temporary_)) {
    previous->temporary_ = std::exchange(file.temporary_, {});
    previous->state_ = State::temporary;
  }
  refused = file.remove_old();
  const int unsynced = durable ? sync_directory(file.target_.directory) : 0;
  if (unsynced != 0) throw not_durable(unsynced, file.path_, 1);
  if (refused != 0) throw not_removed(refused, file.path_, 1);
}

}  // namespace fastshard
