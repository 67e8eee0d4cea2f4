// SPDX-License-Identifier: Apache-2.0
#include "device/streaming.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace fastshard {

#ifdef __SSE2__
// SSE2 is in every x86-64 and as fast as AVX2 and AVX-512 here: the write-combining buffers are the limit. The
// processor's own prefetching ends with each page, so the source is asked for a page ahead (a tenth faster); asking
// for what is not mapped does no harm.
void copy_streaming(std::byte* out, const std::byte* source, size_t nbytes, size_t ahead_nbytes) {
  constexpr size_t kLineNbytes = 64;
  const size_t head = std::min(nbytes, (kLineNbytes - reinterpret_cast<uintptr_t>(out) % kLineNbytes) % kLineNbytes);
  std::memcpy(out, source, head);
  size_t done = head;
  for (; nbytes - done >= kLineNbytes; done += kLineNbytes) {
    const auto* from = reinterpret_cast<const __m128i*>(source + done);
    auto* to = reinterpret_cast<__m128i*>(out + done);
    _mm_prefetch(reinterpret_cast<const char*>(from) + ahead_nbytes, _MM_HINT_T0);
    const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
    const __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
    _mm_stream_si128(to, a);
    _mm_stream_si128(to + 1, b);
    _mm_stream_si128(to + 2, c);
    _mm_stream_si128(to + 3, d);
  }
  _mm_sfence();
  std::memcpy(out + done, source + done, nbytes - done);
}
#else
void copy_streaming(std::byte* out, const std::byte* source, size_t nbytes, size_t) {
  std::memcpy(out, source, nbytes);
}
#endif

}  // namespace fastshard
