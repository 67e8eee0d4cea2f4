// SPDX-License-Identifier: Apache-2.0
// A stand-in for libcuda.so.1 over host memory: the driver entry points that fastshard uses, for tests on
// machines without a GPU. It is late where the driver may be late and strict where the driver may be strict;
// it says nothing about speed. What it adds to the driver's contract:
//  - everything starts late by a random time, so that streams overtake each other;
//  - device addresses cannot be read by the host (SIGSEGV), freed ones are never given out again;
//  - an asynchronous copy to registered memory poisons its target at once and copies later;
//  - what a correct program never does is counted (sim_violations), besides the error it gets.
// And it is as unkind as real drivers are, where tests do not choose otherwise (SETTINGS in tests/simcuda_values.py):
//  - a job may fill a device, and other kernels wait for the ends of its kernels, in the order of priorities;
//  - copies to the host queue up for one copy engine;
//  - page-locking and allocating wait for what runs, and let no other call pass; a disk's files are not page-locked;
//  - memory is given in granules; captures forbid calls to other threads; a context whose work has failed is dead.
// Blocks of a kernel run one after the other, so races between them are for compute-sanitizer on a GPU to see.
//
// simulator.h is the machine (simulator.cc runs streams, engines.cc is what these share), call.h what every entry point
// does first. The entry points are here (driver, devices, contexts), in streams.cc, capture.cc, memory.cc,
// registration.cc and kernel.cc; control.cc is the tests' side.
#include <string_view>

#include "call.h"

namespace simulated {

bool clear_context(std::unique_lock<std::mutex>& lock, Context* context) {
  State& s = state();
  bool found = false;
  const auto take = [&](auto& objects) {
    std::remove_reference_t<decltype(objects)> taken;
    for (const auto& object : objects) {
      if (object.second->context == context) taken.insert(object);
    }
    found = found || !taken.empty();
    return taken;
  };
  for (const auto& [handle, stream] : take(s.streams)) {
    s.changed.wait(lock, [&, &waited = stream] { return waited->idle(); });
    stream->destroyed = true;
    remove(s.streams, kStreams, handle);
  }
  for (const auto& [handle, event] : take(s.events)) remove(s.events, kEvents, handle);
  for (const auto& [handle, module] : take(s.modules)) remove_module(handle);
  for (const auto& [begin, range] : take(s.registrations)) remove_registration(lock, range);
  for (const auto& [begin, range] : take(s.allocations)) remove_allocation(lock, range);
  if (context->legacy_stream != nullptr) context->legacy_stream->destroyed = true;
  context->legacy_stream = nullptr;
  s.changed.notify_all();
  return found;
}

namespace {

int attribute(CUdevice_attribute which, int device) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X:
      return 0x7fffffff;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z:
      return 0xffff;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      return 32;
    case CU_DEVICE_ATTRIBUTE_MAX_PITCH:
      return static_cast<int>(kMaxPitch);
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      return 8;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      return 9;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT:
      return 2;
    case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID:
      return device + 1;
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED:
      return 1;
    default:
      return 0;
  }
}

struct ErrorText {
  CUresult result;
  const char* name;
  const char* text;
};
#define SIM_ERROR(name, text) {name, #name, text}
constexpr ErrorText kErrors[] = {
    SIM_ERROR(CUDA_SUCCESS, "no error"),
    SIM_ERROR(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    SIM_ERROR(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    SIM_ERROR(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    SIM_ERROR(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
    SIM_ERROR(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    SIM_ERROR(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
    SIM_ERROR(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid"),
    SIM_ERROR(CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device"),
    SIM_ERROR(CUDA_ERROR_INVALID_PTX, "a PTX JIT compilation failed"),
    SIM_ERROR(CUDA_ERROR_JIT_COMPILER_NOT_FOUND, "PTX JIT compiler library not found"),
    SIM_ERROR(CUDA_ERROR_INVALID_SOURCE, "device kernel image is invalid"),
    SIM_ERROR(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "the provided PTX was compiled with an unsupported toolchain."),
    SIM_ERROR(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    SIM_ERROR(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    SIM_ERROR(CUDA_ERROR_NOT_READY, "device not ready"),
    SIM_ERROR(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    SIM_ERROR(CUDA_ERROR_CONTEXT_IS_DESTROYED, "context is destroyed"),
    SIM_ERROR(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "part or all of the requested memory range is already mapped"),
    SIM_ERROR(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "pointer does not correspond to a registered memory region"),
    SIM_ERROR(CUDA_ERROR_MISALIGNED_ADDRESS, "misaligned address"),
    SIM_ERROR(CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure"),
    SIM_ERROR(CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
    SIM_ERROR(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"),
    SIM_ERROR(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "operation failed due to a previous error during capture"),
    SIM_ERROR(CUDA_ERROR_STREAM_CAPTURE_MERGE, "operation would result in a merge of separate capture sequences"),
    SIM_ERROR(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "capture was not ended in the same stream as it began"),
    SIM_ERROR(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, "capturing stream has unjoined work"),
    SIM_ERROR(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "dependency created on uncaptured work in another stream"),
    SIM_ERROR(CUDA_ERROR_CAPTURED_EVENT, "operation not permitted on an event last recorded in a capturing stream"),
    SIM_ERROR(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
              "operation would make the legacy stream depend on a capturing blocking stream"),
    SIM_ERROR(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD,
              "attempt to terminate a thread-local capture sequence from another thread"),
    SIM_ERROR(CUDA_ERROR_UNKNOWN, "unknown error"),
};

const ErrorText* find_error(CUresult result) {
  for (const ErrorText& error : kErrors) {
    if (error.result == result) return &error;
  }
  return nullptr;
}

}  // namespace
}  // namespace simulated

using namespace simulated;

CUresult cuInit(unsigned flags) {
  return entry("cuInit", Needs::kNothing, [&](Call&) {
    require(flags == 0);
    set_initialized();
  });
}

CUresult cuDriverGetVersion(int* version) {
  return entry("cuDriverGetVersion", Needs::kNothing, [&](Call&) { *version = CUDA_VERSION; });
}

CUresult cuGetErrorName(CUresult result, const char** name) {
  const ErrorText* error = find_error(result);
  *name = error == nullptr ? nullptr : error->name;
  return error == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult result, const char** text) {
  const ErrorText* error = find_error(result);
  *text = error == nullptr ? nullptr : error->text;
  return error == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuGetProcAddress(const char* name, void** address, int version, cuuint64_t,
                          CUdriverProcAddressQueryResult* status) {
  return entry("cuGetProcAddress", Needs::kNothing, [&](Call&) {
    require(name != nullptr && address != nullptr && version <= CUDA_VERSION);
    *address = nullptr;
    for (const EntryPoint& entry_point : entry_points()) {
      if (std::string_view(name) == entry_point.name) *address = entry_point.address;
    }
    if (status == nullptr) return;
    *status = *address == nullptr ? CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND : CU_GET_PROC_ADDRESS_SUCCESS;
  });
}

CUresult cuDeviceGetCount(int* count) {
  return entry("cuDeviceGetCount", Needs::kDriver, [&](Call&) { *count = kDevices; });
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  return entry("cuDeviceGet", Needs::kDriver, [&](Call&) {
    require(ordinal >= 0 && ordinal < kDevices, CUDA_ERROR_INVALID_DEVICE);
    *device = ordinal;
  });
}

CUresult cuDeviceGetName(char* name, int size, CUdevice device) {
  return entry("cuDeviceGetName", Needs::kDriver, [&](Call&) {
    require(device >= 0 && device < kDevices, CUDA_ERROR_INVALID_DEVICE);
    require(size > 0);
    const std::string text = "Simulated device " + std::to_string(device);
    name[text.copy(name, static_cast<size_t>(size) - 1)] = '\0';
  });
}

CUresult cuDeviceTotalMem(size_t* nbytes, CUdevice device) {
  return entry("cuDeviceTotalMem", Needs::kDriver, [&](Call&) {
    require(device >= 0 && device < kDevices, CUDA_ERROR_INVALID_DEVICE);
    *nbytes = static_cast<size_t>(state().settings.device_nbytes);
  });
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
  return entry("cuDeviceGetAttribute", Needs::kDriver, [&](Call&) {
    require(device >= 0 && device < kDevices, CUDA_ERROR_INVALID_DEVICE);
    *value = attribute(which, device);
  });
}

CUresult cuDeviceGetPCIBusId(char* address, int size, CUdevice device) {
  return entry("cuDeviceGetPCIBusId", Needs::kDriver, [&](Call&) {
    require(device >= 0 && device < kDevices, CUDA_ERROR_INVALID_DEVICE);
    const std::string text = "0000:" + std::string(device == 0 ? "0A" : "8B") + ":00.0";
    require(size > static_cast<int>(text.size()));
    address[text.copy(address, text.size())] = '\0';
  });
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return entry("cuDevicePrimaryCtxRetain", Needs::kDriver, [&](Call&) {
    require(device >= 0 && device < kDevices, CUDA_ERROR_INVALID_DEVICE);
    Context& primary = state().contexts[device];
    require(primary.error == CUDA_SUCCESS, primary.error);
    primary.device = device;
    ++primary.retained;
    state().count(kContexts, 1);
    *context = primary.handle();
  });
}

CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
  return entry("cuDevicePrimaryCtxRelease", Needs::kDriver, [&](Call& call) {
    require(device >= 0 && device < kDevices, CUDA_ERROR_INVALID_DEVICE);
    Context& primary = state().contexts[device];
    if (primary.retained == 0) reject(CUDA_ERROR_INVALID_CONTEXT, "context released more often than retained");
    state().count(kContexts, -1);
    const CUresult error = primary.error;
    if (--primary.retained == 0 && clear_context(call.lock, &primary)) {
      note_violation("context destroyed with objects left in it");
    }
    require(error == CUDA_SUCCESS, error);
  });
}

CUresult cuCtxPushCurrent(CUcontext handle) {
  return entry("cuCtxPushCurrent", Needs::kDriver, [&](Call&) {
    for (Context& context : state().contexts) {
      if (context.handle() != handle || context.retained == 0) continue;
      require(context.error == CUDA_SUCCESS, context.error);
      return push_context(&context);
    }
    reject(CUDA_ERROR_INVALID_CONTEXT, "unknown or destroyed context made current");
  });
}

CUresult cuCtxPopCurrent(CUcontext* context) {
  return entry("cuCtxPopCurrent", Needs::kDriver, [&](Call&) {
    Context* const popped = pop_context();
    if (context != nullptr) *context = popped->handle();
  });
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  return entry("cuCtxGetCurrent", Needs::kDriver, [&](Call&) {
    Context* const current = current_context();
    *context = current == nullptr ? nullptr : current->handle();
  });
}

std::span<const EntryPoint> simulated::entry_points() {
  // `#name` keeps the name as written, `&name` follows cuda.h to the versioned symbol.
#define SIM_ENTRY(name)                   \
  {                                       \
    #name, reinterpret_cast<void*>(&name) \
  }
  static const EntryPoint table[] = {
      SIM_ENTRY(cuInit),
      SIM_ENTRY(cuDriverGetVersion),
      SIM_ENTRY(cuGetErrorName),
      SIM_ENTRY(cuGetErrorString),
      SIM_ENTRY(cuGetProcAddress),
      SIM_ENTRY(cuDeviceGetCount),
      SIM_ENTRY(cuDeviceGet),
      SIM_ENTRY(cuDeviceGetName),
      SIM_ENTRY(cuDeviceTotalMem),
      SIM_ENTRY(cuDeviceGetAttribute),
      SIM_ENTRY(cuDeviceGetPCIBusId),
      SIM_ENTRY(cuDevicePrimaryCtxRetain),
      SIM_ENTRY(cuDevicePrimaryCtxRelease),
      SIM_ENTRY(cuCtxPushCurrent),
      SIM_ENTRY(cuCtxPopCurrent),
      SIM_ENTRY(cuCtxGetCurrent),
      SIM_ENTRY(cuStreamCreate),
      SIM_ENTRY(cuStreamCreateWithPriority),
      SIM_ENTRY(cuStreamGetPriority),
      SIM_ENTRY(cuCtxGetStreamPriorityRange),
      SIM_ENTRY(cuThreadExchangeStreamCaptureMode),
      SIM_ENTRY(cuStreamBeginCapture),
      SIM_ENTRY(cuStreamEndCapture),
      SIM_ENTRY(cuStreamDestroy),
      SIM_ENTRY(cuStreamSynchronize),
      SIM_ENTRY(cuStreamQuery),
      SIM_ENTRY(cuStreamWaitEvent),
      SIM_ENTRY(cuStreamIsCapturing),
      SIM_ENTRY(cuEventCreate),
      SIM_ENTRY(cuEventRecord),
      SIM_ENTRY(cuEventQuery),
      SIM_ENTRY(cuEventSynchronize),
      SIM_ENTRY(cuEventDestroy),
      SIM_ENTRY(cuMemHostRegister),
      SIM_ENTRY(cuMemHostUnregister),
      SIM_ENTRY(cuMemHostGetDevicePointer),
      SIM_ENTRY(cuMemAlloc),
      SIM_ENTRY(cuMemFree),
      SIM_ENTRY(cuMemGetInfo),
      SIM_ENTRY(cuMemcpyDtoHAsync),
      SIM_ENTRY(cuMemcpyHtoDAsync),
      SIM_ENTRY(cuMemcpyDtoH),
      SIM_ENTRY(cuMemcpyHtoD),
      SIM_ENTRY(cuMemcpy2DAsync),
      SIM_ENTRY(cuMemsetD8Async),
      SIM_ENTRY(cuModuleLoadData),
      SIM_ENTRY(cuModuleUnload),
      SIM_ENTRY(cuModuleGetFunction),
      SIM_ENTRY(cuLaunchKernel),
  };
  return table;
}
