// SPDX-License-Identifier: Apache-2.0
// Which name of which directory a save puts its file under.
#pragma once

#include <sys/stat.h>

#include <optional>
#include <string>

#include "plan/error.h"

namespace fastshard {

// So many symbolic links are followed one after the other: the kernel's own limit.
inline constexpr int kMaxLinks = 40;

struct Target {
  std::string path;                     // what a rename replaces
  std::string directory;                // it lies in
  std::string name;                     // in there
  std::optional<struct stat> replaced;  // of the regular file that stands there
};

// `follow_links`: where `path` is a symbolic link, the target is the file that it leads to, if the kernel lets this
// process follow it (fs.protected_symlinks); else it is the link itself. Throws IoError for what is neither absent nor
// a regular file: renaming over a device or a pipe would take it from everybody else.
Target find_target(const std::string& path, bool follow_links);

// The names alone, of a path that is taken as it is; nothing is looked at.
Target target_of(const std::string& path);

}  // namespace fastshard
