// SPDX-License-Identifier: Apache-2.0
#include "plan/plan.h"

#include <stdexcept>

namespace fastshard {

TensorView make_view(const std::byte* data, int device, uint64_t itemsize, const std::vector<int64_t>& shape,
                     const std::vector<int64_t>& strides) {
  if (shape.size() != strides.size()) throw std::invalid_argument("shape and strides differ in length");
  TensorView view{.data = data, .device = device, .run_nbytes = itemsize};
  std::vector<int64_t> merged_shape, merged_strides;
  for (size_t dim = 0; dim < shape.size(); ++dim) {
    if (shape[dim] < 0 || strides[dim] < 0) throw std::invalid_argument("negative size or stride");
    if (shape[dim] == 0) {
      view.run_nbytes = 0;
      return view;
    }
    if (shape[dim] == 1) continue;
    if (!merged_shape.empty() && merged_strides.back() == shape[dim] * strides[dim]) {
      merged_shape.back() *= shape[dim];
      merged_strides.back() = strides[dim];
    } else {
      merged_shape.push_back(shape[dim]);
      merged_strides.push_back(strides[dim]);
    }
  }
  if (!merged_shape.empty() && merged_strides.back() == 1) {
    view.run_nbytes *= static_cast<uint64_t>(merged_shape.back());
    merged_shape.pop_back();
    merged_strides.pop_back();
  }
  if (merged_shape.size() > kMaxDims) throw std::invalid_argument("too many strided dimensions");
  view.ndim = static_cast<int32_t>(merged_shape.size());
  for (int dim = 0; dim < view.ndim; ++dim) {
    view.shape[dim] = merged_shape[static_cast<size_t>(dim)];
    view.stride_nbytes[dim] = merged_strides[static_cast<size_t>(dim)] * static_cast<int64_t>(itemsize);
  }
  return view;
}

namespace {

void check_cast(const WriteItem& item) {
  const TensorView& view = item.source;
  if (view.from == DType::raw || view.from == DType::f8_e4m3_sat || view.to == DType::f64) {
    throw std::invalid_argument("there is no such cast");
  }
  if (view.run_nbytes % itemsize(view.from) != 0) throw std::invalid_argument("a run of a cast splits an element");
  // Then no chunk that ends on a page ends inside an element.
  if (item.file_offset % itemsize(view.to) != 0) throw std::invalid_argument("the target of a cast is not aligned");
}

}  // namespace

void check(const SavePlan& plan) {
  for (const FilePlan& file : plan.files) {
    uint64_t expected = 0;
    for (const WriteItem& item : file.items) {
      if (item.file_offset != expected) {
        throw std::invalid_argument("items do not tile " + file.path + ": offset " + std::to_string(item.file_offset) +
                                    " where " + std::to_string(expected) + " was expected");
      }
      if (item.source.cast()) check_cast(item);
      const uint64_t nbytes = item.source.packed_nbytes();
      if (nbytes != 0 && item.source.data == nullptr && item.source.device != kFetched) {
        throw std::invalid_argument("an item of " + file.path + " has bytes but no address");
      }
      expected += nbytes;
    }
    if (file.nbytes != expected) throw std::invalid_argument("items do not fill " + file.path);
  }
}

}  // namespace fastshard
