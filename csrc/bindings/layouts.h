// SPDX-License-Identifier: Apache-2.0
// Layouts as Python holds them.
#pragma once

#include <memory>
#include <vector>

#include "bindings/python.h"
#include "plan/layout.h"

namespace fastshard {

// Dtypes by what Described::dtype() says of them.
struct Kinds {
  const Kind* find(uint32_t dtype) const;

  std::vector<uint32_t> dtypes;
  std::vector<Kind> kinds;
};

// The layout of one file, which stands for its items in a plan. It does not keep the tensors alive.
struct LayoutHandle {
  std::shared_ptr<const Kinds> kinds;
  py::list names;  // in the order in which they were given; the layout reads them where they are
  Layout layout;
};

}  // namespace fastshard
