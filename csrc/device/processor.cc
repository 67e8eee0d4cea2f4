// SPDX-License-Identifier: Apache-2.0
#include "device/processor.h"

#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace fastshard {
namespace {

#ifdef __x86_64__
// Bits of XCR0: the kernel keeps the registers of SSE and AVX, and those of AVX-512.
constexpr unsigned kAvxState = 0x6, kAvx512State = 0xe6;

unsigned kept_states() noexcept {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// Intel's Software Developer's Manual, volume 2, CPUID: leaf 1, and leaf 7 with its subleaf 0.
Processor ask() noexcept {
  Processor found;
  unsigned a, b, c, d;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return found;
  const unsigned states = (c & bit_OSXSAVE) != 0 ? kept_states() : 0;
  const bool avx = (states & kAvxState) == kAvxState, avx512 = (states & kAvx512State) == kAvx512State;
  found.pclmulqdq = (c & bit_PCLMUL) != 0;
  found.sse4_1 = (c & bit_SSE4_1) != 0;
  found.f16c = avx && (c & bit_F16C) != 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return found;
  found.avx2 = avx && (b & bit_AVX2) != 0;
  found.avx512f = avx512 && (b & bit_AVX512F) != 0;
  found.vpclmulqdq = avx && (c & bit_VPCLMULQDQ) != 0;
  return found;
}
#else
Processor ask() noexcept { return {}; }
#endif

}  // namespace

const Processor& processor() noexcept {
  static const Processor found = ask();
  return found;
}

}  // namespace fastshard
