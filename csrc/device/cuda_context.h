// SPDX-License-Identifier: Apache-2.0
// A device's primary context, and the streams and events in it, which must be released before the context.
//
// Whatever calls the driver makes a Current first, releases included: it is also what keeps a graph valid that another
// thread captures meanwhile. No destructor throws; on a context that has failed, releases return its error once more,
// and what they were to release goes with the context.
#pragma once

#include <array>
#include <memory>
#include <string>

#include "device/cuda_driver.h"

namespace fastshard {

// For a scope, what this thread calls is no part of the graphs that other threads capture. In the mode that torch
// captures in, calls that wait, allocate or register, made by any thread, would make the graph invalid and fail.
class Uncaptured {
 public:
  explicit Uncaptured(const CudaDriver& driver)
      : driver_(driver), exchanged_(driver_.cuThreadExchangeStreamCaptureMode(&mode_) == CUDA_SUCCESS) {}
  ~Uncaptured() {
    if (exchanged_) driver_.cuThreadExchangeStreamCaptureMode(&mode_);
  }
  Uncaptured(const Uncaptured&) = delete;
  Uncaptured& operator=(const Uncaptured&) = delete;

 private:
  const CudaDriver& driver_;
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;  // then the thread's own
  const bool exchanged_;
};

class Context {
 public:
  explicit Context(int ordinal) : driver_(cuda_driver()), ordinal_(ordinal) {
    const Uncaptured uncaptured(driver_);
    int count = 0;
    FASTSHARD_CUDA(driver_, cuDeviceGetCount, &count);
    if (ordinal >= count) {
      throw CudaError("no CUDA device " + std::to_string(ordinal) + ": the driver sees " + std::to_string(count));
    }
    FASTSHARD_CUDA(driver_, cuDeviceGet, &device_, ordinal);
    FASTSHARD_CUDA(driver_, cuDeviceGetAttribute, &processors_, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device_);
    FASTSHARD_CUDA(driver_, cuDevicePrimaryCtxRetain, &context_, device_);
  }
  ~Context() {
    const Uncaptured uncaptured(driver_);
    driver_.cuDevicePrimaryCtxRelease(device_);
  }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  const CudaDriver& driver() const { return driver_; }
  int ordinal() const { return ordinal_; }
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
  const int ordinal_;
  CUdevice device_ = 0;
  int processors_ = 0;
  CUcontext context_ = nullptr;
};

// Makes the device current on this thread for a scope, and restores what was current before.
class Current {
 public:
  explicit Current(const Context& context) : pushed_(context), uncaptured_(context.driver()) {}
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  class Pushed {
   public:
    explicit Pushed(const Context& context) : driver_(context.driver()) {
      FASTSHARD_CUDA(driver_, cuCtxPushCurrent, context.get());
    }
    ~Pushed() {
      CUcontext popped;
      driver_.cuCtxPopCurrent(&popped);
    }
    Pushed(const Pushed&) = delete;
    Pushed& operator=(const Pushed&) = delete;

   private:
    const CudaDriver& driver_;
  };

  const Pushed pushed_;
  const Uncaptured uncaptured_;
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

// Of a stream's kernels: among those that wait for multiprocessors, the highest come first. Copies have none.
enum class Priority { ordinary, highest };

// A stream that, like torch's streams, does not wait for the legacy default stream.
class Stream {
 public:
  Stream(std::shared_ptr<Context> context, Priority priority) : context_(std::move(context)) {
    const Current current(*context_);
    int lowest = 0, highest = 0;
    if (priority == Priority::highest) {
      FASTSHARD_CUDA(context_->driver(), cuCtxGetStreamPriorityRange, &lowest, &highest);
    }
    FASTSHARD_CUDA(context_->driver(), cuStreamCreateWithPriority, &stream_, CU_STREAM_NON_BLOCKING, highest);
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
