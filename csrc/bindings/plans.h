// SPDX-License-Identifier: Apache-2.0
// Makes plans and options of the NamedTuples of fastshard/engine/plan.py.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "bindings/python.h"
#include "file/filesystem.h"
#include "plan/plan.h"

namespace fastshard {

// Makes a plan of a list of FilePlan. The header of each becomes its item 0, which points into the Python object: that
// must be kept as long as the plan.
std::shared_ptr<SavePlan> plan_from(const py::list& files);

// The options of a save.
struct SaveOptions {
  std::map<int, uintptr_t> streams;  // by CUDA ordinal
  Intent intent;
};
SaveOptions options_from(py::handle object);

WritePath write_path_from(const std::string& name);

}  // namespace fastshard
