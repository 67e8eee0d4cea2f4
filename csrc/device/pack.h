// SPDX-License-Identifier: Apache-2.0
// Element -> address arithmetic of strided views, and the CPU pack: production for host tensors, reference for the
// kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "plan/plan.h"

namespace fastshard {

// Address of the run with this index, runs counted in row-major order of the view's shape.
FASTSHARD_HOST_DEVICE inline const std::byte* run_address(const TensorView& view, uint64_t run) {
  const std::byte* address = view.data;
  for (int dim = view.ndim - 1; dim >= 0; --dim) {
    const uint64_t size = static_cast<uint64_t>(view.shape[dim]);
    address += static_cast<int64_t>(run % size) * view.stride_nbytes[dim];
    run /= size;
  }
  return address;
}

// Address of byte `offset` of the tensor when packed as it is, before any cast.
FASTSHARD_HOST_DEVICE inline const std::byte* packed_address(const TensorView& view, uint64_t offset) {
  if (view.ndim == 0) return view.data + offset;
  return run_address(view, offset / view.run_nbytes) + offset % view.run_nbytes;
}

// Memory from the first byte of a view that is not empty to behind its last one, with what lies between its runs.
std::span<const std::byte> source_extent(const TensorView& view);
// Whether runs follow one another in memory as they do when packed (slices of rows or columns, not transposed views).
bool in_memory_order(const TensorView& view);
// The same for the (cast and) packed bytes [first_byte, first_byte + nbytes) of a view in memory order.
std::span<const std::byte> source_extent(const TensorView& view, uint64_t first_byte, uint64_t nbytes);

// The widest unit (a power of two up to 16) that divides all of: source addresses, strides, lengths and the
// position of one gather. Of a cast: an element of the target. 0: a cast of what is not aligned, which the kernel
// cannot do.
uint32_t pack_unit(const TensorView& view, uint64_t first_byte, uint64_t nbytes, uint64_t position);

// The CPU pack: (cast and) packed bytes [first_byte, first_byte + nbytes) of a view of host memory, to `out`.
void pack_bytes(const TensorView& view, uint64_t first_byte, uint64_t nbytes, std::byte* out);

}  // namespace fastshard
