// SPDX-License-Identifier: Apache-2.0
#include "file/target.h"

#include <fcntl.h>
#include <limits.h>
#include <unistd.h>

#include <cerrno>
#include <string_view>

#include "file/filesystem.h"

namespace fastshard {
namespace {

std::string parent_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

std::string name_in_parent(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? path : path.substr(slash + 1);
}

// The status of what stands there, a link not followed. None only where nothing does.
std::optional<struct stat> status_of(const std::string& place, const std::string& path) {
  struct stat info;
  if (lstat(place.c_str(), &info) == 0) return info;
  if (errno != ENOENT || place.empty()) throw IoError(errno, path, "lstat");
  return std::nullopt;
}

// Where a link leads that leads to nothing yet, so that the kernel cannot be asked to open it: link by link, each held
// open while it is looked at. Refused as the kernel refuses it while fs.protected_symlinks is set: another
// user's link in a sticky folder that all may write to.
std::string follow_by_name(const std::string& path) {
  std::string place = path;
  for (int links = 0; links <= kMaxLinks; ++links) {
    const std::string parent = parent_of(place);
    const Descriptor folder(open(parent.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
    if (!folder) throw IoError(errno, path, "open");
    const Descriptor link(openat(folder.get(), name_in_parent(place).c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC));
    if (!link && errno == ENOENT) return place;
    if (!link) throw IoError(errno, path, "open");
    struct stat info, around;
    if (fstat(link.get(), &info) != 0 || fstat(folder.get(), &around) != 0) throw IoError(errno, path, "fstat");
    if (!S_ISLNK(info.st_mode)) return place;
    const bool shared = (around.st_mode & (S_ISVTX | S_IWOTH)) == (S_ISVTX | S_IWOTH);
    if (shared && info.st_uid != geteuid() && info.st_uid != around.st_uid) throw IoError(EACCES, path, "open");
    char text[PATH_MAX];
    const ssize_t length = readlinkat(link.get(), "", text, sizeof text);
    if (length < 0) throw IoError(errno, path, "readlink");
    const std::string to(text, static_cast<size_t>(length));
    place = to.starts_with('/') ? to : parent + "/" + to;
  }
  throw IoError(ELOOP, path, "readlink");
}

// The kernel follows the links; the name of what it has found is then asked for.
std::string follow(const std::string& path) {
  const Descriptor found(open(path.c_str(), O_PATH | O_CLOEXEC));
  if (!found && errno == ENOENT) return follow_by_name(path);
  if (!found) throw IoError(errno, path, "open");
  char text[PATH_MAX];
  const ssize_t length = readlink(self_path(found.get()).c_str(), text, sizeof text);
  if (length < 0 && (errno == ENOENT || errno == ENOTDIR)) return follow_by_name(path);  // no /proc here
  if (length < 0) throw IoError(errno, path, "readlink");
  const std::string place(text, static_cast<size_t>(length));
  struct stat ours, there;
  if (fstat(found.get(), &ours) != 0) throw IoError(errno, path, "fstat");
  if (S_ISDIR(ours.st_mode)) throw IoError(EISDIR, path, "open");
  if (!S_ISREG(ours.st_mode)) throw IoError(EINVAL, path, "open");
  // Removed files and those of no folder (memfd) have no name that could be replaced.
  if (lstat(place.c_str(), &there) != 0) throw IoError(errno, path, "lstat");
  if (ours.st_dev != there.st_dev || ours.st_ino != there.st_ino) throw IoError(ENOENT, path, "open");
  return place;
}

// While the files of a folder change all at once, their names are links into a hidden folder for a moment
// (fastshard/publish/linking.py). Each of them stands for the file that it is about to be.
bool stands_for_file(const std::string& link) {
  char text[PATH_MAX];
  const ssize_t length = readlink(link.c_str(), text, sizeof text);
  if (length < 0) return false;  // the kernel will say why
  const std::string_view to(text, static_cast<size_t>(length));
  const size_t hidden = to.find(".fastshard-");
  return hidden != std::string_view::npos && to.find(".staging/.now/", hidden) != std::string_view::npos;
}

}  // namespace

Target find_target(const std::string& path, bool follow_links) {
  std::optional<struct stat> there = status_of(path, path);
  std::string place = path;
  if (follow_links && there && S_ISLNK(there->st_mode) && !stands_for_file(path)) {
    place = follow(path);
    there = status_of(place, path);
  }
  Target target = target_of(place);
  target.replaced = there;
  if (target.replaced && S_ISLNK(target.replaced->st_mode)) target.replaced.reset();
  if (target.replaced && S_ISDIR(target.replaced->st_mode)) throw IoError(EISDIR, path, "open");
  if (target.replaced && !S_ISREG(target.replaced->st_mode)) throw IoError(EINVAL, path, "open");
  return target;
}

Target target_of(const std::string& path) {
  return {.path = path, .directory = parent_of(path), .name = name_in_parent(path), .replaced = std::nullopt};
}

}  // namespace fastshard
