// SPDX-License-Identifier: Apache-2.0
#include "plan/plan.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace fastshard {

TensorView make_view(const std::byte* data, int device, uint64_t itemsize, const std::vector<int64_t>& shape,
                     const std::vector<int64_t>& strides) {
  if (shape.size() != strides.size()) throw std::invalid_argument("shape and strides must have the same length");
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

constexpr uint64_t kMaxNbytes = std::numeric_limits<int64_t>::max();

std::string name_of(const FilePlan& file) { return file.path().empty() ? "the memory target" : file.path(); }

// As users number them: the header, item 0 here, does not count.
std::string name_of(const FilePlan& file, uint32_t item) {
  return (item == 0 ? std::string("the header") : "item " + std::to_string(item - 1)) + " of " + name_of(file);
}

void check_cast(const WriteItem& item) {
  const TensorView& view = item.source;
  if (view.from == DType::raw || view.from == DType::f8_e4m3_sat || view.to == DType::f64) {
    throw std::invalid_argument("unsupported cast");
  }
  if (view.run_nbytes % itemsize(view.from) != 0)
    throw std::invalid_argument("the runs of a cast must consist of whole elements");
  // Then no chunk that ends on a page ends inside an element.
  if (item.file_offset % itemsize(view.to) != 0) throw std::invalid_argument("the target of a cast is not aligned");
}

[[noreturn]] void refuse_gap(uint64_t begin, uint64_t end, const std::string& before) {
  throw std::invalid_argument("a gap before " + before + ": nothing is at " + std::to_string(begin) + " to " +
                              std::to_string(end) + ", and the plan does not say that there are gaps");
}

void check_item(const FilePlan& file, uint32_t index) {
  const WriteItem& item = file.items[index];
  if (item.source.cast()) check_cast(item);
  const uint64_t nbytes = item.source.packed_nbytes();
  if (nbytes != 0 && item.source.data == nullptr && item.source.device != kFetched) {
    throw std::invalid_argument(name_of(file, index) + " has bytes but no address");
  }
  if (item.file_offset > file.nbytes || nbytes > file.nbytes - item.file_offset) {
    throw std::invalid_argument(name_of(file, index) + " lies beyond the file's " + std::to_string(file.nbytes) +
                                " bytes: " + std::to_string(nbytes) + " at " + std::to_string(item.file_offset));
  }
}

void check(const FilePlan& file) {
  if (file.nbytes > kMaxNbytes) throw std::invalid_argument("larger than any file can be: " + file.path());
  if (std::holds_alternative<Link>(file.target) && file.nbytes != 0) {
    throw std::invalid_argument("a link cannot have bytes of its own: " + file.path());
  }
  uint64_t end = 0;
  uint32_t before = 0;  // that ends there
  for (const uint32_t index : in_file_order(file)) {
    check_item(file, index);
    const WriteItem& item = file.items[index];
    const uint64_t nbytes = item.source.packed_nbytes();
    if (nbytes == 0) continue;
    if (item.file_offset < end) {
      throw std::invalid_argument(name_of(file, index) + " begins at " + std::to_string(item.file_offset) +
                                  ", inside " + name_of(file, before));
    }
    if (!file.gaps && item.file_offset != end) refuse_gap(end, item.file_offset, name_of(file, index));
    end = item.file_offset + nbytes;
    before = index;
  }
  if (!file.gaps && end != file.nbytes) refuse_gap(end, file.nbytes, "the end of " + name_of(file));
  if (file.placed) check(file.places, file.nbytes, file.placed_in_nbytes, name_of(file));
}

}  // namespace

const std::string& path_of(const FileTarget& target) {
  static const std::string none;
  return std::visit(
      [](const auto& what) -> const std::string& {
        if constexpr (requires { what.path; }) return what.path;
        return none;
      },
      target);
}

const Memory* memory_of(const FileTarget& target) {
  if (const auto* standing = std::get_if<StandingMapping>(&target)) return &standing->memory;
  return std::get_if<Memory>(&target);
}

uint64_t FilePlan::written_nbytes() const {
  if (!gaps) return nbytes;
  uint64_t total = 0;
  for (const WriteItem& item : items) total += item.source.packed_nbytes();
  return total;
}

std::vector<uint32_t> in_file_order(const FilePlan& file) {
  std::vector<uint32_t> order(file.items.size());
  std::iota(order.begin(), order.end(), uint32_t{0});
  const auto offset = [&](uint32_t item) { return file.items[item].file_offset; };
  if (!std::ranges::is_sorted(order, {}, offset)) std::ranges::stable_sort(order, {}, offset);
  return order;
}

void check(const SavePlan& plan) {
  for (const FilePlan& file : plan.files) check(file);
}

}  // namespace fastshard
