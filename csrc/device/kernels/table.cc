// SPDX-License-Identifier: Apache-2.0
#include "device/kernels/table.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <span>

#include "device/pack.h"

namespace fastshard {
namespace {

// Dimensions whose product stays below this are divided by in 32 bits.
constexpr uint64_t kWindow = uint64_t{1} << 30;
// A smaller box is no use: it stays in the L1 cache between its neighbours, so it may be gathered as it comes.
constexpr uint64_t kMinBoxNbytes = 16 << 10;
constexpr uint64_t kMinPlaneNbytes = 4 << 10;

PackDim make_dim(uint64_t size, int64_t stride, uint32_t out_stride = 0) {
  PackDim dim{stride, static_cast<uint32_t>(std::min<uint64_t>(size, 0x7fffffff)), 0, 0, out_stride};
  dim.shift = static_cast<uint32_t>(std::bit_width(dim.size - 1));
  const uint64_t above = (uint64_t{1} << dim.shift) - dim.size;
  dim.magic = static_cast<uint32_t>((above << 32) / dim.size + 1);
  return dim;
}

struct Level {
  uint64_t size;
  int64_t stride;
};

uint32_t to_power_of_two(uint64_t value) { return static_cast<uint32_t>(std::bit_ceil(value)); }

}  // namespace

// A view as levels of units, the innermost first, and where the bytes [first_byte, ...) of it go.
struct PackTable::Walk {
  const TensorView& view;
  uint32_t unit;      // bytes in the source
  uint32_t out_unit;  // and in the output
  uint64_t origin;    // unit that goes to `offset`
  uint32_t offset;
  uint32_t count = 0;
  std::array<Level, kMaxLevels> levels = {};
  std::array<uint64_t, kMaxLevels> below = {};  // units of all levels further inside

  Walk(const TensorView& what, uint32_t source_unit, uint32_t target_unit, uint64_t first, uint32_t where)
      : view(what), unit(source_unit), out_unit(target_unit), origin(first), offset(where) {
    const uint64_t run = view.run_nbytes / unit;
    if (run > 1 || view.ndim == 0) push({run, static_cast<int64_t>(unit)});
    for (int dim = view.ndim - 1; dim >= 0; --dim) {
      push({static_cast<uint64_t>(view.shape[dim]), view.stride_nbytes[dim]});
    }
  }
  void push(Level level) {
    below[count] = count == 0 ? 1 : below[count - 1] * levels[count - 1].size;
    levels[count++] = level;
  }
  const std::byte* address(uint64_t index) const {
    const std::byte* address = view.data;
    for (uint32_t i = 0; i < count; ++i) {
      address += static_cast<int64_t>(index / below[i] % levels[i].size) * levels[i].stride;
    }
    return address;
  }
  uint32_t out(uint64_t index) const { return offset + static_cast<uint32_t>((index - origin) * out_unit); }
};

bool PackTable::add(const TensorView& view, uint64_t first_byte, uint64_t nbytes, uint32_t offset) {
  if (nbytes == 0) return true;
  const size_t entries = entries_.size();
  const size_t dims = dims_.size();
  if (!view.cast() && view.contiguous()) {
    add_copy(view.data + first_byte, nbytes, offset);
  } else {
    const uint32_t unit = pack_unit(view, first_byte, nbytes, base_ + offset);
    if (unit == 0) return false;
    const Walk walk(view, view.cast() ? itemsize(view.from) : unit, unit, first_byte / unit, offset);
    const uint64_t end = walk.origin + nbytes / unit;
    if (!add_tiles(walk, walk.origin, end)) add_gather(walk, walk.origin, end);
  }
  if (this->nbytes() <= capacity_ && dims_.size() <= UINT16_MAX) return true;
  entries_.resize(entries);
  dims_.resize(dims);
  return false;
}

void PackTable::write(std::byte* memory) const {
  // Not by memcpy(), which must not be given the null pointer that an empty list has.
  std::ranges::copy(std::as_bytes(std::span(entries_)), memory);
  std::ranges::copy(std::as_bytes(std::span(dims_)), memory + entries_nbytes());
}

uint16_t PackTable::add_dims(const PackDim* dims, uint32_t count) {
  const auto index = static_cast<uint16_t>(dims_.size());
  dims_.insert(dims_.end(), dims, dims + count);
  return index;
}

void PackTable::add_copy(const std::byte* source, uint64_t nbytes, uint32_t offset) {
  const uintptr_t distance = reinterpret_cast<uintptr_t>(source) - base_ - offset;
  uint8_t unit = 16;
  while (distance % unit != 0) unit /= 2;
  for (uint64_t done = 0; done < nbytes;) {
    PackEntry entry{};
    entry.source = source + done;
    entry.out = offset + static_cast<uint32_t>(done);
    // All but the first begin where 16 bytes can be stored.
    entry.count = static_cast<uint32_t>(std::min<uint64_t>(kEntryNbytes - (base_ + entry.out) % 16, nbytes - done));
    entry.unit = unit;
    entries_.push_back(entry);
    done += entry.count;
  }
}

void PackTable::add_gather(const Walk& walk, uint64_t first, uint64_t end) {
  if (first == end) return;
  // Levels that are divided by; the one above them is not.
  uint32_t inner = 0;
  while (inner + 1 < walk.count && walk.below[inner + 1] < kWindow) ++inner;
  std::array<PackDim, kMaxLevels> dims;
  for (uint32_t i = 0; i <= inner; ++i) dims[i] = make_dim(walk.levels[i].size, walk.levels[i].stride);
  const uint16_t index = add_dims(dims.data(), inner + 1);
  const uint64_t row = walk.below[inner] * walk.levels[inner].size;
  for (uint64_t next = first; next < end;) {
    const uint64_t room = (kEntryNbytes - (base_ + walk.out(next)) % 16) / walk.out_unit;
    const uint64_t last = std::min({next + room, end, (next / row + 1) * row}) - 1;
    // The fewest levels that all of the entry is in.
    uint32_t top = 0;
    while (top < inner && next / walk.below[top + 1] != last / walk.below[top + 1]) ++top;
    PackEntry entry{};
    entry.kind = PackKind::gather;
    entry.source = walk.address(next - next % walk.below[top]);
    entry.out = walk.out(next);
    entry.first = static_cast<uint32_t>(next % walk.below[top]);
    entry.count = static_cast<uint32_t>(last + 1 - next);
    entry.dims = index;
    entry.dim_count = static_cast<uint8_t>(top + 1);
    entry.unit = static_cast<uint8_t>(walk.unit);
    entry.from = walk.view.from;
    entry.to = walk.view.to;
    entries_.push_back(entry);
    next = last + 1;
  }
}

// Where neighbours in the output lie far apart, and neighbours in the source are those of another level.
bool PackTable::add_tiles(const Walk& walk, uint64_t first, uint64_t end) {
  if (walk.view.run_nbytes != walk.unit || walk.levels[0].stride == 0) return false;
  uint32_t wide = 1;
  while (wide < walk.count && walk.levels[wide].stride != walk.unit) ++wide;
  if (wide >= walk.count) return false;
  const uint64_t row = walk.below[wide];  // one step of the level that is contiguous in the source
  const uint64_t size = walk.levels[wide].size;
  const uint64_t high = walk.levels[0].size;
  const uint64_t begin_row = (first + row - 1) / row;
  const uint64_t end_row = end / row;
  if (begin_row >= end_row || high >= kWindow || size >= kWindow) return false;
  const uint64_t plane = std::min(size, end_row - begin_row) * high * walk.out_unit;
  // What is looped over inside of a box: the level between the two, or else the one around them.
  const uint32_t around = wide >= 2 ? 1 : 2;
  const uint64_t batch = around < walk.count ? walk.levels[around].size : 1;
  if (std::min(size, end_row - begin_row) < 4 || plane < kMinPlaneNbytes) return false;
  if (plane * std::min(batch, kMinBoxNbytes) < kMinBoxNbytes) return false;

  const auto out_stride = [&](uint32_t level) { return static_cast<uint32_t>(walk.below[level] * walk.out_unit); };
  const auto box = [&](uint64_t index, uint64_t width, uint64_t count) {
    const PackDim wide_dim{walk.unit, static_cast<uint32_t>(width), 0, 0, out_stride(wide)};
    const PackDim batch_dim{around < walk.count ? walk.levels[around].stride : 0, static_cast<uint32_t>(count), 0, 0,
                            around < walk.count ? out_stride(around) : 0};
    add_box(walk, walk.address(index), walk.out(index), static_cast<uint32_t>(high), wide_dim, batch_dim);
  };
  add_gather(walk, first, begin_row * row);
  for (uint64_t next = begin_row; next < end_row;) {
    const uint64_t width = std::min(size - next % size, end_row - next);
    if (wide >= 2) {
      // Every combination of the levels between `around` and `wide`.
      const uint64_t step = walk.below[2];
      for (uint64_t middle = 0; middle < row; middle += step) box(next * row + middle, width, batch);
      next += width;
    } else {
      const uint64_t whole = (end_row - next) / size;
      const uint64_t left = around < walk.count ? batch - next / size % batch : 1;
      const uint64_t count = width == size ? std::min(whole, left) : 1;
      box(next * row, width, count);
      next += width * count;
    }
  }
  add_gather(walk, end_row * row, end);
  return true;
}

// Cut into entries.
void PackTable::add_box(const Walk& walk, const std::byte* source, uint32_t offset, uint32_t high, PackDim wide,
                        PackDim batch) {
  const uint32_t size = walk.out_unit;
  const uint32_t elements = kTileNbytes / size;
  // Rows of 128 bytes in the output, longer ones in the source; where one side is short the other takes the rest.
  uint32_t tile_high = std::min(std::max(32u, 128 / size), to_power_of_two(high));
  const uint32_t tile_wide = std::min(elements / tile_high, to_power_of_two(wide.size));
  tile_high = std::min({elements / tile_wide, kTilePadNbytes / size, to_power_of_two(high)});

  const bool narrow = walk.view.cast() || walk.unit >= 4;
  const auto in_bits = reinterpret_cast<uintptr_t>(source) | static_cast<uint64_t>(walk.levels[0].stride) |
                       static_cast<uint64_t>(batch.stride) | uint64_t{tile_wide} * walk.unit;
  const uint64_t out_bits = (base_ + offset) | wide.out_stride | batch.out_stride | uint64_t{tile_high} * size;

  // Whole planes if they are small, whole tiles of one plane if not.
  const uint64_t plane = uint64_t{high} * wide.size * size;
  const bool whole = plane <= kEntryNbytes;
  const uint32_t step_batch = whole ? static_cast<uint32_t>(kEntryNbytes / plane) : 1;
  const uint32_t step_wide = whole ? wide.size : tile_wide;
  const uint32_t step_high =
      whole ? high : std::max(tile_high, kEntryNbytes / (tile_wide * size) / tile_high * tile_high);
  for (uint32_t b = 0; b < batch.size; b += step_batch) {
    for (uint32_t w = 0; w < wide.size; w += step_wide) {
      for (uint32_t h = 0; h < high; h += step_high) {
        std::array<PackDim, 3> dims = {
            PackDim{walk.levels[0].stride, std::min(step_high, high - h), 0, 0, size},
            wide,
            batch,
        };
        dims[1].size = std::min(step_wide, wide.size - w);
        dims[2].size = std::min(step_batch, batch.size - b);
        PackEntry entry{};
        entry.kind = PackKind::tiles;
        entry.source = source + b * batch.stride + w * wide.stride + h * walk.levels[0].stride;
        entry.out = offset + b * batch.out_stride + w * wide.out_stride + h * size;
        entry.dims = add_dims(dims.data(), 3);
        entry.dim_count = 3;
        entry.unit = static_cast<uint8_t>(walk.unit);
        entry.from = walk.view.from;
        entry.to = walk.view.to;
        entry.log_wide = static_cast<uint8_t>(std::countr_zero(tile_wide));
        entry.log_high = static_cast<uint8_t>(std::countr_zero(tile_high));
        entry.wide_loads = !narrow && in_bits % 4 == 0;
        entry.wide_stores = size < 4 && out_bits % 4 == 0;
        entries_.push_back(entry);
      }
    }
  }
}

}  // namespace fastshard
