// SPDX-License-Identifier: Apache-2.0
// Lays out tensors in a safetensors file: the order in which they lie there, whether they share memory, and the header.
// The rules are those of fastshard/formats/safetensors.py and fastshard/engine/tensors.py, which serve where this does
// not, and tests compare the two. Memory is used sparingly: with thousands of tensors the first touch of a page costs
// more than what is done there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "plan/plan.h"

namespace fastshard {

// What becomes of the tensors of one dtype.
struct Kind {
  uint64_t itemsize = 0;       // bytes of an element in memory
  uint64_t file_itemsize = 0;  // and in the file
  uint32_t rank = 0;           // place of its dtype in the order of a file
  std::string code;            // of its dtype in the header
  uint64_t packed = 1;         // elements that the header counts for one in memory, in the last dimension
  DType from = DType::raw;
  DType to = DType::raw;
};

struct LaidTensor {
  const char* name_data = nullptr;
  const std::byte* data = nullptr;
  uint64_t nbytes = 0;  // in the file
  const Kind* kind = nullptr;
  uint32_t name_size = 0;
  int32_t device = kHost;
  uint32_t given = 0;  // how many were added before it
  uint32_t dims = 0;   // index of its sizes, behind which lie the strides of one that is not contiguous
  uint16_t ndim = 0;
  bool contiguous = true;

  std::string_view name() const { return {name_data, name_size}; }  // UTF-8
};

class Layout {
 public:
  // The elements of a tensor on a device, or in host memory.
  struct Source {
    const std::byte* data;
    int32_t device;
    std::span<const int64_t> shape;
    std::span<const int64_t> strides;  // in elements
  };

  void reserve(size_t count);
  // Adds a tensor. Name and kind must outlive the layout. Returns false, and adds nothing, for elements that have no
  // memory, and for sizes that no file has.
  bool add(std::string_view name, const Kind& kind, const Source& source);
  // Brings the tensors that were added into the order of the file, by dtype and then by name. Returns false, and is of
  // no use any more, if any two of them reach over the same memory.
  bool finish();

  // In the order of the file.
  std::span<const LaidTensor> tensors() const { return tensors_; }
  // Of all tensors together.
  uint64_t nbytes() const { return nbytes_; }
  // In elements, as they lie in memory.
  std::span<const int64_t> shape(const LaidTensor& tensor) const;
  std::span<const int64_t> strides(const LaidTensor& tensor) const;
  TensorView view(const LaidTensor& tensor) const;
  // Returns at least as many bytes as the header has, length and padding included. `metadata` is the entry of the
  // metadata as JSON; an empty one is left out.
  size_t header_bound(std::string_view metadata) const { return header_bound_ + metadata.size(); }
  // Writes the header and returns how many bytes it has.
  size_t write_header(std::string_view metadata, char* out) const;

 private:
  // A number to sort by, and what it belongs to.
  struct Keyed {
    uint64_t key, of;
  };

  bool overlapping();
  void sort();
  void sort_by_name(std::span<Keyed> part, size_t depth, int levels);

  std::vector<LaidTensor> tensors_;
  std::vector<int64_t> dims_;
  std::vector<Keyed> keyed_;  // first the address ranges, then the order
  uint64_t nbytes_ = 0;
  size_t header_bound_ = sizeof(uint64_t) + 2 + 1 + 7;  // length, braces, a comma and padding
};

// Returns whether the elements lie one behind the other, by torch's rule.
bool is_contiguous(std::span<const int64_t> shape, std::span<const int64_t> strides);

}  // namespace fastshard
