// SPDX-License-Identifier: Apache-2.0
// Plans of saves, as plain data. Nothing here owns tensor memory, opens a file or copies a byte.
// The Python side (fastshard/engine/plan.py) has the same names.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "plan/places.h"

// For what the kernels use, too (cast.h, pack.h); nvcc compiles it as C++17.
#ifdef __CUDACC__
#define FASTSHARD_HOST_DEVICE __host__ __device__
#else
#define FASTSHARD_HOST_DEVICE
#endif

namespace fastshard {

// Where a tensor's bytes are. Zero and above is the CUDA device of that ordinal.
inline constexpr int kHost = -1;
// Only Python can produce the bytes (accelerators without a native device, tensors loaded on demand).
inline constexpr int kFetched = -2;

// Dimensions left after neighbouring ones are merged; fastshard/engine/tensors.py makes anything above contiguous.
inline constexpr int kMaxDims = 8;

// Element types that can be cast (cast.h) on the way out. raw: the bytes are copied as they are. f8_e4m3_sat is
// f8_e4m3 as a target, in which what is too large becomes the largest number, not NaN.
enum class DType : uint8_t { raw, f64, f32, f16, bf16, f8_e4m3, f8_e5m2, f8_e4m3_sat };

FASTSHARD_HOST_DEVICE constexpr uint32_t itemsize(DType type) {
  switch (type) {
    case DType::f64:
      return 8;
    case DType::f32:
      return 4;
    case DType::f16:
    case DType::bf16:
      return 2;
    default:
      return 1;
  }
}

// Non-owning strided memory of one tensor, as bytes: an array of `shape` whose elements are runs of
// `run_nbytes` contiguous bytes. A contiguous tensor is a single run with no dimensions left.
// Its elements may be cast while they are packed: `data`, strides and runs are those of the source, what is
// counted in a file, a chunk or an op is packed bytes. Plain enough to be handed to a kernel as it is.
struct TensorView {
  const std::byte* data = nullptr;
  int32_t device = kHost;
  int32_t ndim = 0;
  uint64_t run_nbytes = 0;
  int64_t shape[kMaxDims] = {};
  int64_t stride_nbytes[kMaxDims] = {};
  DType from = DType::raw;
  DType to = DType::raw;  // raw: not cast

  FASTSHARD_HOST_DEVICE bool cast() const { return to != DType::raw; }
  // Whether the packed bytes are a range of memory, which those of a cast are not.
  FASTSHARD_HOST_DEVICE bool contiguous() const { return ndim == 0 && !cast(); }

  // Packed, in the file.
  FASTSHARD_HOST_DEVICE uint64_t packed_run_nbytes() const {
    return cast() ? run_nbytes / itemsize(from) * itemsize(to) : run_nbytes;
  }
  FASTSHARD_HOST_DEVICE uint64_t packed_nbytes() const { return packed_run_nbytes() * runs(); }
  // Of the source, an element that lies there twice (stride 0) counted twice.
  FASTSHARD_HOST_DEVICE uint64_t source_nbytes() const { return run_nbytes * runs(); }

 private:
  FASTSHARD_HOST_DEVICE uint64_t runs() const {
    uint64_t total = 1;
    for (int dim = 0; dim < ndim; ++dim) total *= static_cast<uint64_t>(shape[dim]);
    return total;
  }
};

// Merges dimensions that lie one behind the other and folds the innermost contiguous one into the run.
// `shape` and `strides` are in elements, as torch gives them. Throws std::invalid_argument when more than
// kMaxDims dimensions are left.
TensorView make_view(const std::byte* data, int device, uint64_t itemsize, const std::vector<int64_t>& shape,
                     const std::vector<int64_t>& strides);

class SourceFile;

// One tensor's place in a file: its bytes, cast and packed, begin at `file_offset`.
struct WriteItem {
  TensorView source;
  uint64_t file_offset = 0;
  const SourceFile* mapped = nullptr;  // that `source` lies in (source_file.h)
};

// A new file, which appears under its path when the save ends.
struct NewFile {
  std::string path;
};

// Memory of the file's size.
struct Memory {
  std::byte* bytes = nullptr;
  bool streaming = false;  // it is larger than any cache: the CPU stores past its caches
  // Where the page-locked memory begins that it lies in, or null: devices copy straight into it.
  const std::byte* locked_begin = nullptr;
  uint64_t locked_part_nbytes = 0;  // of each part of that: no copy reaches from one into the next; 0: there is one

  bool page_locked() const { return locked_begin != nullptr; }
};

class Changes;  // save/changes.h

// The memory of a file that a prepared save fills and publishes. Its pages are there.
struct StandingMapping {
  std::string path;
  Memory memory;
  bool populate = false;       // a disk's page cache: pages must be made writable again before each store
  Changes* changes = nullptr;  // told of all bytes, if it is to be known what differs from the file before
};

// A file that somebody else has made and will publish, of which others may write other parts meanwhile. The items are
// written to their offsets, and synced if the save is durable. The file is never cut, renamed or removed; what was
// written of it stays when the save fails.
struct ForeignFile {
  std::string path;     // only for messages if there is a descriptor
  int descriptor = -1;  // stays the caller's
};

// No bytes, but a second name for a file that has them: a hard link, or a copy where there can be none. The name
// appears together with the other files of the save.
struct Link {
  std::string path;
  std::string existing;
};

// What a file's bytes go into.
using FileTarget = std::variant<NewFile, ForeignFile, StandingMapping, Memory, Link>;

// Empty where it has none.
const std::string& path_of(const FileTarget& target);
// Null where the target is no memory.
const Memory* memory_of(const FileTarget& target);

// One output of `nbytes`. The first item is the header.
struct FilePlan {
  FileTarget target;
  std::vector<WriteItem> items;  // in any order
  uint64_t nbytes = 0;
  bool gaps = false;  // there may be bytes that belong to no item: they are not written
  // Where what the items fill lies in the file, which has at least `placed_in_nbytes`: the offsets of the items and of
  // chunks, and `nbytes`, are then those of packed bytes. Not `placed`: the items lie in the file as they are.
  bool placed = false;
  std::vector<Place> places = {};
  uint64_t placed_in_nbytes = 0;

  const std::string& path() const { return path_of(target); }
  uint64_t file_nbytes() const { return placed ? placed_in_nbytes : nbytes; }
  // Of the items.
  uint64_t written_nbytes() const;
};

// Indices of the items, by their offsets.
std::vector<uint32_t> in_file_order(const FilePlan& file);

struct SavePlan {
  std::vector<FilePlan> files;
};

// Throws std::invalid_argument unless the items of every file lie inside of it, without overlaps, and without gaps but
// where the plan says that there may be some, casts are possible and aligned, and the items fill
// their places, if there are any.
void check(const SavePlan& plan);

}  // namespace fastshard
