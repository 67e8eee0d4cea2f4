// SPDX-License-Identifier: Apache-2.0
// Prepared saves as Python holds them.
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bindings/plans.h"
#include "bindings/saves.h"
#include "file/source_file.h"

namespace fastshard {
namespace {

// A prepared save as Python holds it: one plan for each generation of the file, as each has its own address.
// Python sees to it that one thread at a time is in here. In that thread a signal handler may call in between any two
// calls: what is bound has a tag that submit compares, and a save that the handler interrupted is stopped.
struct PreparedHandle {
  PreparedHandle(std::shared_ptr<Engine> of, const py::object& file, size_t generations, py::object tag)
      : engine(std::move(of)) {
    bind(file, generations, std::move(tag));
    const GilReleased released;
    standing = engine->stand(*plans.front(), generations);
  }
  PreparedHandle(const PreparedHandle&) = delete;
  PreparedHandle& operator=(const PreparedHandle&) = delete;
  ~PreparedHandle() { close(); }

  void bind(const py::object& file, size_t generations, py::object tag) {
    std::vector<std::shared_ptr<SavePlan>> bound;
    py::list files;
    files.append(file);
    while (bound.size() < generations) bound.push_back(plan_from(files));
    check(*bound.at(0));
    if (!plans.empty() && bound[0]->files[0].nbytes != plans[0]->files[0].nbytes) {
      throw std::invalid_argument("the new plan would change the size of the file");
    }
    plans = std::move(bound);
    bound_file = file;
    bound_tag = std::move(tag);
  }

  // Null unless what is bound has this tag.
  std::unique_ptr<SaveHandle> submit(const py::object& options, const py::object& tag, const py::object& kept,
                                     bool changed) {
    if (standing == nullptr) throw std::runtime_error("the prepared save is closed");
    if (!tag.is(bound_tag)) return nullptr;
    const SaveOptions asked = options_from(options);
    if (asked.intent.amended || !asked.intent.keep_cached || asked.intent.follow_links) {
      throw std::invalid_argument("a prepared save takes no other options than durable and checksums");
    }
    auto submitted = std::make_unique<SaveHandle>(py::make_tuple(bound_file, kept));
    const GilReleased released;
    if (const std::shared_ptr<Save> before = newest.lock(); before != nullptr && !before->finished()) {
      before->cancel();
      before->settle();
    }
    const size_t generation = standing->next();
    FilePlan& file = plans[generation]->files[0];
    StandingMapping target = standing->target(generation);
    const auto changes =
        changed ? std::make_shared<Changes>(standing->newest(), file.nbytes, file.items.size()) : nullptr;
    target.changes = changes.get();
    submitted->changes = changes;
    file.target = std::move(target);
    read_from_files(*plans[generation]);
    const auto commit = [target = standing, changes, generation, durable = asked.intent.durable] {
      return target->publish(generation, durable);
    };
    auto save = engine->submit(plans[generation], asked.streams, asked.intent, commit);
    newest = save;
    submitted->save = std::move(save);
    return submitted;
  }

  void close() {
    const GilReleased released;
    standing.reset();
    engine.reset();
  }

  std::shared_ptr<Engine> engine;
  std::shared_ptr<Standing> standing;
  std::vector<std::shared_ptr<SavePlan>> plans;
  py::object bound_file, bound_tag;
  std::weak_ptr<Save> newest;
};

}  // namespace

void bind_prepared(py::module_& module, py::class_<EngineHandle>& engine) {
  py::class_<PreparedHandle>(module, "Prepared")
      .def("submit", &PreparedHandle::submit, "options"_a, "tag"_a, "kept"_a, "changed"_a = false)
      .def(
          "bind",
          [](PreparedHandle& handle, const py::object& file, py::object tag) {
            handle.bind(file, handle.plans.size(), std::move(tag));
          },
          "file"_a, "tag"_a)
      .def_property_readonly("closed", [](const PreparedHandle& handle) { return handle.standing == nullptr; })
      .def_property_readonly("tag", [](const PreparedHandle& handle) { return handle.bound_tag; })
      .def("close", &PreparedHandle::close);
  engine.def(
      "prepare",
      [](EngineHandle& handle, const py::object& file, size_t generations, py::object tag) {
        return std::make_unique<PreparedHandle>(handle.open(), file, generations, std::move(tag));
      },
      "file"_a, "generations"_a, "tag"_a);
}

}  // namespace fastshard
