// SPDX-License-Identifier: Apache-2.0
// What a file has besides its contents, taken over from the file that it replaces.
#pragma once

#include <sys/stat.h>

#include <string>
#include <vector>

#include "plan/error.h"

namespace fastshard {

// Gives the file behind `fd` the owner, mode, access control list and extended attributes of the file at `path`, which
// is not followed if it is a link and whose stat is `of`. Returns what was refused, in words. Where owner or group
// cannot be given, the bits that would then speak of somebody else (setuid, setgid, the group's) are left out.
// Throws IoError, naming `shown`, when the new file itself cannot be looked at.
std::vector<std::string> adopt_attributes(int fd, const std::string& path, const struct stat& of,
                                          const std::string& shown);

}  // namespace fastshard
