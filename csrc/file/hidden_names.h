// SPDX-License-Identifier: Apache-2.0
// Hidden names beside a target, and what killed saves have left under them. The names are the target's own, so that
// the next save there finds them without listing the directory. A file under such a name belongs to a
// living process while that holds a write lock on it, which nobody can take who may only read the file.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "file/target.h"

namespace fastshard {

// Hidden names that a target has; saves that go on at the same time use several.
inline constexpr unsigned kTemporaryNames = 8;

// No loader looks at it: it starts with a dot and does not end in .safetensors.
std::string temporary_name(const std::string& directory, const std::string& name, unsigned number);
// One that no target has.
std::string random_temporary_name(const std::string& directory, const std::string& path);

// Tries `make` (0, or an errno) with the target's hidden names, until it says something else than EEXIST, and with
// random ones when all are taken. 0 and the name, or the errno.
int take_name(const Target& target, const std::string& path, const std::function<int(const std::string&)>& make,
              std::string& name);

// Tells remove_leftovers that the file behind `fd` belongs to a living process, until it is closed or given up.
// 0, or an errno: EAGAIN where somebody else has it.
int mark_in_use(int fd) noexcept;
void give_up(int fd) noexcept;

// Removes what is under the target's hidden names and belongs to nobody. Returns what could not be removed, in words.
// Whether somebody on another machine is using a file cannot be relied upon to show in locks: where `one_machine` is
// false, what was changed within the last hour stays. Where locks are refused, everything does.
std::vector<std::string> remove_leftovers(const Target& target, bool one_machine);

}  // namespace fastshard
