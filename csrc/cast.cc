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

// The shifts by different numbers of places that make it a vector loop came to x86 with AVX2.
#if defined(__x86_64__)
#define FASTSHARD_VECTORS [[gnu::target("avx2")]]
const bool have_vectors = __builtin_cpu_supports("avx2");
#else
#define FASTSHARD_VECTORS
constexpr bool have_vectors = true;
#endif

template <DType From, DType To>
FASTSHARD_VECTORS void cast_together(const std::byte* __restrict source, uint64_t count, std::byte* __restrict out) {
  for (uint64_t i = 0; i < count; ++i) cast_one<From, To>(source + i * itemsize(From), out + i * itemsize(To));
}

template <DType From, DType To>
void cast_row(const std::byte* source, int64_t stride, uint64_t count, std::byte* out) {
  if (stride == itemsize(From) && have_vectors) return cast_together<From, To>(source, count, out);
  for (uint64_t i = 0; i < count; ++i, source += stride, out += itemsize(To)) cast_one<From, To>(source, out);
}

}  // namespace

CastRow row_cast(DType from, DType to) {
  return visit_cast(from, to, [](auto source, auto target) -> CastRow {
    return cast_row<decltype(source)::value, decltype(target)::value>;
  });
}

}  // namespace fastshard
