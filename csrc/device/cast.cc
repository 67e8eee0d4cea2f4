// SPDX-License-Identifier: Apache-2.0
#include "device/cast.h"

#include "device/processor.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastshard {
namespace {

// Through memcpy, as neither side has to be aligned.
template <DType From, DType To>
[[gnu::always_inline]] inline void cast_one(const std::byte* source, std::byte* out) {
  typename Element<From>::storage_type bits;
  std::memcpy(&bits, source, sizeof bits);
  const auto cast = cast_element<From, To>(bits);
  std::memcpy(out, &cast, sizeof cast);
}

// The shifts by different numbers of places that make it a vector loop came to x86 with AVX2.
#if defined(__x86_64__)
#define FASTSHARD_VECTORS [[gnu::target("avx2")]]
const bool have_vectors = processor().avx2;
#else
#define FASTSHARD_VECTORS
constexpr bool have_vectors = true;
#endif

template <DType From, DType To>
FASTSHARD_VECTORS void cast_together(const std::byte* __restrict source, uint64_t count, std::byte* __restrict out) {
  for (uint64_t i = 0; i < count; ++i) cast_one<From, To>(source + i * itemsize(From), out + i * itemsize(To));
}

#if defined(__x86_64__)
// What the processor does in one instruction, with the same bits; a compiler does not see it in the integers.
const bool have_f16c = have_vectors && processor().f16c;

[[gnu::target("avx2,f16c")]] uint64_t narrow_to_f16(const std::byte* source, uint64_t count, std::byte* out) {
  uint64_t done = 0;
  for (; done + 8 <= count; done += 8) {
    const __m256 wide = _mm256_loadu_ps(reinterpret_cast<const float*>(source + done * 4));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + done * 2), _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
  }
  return done;
}

[[gnu::target("avx2,f16c")]] uint64_t widen_f16(const std::byte* source, uint64_t count, std::byte* out) {
  uint64_t done = 0;
  for (; done + 8 <= count; done += 8) {
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + done * 2));
    _mm256_storeu_ps(reinterpret_cast<float*>(out + done * 4), _mm256_cvtph_ps(narrow));
  }
  return done;
}
#endif

// How many of the first elements the processor has an instruction for.
template <DType From, DType To>
uint64_t cast_by_instruction([[maybe_unused]] const std::byte* source, [[maybe_unused]] uint64_t count,
                             [[maybe_unused]] std::byte* out) {
#if defined(__x86_64__)
  if constexpr (From == DType::f32 && To == DType::f16) return have_f16c ? narrow_to_f16(source, count, out) : 0;
  if constexpr (From == DType::f16 && To == DType::f32) return have_f16c ? widen_f16(source, count, out) : 0;
#endif
  return 0;
}

template <DType From, DType To>
void cast_row(const std::byte* source, int64_t stride, uint64_t count, std::byte* out) {
  if (stride == itemsize(From) && have_vectors) {
    const uint64_t done = cast_by_instruction<From, To>(source, count, out);
    return cast_together<From, To>(source + done * itemsize(From), count - done, out + done * itemsize(To));
  }
  for (uint64_t i = 0; i < count; ++i, source += stride, out += itemsize(To)) cast_one<From, To>(source, out);
}

}  // namespace

CastRow row_cast(DType from, DType to) {
  return visit_cast(from, to, [](auto source, auto target) -> CastRow {
    return cast_row<decltype(source)::value, decltype(target)::value>;
  });
}

}  // namespace fastshard
