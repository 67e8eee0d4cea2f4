// SPDX-License-Identifier: Apache-2.0
// Errors, as the exceptions that Python has for them.
#include <exception>
#include <system_error>

#include "bindings/python.h"
#include "plan/error.h"

namespace fastshard {

namespace {

// An exception with `items`: for each file of a plan, the positions of items in Python's numbering, in which the header
// is none.
void raise(const NotForked& error, py::handle type) {
  py::list files;
  for (const std::vector<uint32_t>& of_file : error.items()) {
    py::list items;
    for (const uint32_t item : of_file) {
      if (item != 0) items.append(item - 1);
    }
    files.append(items);
  }
  const py::object raised = type(error.what());
  raised.attr("items") = files;
  PyErr_SetObject(type.ptr(), raised.ptr());
}

py::handle not_forked;  // never destroyed

}  // namespace

// Only of this module: torch may share pybind11's tables, and what its streams throw is a std::system_error too.
void bind_errors(py::module_& module) {
  if (!not_forked) {
    const py::dict defaults("items"_a = py::list());
    not_forked = PyErr_NewException("fastshard._native.NotForked", PyExc_RuntimeError, defaults.ptr());
    if (!not_forked) throw py::error_already_set();
  }
  module.attr("NotForked") = not_forked;
  // NOLINTNEXTLINE(performance-unnecessary-value-param): pybind11 wants a function of that type
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const IoError& error) {
      const int code = error.code().value();
      py::object text = py::module_::import("os").attr("strerror")(code);
      if (!error.detail().empty()) text = text + py::str("; " + error.detail());
      const py::object path = py::module_::import("os").attr("fsdecode")(py::bytes(error.path()));
      const py::object raised = py::module_::import("builtins").attr("OSError")(code, text, path);
      raised.attr("published") = error.published();
      PyErr_SetObject(py::type::handle_of(raised).ptr(), raised.ptr());
    } catch (const std::system_error& error) {  // a thread that is not to be had
      const int code = error.code().value();
      const py::object text = py::module_::import("os").attr("strerror")(code);
      PyErr_SetObject(PyExc_OSError, py::make_tuple(code, text).ptr());
    } catch (const NotForked& error) {
      raise(error, not_forked);
    } catch (const CudaError& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    } catch (const Cancelled& error) {
      const py::object type = py::module_::import("concurrent.futures").attr("CancelledError");
      PyErr_SetString(type.ptr(), error.what());
    }
  });
}

}  // namespace fastshard
