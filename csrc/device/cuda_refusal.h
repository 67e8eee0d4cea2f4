// SPDX-License-Identifier: Apache-2.0
// What the driver may refuse without ending a save: kernels, page-locking, addresses of page-locked memory.
#pragma once

#include <string>

#include "device/cuda_driver.h"

namespace fastshard {

// Returns the driver's name and text of a result, as it stands in Stats::fallbacks. Throws CudaError, naming `call`,
// for a result after which nothing more can be had from the context: that is no refusal.
std::string describe_refusal(const CudaDriver& driver, CUresult result, const char* call);

}  // namespace fastshard
