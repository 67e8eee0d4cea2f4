// SPDX-License-Identifier: Apache-2.0
#include "file/temporary.h"

#include <fcntl.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <new>

#include "file/attributes.h"
#include "file/closing.h"
#include "file/hidden_names.h"

namespace fastshard {
namespace {

// Nobody but the owner, until the file has its final mode.
constexpr mode_t kStagedMode = 0600;

// Direct I/O goes in blocks of at least a page, as smaller ones are slow where the filesystem's own are larger.
constexpr uint64_t kMinDirectBlockNbytes = 4096;
constexpr uint64_t kMaxDirectBlockNbytes = 64 << 10;

// Not always the truth: the space of files that earlier saves have replaced may be about to be freed.
bool no_space(int error) { return error == ENOSPC || error == EDQUOT; }

// Kernels and filesystems that do not know O_TMPFILE try to open the directory instead.
bool without_nameless_files(int error) { return is_unsupported(error) || error == EISDIR || error == ENOENT; }

uint64_t round_up(uint64_t nbytes, uint64_t unit) { return (nbytes + unit - 1) / unit * unit; }

bool same_state(const struct stat& one, const struct stat& other) {
  return one.st_dev == other.st_dev && one.st_ino == other.st_ino && one.st_ctim.tv_sec == other.st_ctim.tv_sec &&
         one.st_ctim.tv_nsec == other.st_ctim.tv_nsec;
}

// Returns 0 if direct I/O needs a larger alignment than staging slots have, which are aligned to pages.
uint64_t direct_block_nbytes(int fd) {
#ifdef STATX_DIOALIGN  // Linux 6.1
  struct statx info;
  if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &info) == 0 && (info.stx_mask & STATX_DIOALIGN) != 0) {
    const uint64_t block = info.stx_dio_offset_align;
    if (block == 0 || block > kMaxDirectBlockNbytes || info.stx_dio_mem_align > kMinDirectBlockNbytes) return 0;
    return std::max(kMinDirectBlockNbytes, block);
  }
#else
  static_cast<void>(fd);
#endif
  return kMinDirectBlockNbytes;
}

bool set_direct(int fd, bool direct) {
  const int flags = fcntl(fd, F_GETFL);
  return flags >= 0 && fcntl(fd, F_SETFL, direct ? flags | O_DIRECT : flags & ~O_DIRECT) == 0;
}

}  // namespace

TemporaryFile::TemporaryFile(const std::string& path, uint64_t nbytes, const Intent& intent)
    : TemporaryFile(path, nbytes, intent, site_of(path, intent)) {}

TemporaryFile::TemporaryFile(const std::string& path, uint64_t nbytes, const Intent& intent, const Site& site)
    : PlacedFile(path, nbytes, intent, site), gaps_(intent.gaps) {
  write_path_ = choose_write_path(site.filesystem, intent).path;
  storable_ = intent.wanted == WritePath::automatic && site.filesystem.one_machine && keep_cached();
  note_fallbacks(remove_leftovers(place_.target(), one_machine()));  // first, as they take up space
  make(intent.at_once);
  try {
    if (write_path_ == WritePath::direct) set_up_direct();
    if (nbytes_ != 0) preallocate();
  } catch (...) {
    discard();
    throw;
  }
}

std::string TemporaryFile::space_needed(int error) const {
  std::string text = OutputFile::space_needed(error);
  if (!text.empty() && no_space(error) && place_.target().replaced) {
    text += "; the old file is kept until the new one stands";
  }
  return text;
}

void TemporaryFile::make(bool at_once) {
  // A file that replaces another one needs a hidden name in any case. If it has one from the start, the folder changes
  // once less.
  const bool replaces = place_.target().replaced.has_value();
  const bool named = at_once && replaces;
  if (!named && make_nameless()) return;
  place_.take_hidden_name([&](const std::string& name) { return make_named(name); }, "open");
  if (!replaces) take_mode_back();
}

// Returns false if this filesystem has no nameless files, or they could not be given a name.
bool TemporaryFile::make_nameless() {
  const Target& target = place_.target();
  // The kernel decides about the mode of a file that replaces none, by umask and the directory's default list.
  const mode_t mode = target.replaced ? kStagedMode : 0666;
  fd_ = Descriptor(open(target.directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, mode));
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

// Makes the file under a hidden name. Returns 0, or an errno.
int TemporaryFile::make_named(const std::string& name) {
  const mode_t mode = place_.target().replaced ? kStagedMode : 0666;
  fd_ = Descriptor(open(name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode));
  if (!fd_) return errno;
  // Until it is marked, another save may take it for a leftover.
  const int error = mark_in_use(fd_.get());
  if (error == EAGAIN || place_.lost(name)) return EEXIST;
  if (error != 0) note_fallback("locks", error);
  return 0;
}

// The mode that the kernel has given a new file under a hidden name waits until the file is complete.
void TemporaryFile::take_mode_back() {
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

void TemporaryFile::preallocate() {
  // Preallocation makes later writes cheaper on disk filesystems and dearer on tmpfs, where it would also make small
  // pages of what could be huge ones. There only a mapping needs it, on kernels that cannot populate: a store to a page
  // that cannot be had is a SIGBUS.
  if (memory_backed() && (write_path_ == WritePath::buffered || can_populate())) {
    const bool mapped = write_path_ != WritePath::buffered || storable_;
    if (mapped && ftruncate(fd_.get(), static_cast<off_t>(nbytes_)) != 0) fail("ftruncate");
    return;
  }
  int result;
  do {
    result = fallocate(fd_.get(), 0, 0, static_cast<off_t>(round_up(nbytes_, block_nbytes_)));
  } while (result != 0 && (errno == EINTR || (no_space(errno) && wait_for_closing())));
  preallocated_ = result == 0;
  if (preallocated_) return;
  if (!is_unsupported(errno)) fail("fallocate");
  storable_ = false;  // a page that cannot be had would be noticed only here and there
  note_fallback("fallocate");
  if (write_path_ != WritePath::direct) write_path_ = WritePath::buffered;
}

// If direct I/O does not work here, the file is written through the page cache.
void TemporaryFile::set_up_direct() {
  errno = EINVAL;
  if (direct_works()) return;
  note_fallback("O_DIRECT");
  if (!set_direct(fd_.get(), false)) fail("fcntl");
  block_nbytes_ = 1;
  write_path_ = WritePath::buffered;
}

// Tries direct I/O by a write, as some filesystems accept the flag and refuse the writes. Sets errno when it fails.
bool TemporaryFile::direct_works() {
  if (memory_backed()) return false;  // newer kernels accept the flag there, too, and ignore it
  block_nbytes_ = direct_block_nbytes(fd_.get());
  if (block_nbytes_ == 0 || !set_direct(fd_.get(), true)) return false;
  const std::unique_ptr<void, void (*)(void*)> block(std::aligned_alloc(kMinDirectBlockNbytes, block_nbytes_),
                                                     std::free);
  if (block == nullptr) throw std::bad_alloc();
  std::memset(block.get(), 0, block_nbytes_);
  ssize_t written;
  do {
    written = pwrite(fd_.get(), block.get(), block_nbytes_, 0);
  } while (written < 0 && errno == EINTR);
  if (written < 0 && !is_unsupported(errno)) fail("write");
  return written >= 0;
}

void require_space(std::span<TemporaryFile* const> files) {
  std::map<dev_t, uint64_t> wanted;
  for (const TemporaryFile* file : files) {
    if (file->preallocated_) continue;
    const auto info = file->identity();
    struct statvfs space;
    // A filesystem that does not answer may have space, and one without a limit reports no blocks at all.
    const std::string& directory = file->place_.target().directory;
    if (!info || statvfs(directory.c_str(), &space) != 0 || space.f_blocks == 0) continue;
    wanted[info->st_dev] += file->nbytes_;
    if (wanted[info->st_dev] > static_cast<uint64_t>(space.f_bavail) * space.f_frsize) {
      file->fail("reserve", ENOSPC);
    }
  }
}

Mapping TemporaryFile::map() {
  if (ftruncate(fd_.get(), static_cast<off_t>(nbytes_)) != 0) fail("ftruncate");
  return Mapping(fd_.get(), 0, nbytes_, path_);
}

void TemporaryFile::end_writing() {
  if (write_path_ != WritePath::direct && !gaps_) return;
  // From here on reads and copies need not be in whole blocks.
  if (write_path_ == WritePath::direct && !set_direct(fd_.get(), false)) fail("fcntl");
  int result;
  do {
    result = ftruncate(fd_.get(), static_cast<off_t>(nbytes_));
  } while (result != 0 && errno == EINTR);
  if (result != 0) fail("ftruncate");
}

void TemporaryFile::sync() {
  take_attributes();
  OutputFile::sync();
}

void TemporaryFile::suspend() {
  if (place_.hidden_name().empty()) {
    struct stat made;
    if (fstat(fd_.get(), &made) != 0) fail("fstat");
    if (!place_.target().replaced && fchmod(fd_.get(), kStagedMode) == 0) new_mode_ = made.st_mode & 07777;
    place_.link_hidden();
  }
  // The lock that marks the file belongs to its open file description, which lives as long as a mapping of it.
  try {
    mark_.emplace(fd_.get(), 0, 1, path_);
  } catch (const IoError& error) {
    note_fallback("mmap", error.code().value());
  }
  suspend_under(place_.hidden_name(), O_NOFOLLOW);
}

// Takes over owner, mode, access list and extended attributes of the file that stands there now, or else of the one
// that stood there when the save began.
void TemporaryFile::take_attributes() {
  if (const auto& replaced = place_.look_again()) {
    if (adopted_ && same_state(*adopted_, *replaced)) return;
    adopted_ = replaced;
    note_fallbacks(adopt_attributes(fd_.get(), place_.target().path, *adopted_, path_));
  } else if (new_mode_) {
    if (fchmod(fd_.get(), *new_mode_) != 0) note_fallback("fchmod");
  }
  new_mode_.reset();
}

void TemporaryFile::put_in_place(bool keep_old) {
  const Awake awake(*this);
  check_written();
  take_attributes();
  check_stored();
  place_.put(keep_old);
}

// Called when all files stand. Returns 0, or the errno of what failed.
int TemporaryFile::remove_old() noexcept {
  const int error = place_.remove_old();
  if (fd_) give_up(fd_.get());
  mark_.reset();
  return error;
}

bool TemporaryFile::intact() const {
  struct stat info;
  if (place_.state() != Placement::State::temporary || fstat(fd_.get(), &info) != 0) return false;
  const std::string& name = place_.hidden_name();
  if (info.st_nlink > 1) return false;  // somebody keeps it under another name: it is not to be written again
  return static_cast<uint64_t>(info.st_size) == nbytes_ && (name.empty() || place_.is_at(name));
}

}  // namespace fastshard
