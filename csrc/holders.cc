// SPDX-License-Identifier: Apache-2.0
#include "holders.h"

#include <dirent.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstdlib>
#include <memory>

#include "error.h"

namespace fastshard {

std::optional<Holders> holders_of(int fd) {
  struct stat wanted;
  if (fstat(fd, &wanted) != 0) throw IoError(errno, "", "fstat");
  const auto close = [](DIR* folder) { closedir(folder); };
  const std::unique_ptr<DIR, decltype(close)> folder(opendir("/proc/self/fd"), close);
  if (folder == nullptr && errno == ENOENT) return std::nullopt;
  if (folder == nullptr) throw IoError(errno, "", "opendir");
  Holders found;
  for (;;) {
    errno = 0;
    const dirent* const entry = readdir(folder.get());
    if (entry == nullptr && errno == ENOENT) return std::nullopt;
    if (entry == nullptr && errno != 0) throw IoError(errno, "", "readdir");
    if (entry == nullptr) return found;
    if (entry->d_name[0] == '.') continue;
    const int descriptor = std::atoi(entry->d_name);
    if (descriptor == fd || descriptor == dirfd(folder.get())) continue;
    struct stat info;
    if (fstat(descriptor, &info) != 0) {
      if (errno != EBADF) found.certain = false;  // else it was closed in the meantime
    } else if (info.st_ino == wanted.st_ino && info.st_dev == wanted.st_dev) {
      found.descriptors.push_back(descriptor);
    }
  }
}

}  // namespace fastshard
