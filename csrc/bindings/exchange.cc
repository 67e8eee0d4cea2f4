// SPDX-License-Identifier: Apache-2.0
#include "bindings/exchange.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace fastshard {
namespace {

// Forgets the exception with which a function of torch has failed.
void forget_error() {
  if (PyErr_Occurred() != nullptr && PyErr_ExceptionMatches(PyExc_Exception) == 0) throw py::error_already_set();
  PyErr_Clear();
}

constexpr char kNotDescribed[] = "a tensor that torch does not describe";
constexpr char kBit[] = "a conjugate or negative bit";
constexpr char kDtype[] = "a dtype that is left to Python";

uint8_t code_of(uint32_t dtype) { return static_cast<uint8_t>(dtype); }

// Asks a method for a bit. Returns nothing if the tensor does not have it.
const char* no_bit(const py::object& method, py::handle tensor) {
  PyObject* const arguments[] = {tensor.ptr()};
  const auto answer = py::reinterpret_steal<py::object>(PyObject_Vectorcall(method.ptr(), arguments, 1, nullptr));
  if (!answer) forget_error();
  if (answer.ptr() == Py_False) return nullptr;
  return answer.ptr() == Py_True ? kBit : kNotDescribed;
}

const dlpack::ExchangeApi* table_of(const py::object& capsule) {
  if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kExchangeApi)) {
    throw std::invalid_argument("torch's table of DLPack functions is no capsule of that name");
  }
  const auto* first =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kExchangeApi));
  const auto* table = first;
  while (table != nullptr && table->version.major > dlpack::kMajorVersion) table = table->previous;
  if (table == nullptr || table->version.major != dlpack::kMajorVersion) {
    throw std::invalid_argument("torch's table of DLPack functions has version " +
                                std::to_string(first->version.major) + "." + std::to_string(first->version.minor));
  }
  if (table->dltensor_from_py_object_no_sync == nullptr) {
    throw std::invalid_argument("torch's table of DLPack functions has none that describes a tensor");
  }
  return table;
}

}  // namespace

Exchange::Exchange(const py::object& capsule, const py::tuple& classes, py::object is_neg, py::object is_conj)
    : capsule_(capsule),
      classes_(classes),
      is_neg_(std::move(is_neg)),
      is_conj_(std::move(is_conj)),
      describe_(table_of(capsule)->dltensor_from_py_object_no_sync) {}

bool Exchange::plain(py::handle object) const {
  const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  for (Py_ssize_t index = 0; index < PyTuple_GET_SIZE(classes_.ptr()); ++index) {
    if (PyTuple_GET_ITEM(classes_.ptr(), index) == type) return true;
  }
  return false;
}

bool Exchange::asks(uint32_t dtype) const {
  return code_of(dtype) == dlpack::kComplex ||
         std::ranges::any_of(ambiguous_, [&](const auto& row) { return row.first == dtype; });
}

bool Exchange::fill(py::handle tensor, Described& out) const {
  out.tensor = {};
  if (describe_(tensor.ptr(), &out.tensor) == 0) return true;
  forget_error();
  return false;
}

// What only some dtypes have. Returns nothing, or what it is.
const char* Exchange::unusual(py::handle tensor, uint32_t dtype) const {
  if (code_of(dtype) == dlpack::kComplex) return no_bit(is_conj_, tensor);
  for (const auto& [number, known] : ambiguous_) {
    if (number != dtype) continue;
    const auto found = py::reinterpret_steal<py::object>(PyObject_GetAttrString(tensor.ptr(), "dtype"));
    if (!found) forget_error();
    if (!found.is(known)) return kDtype;
  }
  return nullptr;
}

const char* Exchange::describe(py::handle tensor, Described& out) const {
  if (const char* why = no_bit(is_neg_, tensor); why != nullptr) return why;
  if (!fill(tensor, out)) return kNotDescribed;
  const uint32_t dtype = out.dtype();
  if (!asks(dtype)) return nullptr;
  if (const char* why = unusual(tensor, dtype); why != nullptr) return why;
  // Once more, as torch may have let others run.
  return fill(tensor, out) && out.dtype() == dtype ? nullptr : kNotDescribed;
}

}  // namespace fastshard
