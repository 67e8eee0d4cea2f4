// SPDX-License-Identifier: Apache-2.0
// Decides whether a file can be replaced by a new one, or has to be written over where it is.
#pragma once

#include <string>

namespace fastshard {

struct Look {
  const char* why_in_place = nullptr;  // the reason; null if nothing known so far is against a replacement
  bool held = false;                   // the caller has to find out whether this process has the file open
};

// Examines the file with as few system calls as possible, none of which changes it. Throws the IoError of opening it
// (ENOENT, too) if it can neither be examined nor be opened for writing.
Look look_at_file(const std::string& path);

}  // namespace fastshard
