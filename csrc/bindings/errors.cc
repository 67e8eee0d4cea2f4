// SPDX-License-Identifier: Apache-2.0
// Errors, as the exceptions that Python has for them.
#include <exception>
#include <system_error>

#include "bindings/python.h"
#include "plan/error.h"

namespace fastshard {

// Only of this module: torch may share pybind11's tables, and what its streams throw is a std::system_error too.
void bind_errors(py::module_&) {
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
    } catch (const CudaError& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    } catch (const Cancelled& error) {
      const py::object type = py::module_::import("concurrent.futures").attr("CancelledError");
      PyErr_SetString(type.ptr(), error.what());
    }
  });
}

}  // namespace fastshard
