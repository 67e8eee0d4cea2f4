// SPDX-License-Identifier: Apache-2.0
#include "device/cuda_kernels.h"

#include <algorithm>
#include <array>

#include "device/cuda_refusal.h"
#include "device/kernels/embedded.h"

namespace fastshard {

CudaKernels::~CudaKernels() {
  if (module_ == nullptr) return;
  try {
    const Current current(*context_);
    context_->driver().cuModuleUnload(module_);
  } catch (const CudaError&) {
    // The context is gone, and the module with it.
  }
}

CUfunction CudaKernels::pack(const std::shared_ptr<Context>& context) {
  // Not std::call_once: not everywhere may what it calls throw, and the next call is to try again.
  const std::lock_guard lock(mutex_);
  if (!asked_) load(context);
  asked_ = true;
  return pack_;
}

void CudaKernels::load(const std::shared_ptr<Context>& context) {
  if (embedded_kernels() == nullptr) {
    refusal_ = "built without kernels";
    return;
  }
  const CudaDriver& driver = context->driver();
  const auto refused = [&](CUresult result, const char* call) {
    if (result == CUDA_ERROR_OUT_OF_MEMORY) driver.check(result, call);
    if (result != CUDA_SUCCESS) refusal_ = "kernels refused: " + describe_refusal(driver, result, call);
    return result != CUDA_SUCCESS;
  };
  context_ = context;
  if (module_ == nullptr && refused(driver.cuModuleLoadData(&module_, embedded_kernels()), "cuModuleLoadData")) return;
  refused(driver.cuModuleGetFunction(&pack_, module_, kPackKernelName), "cuModuleGetFunction");
}

CUdeviceptr device_address(const Context& context, const std::byte* address, const std::byte* base) {
  if (base == nullptr) return 0;
  CUdeviceptr found = 0;
  const CudaDriver& driver = context.driver();
  const CUresult result = driver.cuMemHostGetDevicePointer(&found, const_cast<std::byte*>(base), 0);
  if (result == CUDA_SUCCESS) return found + static_cast<uint64_t>(address - base);
  describe_refusal(driver, result, "cuMemHostGetDevicePointer");  // throws what earlier work has met
  return 0;
}

void launch_pack(const Context& context, CUfunction kernel, CUstream stream, const PackTable& table, CUdeviceptr out,
                 unsigned max_blocks, Staging& staging) {
  CUdeviceptr entries = device_address(context, staging.scratch.data(), staging.scratch_base);
  if (entries == 0) throw CudaError("the device cannot access the table of its kernel");
  table.write(staging.scratch.data());
  staging.scratch = staging.scratch.subspan(table.nbytes());
  CUdeviceptr dims = entries + table.entries_nbytes();
  uint32_t count = table.count();
  std::array<void*, 4> parameters = {&entries, &count, &dims, &out};
  FASTSHARD_CUDA(context.driver(), cuLaunchKernel, kernel, std::min(count, max_blocks), 1, 1, kPackThreads, 1, 1, 0,
                 stream, parameters.data(), nullptr);
}

}  // namespace fastshard
