// SPDX-License-Identifier: Apache-2.0
// Element -> address arithmetic of strided views: shared by the CPU pack (production for host tensors,
// reference for the kernels) and kernels/pack.cu.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan.h"

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

// Address of the element that is cast to the packed bytes from `offset` on.
FASTSHARD_HOST_DEVICE inline const std::byte* cast_address(const TensorView& view, uint64_t offset) {
  return packed_address(view, offset / itemsize(view.to) * itemsize(view.from));
}

// One gather of the pack kernel: bytes [first_byte, first_byte + nbytes) of the (cast and) packed `view` go to
// slot + slot_offset. `unit` (a power of two up to 16) divides every address and length in it; of a cast it is
// one element of the target, and the source is aligned to its own elements.
struct PackEntry {
  TensorView view;
  uint64_t first_byte;
  uint64_t nbytes;
  uint64_t slot_offset;
  uint32_t unit;
  uint32_t padding = 0;
};

// Parameters of the pack kernel, in order: const PackEntry* table, uint32_t count, std::byte* slot.
inline constexpr char kPackKernelName[] = "fastshard_pack";
inline constexpr unsigned kPackThreads = 256;

// The widest unit that fits all of: source addresses, strides, lengths and slot positions of one gather.
// 0: a cast of what is not aligned, which the kernel cannot do.
uint32_t pack_unit(const TensorView& view, uint64_t first_byte, uint64_t nbytes, uint64_t slot_offset);

// The CPU pack: (cast and) packed bytes [first_byte, first_byte + nbytes) of a view of host memory, to `out`.
void pack_bytes(const TensorView& view, uint64_t first_byte, uint64_t nbytes, std::byte* out);

}  // namespace fastshard
