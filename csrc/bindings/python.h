// SPDX-License-Identifier: Apache-2.0
// pybind11, which only this folder includes, and the interpreter's lock (GIL), which is released in every call that can
// block.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/gil.h"

namespace fastshard {

namespace py = pybind11;
using namespace py::literals;

// Like py::gil_scoped_release, but for take_gil().
class GilReleased {
 public:
  GilReleased() : state_(PyEval_SaveThread()) {}
  ~GilReleased() { take_gil(state_); }
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
