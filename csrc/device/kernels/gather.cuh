// SPDX-License-Identifier: Apache-2.0
// Contiguous and strided gathers: neighbouring threads store neighbouring words of 16 bytes, and put each together
// from as many units as it takes.
#pragma once

#include "device/kernels/elements.cuh"
#include "device/kernels/memory.cuh"
#include "device/kernels/table.h"

namespace fastshard {

// Where `kCount` neighbours are, all at once: no branch at the end of a row, and divisions that do not wait for each
// other. Returns how many units from the first on follow each other at dims[0].stride.
template <uint32_t kCount>
__device__ __forceinline__ uint32_t locate(const PackEntry& entry, const PackDim* dims, uint32_t first,
                                           const std::byte* (&places)[kCount]) {
  uint32_t index[kCount];
#pragma unroll
  for (uint32_t i = 0; i < kCount; ++i) {
    index[i] = entry.first + first + i;
    places[i] = entry.source;
  }
  uint32_t left = ~0u;
  const uint32_t outermost = entry.dim_count - 1u;
#pragma unroll 1
  for (uint32_t level = 0; level < outermost; ++level) {
    const PackDim dim = dims[level];
#pragma unroll
    for (uint32_t i = 0; i < kCount; ++i) {
      const uint32_t above = divided(index[i], dim);
      const uint32_t within = index[i] - above * dim.size;
      places[i] += within * dim.stride;
      index[i] = above;
      if (level == 0 && i == 0) left = dim.size - within;
    }
  }
#pragma unroll
  for (uint32_t i = 0; i < kCount; ++i) places[i] += index[i] * dims[outermost].stride;
  return left;
}

// Units become 16 bytes.
__device__ __forceinline__ uint4 joined(const uint8_t (&units)[16]) {
  uint32_t words[4] = {};
#pragma unroll
  for (uint32_t i = 0; i < 16; ++i) words[i / 4] |= static_cast<uint32_t>(units[i]) << (i % 4 * 8);
  return {words[0], words[1], words[2], words[3]};
}
__device__ __forceinline__ uint4 joined(const uint16_t (&units)[8]) {
  uint32_t words[4] = {};
#pragma unroll
  for (uint32_t i = 0; i < 8; ++i) words[i / 2] |= static_cast<uint32_t>(units[i]) << (i % 2 * 16);
  return {words[0], words[1], words[2], words[3]};
}
__device__ __forceinline__ uint4 joined(const uint32_t (&units)[4]) { return {units[0], units[1], units[2], units[3]}; }
__device__ __forceinline__ uint4 joined(const uint64_t (&units)[2]) {
  return {static_cast<uint32_t>(units[0]), static_cast<uint32_t>(units[0] >> 32), static_cast<uint32_t>(units[1]),
          static_cast<uint32_t>(units[1] >> 32)};
}
__device__ __forceinline__ uint4 joined(const uint4 (&units)[1]) { return units[0]; }

// `words` whole words of 16 bytes at `out`; load(unit index of a word's first, units). Several words of a thread
// are loaded before any is stored: the compiler cannot know that the stores change nothing that is loaded.
template <typename Unit, typename Load>
__device__ __forceinline__ void store_words(uint32_t words, std::byte* out, Load load) {
  constexpr uint32_t kUnits = 16 / sizeof(Unit);
  constexpr uint32_t kAhead = sizeof(Unit) == 16 ? 2 : 1;
#pragma unroll 1
  for (uint32_t first = threadIdx.x; first < words; first += kAhead * kPackThreads) {
    Unit units[kAhead][kUnits];
#pragma unroll
    for (uint32_t ahead = 0; ahead < kAhead; ++ahead) {
      const uint32_t word = first + ahead * kPackThreads;
      if (word < words) load(word * kUnits, units[ahead]);
    }
#pragma unroll
    for (uint32_t ahead = 0; ahead < kAhead; ++ahead) {
      const uint32_t word = first + ahead * kPackThreads;
      if (word < words) global::store(out + uint64_t{word} * 16, joined(units[ahead]));
    }
  }
}

// Bytes up to the next multiple of 16.
__device__ __forceinline__ uint32_t to_word(const std::byte* out) {
  return static_cast<uint32_t>(-reinterpret_cast<uintptr_t>(out) & 15);
}

template <typename Unit>
__device__ void copy_entry(const PackEntry& entry, std::byte* out) {
  const uint32_t head = min(entry.count, to_word(out));
  const uint32_t words = (entry.count - head) / 16;
  const uint32_t tail = entry.count - head - words * 16;
  if (threadIdx.x < head + tail) {
    const uint32_t index = threadIdx.x < head ? threadIdx.x : threadIdx.x + words * 16;
    global::store(out + index, global::load<uint8_t>(entry.source + index));
  }
  const std::byte* source = entry.source + head;
  store_words<Unit>(words, out + head, [&](uint32_t first, auto& units) {
#pragma unroll
    for (uint32_t i = 0; i < 16 / sizeof(Unit); ++i) {
      units[i] = global::load<Unit>(source + uint64_t{first + i} * sizeof(Unit));
    }
  });
}

template <typename Unit>
__device__ void gather_entry(const PackEntry& entry, const PackDim* dims, std::byte* out) {
  constexpr uint32_t kUnits = 16 / sizeof(Unit);
  const uint32_t head = min(entry.count, to_word(out) / static_cast<uint32_t>(sizeof(Unit)));
  const uint32_t words = (entry.count - head) / kUnits;
  const uint32_t tail = entry.count - head - words * kUnits;
  if (threadIdx.x < head + tail) {
    const uint32_t index = threadIdx.x < head ? threadIdx.x : threadIdx.x + words * kUnits;
    const std::byte* place[1];
    locate(entry, dims, index, place);
    global::store(out + index * sizeof(Unit), global::load<Unit>(place[0]));
  }
  store_words<Unit>(words, out + head * sizeof(Unit), [&](uint32_t first, auto& units) {
    constexpr uint32_t kTogether = kUnits < kBatch ? kUnits : kBatch;
#pragma unroll
    for (uint32_t done = 0; done < kUnits; done += kTogether) {
      const std::byte* places[kTogether];
      locate(entry, dims, head + first + done, places);
#pragma unroll
      for (uint32_t i = 0; i < kTogether; ++i) units[done + i] = global::load<Unit>(places[i]);
    }
  });
}

// Four elements a thread: up to 32 bytes in, up to 16 out, wherever both are aligned and the source contiguous.
__device__ inline void cast_entry(const PackEntry& entry, const PackDim* dims, std::byte* out) {
  const uint32_t size = itemsize(entry.to);
  const uint32_t group = kBatch * size;  // bytes, a power of two up to 16
  const uint32_t head = min(entry.count, (to_word(out) & (group - 1)) / size);
  const uint32_t groups = (entry.count - head + kBatch - 1) / kBatch;
  const uint32_t in_alignment = min(kBatch * entry.unit, 16u);
  // Group 0 is what comes before the first aligned one.
#pragma unroll 1
  for (uint32_t index = threadIdx.x; index <= groups; index += kPackThreads) {
    const uint32_t first = index == 0 ? 0 : head + (index - 1) * kBatch;
    const uint32_t count = index == 0 ? head : min(kBatch, entry.count - first);
    if (count == 0) continue;
    Places places;
    const bool together = locate(entry, dims, first, places.at) >= kBatch && count == kBatch &&
                          dims[0].stride == entry.unit && reinterpret_cast<uintptr_t>(places.at[0]) % in_alignment == 0;
    const Four cast = narrow(entry.to, load_wide(entry.from, places, count, together));
    std::byte* const target = out + uint64_t{first} * size;
    if (index == 0 || count < kBatch) {
#pragma unroll
      for (uint32_t i = 0; i < kBatch; ++i) {
        if (i < count) put(target + i * size, size, cast.bits[i]);
      }
    } else if (size == 4) {
      global::store(target, uint4{cast.bits[0], cast.bits[1], cast.bits[2], cast.bits[3]});
    } else if (size == 2) {
      global::store(target, uint2{cast.bits[0] | cast.bits[1] << 16, cast.bits[2] | cast.bits[3] << 16});
    } else {
      global::store(target, cast.bits[0] | cast.bits[1] << 8 | cast.bits[2] << 16 | cast.bits[3] << 24);
    }
  }
}

}  // namespace fastshard
