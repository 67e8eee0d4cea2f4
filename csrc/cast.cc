// SPDX-License-Identifier: Apache-2.0
#include "cast.h"

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

template <DType From, DType To>
void cast_together(const std::byte* __restrict source, uint64_t count, std::byte* __restrict out) {
  for (uint64_t i = 0; i < count; ++i) cast_one<From, To>(source + i * itemsize(From), out + i * itemsize(To));
}

#if defined(__x86_64__)
// The shifts by different numbers of places that a vector loop needs come with AVX2.
template <DType From, DType To>
[[gnu::target("avx2")]] void cast_together_avx2(const std::byte* __restrict source, uint64_t count,
                                                std::byte* __restrict out) {
  for (uint64_t i = 0; i < count; ++i) cast_one<From, To>(source + i * itemsize(From), out + i * itemsize(To));
}
#endif

template <DType From, DType To>
void cast_row(const std::byte* source, int64_t stride, uint64_t count, std::byte* out) {
  if (stride != itemsize(From)) {
    for (uint64_t i = 0; i < count; ++i, source += stride, out += itemsize(To)) cast_one<From, To>(source, out);
    return;
  }
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2");
  if (avx2) return cast_together_avx2<From, To>(source, count, out);
#endif
  cast_together<From, To>(source, count, out);
}

}  // namespace

CastRow row_cast(DType from, DType to) {
  return visit_cast(from, to, [](auto source, auto target) -> CastRow {
    return cast_row<decltype(source)::value, decltype(target)::value>;
  });
}

}  // namespace fastshard
