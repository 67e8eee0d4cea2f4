// SPDX-License-Identifier: Apache-2.0
// Memory that Python hands over or takes: mapped files, new bytes.
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "bindings/python.h"
#include "file/source_file.h"

namespace fastshard {

void bind_memory(py::module_& module) {
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
  module.def("leak", [](const py::object& object) { object.inc_ref(); }, "object"_a);
}

}  // namespace fastshard
