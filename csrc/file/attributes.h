// SPDX-License-Identifier: Apache-2.0
// Owner, mode, access control list and extended attributes, which a file takes over from the one that it replaces.
#pragma once

#include <sys/stat.h>

#include <string>
#include <vector>

#include "plan/error.h"

namespace fastshard {

// Gives the file behind `fd` the attributes of the file at `path`, whose stat is `of`; a link at `path` is not
// followed. Returns descriptions of what was refused. If owner or group cannot be given, the mode bits that would apply
// to another owner or group (setuid, setgid, the group's) are left out. Throws IoError, naming `shown`, if the new file
// itself cannot be examined.
std::vector<std::string> adopt_attributes(int fd, const std::string& path, const struct stat& of,
                                          const std::string& shown);

}  // namespace fastshard
