// SPDX-License-Identifier: Apache-2.0
// Files that the engine does not write, and what is known of names and descriptors.
#include <sys/stat.h>
#include <unistd.h>

#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/python.h"
#include "file/closing.h"
#include "file/file_runs.h"
#include "file/hidden_names.h"
#include "file/holders.h"
#include "file/in_place.h"
#include "file/publish.h"
#include "save/file_crc32.h"

namespace fastshard {
namespace {

// How long a signal's handler may have to wait.
constexpr double kSignalsSeconds = 0.1;

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
    PlacedFile* const alone = published.get();
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

void bind_new_file(py::module_& module) {
  py::class_<NewFileHandle>(module, "NewFile")
      .def(py::init([](const std::string& path, bool keep_cached, bool at_once) {
             const GilReleased released;
             return std::make_unique<NewFileHandle>(path, keep_cached, at_once);
           }),
           "path"_a, "keep_cached"_a, "at_once"_a)
      .def("descriptor", [](const NewFileHandle& handle) { return handle.open().descriptor(); })
      .def("publish", &NewFileHandle::publish, "durable"_a, Released())
      .def("close", &NewFileHandle::close, Released());
}

void bind_closing(py::module_& module) {
  // Takes the descriptors over and closes them on a thread of its own; what it returns can be waited for.
  py::class_<Closing>(module, "Closing").def("done", &Closing::done).def("wait", [](const Closing& closing) {
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
}

void bind_names(py::module_& module) {
  module.def("on_one_machine", [](int fd) { return filesystem_of(fd, "").one_machine; }, "fd"_a, Released());
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
}

void bind_reading(py::module_& module) {
  // Bytes and calls; nothing where the file ends before.
  module.def(
      "read_runs",
      [](int fd, const py::bytes& path, uint64_t offset, uint64_t nbytes, std::vector<uint64_t> counts,
         std::vector<uint64_t> in_file, std::vector<int64_t> in_memory, uintptr_t address,
         bool streaming) -> std::optional<std::pair<uint64_t, uint64_t>> {
        if (counts.size() != in_file.size() || counts.size() != in_memory.size()) {
          throw std::invalid_argument("a count and two strides for each dimension");
        }
        const auto name = path.cast<std::string>();
        const FileRuns runs{offset, nbytes, std::move(counts), std::move(in_file), std::move(in_memory)};
        const GilReleased released;
        const auto found = read_runs(fd, name, runs, reinterpret_cast<std::byte*>(address), streaming);
        if (!found) return std::nullopt;
        return std::pair(found->nbytes, found->calls);
      },
      "fd"_a, "path"_a, "offset"_a, "nbytes"_a, "counts"_a, "in_file"_a, "in_memory"_a, "address"_a, "streaming"_a);
  // Nothing where the file ends before.
  module.def(
      "crc32_of_ranges",
      [](int fd, const py::bytes& path, uint64_t offset, const std::vector<uint64_t>& sizes, bool direct,
         const py::buffer& block) {
        const auto name = path.cast<std::string>();
        const py::buffer_info memory = block.request(/*writable=*/true);
        const std::span bytes(static_cast<std::byte*>(memory.ptr), static_cast<size_t>(memory.size * memory.itemsize));
        const GilReleased released;
        return crc32_of_ranges(fd, name, offset, sizes, direct, bytes);
      },
      "fd"_a, "path"_a, "offset"_a, "sizes"_a, "direct"_a, "block"_a);
  module.def("crc32_joined", &crc32_joined, "first"_a, "second"_a, "nbytes"_a);
}

}  // namespace

void bind_files(py::module_& module) {
  bind_new_file(module);
  bind_closing(module);
  bind_names(module);
  bind_reading(module);
}

}  // namespace fastshard
