// SPDX-License-Identifier: Apache-2.0
// The descriptors of this process that lead to a file.
#pragma once

#include <optional>
#include <vector>

namespace fastshard {

struct Holders {
  std::vector<int> descriptors;
  bool certain = true;  // false: there is a descriptor that cannot be asked
};

// Returns the descriptors besides `fd` that lead to its file, or nothing without /proc. If many are open, each number
// of the table is asked, about 1 us each: to list /proc/self/fd, the kernel makes an inode for each open one, which
// takes many times as long. A lease (F_SETLEASE) would tell at once, but it delays everybody who opens the file
// meanwhile, and sends this process a signal. Throws IoError, naming no file.
std::optional<Holders> holders_of(int fd);

}  // namespace fastshard
