// SPDX-License-Identifier: Apache-2.0
// Hidden names beside a target, and what killed saves have left under them. The names follow from the target's, so that
// the next save there finds them without listing the directory. A file under such a name belongs to a living process
// while that process holds a write lock on it, which nobody can take who may only read the file.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "file/target.h"

namespace fastshard {

// Hidden names that a target has; saves that go on at the same time use several.
inline constexpr unsigned kTemporaryNames = 8;

// The hidden name of that number. No loader looks at it, as it starts with a dot and does not end in .safetensors.
std::string temporary_name(const std::string& directory, const std::string& name, unsigned number);
// A hidden name that belongs to no target.
std::string random_temporary_name(const std::string& directory, const std::string& path);

// Tries `make`, which returns 0 or an errno, with the target's hidden names until it returns something else than
// EEXIST, and with random names when all are taken. Returns 0 and sets `name`, or returns the errno.
int take_name(const Target& target, const std::string& path, const std::function<int(const std::string&)>& make,
              std::string& name);

// Tells remove_leftovers() that the file behind `fd` belongs to a living process, until it is closed or given up.
// Returns 0, or an errno: EAGAIN when somebody else has marked it.
int mark_in_use(int fd) noexcept;
// The same of a file that this process only reads and gives a second name; where that is refused the file has none.
void mark_as_read(int fd) noexcept;
void give_up(int fd) noexcept;

// Removes what is under the target's hidden names and belongs to nobody. Returns what could not be removed, in words.
// A lock that is held on another machine may not show on this one, so when `one_machine` is false, a file that was
// changed within the last hour stays. When locks are refused, every file stays.
std::vector<std::string> remove_leftovers(const Target& target, bool one_machine);

}  // namespace fastshard
