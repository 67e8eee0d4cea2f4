// SPDX-License-Identifier: Apache-2.0
#include "file/hidden_names.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <system_error>

#include "file/filesystem.h"

namespace fastshard {
namespace {

constexpr time_t kUntouchedSeconds = 3600;
// When another machine may serve the names, each look costs a round trip, so it ends when so many names in a row are
// free. The same is enough when all names were looked at within this second, as they are taken in order.
constexpr unsigned kFreeInARow = 2;

// FNV-1a: names of any length and alphabet become digits.
uint64_t hash_of(const std::string& text) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char letter : text) hash = (hash ^ static_cast<unsigned char>(letter)) * 0x100000001b3;
  return hash;
}

std::string hidden(const std::string& directory, uint64_t number, const std::string& rest) {
  std::array<char, 17> digits;
  std::snprintf(digits.data(), digits.size(), "%016llx", static_cast<unsigned long long>(number));
  return directory + "/.fastshard-" + digits.data() + rest + ".tmp";
}

// Remembers whether a target's hidden names were looked at in this very second, for saves made by the thousand. Two
// targets that share an entry of the table only make each other look once more.
class Looked {
 public:
  explicit Looked(const Target& target) {
    const uint64_t hash = hash_of(target.path);
    const auto since = std::chrono::steady_clock::now().time_since_epoch();
    const auto now = std::chrono::duration_cast<std::chrono::seconds>(since);
    entry_ = &entries_[hash % entries_.size()];
    value_ = (hash << 16) | (static_cast<uint64_t>(now.count()) & 0xffff);
  }
  bool just_now() const { return entry_->load(std::memory_order_relaxed) == value_; }
  void note() { entry_->store(value_, std::memory_order_relaxed); }

 private:
  inline static std::array<std::atomic<uint64_t>, 64> entries_ = {};
  std::atomic<uint64_t>* entry_;
  uint64_t value_;
};

struct flock whole_file(int type) {
  struct flock lock = {};  // l_pid must be 0
  lock.l_type = static_cast<short>(type);
  lock.l_whence = SEEK_SET;
  return lock;
}

bool is_at(const struct stat& info, const std::string& name) {
  struct stat there;
  return lstat(name.c_str(), &there) == 0 && there.st_dev == info.st_dev && there.st_ino == info.st_ino;
}

// Whether anybody holds a write lock. True when that cannot be told, too.
bool write_locked(int fd) {
  struct flock lock = whole_file(F_RDLCK);  // what a write lock alone stands against
  return fcntl(fd, F_OFD_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

// While a save of several files puts them in place, the hidden name holds the old file, which nobody has locked. The
// new file is the target then, and is locked. A hidden name that is a second name of the target's own file holds
// nothing.
bool being_published(const Target& target, const struct stat& leftover) {
  if (is_at(leftover, target.path)) return false;
  const Descriptor file(open(target.path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  if (!file) return errno != ENOENT && errno != ELOOP;
  return write_locked(file.get());
}

// Only the process that has locked the file removes its name. Otherwise it could remove a new file under a name that
// another process has just cleared. Files that may not be written to can only be locked by flock().
bool lock_leftover(const Descriptor& writable, const Descriptor& readable) {
  if (writable) return mark_in_use(writable.get()) == 0;
  return !write_locked(readable.get()) && flock(readable.get(), LOCK_EX | LOCK_NB) == 0;
}

// Returns 0, or the errno of what failed. A file that may belong to somebody stays.
int remove_leftover(const Target& target, const std::string& name, const struct stat& found, bool one_machine) {
  if (!one_machine && std::time(nullptr) - found.st_mtime < kUntouchedSeconds) return 0;
  if (S_ISLNK(found.st_mode)) {  // a link that was replaced by a save of several files
    if (being_published(target, found) || !is_at(found, name)) return 0;
    return unlink(name.c_str()) == 0 ? 0 : errno;
  }
  if (!S_ISREG(found.st_mode)) return 0;
  constexpr int kFlags = O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC;
  const Descriptor writable(open(name.c_str(), O_RDWR | kFlags));
  const Descriptor readable(writable ? -1 : open(name.c_str(), O_RDONLY | kFlags));
  if (!writable && !readable) return errno == EACCES ? 0 : errno;  // another user's
  struct stat opened;
  if (fstat((writable ? writable : readable).get(), &opened) != 0) return errno;
  if (!lock_leftover(writable, readable) || being_published(target, opened) || !is_at(opened, name)) return 0;
  return unlink(name.c_str()) == 0 ? 0 : errno;
}

}  // namespace

std::string temporary_name(const std::string& directory, const std::string& name, unsigned number) {
  return hidden(directory, hash_of(name), std::string("-").append(std::to_string(number)));
}

std::string random_temporary_name(const std::string& directory, const std::string& path) {
  uint64_t number;
  if (getrandom(&number, sizeof number, 0) != sizeof number) throw IoError(errno, path, "getrandom");
  return hidden(directory, number, "");
}

int take_name(const Target& target, const std::string& path, const std::function<int(const std::string&)>& make,
              std::string& name) {
  for (unsigned number = 0; number < 2 * kTemporaryNames; ++number) {
    std::string tried = number < kTemporaryNames ? temporary_name(target.directory, target.name, number)
                                                 : random_temporary_name(target.directory, path);
    const int error = make(tried);
    if (error == 0) name = std::move(tried);
    if (error != EEXIST) return error;
  }
  return EEXIST;
}

int mark_in_use(int fd) noexcept {
  struct flock lock = whole_file(F_WRLCK);
  if (fcntl(fd, F_OFD_SETLK, &lock) == 0) return 0;
  return errno == EACCES ? EAGAIN : errno;
}

// Both locks that lock_leftover() may try.
void mark_as_read(int fd) noexcept {
  struct flock lock = whole_file(F_RDLCK);
  fcntl(fd, F_OFD_SETLK, &lock);
  flock(fd, LOCK_SH | LOCK_NB);
}

void give_up(int fd) noexcept {
  struct flock lock = whole_file(F_UNLCK);
  fcntl(fd, F_OFD_SETLK, &lock);
}

std::vector<std::string> remove_leftovers(const Target& target, bool one_machine) {
  std::vector<std::string> left;
  const auto note = [&](int error) {
    if (error == 0 || error == ENOENT) return;
    left.push_back("removing what a killed save has left refused: " + std::generic_category().message(error));
  };
  Looked looked(target);
  const bool all = one_machine && !looked.just_now();
  unsigned free = 0;
  for (unsigned number = 0; number < kTemporaryNames; ++number) {
    const std::string name = temporary_name(target.directory, target.name, number);
    struct stat found;
    if (lstat(name.c_str(), &found) == 0) {
      free = 0;
      note(remove_leftover(target, name, found, one_machine));
    } else if (errno != ENOENT) {
      note(errno);
      break;  // the save itself will tell more
    } else if (++free == kFreeInARow && !all) {
      return left;
    }
  }
  looked.note();
  return left;
}

}  // namespace fastshard
