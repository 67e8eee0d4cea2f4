// SPDX-License-Identifier: Apache-2.0
// The module that Python imports.
#include "bindings/python.h"

PYBIND11_MODULE(_native, module) {
  fastshard::bind_errors(module);
  fastshard::bind_layouts(module);
  fastshard::bind_plans(module);
  fastshard::bind_saves(module);
  fastshard::bind_files(module);
  fastshard::bind_memory(module);
  fastshard::bind_system(module);
}
