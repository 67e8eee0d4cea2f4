// SPDX-License-Identifier: Apache-2.0
#include "bindings/saves.h"

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "bindings/page_lock.h"
#include "bindings/plans.h"
#include "file/huge_pages.h"
#include "file/source_file.h"

namespace fastshard {

void EngineHandle::close() {
  auto closing = std::move(engine);
  const GilReleased released;
  closing.reset();
}

std::shared_ptr<Engine> EngineHandle::open() const {
  if (engine == nullptr) throw std::runtime_error("the engine is closed");
  return engine;
}

SaveHandle::~SaveHandle() {
  if (save == nullptr || save->finished()) return;
  const GilReleased released;
  save->cancel();
  save->disown_fetches(true);
  save->settle();
}

namespace {

// The handle is made before the save, which may stand when it is submitted.
std::unique_ptr<SaveHandle> submit(EngineHandle& handle, const py::list& files, const py::object& options,
                                   const py::object& kept) {
  const std::shared_ptr<Engine> engine = handle.open();
  const std::shared_ptr<SavePlan> plan = plan_from(files);
  const SaveOptions asked = options_from(options);
  auto submitted = std::make_unique<SaveHandle>(py::make_tuple(py::tuple(files), kept));
  const GilReleased released;
  if (!asked.intent.forked) read_from_files(*plan);  // else from the tensors' own mapping, which is private
  submitted->save = engine->submit(plan, asked.streams, asked.intent);
  return submitted;
}

// What keeps the memory page-locked, or why the driver does not do it.
std::variant<std::unique_ptr<PageLockHandle>, std::string> page_lock(EngineHandle& handle, uintptr_t address,
                                                                     uint64_t nbytes, int ordinal) {
  const std::shared_ptr<Engine> engine = handle.open();
  std::unique_ptr<PageLock> lock;
  {
    const GilReleased released;
    lock = engine->page_lock(ordinal, {reinterpret_cast<std::byte*>(address), nbytes});
  }
  if (!lock->refusal().empty()) return lock->refusal();
  return std::make_unique<PageLockHandle>(std::move(lock));
}

// By file, the positions of items that a forked process would not have as they are now, in Python's numbering.
std::vector<std::vector<uint32_t>> items_not_forkable(const py::list& files) {
  const std::shared_ptr<const SavePlan> plan = plan_from(files);
  const GilReleased released;
  std::vector<std::vector<uint32_t>> found = not_forkable(*plan);
  for (std::vector<uint32_t>& items : found) {
    std::erase(items, uint32_t{0});  // the header: it is copied with the process, wherever Python keeps it
    for (uint32_t& item : items) item -= 1;
  }
  return found;
}

// A request in Python's numbering: the header, item 0 here, is never fetched.
std::optional<std::tuple<uint64_t, uint32_t, uint32_t, uint64_t, uint64_t, uintptr_t>> fetch(SaveHandle& handle) {
  const std::optional<FetchRequest> request = handle.save->fetch();
  if (!request) return std::nullopt;
  return std::tuple(request->id, request->file, request->item - 1, request->first_byte, request->nbytes,
                    reinterpret_cast<uintptr_t>(request->out));
}

// Whether there was a file to compare with, the changed items in Python's numbering, and the changed ranges; None if
// that was not asked for. They are complete when the save is finished.
py::object changes(const SaveHandle& handle) {
  if (handle.changes == nullptr) return py::none();
  std::vector<uint32_t> items;
  std::vector<std::pair<uint64_t, uint64_t>> ranges;
  {
    const GilReleased released;
    items = handle.changes->items();
    ranges = handle.changes->ranges();
  }
  std::erase(items, uint32_t{0});  // the header, which is always the same
  for (uint32_t& item : items) item -= 1;
  return py::make_tuple(handle.changes->compares(), items, ranges);
}

void amend(SaveHandle& handle, const std::vector<std::tuple<uint32_t, uint64_t, py::bytes>>& given) {
  std::vector<Amendment> amendments;
  amendments.reserve(given.size());
  for (const auto& [file, offset, bytes] : given) amendments.push_back({file, offset, bytes});
  const GilReleased released;
  handle.save->amend(std::move(amendments));
}

py::dict to_dict(const Stats& stats) {
  return py::dict("files"_a = stats.files, "nbytes"_a = stats.nbytes, "seconds"_a = stats.seconds,
                  "copy_seconds"_a = stats.copy_seconds, "write_seconds"_a = stats.write_seconds,
                  "sync_seconds"_a = stats.sync_seconds, "write_path"_a = stats.write_path, "staging"_a = stats.staging,
                  "staging_nbytes"_a = stats.staging_nbytes, "mapped_nbytes"_a = stats.mapped_nbytes,
                  "written_runs"_a = stats.written_runs, "priority"_a = stats.priority,
                  "device_scratch_nbytes"_a = stats.device_scratch_nbytes,
                  "fallbacks"_a = py::tuple(py::cast(stats.fallbacks)));
}

void bind_save(py::module_& module) {
  py::class_<SaveHandle>(module, "Save")
      .def(
          "wait", [](SaveHandle& handle, double seconds) { return handle.save->wait(seconds); }, "seconds"_a,
          Released())
      .def(
          "finished", [](const SaveHandle& handle) { return handle.save->finished(); }, Released())
      .def(
          "begin", [](SaveHandle& handle) { handle.save->start(false); }, Released())
      .def(
          "read", [](const SaveHandle& handle) { return handle.save->read(); }, Released())
      .def(
          "take_over", [](SaveHandle& handle) { return handle.save->take_over(); }, Released())
      .def(
          "cancel", [](SaveHandle& handle) { return handle.save->cancel(); }, Released())
      .def(
          "hold_stream",
          [](SaveHandle& handle, int ordinal, uintptr_t stream) { return handle.save->hold_stream(ordinal, stream); },
          "ordinal"_a, "stream"_a, Released())
      .def(
          "disown_fetches", [](SaveHandle& handle) { handle.save->disown_fetches(false); }, Released())
      .def("fetch", &fetch)
      .def(
          "fetched", [](SaveHandle& handle, uint64_t request) { handle.save->fetched(request); }, "request"_a)
      .def("take_amendment", [](SaveHandle& handle) { return handle.save->take_amendment(); })
      .def("amend", &amend, "amendments"_a)
      .def_property_readonly("nbytes", [](const SaveHandle& handle) { return handle.save->nbytes(); })
      .def_property_readonly("nbytes_written", [](const SaveHandle& handle) { return handle.save->nbytes_written(); })
      .def_property_readonly("devices", [](const SaveHandle& handle) { return handle.save->devices(); })
      .def_property_readonly("fetches", [](const SaveHandle& handle) { return handle.save->fetches(); })
      // Of a save that a forked process writes: its number (0: there is none any more), how much of the tensors' memory
      // it has given back, and how many seconds the fork took. Else None.
      .def_property_readonly("forked",
                             [](const SaveHandle& handle) -> py::object {
                               const ForkedSave* const forked = handle.save->forked();
                               if (forked == nullptr) return py::none();
                               return py::make_tuple(forked->process(), forked->nbytes_dropped(),
                                                     forked->fork_seconds());
                             })
      .def("checksums", [](const SaveHandle& handle) { return handle.save->checksums(); })
      .def("changes", &changes)
      .def("stats", [](const SaveHandle& handle) { return to_dict(handle.save->stats()); });
}

py::class_<EngineHandle> bind_engine(py::module_& module) {
  py::class_<EngineHandle> engine(module, "Engine");
  engine
      .def(py::init([](uint64_t memory_budget, size_t threads, const std::string& write_path, uint64_t device_scratch,
                       bool io_uring) {
             return std::make_unique<EngineHandle>(
                 Options{memory_budget, threads, write_path_from(write_path), device_scratch, io_uring});
           }),
           "memory_budget"_a, "threads"_a, "write_path"_a, "device_scratch"_a, "io_uring"_a = true)
      .def("submit", &submit, "files"_a, "options"_a, "kept"_a)
      .def(
          "numa_node", [](EngineHandle& handle, int ordinal) { return handle.open()->device(ordinal).numa_node(); },
          "ordinal"_a, Released())
      .def(
          "warm_up", [](EngineHandle& handle, int ordinal) { handle.open()->warm_up(ordinal); }, "ordinal"_a,
          Released())
      .def("page_lock", &page_lock, "address"_a, "nbytes"_a, "ordinal"_a)
      .def_property_readonly("closed", [](const EngineHandle& handle) { return handle.engine == nullptr; })
      .def("close", &EngineHandle::close);
  return engine;
}

}  // namespace

void bind_saves(py::module_& module) {
  py::class_<PageLockHandle>(module, "PageLock")
      .def("release", &PageLockHandle::release)
      .def_property_readonly("part_nbytes", [](const PageLockHandle& handle) {
        return handle.lock == nullptr ? 0 : handle.lock->part_nbytes();
      });
  module.def("can_collapse", &can_collapse);
  module.def("not_forkable", &items_not_forkable, "files"_a);
  bind_save(module);
  py::class_<EngineHandle> engine = bind_engine(module);
  bind_prepared(module, engine);
}

}  // namespace fastshard
