// SPDX-License-Identifier: Apache-2.0
// Engines and saves as Python holds them.
#pragma once

#include <memory>

#include "bindings/python.h"
#include "save/changes.h"
#include "save/engine.h"

namespace fastshard {

// An engine as Python holds it, until closed. Closing and dropping wait for the saves under way.
struct EngineHandle {
  explicit EngineHandle(const Options& options) : engine(std::make_shared<Engine>(options)) {}
  EngineHandle(const EngineHandle&) = delete;
  EngineHandle& operator=(const EngineHandle&) = delete;
  ~EngineHandle() { close(); }

  void close();
  // Throws std::runtime_error once it is closed.
  std::shared_ptr<Engine> open() const;

  std::shared_ptr<Engine> engine;
};

// A save as Python holds it. If it is dropped while running, by an exception that arrives between two bytecodes, it is
// stopped first, as the tensors may go right after.
struct SaveHandle {
  // `alive` is what the save reads from, its plan included. It is kept as long as the handle, which is made and dropped
  // with the GIL held.
  explicit SaveHandle(py::object alive) : kept(std::move(alive)) {}
  SaveHandle(const SaveHandle&) = delete;
  SaveHandle& operator=(const SaveHandle&) = delete;
  ~SaveHandle();

  const py::object kept;
  std::shared_ptr<Save> save;
  std::shared_ptr<const Changes> changes;  // null unless they were asked for
};

void bind_prepared(py::module_& module, py::class_<EngineHandle>& engine);

}  // namespace fastshard
