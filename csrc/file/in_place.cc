// SPDX-License-Identifier: Apache-2.0
#include "file/in_place.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <vector>

#include "file/filesystem.h"
#include "file/holders.h"
#include "file/target.h"
#include "plan/error.h"

namespace fastshard {
namespace {

// Whether it is what stands there, a link not followed.
bool is_at(const struct stat& file, const std::string& place, const std::string& path) {
  struct stat there;
  if (lstat(place.c_str(), &there) == 0) return there.st_dev == file.st_dev && there.st_ino == file.st_ino;
  if (errno != ENOENT && errno != ENOTDIR) throw IoError(errno, path, "lstat");
  return false;
}

bool is_ours(const struct stat& file) {
  const uid_t user = geteuid();
  if (user == 0) return true;
  if (file.st_uid != user) return false;
  if (file.st_gid == getegid()) return true;
  std::vector<gid_t> groups(static_cast<size_t>(std::max(getgroups(0, nullptr), 0)));
  const int count = getgroups(static_cast<int>(groups.size()), groups.data());
  return count > 0 && std::find(groups.begin(), groups.begin() + count, file.st_gid) != groups.begin() + count;
}

bool may_be_renamed_to(const struct stat& file, const std::string& folder, const std::string& path) {
  if (faccessat(AT_FDCWD, folder.c_str(), W_OK | X_OK, AT_EACCESS) != 0) return false;
  const uid_t user = geteuid();
  if (user == 0 || user == file.st_uid) return true;
  struct stat held;
  if (stat(folder.c_str(), &held) != 0) throw IoError(errno, path, "stat");
  return (held.st_mode & S_ISVTX) == 0 || held.st_uid == user;
}

// Whether a name on the way is a process's descriptor: it leads to the file whatever becomes of its name.
bool by_process(std::string place, const std::string& path) {
  for (int links = 0; links < kMaxLinks; ++links) {
    const std::string whole = std::filesystem::absolute(place).lexically_normal();
    if (whole.starts_with("/proc/") || whole.starts_with("/dev/fd/")) return true;
    char text[PATH_MAX];
    const ssize_t length = readlink(place.c_str(), text, sizeof text);
    if (length < 0 && errno == EINVAL) return false;  // no link
    if (length < 0) throw IoError(errno, path, "readlink");
    const std::string to(text, static_cast<size_t>(length));
    place = to.starts_with('/') ? to : target_of(place).directory + "/" + to;
  }
  return false;
}

std::string real_place(int fd, const std::string& path) {
  char text[PATH_MAX];
  const ssize_t length = readlink(self_path(fd).c_str(), text, sizeof text);
  if (length >= 0) return {text, static_cast<size_t>(length)};
  if (errno != ENOENT && errno != ENOTDIR) throw IoError(errno, path, "readlink");
  if (realpath(path.c_str(), text) == nullptr) throw IoError(errno, path, "realpath");  // no /proc here
  return text;
}

// Which mount it is of; -1 where that cannot be told.
int mount_of(int fd) {
  const std::string place = "/proc/self/fdinfo/" + std::to_string(fd);
  const auto close = [](std::FILE* file) { std::fclose(file); };
  const std::unique_ptr<std::FILE, decltype(close)> file(std::fopen(place.c_str(), "re"), close);
  char line[256];
  int mount;
  while (file != nullptr && std::fgets(line, sizeof line, file.get()) != nullptr) {
    if (std::sscanf(line, "mnt_id: %d", &mount) == 1) return mount;
  }
  return -1;
}

// Whether the file itself is mounted there: a name that cannot be taken.
bool is_mount(int fd, const std::string& folder, const std::string& path) {
#ifdef STATX_ATTR_MOUNT_ROOT  // Linux 5.8
  struct statx info;
  if (statx(fd, "", AT_EMPTY_PATH, 0, &info) == 0 && (info.stx_attributes_mask & STATX_ATTR_MOUNT_ROOT) != 0) {
    return (info.stx_attributes & STATX_ATTR_MOUNT_ROOT) != 0;
  }
#endif
  const Descriptor around(open(folder.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
  if (!around) throw IoError(errno, path, "open");
  return mount_of(fd) != mount_of(around.get());
}

}  // namespace

Look look_at_file(const std::string& path) {
  struct stat info;
  if (stat(path.c_str(), &info) != 0) throw IoError(errno, path, "stat");
  if (S_ISDIR(info.st_mode)) throw IoError(EISDIR, path, "open");
  if (!S_ISREG(info.st_mode)) return {"a device or a pipe"};
  // With O_CREAT, as torch opens it: the kernel then refuses other users' files in sticky folders (protected_regular).
  const Descriptor file(open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | O_NOCTTY, 0666));
  if (!file) throw IoError(errno, path, "open");
  if (fstat(file.get(), &info) != 0) throw IoError(errno, path, "fstat");
  if (info.st_nlink > 1) return {"a file with several names (hard links)"};
  if (!is_ours(info)) return {"another user's or group's file"};
  std::string place = path;
  if (!is_at(info, place, path)) {
    if (by_process(path, path)) return {"a path that leads through /proc"};
    place = real_place(file.get(), path);
    if (!is_at(info, place, path)) return {"a file that its path no longer leads to"};
  }
  const std::string folder = target_of(place).directory;
  if (!may_be_renamed_to(info, folder, path)) return {"a folder that may not be written to"};
  if (is_mount(file.get(), folder, path)) return {"a file that is a mount point"};
  const std::optional<Holders> holders = holders_of(file.get());
  return {.held = holders && (!holders->certain || !holders->descriptors.empty())};
}

}  // namespace fastshard
