// SPDX-License-Identifier: Apache-2.0
#include "device/pack.h"

#include <algorithm>
#include <cstring>

#include "device/cast.h"

namespace fastshard {
namespace {

// Side of the square in which a transposed view is turned, in elements: both sides stay in L1.
constexpr int64_t kTile = 32;

// `count` runs that lie `stride` apart. Fixed sizes compile to plain loads and stores.
template <size_t kRun>
std::byte* pack_row(const std::byte* source, int64_t stride, uint64_t count, std::byte* out) {
  for (uint64_t i = 0; i < count; ++i) {
    std::memcpy(out, source, kRun);
    source += stride;
    out += kRun;
  }
  return out;
}

std::byte* pack_row(const std::byte* source, int64_t stride, uint64_t count, uint64_t run, std::byte* out) {
  switch (run) {
    case 1:
      return pack_row<1>(source, stride, count, out);
    case 2:
      return pack_row<2>(source, stride, count, out);
    case 4:
      return pack_row<4>(source, stride, count, out);
    case 8:
      return pack_row<8>(source, stride, count, out);
    case 16:
      return pack_row<16>(source, stride, count, out);
    default:
      for (uint64_t i = 0; i < count; ++i) {
        std::memcpy(out, source, run);
        source += stride;
        out += run;
      }
      return out;
  }
}

// `rows` whole rows of a matrix whose columns lie together (a transpose): in tiles, so that a cache line
// of the source is used for all the rows it holds bytes of.
template <size_t kRun>
void pack_transposed(const std::byte* source, int64_t rows, int64_t columns, int64_t column_stride, std::byte* out) {
  for (int64_t row0 = 0; row0 < rows; row0 += kTile) {
    const int64_t row1 = std::min(rows, row0 + kTile);
    for (int64_t column0 = 0; column0 < columns; column0 += kTile) {
      const int64_t column1 = std::min(columns, column0 + kTile);
      for (int64_t row = row0; row < row1; ++row) {
        pack_row<kRun>(source + row * static_cast<int64_t>(kRun) + column0 * column_stride, column_stride,
                       static_cast<uint64_t>(column1 - column0),
                       out + (row * columns + column0) * static_cast<int64_t>(kRun));
      }
    }
  }
}

bool pack_transposed(const std::byte* source, int64_t rows, int64_t columns, int64_t column_stride, uint64_t run,
                     std::byte* out) {
  switch (run) {
    case 1:
      pack_transposed<1>(source, rows, columns, column_stride, out);
      return true;
    case 2:
      pack_transposed<2>(source, rows, columns, column_stride, out);
      return true;
    case 4:
      pack_transposed<4>(source, rows, columns, column_stride, out);
      return true;
    case 8:
      pack_transposed<8>(source, rows, columns, column_stride, out);
      return true;
    default:
      return false;
  }
}

// As pack_transposed(), each element cast.
void cast_transposed(CastRow cast, const TensorView& view, const std::byte* source, int64_t rows, int64_t columns,
                     std::byte* out) {
  const int64_t stride = view.stride_nbytes[view.ndim - 1];
  for (int64_t row0 = 0; row0 < rows; row0 += kTile) {
    const int64_t row1 = std::min(rows, row0 + kTile);
    for (int64_t column0 = 0; column0 < columns; column0 += kTile) {
      const int64_t width = std::min(columns - column0, kTile);
      for (int64_t row = row0; row < row1; ++row) {
        cast(source + row * itemsize(view.from) + column0 * stride, stride, static_cast<uint64_t>(width),
             out + (row * columns + column0) * itemsize(view.to));
      }
    }
  }
}

// `count` elements from the `first` on, cast. The counterpart of pack_bytes() below.
void pack_cast(const TensorView& view, uint64_t first, uint64_t count, std::byte* out) {
  const CastRow cast = row_cast(view.from, view.to);
  const int64_t in_nbytes = itemsize(view.from);
  const uint64_t out_nbytes = itemsize(view.to);
  if (view.ndim == 0) return cast(view.data + first * itemsize(view.from), in_nbytes, count, out);
  const uint64_t run = view.run_nbytes / itemsize(view.from);
  const auto columns = static_cast<uint64_t>(view.shape[view.ndim - 1]);
  const int64_t stride = view.stride_nbytes[view.ndim - 1];
  const bool transposed = run == 1 && view.ndim >= 2 && view.stride_nbytes[view.ndim - 2] == in_nbytes;

  const uint64_t end = first + count;
  for (uint64_t next = first; next < end;) {
    const uint64_t column = next / run % columns;
    const std::byte* source = run_address(view, next / run);
    uint64_t taken = 0;
    if (run == 1) {
      const uint64_t height = transposed ? static_cast<uint64_t>(view.shape[view.ndim - 2]) : 1;
      const uint64_t rows = column != 0 ? 0 : std::min(height - next / columns % height, (end - next) / columns);
      if (rows > 1) {
        cast_transposed(cast, view, source, static_cast<int64_t>(rows), static_cast<int64_t>(columns), out);
        taken = rows * columns;
      } else {
        taken = std::min(columns - column, end - next);
        cast(source, stride, taken, out);
      }
    } else {
      // Runs of this row, the first and the last of which may be cut.
      uint64_t inside = next % run;
      for (uint64_t left = columns - column; left != 0 && next + taken < end; --left) {
        const uint64_t piece = std::min(run - inside, end - next - taken);
        cast(source + inside * itemsize(view.from), in_nbytes, piece, out + taken * out_nbytes);
        taken += piece;
        source += stride;
        inside = 0;
      }
    }
    out += taken * out_nbytes;
    next += taken;
  }
}

}  // namespace

std::span<const std::byte> source_extent(const TensorView& view) {
  uint64_t nbytes = view.run_nbytes;
  for (int dim = 0; dim < view.ndim; ++dim) {
    nbytes += static_cast<uint64_t>((view.shape[dim] - 1) * view.stride_nbytes[dim]);
  }
  return {view.data, nbytes};
}

bool in_memory_order(const TensorView& view) {
  uint64_t reach = view.run_nbytes;
  for (int dim = view.ndim - 1; dim >= 0; --dim) {
    if (static_cast<uint64_t>(view.stride_nbytes[dim]) < reach) return false;
    reach += static_cast<uint64_t>((view.shape[dim] - 1) * view.stride_nbytes[dim]);
  }
  return true;
}

std::span<const std::byte> source_extent(const TensorView& view, uint64_t first_byte, uint64_t nbytes) {
  uint64_t last_byte = first_byte + nbytes - 1;
  if (view.cast()) {
    first_byte = first_byte / itemsize(view.to) * itemsize(view.from);
    last_byte = (last_byte / itemsize(view.to) + 1) * itemsize(view.from) - 1;
  }
  return {packed_address(view, first_byte), packed_address(view, last_byte) + 1};
}

uint32_t pack_unit(const TensorView& view, uint64_t first_byte, uint64_t nbytes, uint64_t position) {
  if (view.cast()) {
    uint64_t source = reinterpret_cast<uintptr_t>(view.data);
    for (int dim = 0; dim < view.ndim; ++dim) source |= static_cast<uint64_t>(view.stride_nbytes[dim]);
    const bool aligned = source % itemsize(view.from) == 0 && position % itemsize(view.to) == 0;
    return aligned ? itemsize(view.to) : 0;
  }
  uint64_t bits = reinterpret_cast<uintptr_t>(view.data) | first_byte | nbytes | position;
  if (view.ndim != 0) bits |= view.run_nbytes;
  for (int dim = 0; dim < view.ndim; ++dim) bits |= static_cast<uint64_t>(view.stride_nbytes[dim]);
  uint32_t unit = 16;
  while (bits % unit != 0) unit /= 2;
  return unit;
}

void pack_bytes(const TensorView& view, uint64_t first_byte, uint64_t nbytes, std::byte* out) {
  if (view.cast()) return pack_cast(view, first_byte / itemsize(view.to), nbytes / itemsize(view.to), out);
  if (view.ndim == 0) {
    std::memcpy(out, view.data + first_byte, nbytes);
    return;
  }
  const uint64_t run = view.run_nbytes;
  const auto columns = static_cast<uint64_t>(view.shape[view.ndim - 1]);
  const int64_t stride = view.stride_nbytes[view.ndim - 1];
  const bool transposed = view.ndim >= 2 && view.stride_nbytes[view.ndim - 2] == static_cast<int64_t>(run);

  // A run cut by the beginning of the range.
  const uint64_t head = std::min(nbytes, (run - first_byte % run) % run);
  std::memcpy(out, packed_address(view, first_byte), head);
  out += head;
  uint64_t next = (first_byte + head) / run;
  const uint64_t end = (first_byte + nbytes) / run;
  while (next < end) {
    const uint64_t column = next % columns;
    const std::byte* source = run_address(view, next);
    if (transposed && column == 0) {
      const auto height = static_cast<uint64_t>(view.shape[view.ndim - 2]);
      const uint64_t row = next / columns % height;
      const uint64_t rows = std::min(height - row, (end - next) / columns);
      if (rows > 1 &&
          pack_transposed(source, static_cast<int64_t>(rows), static_cast<int64_t>(columns), stride, run, out)) {
        out += rows * columns * run;
        next += rows * columns;
        continue;
      }
    }
    const uint64_t count = std::min(columns - column, end - next);
    out = pack_row(source, stride, count, run, out);
    next += count;
  }
  // A run cut by the end of the range.
  const uint64_t tail = nbytes - head - (end - std::min(end, (first_byte + head) / run)) * run;
  if (tail != 0) std::memcpy(out, run_address(view, end), tail);
}

}  // namespace fastshard
