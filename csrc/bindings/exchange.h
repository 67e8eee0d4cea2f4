// SPDX-License-Identifier: Apache-2.0
// Reads torch's tensors through the table of C functions that torch.Tensor offers (__dlpack_c_exchange_api__).
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "bindings/dlpack.h"
#include "bindings/python.h"

namespace fastshard {

// A tensor as it is described while nobody else can run.
struct Described {
  dlpack::Tensor tensor;

  const std::byte* data() const { return static_cast<const std::byte*>(tensor.data) + tensor.byte_offset; }
  std::span<const int64_t> shape() const { return {tensor.shape, static_cast<size_t>(tensor.ndim)}; }
  std::span<const int64_t> strides() const { return {tensor.strides, static_cast<size_t>(tensor.ndim)}; }
  // A number for its dtype.
  uint32_t dtype() const {
    return uint32_t{tensor.dtype.code} | uint32_t{tensor.dtype.bits} << 8 | uint32_t{tensor.dtype.lanes} << 16;
  }
};

class Exchange {
 public:
  // `capsule` is what torch.Tensor has as __dlpack_c_exchange_api__, `classes` are the classes of tensors without any
  // code of their own, `is_neg` and `is_conj` are torch.Tensor's methods. Throws std::invalid_argument, saying why, if
  // this is no table that can be used.
  Exchange(const py::object& capsule, const py::tuple& classes, py::object is_neg, py::object is_conj);

  // Says that torch may have other dtypes of this number, which has to be asked for: it is unusual if it is not
  // `dtype`.
  void ask_for_dtype(uint32_t number, py::object dtype) { ambiguous_.emplace_back(number, std::move(dtype)); }

  // Returns whether it is of one of these classes, and not of one derived from them.
  bool plain(py::handle object) const;
  // Describes a tensor of one of these classes. Returns nothing, or why that is not possible. Other threads may run
  // before it is described, not afterwards. Throws only what is no Exception, like KeyboardInterrupt.
  const char* describe(py::handle tensor, Described& out) const;

 private:
  bool fill(py::handle tensor, Described& out) const;
  bool asks(uint32_t dtype) const;
  const char* unusual(py::handle tensor, uint32_t dtype) const;

  const py::object capsule_;  // keeps the table
  const py::tuple classes_;
  const py::object is_neg_, is_conj_;
  std::vector<std::pair<uint32_t, py::object>> ambiguous_;
  decltype(dlpack::ExchangeApi::dltensor_from_py_object_no_sync) describe_ = nullptr;
};

}  // namespace fastshard
