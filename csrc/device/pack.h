// SPDX-License-Identifier: Apache-2.0
// Addresses of the elements of strided views, and packing on the CPU. Host tensors are packed by it, and the kernels
// are compared with it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "plan/plan.h"

namespace fastshard {

// Returns the address of the run with this index. Runs are counted in row-major order of the view's shape.
FASTSHARD_HOST_DEVICE inline const std::byte* run_address(const TensorView& view, uint64_t run) {
  const std::byte* address = view.data;
  for (int dim = view.ndim - 1; dim >= 0; --dim) {
    const uint64_t size = static_cast<uint64_t>(view.shape[dim]);
    address += static_cast<int64_t>(run % size) * view.stride_nbytes[dim];
    run /= size;
  }
  return address;
}

// Returns the address of byte `offset` of the packed tensor, before any cast.
FASTSHARD_HOST_DEVICE inline const std::byte* packed_address(const TensorView& view, uint64_t offset) {
  if (view.ndim == 0) return view.data + offset;
  return run_address(view, offset / view.run_nbytes) + offset % view.run_nbytes;
}

// Returns the memory from the first to the last byte of a view that is not empty, including what lies between its runs.
std::span<const std::byte> source_extent(const TensorView& view);
// Returns whether the runs have the same order in memory as when packed: slices of rows or columns, not transposed
// views.
bool in_memory_order(const TensorView& view);
// Returns the memory of the (cast and) packed bytes [first_byte, first_byte + nbytes) of a view in memory order.
std::span<const std::byte> source_extent(const TensorView& view, uint64_t first_byte, uint64_t nbytes);

// Returns the widest unit, a power of two up to 16, that divides source addresses, strides, lengths and the position of
// a gather. For a cast it is the size of a target element, or 0 if the source is not aligned, which the kernel cannot
// cast.
uint32_t pack_unit(const TensorView& view, uint64_t first_byte, uint64_t nbytes, uint64_t position);

// Packs on the CPU: puts the (cast and) packed bytes [first_byte, first_byte + nbytes) of a view of host memory at
// `out`.
void pack_bytes(const TensorView& view, uint64_t first_byte, uint64_t nbytes, std::byte* out);

}  // namespace fastshard
