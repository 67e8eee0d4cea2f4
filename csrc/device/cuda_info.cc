// SPDX-License-Identifier: Apache-2.0
#include "device/cuda_info.h"

#include <array>

#include "device/cuda_driver.h"

namespace fastshard {

std::vector<std::tuple<std::string, uint64_t>> cuda_devices() {
  const CudaDriver& driver = cuda_driver();
  int count = 0;
  FASTSHARD_CUDA(driver, cuDeviceGetCount, &count);
  std::vector<std::tuple<std::string, uint64_t>> devices;
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    CUdevice device;
    FASTSHARD_CUDA(driver, cuDeviceGet, &device, ordinal);
    std::array<char, 256> name = {};
    FASTSHARD_CUDA(driver, cuDeviceGetName, name.data(), static_cast<int>(name.size()), device);
    size_t nbytes = 0;
    FASTSHARD_CUDA(driver, cuDeviceTotalMem, &nbytes, device);
    devices.emplace_back(name.data(), nbytes);
  }
  return devices;
}

std::tuple<std::string, int> cuda_driver_version() {
  const CudaDriver& driver = cuda_driver();
  return {driver.library, driver.version};
}

}  // namespace fastshard
