// SPDX-License-Identifier: Apache-2.0
// What the CUDA driver says of this machine, for `fastshard env`. Throws CudaError where there is no driver.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

namespace fastshard {

// (name, bytes of memory) of each device.
std::vector<std::tuple<std::string, uint64_t>> cuda_devices();
// (library, 1000 * major + 10 * minor of the newest CUDA the driver supports).
std::tuple<std::string, int> cuda_driver_version();

}  // namespace fastshard
