// SPDX-License-Identifier: Apache-2.0
// The border to Python: pybind11, which this folder alone includes, and the interpreter's lock, which is free in every
// call that can block.
#pragma once

#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

namespace fastshard {

namespace py = pybind11;
using namespace py::literals;

// As py::gil_scoped_release. A daemon thread that comes back when the interpreter ends is ended by Python before 3.14
// with pthread_exit(), which unwinds the stack through destructors that must not throw: all of the process would be
// aborted. It waits for the end of the process instead, as newer versions let it.
class GilReleased {
 public:
  GilReleased() : state_(PyEval_SaveThread()) {}
  ~GilReleased() {
    try {
      PyEval_RestoreThread(state_);
    } catch (const abi::__forced_unwind&) {
      for (;;) pause();
    }
  }
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;

 private:
  PyThreadState* const state_;
};

using Released = py::call_guard<GilReleased>;

// Each adds its classes and functions to the module.
void bind_errors(py::module_& module);
void bind_plans(py::module_& module);
void bind_saves(py::module_& module);
void bind_files(py::module_& module);
void bind_memory(py::module_& module);
void bind_system(py::module_& module);

}  // namespace fastshard
