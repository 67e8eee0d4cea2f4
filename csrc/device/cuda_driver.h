// SPDX-License-Identifier: Apache-2.0
// The CUDA driver API, found at run time: nothing here is linked, so the same build imports on a machine
// without a GPU. Types come from cuda.h; only cuda_*.cc include this.
#pragma once

#include <cuda.h>

#include <string>

#include "plan/error.h"

namespace fastshard {

// Every entry point fastshard uses. cuda.h maps the names to versioned symbols (cuStreamDestroy -> _v2).
#define FASTSHARD_CUDA_FUNCTIONS(X)    \
  X(cuInit)                            \
  X(cuDriverGetVersion)                \
  X(cuGetErrorName)                    \
  X(cuGetErrorString)                  \
  X(cuDeviceGetCount)                  \
  X(cuDeviceGet)                       \
  X(cuDeviceGetName)                   \
  X(cuDeviceTotalMem)                  \
  X(cuDeviceGetAttribute)              \
  X(cuDeviceGetPCIBusId)               \
  X(cuDevicePrimaryCtxRetain)          \
  X(cuDevicePrimaryCtxRelease)         \
  X(cuCtxPushCurrent)                  \
  X(cuCtxPopCurrent)                   \
  X(cuCtxGetStreamPriorityRange)       \
  X(cuThreadExchangeStreamCaptureMode) \
  X(cuStreamCreateWithPriority)        \
  X(cuStreamDestroy)                   \
  X(cuStreamSynchronize)               \
  X(cuStreamWaitEvent)                 \
  X(cuEventCreate)                     \
  X(cuEventRecord)                     \
  X(cuEventQuery)                      \
  X(cuEventSynchronize)                \
  X(cuEventDestroy)                    \
  X(cuMemAlloc)                        \
  X(cuMemFree)                         \
  X(cuMemHostRegister)                 \
  X(cuMemHostUnregister)               \
  X(cuMemHostGetDevicePointer)         \
  X(cuMemcpyDtoHAsync)                 \
  X(cuMemcpy2DAsync)                   \
  X(cuModuleLoadData)                  \
  X(cuModuleUnload)                    \
  X(cuModuleGetFunction)               \
  X(cuLaunchKernel)

struct CudaDriver {
// NOLINTNEXTLINE(bugprone-macro-parentheses): the name of a member
#define FASTSHARD_DECLARE(name) decltype(&::name) name = nullptr;
  FASTSHARD_CUDA_FUNCTIONS(FASTSHARD_DECLARE)
#undef FASTSHARD_DECLARE
  std::string library;
  int version = 0;  // 1000 * major + 10 * minor of the CUDA the driver supports

  // Throws CudaError naming `call` unless `result` is success.
  void check(CUresult result, const char* call) const;
};

// The driver, loaded and initialised by the first call; later calls are free. The library is
// $FASTSHARD_LIBCUDA or libcuda.so.1. Throws CudaError with the reason when there is none.
const CudaDriver& cuda_driver();

}  // namespace fastshard

// `driver.cuX(...)`, checked.
#define FASTSHARD_CUDA(driver, name, ...) (driver).check((driver).name(__VA_ARGS__), #name)
