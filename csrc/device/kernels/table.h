// SPDX-License-Identifier: Apache-2.0
// The work of one launch of the pack kernel: entries of about 64 KiB, each for one block of threads, and the dimensions
// of these entries. The CPU makes the table, so that the kernel decomposes no 64-bit index, and divides only by
// constants of which it is given the reciprocal.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "plan/plan.h"

namespace fastshard {

// Kernel parameters, in order: const PackEntry* entries, uint32_t count, const PackDim* dims, std::byte* out.
inline constexpr char kPackKernelName[] = "fastshard_pack";
inline constexpr unsigned kPackThreads = 256;
// Bytes that a block of threads gathers at most, so that one large view is gathered by many blocks.
inline constexpr uint32_t kEntryNbytes = 64 << 10;
// Shared memory of a tile and the padding of its rows.
inline constexpr uint32_t kTileNbytes = 16 << 10;
inline constexpr uint32_t kTilePadNbytes = 512;
// Levels of a view: its dimensions and the elements of a run.
inline constexpr uint32_t kMaxLevels = kMaxDims + 1;

// One level of a strided view.
struct PackDim {
  int64_t stride;  // of the source, in bytes
  uint32_t size;   // below 2^31
  uint32_t magic;  // for divided(); the outermost dimension of a gather is not divided by
  uint32_t shift;
  uint32_t out_stride;  // of a tile
};

enum class PackKind : uint8_t {
  copy,    // contiguous bytes; `unit` divides the distance of source and target
  gather,  // units along dims[0] (innermost) ... dims[dim_count - 1], from the linear index `first` on
  tiles,   // a box: dims[0] neighbours in the output, dims[1] neighbours in the source, dims[2] everything else
};

struct alignas(8) PackEntry {
  const std::byte* source;  // of the index 0
  uint32_t out;             // where the first byte goes, from the kernel's parameter `out` on
  uint32_t first;           // gather
  uint32_t count;           // copy: bytes; gather: units
  uint16_t dims;            // index of the first
  uint8_t dim_count;
  PackKind kind;
  uint8_t unit;  // bytes that lie together in the source, at a multiple of as many; of a cast: an element
  DType from, to;
  uint8_t log_wide;  // tiles: elements of dims[1] and dims[0] in one tile, powers of two
  uint8_t log_high;
  bool wide_loads;  // tiles of elements below 4 bytes: four bytes at a time, everything being aligned
  bool wide_stores;
  uint8_t padding = 0;
};
static_assert(sizeof(PackEntry) == 32 && sizeof(PackDim) == 24, "the kernel copies them word by word");

// value / dim.size, for values below 2^31.
FASTSHARD_HOST_DEVICE inline uint32_t divided(uint32_t value, const PackDim& dim) {
  return (static_cast<uint32_t>((uint64_t{value} * dim.magic) >> 32) + value) >> dim.shift;
}

class PackTable {
 public:
  // `capacity`: bytes the table may have. `out`: the address that offsets count from; only its alignment counts.
  PackTable(uint64_t capacity, uintptr_t out) : capacity_(capacity), base_(out % 16) {}

  // Adds a gather of the packed bytes [first_byte, first_byte + nbytes) of a view to `out` + `offset`. Returns false,
  // and adds nothing, if the table is full, or for a cast of a view that is not aligned.
  bool add(const TensorView& view, uint64_t first_byte, uint64_t nbytes, uint32_t offset);

  bool empty() const { return entries_.empty(); }
  uint32_t count() const { return static_cast<uint32_t>(entries_.size()); }
  uint64_t entries_nbytes() const { return entries_.size() * sizeof(PackEntry); }
  uint64_t nbytes() const { return entries_nbytes() + dims_.size() * sizeof(PackDim); }
  // Entries, and the dimensions right behind them. `memory` is aligned for both.
  void write(std::byte* memory) const;

 private:
  struct Walk;
  void add_copy(const std::byte* source, uint64_t nbytes, uint32_t offset);
  void add_gather(const Walk& walk, uint64_t first, uint64_t end);
  bool add_tiles(const Walk& walk, uint64_t first, uint64_t end);
  void add_box(const Walk& walk, const std::byte* source, uint32_t offset, uint32_t high, PackDim wide, PackDim batch);
  uint16_t add_dims(const PackDim* dims, uint32_t count);

  const uint64_t capacity_;
  const uintptr_t base_;
  std::vector<PackEntry> entries_;
  std::vector<PackDim> dims_;
};

}  // namespace fastshard
