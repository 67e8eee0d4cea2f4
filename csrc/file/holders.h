// SPDX-License-Identifier: Apache-2.0
// Which descriptors of this process lead to a file.
#pragma once

#include <optional>
#include <vector>

namespace fastshard {

struct Holders {
  std::vector<int> descriptors;
  bool certain = true;  // false: there is a descriptor that cannot be asked
};

// The descriptors besides `fd` that lead to its file. Where many are open, each number of the table is asked:
// to list /proc/self/fd, the kernel makes an inode for each open one, which takes many times as long. A lease
// (F_SETLEASE) would tell at once, but it holds up everybody who opens the file meanwhile, and sends this process a
// signal. None where there is no /proc. Throws IoError, naming no file.
std::optional<Holders> holders_of(int fd);

}  // namespace fastshard
