// SPDX-License-Identifier: Apache-2.0
// Gathers strided views and many small tensors with one launch: into device memory that the copy engine then
// takes, or over the link straight into a page-locked staging slot, seen through its device address.
#include "device/kernels/gather.cuh"
#include "device/kernels/tiles.cuh"

namespace fastshard {
namespace {

__device__ void run_copy(const PackEntry& entry, std::byte* out) {
  switch (entry.unit) {
    case 16:
      return copy_entry<uint4>(entry, out);
    case 8:
      return copy_entry<uint64_t>(entry, out);
    case 4:
      return copy_entry<uint32_t>(entry, out);
    case 2:
      return copy_entry<uint16_t>(entry, out);
    default:
      return copy_entry<uint8_t>(entry, out);
  }
}

__device__ void run_gather(const PackEntry& entry, const PackDim* dims, std::byte* out) {
  if (entry.to != DType::raw) return cast_entry(entry, dims, out);
  switch (entry.unit) {
    case 16:
      return gather_entry<uint4>(entry, dims, out);
    case 8:
      return gather_entry<uint64_t>(entry, dims, out);
    case 4:
      return gather_entry<uint32_t>(entry, dims, out);
    case 2:
      return gather_entry<uint16_t>(entry, dims, out);
    default:
      return gather_entry<uint8_t>(entry, dims, out);
  }
}

constexpr uint32_t kEntryWords = sizeof(PackEntry) / sizeof(uint32_t);
constexpr uint32_t kDimWords = sizeof(PackDim) / sizeof(uint32_t);

__device__ __forceinline__ uint32_t load_word(const void* words, uint32_t index) {
  return global::load<uint32_t>(static_cast<const std::byte*>(words) + uint64_t{index} * sizeof(uint32_t));
}

}  // namespace
}  // namespace fastshard

// One block an entry, blocks striding over the table. The table lies in page-locked host memory, where a load
// takes about a microsecond: many threads load a word each, and the next entry is fetched beside the work.
extern "C" __global__ void __launch_bounds__(fastshard::kPackThreads, 2)
    fastshard_pack(const fastshard::PackEntry* entries, uint32_t count, const fastshard::PackDim* table_dims,
                   std::byte* out) {
  using namespace fastshard;
  // Raw bytes: a shared variable may not have initialisers.
  alignas(16) __shared__ unsigned char tile[kTileNbytes + kTilePadNbytes];
  alignas(8) __shared__ uint32_t entry_words[kEntryWords];
  alignas(8) __shared__ uint32_t dim_words[kMaxLevels * kDimWords];
  const auto& entry = *reinterpret_cast<const PackEntry*>(entry_words);
  const auto* dims = reinterpret_cast<const PackDim*>(dim_words);

  uint32_t next_word = 0;
  if (blockIdx.x < count && threadIdx.x < kEntryWords) next_word = load_word(&entries[blockIdx.x], threadIdx.x);
#pragma unroll 1
  for (uint32_t index = blockIdx.x; index < count; index += gridDim.x) {
    __syncthreads();  // the entry before is done
    if (threadIdx.x < kEntryWords) {
      entry_words[threadIdx.x] = next_word;
      if (count - index > gridDim.x) next_word = load_word(&entries[index + gridDim.x], threadIdx.x);
    }
    __syncthreads();
    if (threadIdx.x < entry.dim_count * kDimWords) {
      dim_words[threadIdx.x] = load_word(&table_dims[entry.dims], threadIdx.x);
    }
    __syncthreads();
    std::byte* const target = out + entry.out;
    switch (entry.kind) {
      case PackKind::copy:
        run_copy(entry, target);
        break;
      case PackKind::gather:
        run_gather(entry, dims, target);
        break;
      case PackKind::tiles:
        transpose_entry(entry, dims, target, reinterpret_cast<std::byte*>(tile));
        break;
    }
  }
}
