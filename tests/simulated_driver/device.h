// SPDX-License-Identifier: Apache-2.0
// Runs the kernels of csrc/kernels, the very source, on a CPU: a fiber for each thread of a block, switched where
// the threads meet. Every load and store of global memory is translated and checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace simulated {

// What a kernel may touch: where it sees it, and where it is.
struct Window {
  uintptr_t begin;
  size_t nbytes;
  std::byte* bytes;
  bool writable;
};

struct PackArguments {
  uintptr_t entries;
  uint32_t count;
  uintptr_t dims;
  uintptr_t out;
};

// What the kernel did that it must not: nothing, or the first such access.
struct Fault {
  std::string what;
  bool misaligned = false;
};

// `backwards`: threads run in the other order between two meetings; what depends on it lacks a meeting. Blocks run one
// after the other, in an order that `seed` decides. So what depends on the order is seen, and what only happens to
// blocks that run at once is not: that takes compute-sanitizer and a GPU.
Fault run_pack_kernel(const std::vector<Window>& windows, const PackArguments& arguments, unsigned grid, bool backwards,
                      uint64_t seed);

}  // namespace simulated
