// SPDX-License-Identifier: Apache-2.0
// What devices, kernel and filesystems can do.
#include <string>
#include <tuple>
#include <vector>

#include "bindings/plans.h"
#include "bindings/python.h"
#include "device/cuda_info.h"
#include "device/kernels/embedded.h"
#include "device/processor.h"
#include "file/direct_io.h"
#include "file/filesystem.h"
#include "file/probe.h"

namespace fastshard {

void bind_system(py::module_& module) {
  // The instructions that are used where they are faster, by their names in /proc/cpuinfo.
  module.def("processor_features", [] {
    const Processor& has = processor();
    std::vector<std::string> names;
    const auto note = [&](bool there, const char* name) {
      if (there) names.emplace_back(name);
    };
    note(has.pclmulqdq, "pclmulqdq");
    note(has.sse4_1, "sse4_1");
    note(has.avx2, "avx2");
    note(has.f16c, "f16c");
    note(has.avx512f, "avx512f");
    note(has.vpclmulqdq, "vpclmulqdq");
    return names;
  });
  module.def("kernels_compiled_in", [] { return embedded_kernels() != nullptr; });
  module.def("cuda_devices", &cuda_devices, Released());
  module.def("cuda_driver_version", &cuda_driver_version, Released());
  module.def(
      "filesystem",
      [](const std::string& directory, const std::string& write_path, bool durable, bool keep_cached, bool from_device,
         bool past_cache, uint64_t nbytes) {
        const FileSystem filesystem = filesystem_of(directory, directory);
        const Choice choice = choose_write_path(filesystem, {.wanted = write_path_from(write_path),
                                                             .durable = durable,
                                                             .keep_cached = keep_cached,
                                                             .from_device = from_device,
                                                             .past_cache = past_cache,
                                                             .nbytes = nbytes});
        return std::tuple(filesystem.type, std::string(name_of(choice.path)), choice.reason);
      },
      "directory"_a, "write_path"_a = "auto", "durable"_a = false, "keep_cached"_a = true, "from_device"_a = false,
      "past_cache"_a = false, "nbytes"_a = uint64_t{1} << 30);
  module.def("io_uring_refusal", &io_uring_refusal);
  module.def("probe", &probe, "directory"_a, Released());
}

}  // namespace fastshard
