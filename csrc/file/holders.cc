// SPDX-License-Identifier: Apache-2.0
#include "file/holders.h"

#include <dirent.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "plan/error.h"

namespace fastshard {
namespace {

constexpr char kDescriptors[] = "/proc/self/fd";
constexpr off_t kManyOpen = 64;

// No descriptor has a higher number.
int size_of_table() {
  const auto close = [](std::FILE* file) { std::fclose(file); };
  const std::unique_ptr<std::FILE, decltype(close)> status(std::fopen("/proc/self/status", "re"), close);
  if (status == nullptr) throw IoError(errno, "", "fopen");
  char line[256];
  int size;
  errno = 0;
  while (std::fgets(line, sizeof line, status.get()) != nullptr) {
    if (std::sscanf(line, "FDSize: %d", &size) == 1) return size;
  }
  throw IoError(errno != 0 ? errno : EIO, "", "fgets");
}

class Search {
 public:
  explicit Search(int fd) : fd_(fd) {
    if (fstat(fd, &wanted_) != 0) throw IoError(errno, "", "fstat");
  }
  void ask(int descriptor) {
    if (descriptor == fd_) return;
    struct stat info;
    if (fstat(descriptor, &info) != 0) {
      if (errno != EBADF) found.certain = false;  // else it is not open
    } else if (info.st_ino == wanted_.st_ino && info.st_dev == wanted_.st_dev) {
      found.descriptors.push_back(descriptor);
    }
  }
  Holders found;

 private:
  int fd_;
  struct stat wanted_;
};

void ask_listed(Search& search, DIR* folder) {
  for (;;) {
    errno = 0;
    const dirent* const entry = readdir(folder);
    if (entry == nullptr && errno != 0) throw IoError(errno, "", "readdir");
    if (entry == nullptr) return;
    if (entry->d_name[0] == '.') continue;
    const int descriptor = std::atoi(entry->d_name);
    if (descriptor != dirfd(folder)) search.ask(descriptor);
  }
}

}  // namespace

std::optional<Holders> holders_of(int fd) {
  Search search(fd);
  const auto close = [](DIR* folder) { closedir(folder); };
  const std::unique_ptr<DIR, decltype(close)> folder(opendir(kDescriptors), close);
  if (folder == nullptr) {
    if (errno == ENOENT) return std::nullopt;
    throw IoError(errno, "", "opendir");
  }
  struct stat listed;
  if (fstat(dirfd(folder.get()), &listed) != 0) throw IoError(errno, "", "fstat");
  // Since Linux 6.2 the size is the number of open ones, which only chooses the way here: it may change meanwhile.
  if (listed.st_size < kManyOpen) {
    ask_listed(search, folder.get());
  } else {
    const int size = size_of_table();
    for (int descriptor = 0; descriptor < size; ++descriptor) search.ask(descriptor);
  }
  return search.found;
}

}  // namespace fastshard
