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

  // Loads the kernels into the context, once. Null if none were built, or if the driver does not take them: each driver
  // has its own way of saying that it is older than the compiler. Throws CudaError if there is no memory for them.
  CUfunction pack(const std::shared_ptr<Context>& context);
  // Why pack() has returned null.
  const std::string& refusal() const { return refusal_; }

 private:
  void load(const std::shared_ptr<Context>& context);

  std::mutex mutex_;
  bool asked_ = false;  // and answered: not out of memory
  std::shared_ptr<Context> context_;
  CUmodule module_ = nullptr;
  CUfunction pack_ = nullptr;
  std::string refusal_;
};

// Where the context's device sees `address`, which lies in page-locked memory that begins at `base`
// (Registration::base_of); 0 if the driver does not tell, or for pageable memory, whose base is null. Throws CudaError
// if the context is lost.
CUdeviceptr device_address(const Context& context, const std::byte* address, const std::byte* base);

// Launches the pack kernel on `stream`, with at most `max_blocks` blocks. The table goes into the staging scratch, of
// which it takes the front: there it lives exactly as long as the launch needs it. `out` is what the table was made
// for.
void launch_pack(const Context& context, CUfunction kernel, CUstream stream, const PackTable& table, CUdeviceptr out,
                 unsigned max_blocks, Staging& staging);

}  // namespace fastshard
