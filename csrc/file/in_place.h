// SPDX-License-Identifier: Apache-2.0
// Whether a file can be replaced by a new one, or has to be written over where it is.
#pragma once

#include <string>

namespace fastshard {

struct Look {
  const char* why_in_place = nullptr;  // in words; null: what is known of it leaves it replaceable
  bool held = false;                   // unless this process has the file open, or may have it open
};

// Looks at the file in as few system calls as it takes, none of which changes it. Throws IoError, of ENOENT too, where
// it can neither be looked at nor be opened for writing, as opening it does.
Look look_at_file(const std::string& path);

}  // namespace fastshard
