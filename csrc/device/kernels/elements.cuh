// SPDX-License-Identifier: Apache-2.0
// Elements in registers: loaded and cast, a few at a time. Which types they have is the same for a whole block,
// so it is decided at run time: one body for each type to come from and one for each to go to, not one a pair.
#pragma once

#include "device/cast.h"
#include "device/kernels/memory.cuh"

namespace fastshard {

// Elements a thread has under way at once.
inline constexpr uint32_t kBatch = 4;

template <uint32_t kNbytes>
struct Unsigned;
template <>
struct Unsigned<1> {
  using type = uint8_t;
};
template <>
struct Unsigned<2> {
  using type = uint16_t;
};
template <>
struct Unsigned<4> {
  using type = uint32_t;
};
template <>
struct Unsigned<8> {
  using type = uint64_t;
};
template <>
struct Unsigned<16> {
  using type = uint4;
};

// 4 elements at once, from a multiple of their size: 4 to 32 bytes.
__device__ __forceinline__ void load_four(const std::byte* source, uint8_t (&out)[kBatch]) {
  const auto word = global::load<uint32_t>(source);
  for (uint32_t i = 0; i < kBatch; ++i) out[i] = static_cast<uint8_t>(word >> (8 * i));
}
__device__ __forceinline__ void load_four(const std::byte* source, uint16_t (&out)[kBatch]) {
  const auto words = global::load<uint2>(source);
  out[0] = static_cast<uint16_t>(words.x);
  out[1] = static_cast<uint16_t>(words.x >> 16);
  out[2] = static_cast<uint16_t>(words.y);
  out[3] = static_cast<uint16_t>(words.y >> 16);
}
__device__ __forceinline__ void load_four(const std::byte* source, uint32_t (&out)[kBatch]) {
  const auto words = global::load<uint4>(source);
  out[0] = words.x;
  out[1] = words.y;
  out[2] = words.z;
  out[3] = words.w;
}
__device__ __forceinline__ void load_four(const std::byte* source, uint64_t (&out)[kBatch]) {
  for (uint32_t i = 0; i < kBatch; i += 2) {
    const auto words = global::load<uint4>(source + 8 * i);
    out[i] = words.x | uint64_t{words.y} << 32;
    out[i + 1] = words.z | uint64_t{words.w} << 32;
  }
}

// Where four elements are, and what is in them as float32 bits. By value: functions that are not inlined take and
// return them in registers.
struct Places {
  const std::byte* at[kBatch];
};
struct Four {
  uint32_t bits[kBatch];
};

template <DType From>
__device__ __forceinline__ Four load_as(const Places& places, uint32_t count, bool together) {
  using Bits = typename Element<From>::storage_type;
  Bits bits[kBatch] = {};
  if (together) {
    load_four(places.at[0], bits);
  } else {
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i) {
      if (i < count) bits[i] = global::load<Bits>(places.at[i]);
    }
  }
  Four wide;
#pragma unroll
  for (uint32_t i = 0; i < kBatch; ++i) wide.bits[i] = casting::widened<From>(bits[i]);
  return wide;
}

// The first `count` elements; or, if they lie `together`, all four from an aligned places.at[0] on.
__device__ __noinline__ Four load_wide(DType from, Places places, uint32_t count, bool together) {
  return visit_source(from, [&](auto type) { return load_as<decltype(type)::value>(places, count, together); });
}

template <DType To>
__device__ __forceinline__ Four narrowed_to(Four wide) {
#pragma unroll
  for (uint32_t i = 0; i < kBatch; ++i) wide.bits[i] = casting::narrowed<To>(wide.bits[i]);
  return wide;
}

// Elements of type `to`, each in its low bits.
__device__ __noinline__ Four narrow(DType to, Four wide) {
  return visit_target(to, [&](auto type) { return narrowed_to<decltype(type)::value>(wide); });
}

// One element of `nbytes`.
__device__ __forceinline__ void put(std::byte* out, uint32_t nbytes, uint32_t bits) {
  if (nbytes == 4) {
    global::store(out, bits);
  } else if (nbytes == 2) {
    global::store(out, static_cast<uint16_t>(bits));
  } else {
    global::store(out, static_cast<uint8_t>(bits));
  }
}

}  // namespace fastshard
