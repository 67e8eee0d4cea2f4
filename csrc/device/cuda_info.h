// SPDX-License-Identifier: Apache-2.0
// What the CUDA driver tells about this machine, for `fastshard env`. Throws CudaError if there is no driver.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

namespace fastshard {

// Returns name and bytes of memory of each device.
std::vector<std::tuple<std::string, uint64_t>> cuda_devices();
// Returns the driver's library, and 1000 * major + 10 * minor of the newest CUDA that it supports.
std::tuple<std::string, int> cuda_driver_version();

}  // namespace fastshard
