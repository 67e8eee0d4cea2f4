// SPDX-License-Identifier: Apache-2.0
#include "device/cuda_kernels.h"

#include <algorithm>
#include <array>

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
  std::call_once(once_, [&] { load(context); });
  return pack_;
}

void CudaKernels::load(const std::shared_ptr<Context>& context) {
  if (embedded_kernels() == nullptr) return;
  const CudaDriver& driver = context->driver();
  CUmodule module;
  const CUresult loaded = driver.cuModuleLoadData(&module, embedded_kernels());
  if (loaded == CUDA_ERROR_NO_BINARY_FOR_GPU || loaded == CUDA_ERROR_UNSUPPORTED_PTX_VERSION) return;
  driver.check(loaded, "cuModuleLoadData");
  const CUresult found = driver.cuModuleGetFunction(&pack_, module, kPackKernelName);
  if (found != CUDA_SUCCESS) driver.cuModuleUnload(module);
  driver.check(found, "cuModuleGetFunction");
  context_ = context;
  module_ = module;
}

void launch_pack(const Context& context, CUfunction kernel, CUstream stream, const PackTable& table, CUdeviceptr out,
                 unsigned max_blocks, Staging& staging) {
  CUdeviceptr entries = 0;
  FASTSHARD_CUDA(context.driver(), cuMemHostGetDevicePointer, &entries, staging.scratch.data(), 0);
  table.write(staging.scratch.data());
  staging.scratch = staging.scratch.subspan(table.nbytes());
  CUdeviceptr dims = entries + table.entries_nbytes();
  uint32_t count = table.count();
  std::array<void*, 4> parameters = {&entries, &count, &dims, &out};
  FASTSHARD_CUDA(context.driver(), cuLaunchKernel, kernel, std::min(count, max_blocks), 1, 1, kPackThreads, 1, 1, 0,
                 stream, parameters.data(), nullptr);
}

}  // namespace fastshard
