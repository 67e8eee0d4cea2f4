// SPDX-License-Identifier: Apache-2.0
#include "cast.h"

namespace fastshard {
namespace {

template <DType From, DType To>
[[gnu::always_inline]] inline void cast_elements(const std::byte* __restrict source, int64_t stride, uint64_t count,
                                                 std::byte* __restrict out) {
  for (uint64_t i = 0; i < count; ++i) {
    // By memcpy, as neither side has to be aligned.
    typename Element<From>::storage_type bits;
    std::memcpy(&bits, source + static_cast<int64_t>(i) * stride, sizeof bits);
    const auto cast = cast_element<From, To>(bits);
    std::memcpy(out + i * sizeof cast, &cast, sizeof cast);
  }
}

// The compiler makes the first of these a vector loop.
template <DType From, DType To>
[[gnu::always_inline]] inline void cast_both(const std::byte* source, int64_t stride, uint64_t count, std::byte* out) {
  if (stride == itemsize(From)) return cast_elements<From, To>(source, itemsize(From), count, out);
  cast_elements<From, To>(source, stride, count, out);
}

template <DType From, DType To>
void cast_row(const std::byte* source, int64_t stride, uint64_t count, std::byte* out) {
  cast_both<From, To>(source, stride, count, out);
}

#if defined(__x86_64__)
// Shifts by different numbers of places, and minima, are vector instructions from AVX2 on only.
template <DType From, DType To>
[[gnu::target("avx2")]] void cast_row_avx2(const std::byte* source, int64_t stride, uint64_t count, std::byte* out) {
  cast_both<From, To>(source, stride, count, out);
}
#endif

}  // namespace

CastRow row_cast(DType from, DType to) {
  return visit_cast(from, to, [](auto source, auto target) -> CastRow {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) return cast_row_avx2<decltype(source)::value, decltype(target)::value>;
#endif
    return cast_row<decltype(source)::value, decltype(target)::value>;
  });
}

}  // namespace fastshard
