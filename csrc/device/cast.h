// SPDX-License-Identifier: Apache-2.0
// Casts of floating-point elements, bit for bit those of torch's `tensor.to(dtype)`: to nearest, ties to even, by way
// of float32 (so a float64 is rounded twice, as in torch). float8_e4m3fn has no infinity. A number that is too large
// for it becomes NaN in torch up to 2.12, and the largest number from 2.13 on (f8_e4m3_sat). The CPU and
// kernels/pack.cu share this file. It uses integer arithmetic, so that rounding modes, flushed subnormals and fast-math
// have no influence, and no branches, so that compilers vectorise it.
//
// NaNs stay NaNs. As bfloat16 each becomes 0x7fc0, as a float8 0x7f with its sign. Otherwise a NaN keeps its sign and
// the leading bits of its payload, and is made quiet; from bfloat16 to float32 it is not changed. Torch does the same,
// except that its vectorised loops write some NaNs as 0xffff in bfloat16.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "plan/plan.h"

namespace fastshard {

template <DType>
struct Element;
template <>
struct Element<DType::f64> {
  using storage_type = uint64_t;
};
template <>
struct Element<DType::f32> {
  using storage_type = uint32_t;
};
template <>
struct Element<DType::f16> {
  using storage_type = uint16_t;
};
template <>
struct Element<DType::bf16> {
  using storage_type = uint16_t;
};
template <>
struct Element<DType::f8_e4m3> {
  using storage_type = uint8_t;
};
template <>
struct Element<DType::f8_e4m3_sat> {
  using storage_type = uint8_t;
};
template <>
struct Element<DType::f8_e5m2> {
  using storage_type = uint8_t;
};

namespace casting {

// Like `condition ? yes : no`, for which compilers on the CPU make branches, and then no vector loop.
template <typename Word>
FASTSHARD_HOST_DEVICE inline Word chosen(bool condition, Word yes, Word no) {
#ifdef __CUDA_ARCH__
  return condition ? yes : no;
#else
  const Word mask = Word{0} - static_cast<Word>(condition);
  return (yes & mask) | (no & ~mask);
#endif
}

// a < b, both below half of Word's range: so compared as signed numbers, for which there are vector instructions.
template <typename Word>
FASTSHARD_HOST_DEVICE inline bool less(Word a, Word b) {
  return static_cast<std::make_signed_t<Word>>(a) < static_cast<std::make_signed_t<Word>>(b);
}
template <typename Word>
FASTSHARD_HOST_DEVICE inline Word smaller(Word a, Word b) {
  return chosen(less(a, b), a, b);
}
template <typename Word>
FASTSHARD_HOST_DEVICE inline Word larger(Word a, Word b) {
  return chosen(less(a, b), b, a);
}

// Right shift, to nearest, ties to even. 0 < shift; the sum must not overflow.
template <typename Word>
FASTSHARD_HOST_DEVICE inline Word shifted(Word value, Word shift) {
  return static_cast<Word>((value + (Word{1} << (shift - 1)) - 1 + ((value >> shift) & 1)) >> shift);
}

// The float32 bits of value * 2^exponent, for results that are normal numbers of float32. This is the only operation
// here that is not an integer's: an int below 2^24 becomes a float exactly, in any rounding mode.
FASTSHARD_HOST_DEVICE inline uint32_t scaled(uint32_t value, int exponent) {
  const auto number = static_cast<float>(static_cast<int32_t>(value));
#ifdef __CUDA_ARCH__
  const uint32_t bits = __float_as_uint(number);
#else
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
#endif
  return chosen(value == 0, 0u, bits + (static_cast<uint32_t>(exponent) << 23));
}

// To the bits of a float32.
template <DType From>
FASTSHARD_HOST_DEVICE inline uint32_t widened(typename Element<From>::storage_type bits);

template <>
FASTSHARD_HOST_DEVICE inline uint32_t widened<DType::f32>(uint32_t bits) {
  return bits;
}

template <>
FASTSHARD_HOST_DEVICE inline uint32_t widened<DType::bf16>(uint16_t bits) {
  return uint32_t{bits} << 16;
}

template <>
FASTSHARD_HOST_DEVICE inline uint32_t widened<DType::f16>(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  const uint32_t special = 0x7f800000u | magnitude << 13 | chosen(less(0x7c00u, magnitude), 0x400000u, 0u);
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t subnormal = scaled(magnitude, -24);
  const uint32_t number = chosen(less(magnitude, 0x400u), subnormal, normal);
  return sign | chosen(less(magnitude, 0x7c00u), number, special);
}

template <>
FASTSHARD_HOST_DEVICE inline uint32_t widened<DType::f8_e5m2>(uint8_t bits) {
  return widened<DType::f16>(static_cast<uint16_t>(bits << 8));
}

template <>
FASTSHARD_HOST_DEVICE inline uint32_t widened<DType::f8_e4m3>(uint8_t bits) {
  const uint32_t sign = (bits & 0x80u) << 24;
  const uint32_t magnitude = bits & 0x7fu;
  const uint32_t normal = (magnitude << 20) + (120u << 23);
  const uint32_t subnormal = scaled(magnitude, -9);
  const uint32_t number = chosen(less(magnitude, 8u), subnormal, normal);
  return sign | chosen(magnitude == 0x7fu, 0x7ff00000u, number);
}

// To fewer bits: to float32 too, where it comes from a float64.
template <>
FASTSHARD_HOST_DEVICE inline uint32_t widened<DType::f64>(uint64_t bits) {
  const auto sign = static_cast<uint32_t>(bits >> 32) & 0x80000000u;
  const uint64_t magnitude = bits & 0x7fffffffffffffffu;
  const uint64_t infinity = uint64_t{0x7ff} << 52;
  const uint64_t fraction = magnitude & 0xfffffffffffffu;
  const uint64_t exponent = magnitude >> 52;
  // What is subnormal as float32 loses more places, and from 54 on everything.
  const uint64_t raised = larger<uint64_t>(exponent, 897);
  const uint64_t places = smaller<uint64_t>(29 + raised - exponent, 63);
  const uint64_t number = shifted<uint64_t>(fraction | uint64_t{1} << 52, places) + ((raised - 897) << 23);
  const uint64_t finite = smaller<uint64_t>(number, 0x7f800000u);
  const uint64_t nan = 0x7fc00000u | fraction >> 29;
  return sign | static_cast<uint32_t>(chosen(less(infinity, magnitude), nan, finite));
}

// From the bits of a float32 to a sign, an exponent of that bias, and so many bits of mantissa. What is too
// large becomes `kOverflow`, what is NaN `kNan` with the payload bits that `kPayload` selects.
template <uint32_t kBias, uint32_t kMantissa, uint32_t kSign, uint32_t kOverflow, uint32_t kNan, uint32_t kPayload>
FASTSHARD_HOST_DEVICE inline uint32_t narrowed(uint32_t bits) {
  constexpr uint32_t kDrop = 23 - kMantissa;
  constexpr uint32_t kFirstNormal = 128 - kBias;  // exponent, as float32 has it
  const uint32_t sign = (bits >> 31) * kSign;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t exponent = magnitude >> 23;
  const uint32_t fraction = magnitude & 0x7fffffu;
  // What is subnormal there loses more places, and from 25 on everything. The bit before the mantissa, where it
  // is left, counts as one in the exponent.
  const uint32_t raised = larger(exponent, kFirstNormal);
  const uint32_t places = smaller(kDrop + raised - exponent, 31u);
  const uint32_t number = shifted(fraction | 0x800000u, places) + ((raised - kFirstNormal) << kMantissa);
  const uint32_t finite = smaller(number, kOverflow);
  const uint32_t nan = kNan | (fraction >> kDrop & kPayload);
  return sign | chosen(less(0x7f800000u, magnitude), nan, finite);
}

template <DType To>
FASTSHARD_HOST_DEVICE inline typename Element<To>::storage_type narrowed(uint32_t bits);

template <>
FASTSHARD_HOST_DEVICE inline uint32_t narrowed<DType::f32>(uint32_t bits) {
  return bits;
}

template <>
FASTSHARD_HOST_DEVICE inline uint16_t narrowed<DType::bf16>(uint32_t bits) {
  return static_cast<uint16_t>(chosen(less(0x7f800000u, bits & 0x7fffffffu), 0x7fc0u, shifted(bits, 16u)));
}

template <>
FASTSHARD_HOST_DEVICE inline uint16_t narrowed<DType::f16>(uint32_t bits) {
  return static_cast<uint16_t>(narrowed<15, 10, 0x8000, 0x7c00, 0x7e00, 0x3ff>(bits));
}

template <>
FASTSHARD_HOST_DEVICE inline uint8_t narrowed<DType::f8_e4m3>(uint32_t bits) {
  return static_cast<uint8_t>(narrowed<7, 3, 0x80, 0x7f, 0x7f, 0>(bits));
}

template <>
FASTSHARD_HOST_DEVICE inline uint8_t narrowed<DType::f8_e4m3_sat>(uint32_t bits) {
  return static_cast<uint8_t>(narrowed<7, 3, 0x80, 0x7e, 0x7f, 0>(bits));
}

template <>
FASTSHARD_HOST_DEVICE inline uint8_t narrowed<DType::f8_e5m2>(uint32_t bits) {
  return static_cast<uint8_t>(narrowed<15, 2, 0x80, 0x7c, 0x7f, 0>(bits));
}

}  // namespace casting

// One element. From is not f8_e4m3_sat, To is not f64.
template <DType From, DType To>
FASTSHARD_HOST_DEVICE inline typename Element<To>::storage_type cast_element(
    typename Element<From>::storage_type bits) {
  return casting::narrowed<To>(casting::widened<From>(bits));
}

// A type as an argument: decltype(argument)::value.
template <DType kType>
struct DTypeConstant {
  static constexpr DType value = kType;
};

// visitor(DTypeConstant<from>{}) with a type that can be cast.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <typename Visitor>
FASTSHARD_HOST_DEVICE inline auto visit_source(DType from, Visitor&& visitor) {
  switch (from) {
    case DType::f64:
      return visitor(DTypeConstant<DType::f64>{});
    case DType::f16:
      return visitor(DTypeConstant<DType::f16>{});
    case DType::bf16:
      return visitor(DTypeConstant<DType::bf16>{});
    case DType::f8_e4m3:
      return visitor(DTypeConstant<DType::f8_e4m3>{});
    case DType::f8_e5m2:
      return visitor(DTypeConstant<DType::f8_e5m2>{});
    default:
      return visitor(DTypeConstant<DType::f32>{});
  }
}

// The same with a type to which there is a cast.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <typename Visitor>
FASTSHARD_HOST_DEVICE inline auto visit_target(DType to, Visitor&& visitor) {
  switch (to) {
    case DType::f16:
      return visitor(DTypeConstant<DType::f16>{});
    case DType::bf16:
      return visitor(DTypeConstant<DType::bf16>{});
    case DType::f8_e4m3:
      return visitor(DTypeConstant<DType::f8_e4m3>{});
    case DType::f8_e4m3_sat:
      return visitor(DTypeConstant<DType::f8_e4m3_sat>{});
    case DType::f8_e5m2:
      return visitor(DTypeConstant<DType::f8_e5m2>{});
    default:
      return visitor(DTypeConstant<DType::f32>{});
  }
}

// visitor(DTypeConstant<from>{}, DTypeConstant<to>{}): 36 functions, so in kernels rather one after the other.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <typename Visitor>
FASTSHARD_HOST_DEVICE inline auto visit_cast(DType from, DType to, Visitor&& visitor) {
  return visit_source(
      from, [&](auto source) { return visit_target(to, [&](auto target) { return visitor(source, target); }); });
}

// On the CPU: `count` elements that lie `stride` bytes apart, to `out`, where they lie together. Neither side has
// to be aligned.
using CastRow = void (*)(const std::byte* source, int64_t stride, uint64_t count, std::byte* out);
CastRow row_cast(DType from, DType to);

}  // namespace fastshard
