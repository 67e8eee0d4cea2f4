// SPDX-License-Identifier: Apache-2.0
// What is to be written, as plain data. Nothing here owns tensor memory, opens a file or copies a byte.
// The Python side (fastshard/plan.py) has the same nouns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fastshard {

// Where a tensor's bytes are. Zero and above is the CUDA device of that ordinal.
inline constexpr int kHost = -1;
// Only Python can produce the bytes (accelerators without a native device, tensors loaded on demand).
inline constexpr int kFetched = -2;

// Dimensions left after neighbouring ones are merged; fastshard/tensors.py makes anything above contiguous.
inline constexpr int kMaxDims = 8;

// Non-owning strided memory of one tensor, as bytes: an array of `shape` whose elements are runs of
// `run_nbytes` contiguous bytes. A contiguous tensor is a single run with no dimensions left.
// Plain enough to be handed to a kernel as it is.
struct TensorView {
  const std::byte* data = nullptr;
  int32_t device = kHost;
  int32_t ndim = 0;
  uint64_t run_nbytes = 0;
  int64_t shape[kMaxDims] = {};
  int64_t stride_nbytes[kMaxDims] = {};

  bool contiguous() const { return ndim == 0; }
  uint64_t nbytes() const {
    uint64_t total = run_nbytes;
    for (int dim = 0; dim < ndim; ++dim) total *= static_cast<uint64_t>(shape[dim]);
    return total;
  }
};

// Merges dimensions that lie one behind the other and folds the innermost contiguous one into the run.
// `shape` and `strides` are in elements, as torch gives them. Throws std::invalid_argument when more than
// kMaxDims dimensions are left.
TensorView make_view(const std::byte* data, int device, uint64_t itemsize, const std::vector<int64_t>& shape,
                     const std::vector<int64_t>& strides);

// One tensor's place in a file: its bytes, packed, begin at `file_offset`.
struct WriteItem {
  TensorView source;
  uint64_t file_offset = 0;
};

// Memory of exactly the plan's size that takes the place of a file.
struct MemoryTarget {
  std::byte* bytes = nullptr;
  bool streaming = false;    // larger than any cache and its pages are there: stores go past the caches
  bool page_locked = false;  // devices copy straight into it
  bool populate = false;     // a disk's page cache: pages must be made writable again before each store
};

// One output file: the items back to back, `nbytes` in all. The first item is the header.
struct FilePlan {
  std::string path;
  MemoryTarget memory;  // instead of a file, where it has an address
  std::vector<std::byte> header;
  std::vector<WriteItem> items;
  uint64_t nbytes = 0;
};

struct SavePlan {
  std::vector<FilePlan> files;
};

// Throws std::invalid_argument unless the items tile every file exactly.
void check(const SavePlan& plan);

}  // namespace fastshard
