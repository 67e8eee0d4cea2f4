// SPDX-License-Identifier: Apache-2.0
// The border to Python, and the only file that knows it: plans come in as plain tuples, errors go out as the
// exceptions Python has for them, and the GIL is free in every call that can block.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <cxxabi.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "file/closing.h"
#include "device/cuda_info.h"
#include "file/direct_io.h"
#include "save/engine.h"
#include "file/holders.h"
#include "file/in_place.h"
#include "device/kernels/embedded.h"
#include "file/probe.h"
#include "file/publish.h"
#include "file/source_file.h"
#include "file/hidden_names.h"

namespace py = pybind11;
using namespace py::literals;

namespace fastshard {
namespace {

// How long a signal's handler may have to wait.
constexpr double kSignalsSeconds = 0.1;

// As py::gil_scoped_release. A daemon thread that comes back when the interpreter ends is ended by Python before 3.14 with
// pthread_exit(), which unwinds the stack through destructors that must not throw: all of the process would be aborted.
// It waits for the end of the process instead, as newer versions let it.
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

// An engine as Python holds it, until closed. Closing and dropping wait for the saves under way.
struct EngineHandle {
  explicit EngineHandle(const Options& options) : engine(std::make_shared<Engine>(options)) {}
  EngineHandle(const EngineHandle&) = delete;
  EngineHandle& operator=(const EngineHandle&) = delete;
  ~EngineHandle() { close(); }

  void close() {
    auto closing = std::move(engine);
    const GilReleased released;
    closing.reset();
  }

  std::shared_ptr<Engine> engine;
};

// A save as Python holds it. Should it be dropped while running (an exception that arrived between two
// bytecodes), it is stopped first: the tensors may go right after.
struct SaveHandle {
  SaveHandle() = default;
  SaveHandle(const SaveHandle&) = delete;
  SaveHandle& operator=(const SaveHandle&) = delete;
  ~SaveHandle() {
    if (save == nullptr || save->finished()) return;
    const GilReleased released;
    save->cancel();
    save->disown_fetches(true);
    save->settle();
  }

  std::shared_ptr<Save> save;
};

// A pair of the numbers of fastshard/plan.py.
std::pair<DType, DType> cast_from(const py::object& object) {
  const auto [from, to] = object.cast<std::pair<uint8_t, uint8_t>>();
  if (std::max(from, to) > static_cast<uint8_t>(DType::f8_e4m3_sat) || to == static_cast<uint8_t>(DType::raw)) {
    throw std::invalid_argument("there is no such cast");
  }
  return {static_cast<DType>(from), static_cast<DType>(to)};
}

// TensorView of fastshard/plan.py: (data, nbytes, device, itemsize, shape, strides, cast); shape None: contiguous.
TensorView view_from(py::handle object) {
  const auto tuple = py::reinterpret_borrow<py::tuple>(object);
  const auto [from, to] = tuple[6].is_none() ? std::pair(DType::raw, DType::raw) : cast_from(tuple[6]);
  const auto* data = reinterpret_cast<const std::byte*>(tuple[0].cast<uintptr_t>());
  const int device = tuple[2].cast<int>();
  if (tuple[4].is_none()) {
    TensorView view{.data = data, .device = device, .run_nbytes = tuple[1].cast<uint64_t>(), .from = from, .to = to};
    if (view.cast()) view.run_nbytes = view.run_nbytes / itemsize(to) * itemsize(from);
    return view;
  }
  TensorView view = make_view(data, device, tuple[3].cast<uint64_t>(), tuple[4].cast<std::vector<int64_t>>(),
                              tuple[5].cast<std::vector<int64_t>>());
  view.from = from;
  view.to = to;
  if (view.packed_nbytes() != tuple[1].cast<uint64_t>()) throw std::invalid_argument("nbytes and shape disagree");
  return view;
}

// FilePlan of fastshard/plan.py: (path or a writable buffer, header, items). The header becomes item 0.
FilePlan file_from(py::handle object) {
  const auto tuple = py::reinterpret_borrow<py::tuple>(object);
  FilePlan file;
  const auto header = tuple[1].cast<std::string_view>();
  const auto* first = reinterpret_cast<const std::byte*>(header.data());
  file.header.assign(first, first + header.size());
  const auto items = py::reinterpret_borrow<py::list>(tuple[2]);
  file.items.reserve(items.size() + 1);
  file.items.push_back({TensorView{.data = file.header.data(), .run_nbytes = header.size()}, 0});
  uint64_t offset = header.size();
  for (const py::handle view : items) {
    file.items.push_back({view_from(view), offset});
    WriteItem& item = file.items.back();
    if (item.source.device == kHost) item.mapped = SourceFile::at(item.source.data);
    offset += item.source.packed_nbytes();
  }
  file.nbytes = offset;
  if (py::isinstance<py::bytes>(tuple[0])) {
    file.path = tuple[0].cast<std::string>();
  } else {
    const auto [address, nbytes] = tuple[0].cast<std::pair<uintptr_t, uint64_t>>();
    if (nbytes != file.nbytes) throw std::invalid_argument("the memory target does not have the plan's size");
    file.memory.bytes = reinterpret_cast<std::byte*>(address);
  }
  return file;
}

std::shared_ptr<SavePlan> plan_from(const py::list& files) {
  auto plan = std::make_shared<SavePlan>();
  plan->files.reserve(files.size());
  for (const py::handle file : files) plan->files.push_back(file_from(file));
  return plan;
}

// A prepared save as Python holds it: one plan for each generation of the file, as each has its own address.
// Python sees to it that one thread at a time is in here. In that thread a signal handler may call in between any two
// calls: what is bound has a tag that submit compares, and a save that the handler interrupted is stopped.
struct PreparedHandle {
  PreparedHandle(std::shared_ptr<Engine> of, const py::object& file, size_t generations, py::object tag)
      : engine(std::move(of)) {
    if (engine == nullptr) throw std::runtime_error("the engine is closed");
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
      throw std::invalid_argument("the file would have another size");
    }
    plans = std::move(bound);
    bound_tag = std::move(tag);
  }

  // Null unless what is bound has this tag.
  std::unique_ptr<SaveHandle> submit(const std::map<int, uintptr_t>& streams, bool durable, bool checksums,
                                     const py::object& tag) {
    if (standing == nullptr) throw std::runtime_error("the prepared save is closed");
    if (!tag.is(bound_tag)) return nullptr;
    const GilReleased released;
    if (const std::shared_ptr<Save> before = newest.lock(); before != nullptr && !before->finished()) {
      before->cancel();
      before->settle();
    }
    const size_t generation = standing->next();
    plans[generation]->files[0].memory = standing->target(generation);
    read_from_files(*plans[generation]);
    const auto commit = [target = standing, generation, durable] { return target->publish(generation, durable); };
    auto submitted = std::make_unique<SaveHandle>();
    auto save = engine->submit(plans[generation], streams, {.durable = durable, .checksums = checksums}, commit);
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
  py::object bound_tag;
  std::weak_ptr<Save> newest;
};

// A file that others write, by its descriptor, until it is published or closed; both by the calling thread.
struct NewFileHandle {
  NewFileHandle(const std::string& path, bool keep_cached, bool at_once) {
    const Intent intent{
        .wanted = WritePath::buffered, .keep_cached = keep_cached, .at_once = at_once, .follow_links = true};
    file = std::make_unique<TemporaryFile>(path, 0, intent);
  }
  NewFileHandle(const NewFileHandle&) = delete;
  NewFileHandle& operator=(const NewFileHandle&) = delete;
  ~NewFileHandle() { close(); }

  TemporaryFile& open() const {
    if (file == nullptr) throw std::invalid_argument("the file is closed");
    return *file;
  }
  // Its size, and what the filesystem refused.
  std::pair<uint64_t, std::vector<std::string>> publish(bool durable) {
    struct stat info;
    if (fstat(open().descriptor(), &info) != 0) throw IoError(errno, file->path(), "fstat");
    const std::unique_ptr<TemporaryFile> published = std::move(file);
    if (durable || !published->keep_cached()) published->sync();
    TemporaryFile* const alone = published.get();
    fastshard::publish({&alone, 1}, durable);
    return {static_cast<uint64_t>(info.st_size), published->fallbacks()};
  }
  void close() {
    if (file == nullptr) return;
    if (getpid() != owner) {  // a forked child: the file is the parent's
      static_cast<void>(file.release());
      return;
    }
    // Torch's own opening of it lives as long as the exception that has ended the save.
    if (ftruncate(file->descriptor(), 0) != 0) errno = 0;
    file.reset();
  }

  const pid_t owner = getpid();
  std::unique_ptr<TemporaryFile> file;
};

WritePath write_path_from(const std::string& name) {
  for (const WritePath path :
       {WritePath::automatic, WritePath::buffered, WritePath::direct, WritePath::mapped, WritePath::registered}) {
    if (name == name_of(path)) return path;
  }
  throw std::invalid_argument("write_path must be 'auto', 'buffered', 'direct', 'mapped' or 'registered', not '" +
                              name + "'");
}

py::dict to_dict(const Stats& stats) {
  return py::dict("files"_a = stats.files, "nbytes"_a = stats.nbytes, "seconds"_a = stats.seconds,
                  "copy_seconds"_a = stats.copy_seconds, "write_seconds"_a = stats.write_seconds,
                  "sync_seconds"_a = stats.sync_seconds, "write_path"_a = stats.write_path, "staging"_a = stats.staging,
                  "staging_nbytes"_a = stats.staging_nbytes, "device_scratch_nbytes"_a = stats.device_scratch_nbytes,
                  "fallbacks"_a = py::tuple(py::cast(stats.fallbacks)));
}

// (chunks, ops) of each file, for the tests of the schedule.
py::list schedule_of(const py::list& files, uint64_t slot_nbytes, uint64_t packed_nbytes, uint64_t in_place_nbytes,
                     uint32_t max_ops, bool in_place, uint64_t block_nbytes) {
  const std::shared_ptr<const SavePlan> plan = plan_from(files);
  check(*plan);
  const ScheduleLimits limits{slot_nbytes, packed_nbytes, in_place_nbytes, max_ops, in_place, block_nbytes};
  py::list result;
  for (const FilePlan& file : plan->files) {
    const FileSchedule schedule = make_schedule(file, limits);
    py::list chunks;
    for (const Chunk& chunk : schedule.chunks) {
      constexpr const char* kRoutes[] = {"in_place", "packed", "device"};
      py::list ops;
      for (const CopyOp& op : schedule.ops_of(chunk)) {
        ops.append(py::make_tuple(op.item, op.chunk_offset, op.first_byte, op.nbytes));
      }
      chunks.append(py::make_tuple(chunk.file_offset, chunk.nbytes, kRoutes[static_cast<int>(chunk.route)], ops));
    }
    result.append(chunks);
  }
  return result;
}

// A request in Python's numbering: the header, item 0 here, is never fetched.
std::optional<std::tuple<uint64_t, uint32_t, uint32_t, uint64_t, uint64_t, uintptr_t>> fetch(SaveHandle& handle) {
  const std::optional<FetchRequest> request = handle.save->fetch();
  if (!request) return std::nullopt;
  return std::tuple(request->id, request->file, request->item - 1, request->first_byte, request->nbytes,
                    reinterpret_cast<uintptr_t>(request->out));
}

}  // namespace
}  // namespace fastshard

PYBIND11_MODULE(_native, module) {
  using namespace fastshard;

  // Only of this module: torch may share pybind11's tables, and what its streams throw is a std::system_error too.
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

  py::class_<SaveHandle>(module, "Save")
      .def(
          "wait", [](SaveHandle& handle, double seconds) { return handle.save->wait(seconds); }, "seconds"_a,
          Released())
      .def(
          "finished", [](const SaveHandle& handle) { return handle.save->finished(); }, Released())
      .def(
          "cancel", [](SaveHandle& handle) { return handle.save->cancel(); }, Released())
      .def(
          "disown_fetches", [](SaveHandle& handle) { handle.save->disown_fetches(false); }, Released())
      .def("fetch", &fetch)
      .def(
          "fetched", [](SaveHandle& handle, uint64_t request) { handle.save->fetched(request); }, "request"_a)
      .def("take_amendment", [](SaveHandle& handle) { return handle.save->take_amendment(); })
      .def(
          "amend",
          [](SaveHandle& handle, const std::vector<std::tuple<uint32_t, uint64_t, py::bytes>>& given) {
            std::vector<Amendment> amendments;
            amendments.reserve(given.size());
            for (const auto& [file, offset, bytes] : given) amendments.push_back({file, offset, bytes});
            const GilReleased released;
            handle.save->amend(std::move(amendments));
          },
          "amendments"_a)
      .def_property_readonly("nbytes", [](const SaveHandle& handle) { return handle.save->nbytes(); })
      .def_property_readonly("nbytes_written", [](const SaveHandle& handle) { return handle.save->nbytes_written(); })
      .def_property_readonly("fetches", [](const SaveHandle& handle) { return handle.save->fetches(); })
      .def("checksums", [](const SaveHandle& handle) { return handle.save->checksums(); })
      .def("stats", [](const SaveHandle& handle) { return to_dict(handle.save->stats()); });

  py::class_<EngineHandle>(module, "Engine")
      .def(py::init([](uint64_t memory_budget, size_t threads, const std::string& write_path, uint64_t device_scratch,
                       bool io_uring) {
             return std::make_unique<EngineHandle>(
                 Options{memory_budget, threads, write_path_from(write_path), device_scratch, io_uring});
           }),
           "memory_budget"_a, "threads"_a, "write_path"_a, "device_scratch"_a, "io_uring"_a = true)
      .def(
          "submit",
          [](EngineHandle& handle, const py::list& files, const std::map<int, uintptr_t>& streams, bool durable,
             bool keep_cached, bool checksums, bool amended, const py::object&, bool follow_links) {
            const std::shared_ptr<Engine> engine = handle.engine;
            if (engine == nullptr) throw std::runtime_error("the engine is closed");
            const std::shared_ptr<SavePlan> plan = plan_from(files);
            const GilReleased released;
            read_from_files(*plan);
            const Intent intent{.durable = durable,
                                .keep_cached = keep_cached,
                                .checksums = checksums,
                                .amended = amended,
                                .follow_links = follow_links};
            auto submitted = std::make_unique<SaveHandle>();  // before the save: it may stand when it is submitted
            submitted->save = engine->submit(plan, streams, intent);
            return submitted;
          },
          "files"_a, "streams"_a, "durable"_a, "keep_cached"_a, "checksums"_a, "amended"_a, "keep_alive"_a,
          "follow_links"_a = false, py::keep_alive<0, 8>())
      .def(
          "prepare",
          [](EngineHandle& handle, const py::object& file, size_t generations, py::object tag) {
            return std::make_unique<PreparedHandle>(handle.engine, file, generations, std::move(tag));
          },
          "file"_a, "generations"_a, "tag"_a)
      .def(
          "numa_node",
          [](EngineHandle& handle, int ordinal) {
            const std::shared_ptr<Engine> engine = handle.engine;
            if (engine == nullptr) throw std::runtime_error("the engine is closed");
            return engine->device(ordinal).numa_node();
          },
          "ordinal"_a, Released())
      .def_property_readonly("closed", [](const EngineHandle& handle) { return handle.engine == nullptr; })
      .def("close", &EngineHandle::close);

  py::class_<PreparedHandle>(module, "Prepared")
      .def(
          "submit",
          [](PreparedHandle& handle, const std::map<int, uintptr_t>& streams, bool durable, bool checksums,
             const py::object&, const py::object& tag) { return handle.submit(streams, durable, checksums, tag); },
          "streams"_a, "durable"_a, "checksums"_a, "keep_alive"_a, "tag"_a, py::keep_alive<0, 5>())
      .def(
          "bind",
          [](PreparedHandle& handle, const py::object& file, py::object tag) {
            handle.bind(file, handle.plans.size(), std::move(tag));
          },
          "file"_a, "tag"_a)
      .def_property_readonly("closed", [](const PreparedHandle& handle) { return handle.standing == nullptr; })
      .def_property_readonly("tag", [](const PreparedHandle& handle) { return handle.bound_tag; })
      .def("close", &PreparedHandle::close);

  // Takes the descriptors over and closes them on a thread of its own; what it returns can be waited for.
  py::class_<Closing>(module, "Closing")
      .def("done", &Closing::done)
      .def("wait", [](const Closing& closing) {
        for (;;) {
          {
            const GilReleased released;
            if (closing.wait(kSignalsSeconds)) return;
          }
          if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        }
      });
  module.def(
      "close_later",
      [](const std::vector<int>& descriptors) {
        auto closing = std::make_unique<Closing>();
        const GilReleased released;
        closing->start(descriptors);
        return closing;
      },
      "descriptors"_a);

  module.def("close_soon", &close_soon, "descriptor"_a, py::call_guard<GilReleased>());
  module.def("wait_for_closing", &wait_for_closing, py::call_guard<GilReleased>());

  // A writable buffer of the file's bytes; what is written to it stays in this process.
  py::class_<SourceFile>(module, "SourceFile", py::buffer_protocol())
      .def(py::init([](int fd, uint64_t nbytes, const py::bytes& path) {
             return std::make_unique<SourceFile>(fd, nbytes, path.cast<std::string>());
           }),
           "fd"_a, "nbytes"_a, "path"_a)
      .def_buffer([](const SourceFile& file) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(file.bytes().data()),
                               static_cast<py::ssize_t>(file.bytes().size()));
      })
      .def_static(
          "at",
          [](uintptr_t address) -> std::optional<py::bytes> {
            const SourceFile* const file = SourceFile::at(reinterpret_cast<const std::byte*>(address));
            return file == nullptr ? std::nullopt : std::optional(py::bytes(file->path()));
          },
          "address"_a);

  module.def(
      "same_bytes",
      [](uintptr_t one, uintptr_t other, uint64_t nbytes) {
        return same_bytes(reinterpret_cast<const std::byte*>(one), reinterpret_cast<const std::byte*>(other), nbytes);
      },
      "one"_a, "other"_a, "nbytes"_a, Released());

  // Uninitialised bytes to be filled before anybody else sees them, and their address.
  module.def(
      "new_bytes",
      [](size_t nbytes) {
        auto bytes =
            py::reinterpret_steal<py::bytes>(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(nbytes)));
        if (!bytes) throw py::error_already_set();
        return std::pair(bytes, reinterpret_cast<uintptr_t>(PyBytes_AS_STRING(bytes.ptr())));
      },
      "nbytes"_a);
  // Keeps an object for ever: in a forked child, the parent's threads are not there to finish what it stands for.
  module.def(
      "leak", [](const py::object& object) { object.inc_ref(); }, "object"_a);

  module.def("schedule", &schedule_of, "files"_a, "slot_nbytes"_a, "packed_nbytes"_a, "in_place_nbytes"_a, "max_ops"_a,
             "in_place"_a, "block_nbytes"_a = 1);
  module.def("kernels_compiled_in", [] { return embedded_kernels() != nullptr; });
  module.def("cuda_devices", &cuda_devices, Released());
  module.def("cuda_driver_version", &cuda_driver_version, Released());
  module.def(
      "filesystem",
      [](const std::string& directory, const std::string& write_path, bool durable, bool keep_cached, bool from_device,
         uint64_t nbytes, size_t writers) {
        const FileSystem filesystem = filesystem_of(directory, directory);
        const Choice choice = choose_write_path(filesystem, {.wanted = write_path_from(write_path),
                                                             .durable = durable,
                                                             .keep_cached = keep_cached,
                                                             .from_device = from_device,
                                                             .nbytes = nbytes,
                                                             .writers = writers});
        return std::tuple(filesystem.type, std::string(name_of(choice.path)), choice.reason);
      },
      "directory"_a, "write_path"_a = "auto", "durable"_a = false, "keep_cached"_a = true, "from_device"_a = false,
      "nbytes"_a = uint64_t{1} << 30, "writers"_a = 1);
  // For files that the engine does not write. Paths are bytes.
  py::class_<NewFileHandle>(module, "NewFile")
      .def(py::init([](const std::string& path, bool keep_cached, bool at_once) {
             const GilReleased released;
             return std::make_unique<NewFileHandle>(path, keep_cached, at_once);
           }),
           "path"_a, "keep_cached"_a, "at_once"_a)
      .def("descriptor", [](const NewFileHandle& handle) { return handle.open().descriptor(); })
      .def("publish", &NewFileHandle::publish, "durable"_a, Released())
      .def("close", &NewFileHandle::close, Released());
  module.def(
      "look_at_file",
      [](const std::string& path) {
        const Look found = [&] {
          const GilReleased released;
          return look_at_file(path);
        }();
        return std::pair(found.why_in_place, found.held);
      },
      "path"_a);
  // What a target's hidden names are, and what is done about them, for the tests.
  module.def(
      "temporary_names",
      [](const std::string& path) {
        const Target target = target_of(path);
        py::list names;
        for (unsigned number = 0; number < kTemporaryNames; ++number) {
          names.append(py::bytes(temporary_name(target.directory, target.name, number)));
        }
        return names;
      },
      "path"_a);
  module.def(
      "remove_leftovers",
      [](const std::string& path) {
        const Target target = target_of(path);
        return remove_leftovers(target, filesystem_of(target.directory, path).one_machine);
      },
      "path"_a, Released());
  module.def(
      "holders_of",
      [](int fd) -> std::optional<std::tuple<std::vector<int>, bool>> {
        auto found = holders_of(fd);
        if (!found) return std::nullopt;
        return std::tuple(std::move(found->descriptors), found->certain);
      },
      "fd"_a, Released());
  module.def("io_uring_refusal", &io_uring_refusal);
  module.def("probe", &probe, "directory"_a, Released());
}
