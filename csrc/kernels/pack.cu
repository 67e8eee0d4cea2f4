// SPDX-License-Identifier: Apache-2.0
// Gathers strided views and many small tensors into a staging slot with one launch.
//
// The slot is page-locked host memory seen through its device address: the stores go over the link
// themselves, so no device memory is needed at all. Neighbouring threads store neighbouring units,
// so a warp fills whole 128-byte lines.
#include "../cast.h"
#include "../pack.h"

namespace {

template <typename Unit>
__device__ void pack_entry(const fastshard::PackEntry& entry, std::byte* slot) {
  const uint64_t units = entry.nbytes / sizeof(Unit);
  Unit* out = reinterpret_cast<Unit*>(slot + entry.slot_offset);
  for (uint64_t i = threadIdx.x; i < units; i += blockDim.x) {
    out[i] = *reinterpret_cast<const Unit*>(fastshard::packed_address(entry.view, entry.first_byte + i * sizeof(Unit)));
  }
}

// Element by element, by way of float32; source and target are aligned (pack_unit).
__device__ void cast_entry(const fastshard::PackEntry& entry, std::byte* slot) {
  const uint32_t out_nbytes = fastshard::itemsize(entry.view.to);
  for (uint64_t done = threadIdx.x * out_nbytes; done < entry.nbytes; done += blockDim.x * out_nbytes) {
    const std::byte* source = fastshard::cast_address(entry.view, entry.first_byte + done);
    std::byte* out = slot + entry.slot_offset + done;
    const uint32_t value = fastshard::visit_source(entry.view.from, [&](auto type) {
      using Bits = typename fastshard::Element<decltype(type)::value>::storage_type;
      return fastshard::casting::widened<decltype(type)::value>(*reinterpret_cast<const Bits*>(source));
    });
    fastshard::visit_target(entry.view.to, [&](auto type) {
      using Bits = typename fastshard::Element<decltype(type)::value>::storage_type;
      *reinterpret_cast<Bits*>(out) = fastshard::casting::narrowed<decltype(type)::value>(value);
    });
  }
}

}  // namespace

// One block an entry, blocks striding over the table. The table lies in page-locked host memory too.
extern "C" __global__ void __launch_bounds__(fastshard::kPackThreads)
    fastshard_pack(const fastshard::PackEntry* table, uint32_t count, std::byte* slot) {
  // Raw bytes: a shared variable may not have initialisers.
  __shared__ alignas(16) unsigned char storage[sizeof(fastshard::PackEntry)];
  const auto& entry = *reinterpret_cast<const fastshard::PackEntry*>(storage);
  for (uint32_t index = blockIdx.x; index < count; index += gridDim.x) {
    __syncthreads();
    // Word by word over all threads: a read across the link takes about a microsecond each.
    const auto* words = reinterpret_cast<const uint32_t*>(&table[index]);
    for (unsigned word = threadIdx.x; word < sizeof(storage) / sizeof(uint32_t); word += blockDim.x) {
      reinterpret_cast<uint32_t*>(storage)[word] = words[word];
    }
    __syncthreads();
    if (entry.view.cast()) {
      cast_entry(entry, slot);
      continue;
    }
    switch (entry.unit) {
      case 16:
        pack_entry<uint4>(entry, slot);
        break;
      case 8:
        pack_entry<uint2>(entry, slot);
        break;
      case 4:
        pack_entry<uint32_t>(entry, slot);
        break;
      case 2:
        pack_entry<uint16_t>(entry, slot);
        break;
      default:
        pack_entry<uint8_t>(entry, slot);
        break;
    }
  }
}
