// SPDX-License-Identifier: Apache-2.0
#include "file/attributes.h"

#include <sys/xattr.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <functional>
#include <string_view>
#include <system_error>

namespace fastshard {
namespace {

constexpr std::string_view kAcl = "system.posix_acl_access";
constexpr std::string_view kLabel = "security.selinux";

// Capabilities and integrity hashes are of the old contents; those the kernel drops when a file is written, too.
bool carried(std::string_view name) { return name.starts_with("user.") || name == kAcl || name == kLabel; }

// The answer of a call that fills a buffer and tells its size. Empty where it fails, with errno.
using Fill = std::function<ssize_t(char*, size_t)>;
std::string filled(const Fill& fill) {
  for (;;) {
    const ssize_t nbytes = fill(nullptr, 0);
    if (nbytes <= 0) return {};
    std::string text(static_cast<size_t>(nbytes), '\0');
    const ssize_t got = fill(text.data(), text.size());
    if (got < 0 && errno == ERANGE) continue;  // it has grown meanwhile
    text.resize(got < 0 ? 0 : static_cast<size_t>(got));
    return text;
  }
}

std::vector<std::string> names_in(const std::string& list) {
  std::vector<std::string> names;
  for (size_t begin = 0; begin < list.size();) {
    const size_t end = std::min(list.find('\0', begin), list.size());
    if (carried({list.data() + begin, end - begin})) names.push_back(list.substr(begin, end - begin));
    begin = end + 1;
  }
  return names;
}

// What a filesystem does not have, does not allow, or has no room for. All else, a disk that fails for instance, is an
// error: the file would stand with a mode that is not its own.
bool is_refusal(int error) {
  switch (error) {
    case EPERM:
    case EACCES:
    case EROFS:
    case EINVAL:
    case ENOSYS:
    case ENOTSUP:
    case ENOSPC:
    case EDQUOT:
    case E2BIG:
    case ERANGE:
    case ENODATA:
      return true;
    default:
      return false;
  }
}

bool without_attributes(int error) { return error == 0 || error == ENOTSUP || error == ENOSYS || error == ENOENT; }

}  // namespace

std::vector<std::string> adopt_attributes(int fd, const std::string& path, const struct stat& of,
                                          const std::string& shown) {
  std::vector<std::string> refused;
  const auto note = [&](const std::string& what) {
    if (!is_refusal(errno)) throw IoError(errno, shown, what);
    refused.push_back(what + " refused: " + std::generic_category().message(errno));
  };
  struct stat ours;
  if (fstat(fd, &ours) != 0) throw IoError(errno, shown, "fstat");
  bool owner = ours.st_uid == of.st_uid, group = ours.st_gid == of.st_gid;
  if (!owner || !group) {
    if (fchown(fd, of.st_uid, of.st_gid) == 0) {
      owner = group = true;
    } else {  // as anybody but root: the file becomes the saver's
      note("fchown");
      if (!group) group = fchown(fd, static_cast<uid_t>(-1), of.st_gid) == 0;
    }
  }

  errno = 0;
  const std::vector<std::string> theirs =
      names_in(filled([&](char* to, size_t size) { return llistxattr(path.c_str(), to, size); }));
  if (!without_attributes(errno)) note("reading extended attributes");
  errno = 0;
  const std::vector<std::string> had =
      names_in(filled([&](char* to, size_t size) { return flistxattr(fd, to, size); }));
  for (const std::string& name : theirs) {
    errno = 0;
    const std::string value =
        filled([&](char* to, size_t size) { return lgetxattr(path.c_str(), name.c_str(), to, size); });
    if (errno == ENODATA || errno == ENOENT) continue;  // gone meanwhile
    if (errno != 0) {
      note("reading the extended attribute " + name);
      continue;
    }
    if (std::ranges::find(had, name) != had.end() &&
        value == filled([&](char* to, size_t size) { return fgetxattr(fd, name.c_str(), to, size); })) {
      continue;
    }
    if (fsetxattr(fd, name.c_str(), value.data(), value.size(), 0) != 0) note("the extended attribute " + name);
  }
  for (const std::string& name : had) {
    if (name == kLabel || std::ranges::find(theirs, name) != theirs.end()) continue;
    if (fremovexattr(fd, name.c_str()) != 0 && errno != ENODATA) note("removing the extended attribute " + name);
  }

  // The last, as both a new owner and a list change it.
  mode_t mode = of.st_mode & 07777;
  if (!owner) mode &= ~static_cast<mode_t>(S_ISUID);
  if (!group) mode &= ~static_cast<mode_t>(S_ISGID | (S_IRWXG & ~((mode & S_IRWXO) << 3)));
  if (fchmod(fd, mode) != 0) note("fchmod");
  return refused;
}

}  // namespace fastshard
