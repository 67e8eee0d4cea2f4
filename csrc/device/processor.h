// SPDX-License-Identifier: Apache-2.0
// Which of the instructions that some functions have a faster form for the processor and the kernel allow.
#pragma once

namespace fastshard {

// By their names in /proc/cpuinfo. All false on other processors than x86-64.
struct Processor {
  bool pclmulqdq = false, sse4_1 = false;
  bool avx2 = false, f16c = false;
  bool avx512f = false, vpclmulqdq = false;
};

// Asked once. Not by __builtin_cpu_supports(), which says no to everything where a compiler's runtime does not fill its
// table: that of Zig, which wheels are built with, leaves it empty.
const Processor& processor() noexcept;

}  // namespace fastshard
