// SPDX-License-Identifier: Apache-2.0
// A device's primary context, and the streams and events in it, which must be released before the context.
#pragma once

#include <array>
#include <memory>
#include <string>

#include "device/cuda_driver.h"

namespace fastshard {

class Context {
 public:
  explicit Context(int ordinal) : driver_(cuda_driver()) {
    int count = 0;
    FASTSHARD_CUDA(driver_, cuDeviceGetCount, &count);
    if (ordinal >= count) {
      throw CudaError("no CUDA device " + std::to_string(ordinal) + ": the driver sees " + std::to_string(count));
    }
    FASTSHARD_CUDA(driver_, cuDeviceGet, &device_, ordinal);
    FASTSHARD_CUDA(driver_, cuDeviceGetAttribute, &processors_, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device_);
    FASTSHARD_CUDA(driver_, cuDevicePrimaryCtxRetain, &context_, device_);
  }
  ~Context() { driver_.cuDevicePrimaryCtxRelease(device_); }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  const CudaDriver& driver() const { return driver_; }
  CUcontext get() const { return context_; }
  unsigned processors() const { return static_cast<unsigned>(processors_); }
  // The device's name in /sys/bus/pci/devices; empty if the driver does not tell.
  std::string pci_address() const {
    std::array<char, 32> address = {};
    const CUresult found = driver_.cuDeviceGetPCIBusId(address.data(), static_cast<int>(address.size()) - 1, device_);
    return found == CUDA_SUCCESS ? address.data() : "";
  }

 private:
  const CudaDriver& driver_;
  CUdevice device_ = 0;
  int processors_ = 0;
  CUcontext context_ = nullptr;
};

// Makes the device current on this thread for a scope, and restores what was current before.
class Current {
 public:
  explicit Current(const Context& context) : driver_(context.driver()) {
    FASTSHARD_CUDA(driver_, cuCtxPushCurrent, context.get());
  }
  ~Current() {
    CUcontext popped;
    driver_.cuCtxPopCurrent(&popped);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  const CudaDriver& driver_;
};

class Event {
 public:
  explicit Event(std::shared_ptr<Context> context) : context_(std::move(context)) {
    // Sleeping in cuEventSynchronize leaves the cores to the writers.
    FASTSHARD_CUDA(driver(), cuEventCreate, &event_, CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC);
  }
  ~Event() {
    try {
      const Current current(*context_);
      driver().cuEventDestroy(event_);
    } catch (const CudaError&) {
      // The context is gone, and the event with it.
    }
  }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  CUevent get() const { return event_; }
  const CudaDriver& driver() const { return context_->driver(); }

 private:
  std::shared_ptr<Context> context_;
  CUevent event_ = nullptr;
};

// A stream that, like torch's streams, does not wait for the legacy default stream.
class Stream {
 public:
  explicit Stream(std::shared_ptr<Context> context) : context_(std::move(context)) {
    const Current current(*context_);
    FASTSHARD_CUDA(context_->driver(), cuStreamCreate, &stream_, CU_STREAM_NON_BLOCKING);
  }
  ~Stream() {
    try {
      const Current current(*context_);
      context_->driver().cuStreamDestroy(stream_);
    } catch (const CudaError&) {
      // As above.
    }
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  CUstream get() const { return stream_; }

 private:
  std::shared_ptr<Context> context_;
  CUstream stream_ = nullptr;
};

}  // namespace fastshard
