// SPDX-License-Identifier: Apache-2.0
// pybind11, which only this folder includes, and the interpreter's lock (GIL), which is released in every call that can
// block.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

namespace fastshard {

namespace py = pybind11;
using namespace py::literals;

// Like py::gil_scoped_release. When the interpreter ends, Python before 3.14 ends a returning daemon thread with
// pthread_exit(). That unwinds the stack through destructors that must not throw, so the process would be aborted. Here
// the thread waits for the end of the process instead, as in newer versions.
class GilReleased {
 public:
  GilReleased() : state_(PyEval_SaveThread()) {}
  ~GilReleased() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {  // the forced unwinding of pthread_exit(), as C throws nothing
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
void bind_layouts(py::module_& module);
void bind_plans(py::module_& module);
void bind_saves(py::module_& module);
void bind_files(py::module_& module);
void bind_memory(py::module_& module);
void bind_system(py::module_& module);

}  // namespace fastshard
