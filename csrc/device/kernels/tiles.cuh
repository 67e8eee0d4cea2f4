// SPDX-License-Identifier: Apache-2.0
// Transposed gathers. The neighbours of an element in the source are far from it in the output, and the other way
// round, so a tile goes through shared memory: loads run along the source, stores along the output, both in whole
// lines. Rows of the tile have an odd number of elements, which spreads a column over all banks.
#pragma once

#include "device/kernels/elements.cuh"
#include "device/kernels/memory.cuh"
#include "device/kernels/table.h"

namespace fastshard {

// One tile: `wide` elements that lie together in the source, times `high` that do in the output.
struct Tile {
  const std::byte* source;
  std::byte* out;
  uint32_t wide, high;
  uint32_t pitch;  // of a row in shared memory, in elements
};

// `kParts` neighbours in the source at a time.
template <typename Part, uint32_t kParts>
__device__ __noinline__ void load_tile(const PackEntry& entry, const PackDim* dims, Tile tile, Part* shared) {
  using Word = typename Unsigned<sizeof(Part) * kParts>::type;
  constexpr uint32_t kAhead = 4;
  const uint32_t log_words = entry.log_wide - (kParts == 1 ? 0u : kParts == 2 ? 1u : 2u);
  const uint32_t words = tile.high << log_words;
#pragma unroll 1
  for (uint32_t first = threadIdx.x; first < words; first += kAhead * kPackThreads) {
    Word word[kAhead];
#pragma unroll
    for (uint32_t ahead = 0; ahead < kAhead; ++ahead) {
      const uint32_t index = first + ahead * kPackThreads;
      const uint32_t row = index >> log_words;
      const uint32_t column = (index & ((1u << log_words) - 1)) * kParts;
      if (index >= words || column + kParts > tile.wide) continue;
      word[ahead] = global::load<Word>(tile.source + row * dims[0].stride + uint64_t{column} * sizeof(Part));
    }
#pragma unroll
    for (uint32_t ahead = 0; ahead < kAhead; ++ahead) {
      const uint32_t index = first + ahead * kPackThreads;
      const uint32_t row = index >> log_words;
      const uint32_t column = (index & ((1u << log_words) - 1)) * kParts;
      if (index >= words || column >= tile.wide) continue;
      Part* const to = shared + row * tile.pitch + column;
      if constexpr (kParts == 1) {
        to[0] = word[ahead];
      } else if (column + kParts <= tile.wide) {
        for (uint32_t i = 0; i < kParts; ++i) to[i] = static_cast<Part>(word[ahead] >> (8 * sizeof(Part) * i));
      } else {
        const std::byte* from = tile.source + row * dims[0].stride + uint64_t{column} * sizeof(Part);
#pragma unroll 1
        for (uint32_t i = 0; column + i < tile.wide; ++i) to[i] = global::load<Part>(from + i * sizeof(Part));
      }
    }
  }
}

__device__ __noinline__ void cast_tile(const PackEntry& entry, const PackDim* dims, Tile tile, std::byte* shared) {
  const uint32_t size = itemsize(entry.to);
  const uint32_t elements = tile.high << entry.log_wide;
#pragma unroll 1
  for (uint32_t first = threadIdx.x; first < elements; first += kBatch * kPackThreads) {
    Places places;
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i) {
      const uint32_t index = first + i * kPackThreads;
      const uint32_t column = index & ((1u << entry.log_wide) - 1);
      const bool inside = index < elements && column < tile.wide;
      // What is outside of the tile is loaded from its beginning, and not stored.
      places.at[i] = tile.source;
      if (inside) places.at[i] += (index >> entry.log_wide) * dims[0].stride + uint64_t{column} * entry.unit;
    }
    const Four cast = narrow(entry.to, load_wide(entry.from, places, kBatch, false));
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i) {
      const uint32_t index = first + i * kPackThreads;
      const uint32_t column = index & ((1u << entry.log_wide) - 1);
      if (index >= elements || column >= tile.wide) continue;
      std::byte* const to = shared + ((index >> entry.log_wide) * tile.pitch + column) * size;
      if (size == 4) {
        *reinterpret_cast<uint32_t*>(to) = cast.bits[i];
      } else if (size == 2) {
        *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(cast.bits[i]);
      } else {
        *reinterpret_cast<uint8_t*>(to) = static_cast<uint8_t>(cast.bits[i]);
      }
    }
  }
}

// `kParts` neighbours in the output at a time.
template <typename Part, uint32_t kParts>
__device__ __noinline__ void store_tile(const PackEntry& entry, const PackDim* dims, Tile tile, const Part* shared) {
  using Word = typename Unsigned<sizeof(Part) * kParts>::type;
  const uint32_t log_words = entry.log_high - (kParts == 1 ? 0u : kParts == 2 ? 1u : 2u);
  const uint32_t words = tile.wide << log_words;
#pragma unroll 1
  for (uint32_t index = threadIdx.x; index < words; index += kPackThreads) {
    const uint32_t column = index >> log_words;
    const uint32_t row = (index & ((1u << log_words) - 1)) * kParts;
    if (row >= tile.high) continue;
    const Part* from = shared + row * tile.pitch + column;
    std::byte* const to = tile.out + column * dims[1].out_stride + row * sizeof(Part);
    if constexpr (kParts == 1) {
      global::store(to, from[0]);
    } else if (row + kParts <= tile.high) {
      Word word = 0;
      for (uint32_t i = 0; i < kParts; ++i) word |= static_cast<Word>(from[i * tile.pitch]) << (8 * sizeof(Part) * i);
      global::store(to, word);
    } else {
#pragma unroll 1
      for (uint32_t i = 0; row + i < tile.high; ++i) global::store(to + i * sizeof(Part), from[i * tile.pitch]);
    }
  }
}

template <typename Part>
__device__ __forceinline__ void load_any(const PackEntry& entry, const PackDim* dims, Tile tile, std::byte* shared) {
  constexpr uint32_t kParts = sizeof(Part) < 4 ? 4 / sizeof(Part) : 1;
  if (kParts != 1 && entry.wide_loads)
    return load_tile<Part, kParts>(entry, dims, tile, reinterpret_cast<Part*>(shared));
  load_tile<Part, 1>(entry, dims, tile, reinterpret_cast<Part*>(shared));
}

template <typename Part>
__device__ __forceinline__ void store_any(const PackEntry& entry, const PackDim* dims, Tile tile, std::byte* shared) {
  constexpr uint32_t kParts = sizeof(Part) < 4 ? 4 / sizeof(Part) : 1;
  if (kParts != 1 && entry.wide_stores) {
    return store_tile<Part, kParts>(entry, dims, tile, reinterpret_cast<Part*>(shared));
  }
  store_tile<Part, 1>(entry, dims, tile, reinterpret_cast<Part*>(shared));
}

// `shared` has room for a padded tile.
__device__ __noinline__ void transpose_entry(const PackEntry& entry, const PackDim* dims, std::byte* out,
                                             std::byte* shared) {
  const uint32_t size = dims[0].out_stride;  // of an element
  const uint32_t tiles_wide = (dims[1].size + (1u << entry.log_wide) - 1) >> entry.log_wide;
  const uint32_t tiles_high = (dims[0].size + (1u << entry.log_high) - 1) >> entry.log_high;
  const uint32_t tiles = dims[2].size * tiles_wide * tiles_high;
#pragma unroll 1
  for (uint32_t index = 0; index < tiles; ++index) {
    const uint32_t high = (index % tiles_high) << entry.log_high;
    const uint32_t rest = index / tiles_high;
    const uint32_t wide = (rest % tiles_wide) << entry.log_wide;
    const uint32_t batch = rest / tiles_wide;
    Tile tile;
    tile.source = entry.source + batch * dims[2].stride + high * dims[0].stride + wide * dims[1].stride;
    tile.out = out + batch * dims[2].out_stride + wide * dims[1].out_stride + high * size;
    tile.wide = min(1u << entry.log_wide, dims[1].size - wide);
    tile.high = min(1u << entry.log_high, dims[0].size - high);
    tile.pitch = (1u << entry.log_wide) + 1;
    __syncthreads();  // the tile before has been stored
    if (entry.to != DType::raw) {
      cast_tile(entry, dims, tile, shared);
    } else if (size == 16) {
      load_any<uint4>(entry, dims, tile, shared);
    } else if (size == 8) {
      load_any<uint64_t>(entry, dims, tile, shared);
    } else if (size == 4) {
      load_any<uint32_t>(entry, dims, tile, shared);
    } else if (size == 2) {
      load_any<uint16_t>(entry, dims, tile, shared);
    } else {
      load_any<uint8_t>(entry, dims, tile, shared);
    }
    __syncthreads();
    if (size == 16) {
      store_any<uint4>(entry, dims, tile, shared);
    } else if (size == 8) {
      store_any<uint64_t>(entry, dims, tile, shared);
    } else if (size == 4) {
      store_any<uint32_t>(entry, dims, tile, shared);
    } else if (size == 2) {
      store_any<uint16_t>(entry, dims, tile, shared);
    } else {
      store_any<uint8_t>(entry, dims, tile, shared);
    }
  }
}

}  // namespace fastshard
