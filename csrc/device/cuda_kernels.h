// SPDX-License-Identifier: Apache-2.0
// The pack kernel on a device: loaded when it is first wanted, and launched.
#pragma once

#include <memory>
#include <mutex>

#include "device/cuda_context.h"
#include "device/device.h"
#include "device/kernels/table.h"

namespace fastshard {

// Of one context. Thread-safe.
class CudaKernels {
 public:
  CudaKernels() = default;
  ~CudaKernels();
  CudaKernels(const CudaKernels&) = delete;
  CudaKernels& operator=(const CudaKernels&) = delete;

  // Loads the kernels into the context, once. Null if none were built, or if the driver cannot use them, as the
  // architecture is older than the PTX.
  CUfunction pack(const std::shared_ptr<Context>& context);

 private:
  void load(const std::shared_ptr<Context>& context);

  std::once_flag once_;
  std::shared_ptr<Context> context_;
  CUmodule module_ = nullptr;
  CUfunction pack_ = nullptr;
};

// Launches the pack kernel on `stream`, with at most `max_blocks` blocks. The table goes into the staging scratch, of
// which it takes the front: there it lives exactly as long as the launch needs it. `out` is what the table was made
// for.
void launch_pack(const Context& context, CUfunction kernel, CUstream stream, const PackTable& table, CUdeviceptr out,
                 unsigned max_blocks, Staging& staging);

}  // namespace fastshard
