// SPDX-License-Identifier: Apache-2.0
#include "device/cuda_driver.h"

#include <dlfcn.h>

#include <cstdlib>

namespace fastshard {
namespace {

// Two levels, so that cuda.h's macros have put the version suffix on before the name becomes a string.
#define FASTSHARD_STRING(name) #name
#define FASTSHARD_SYMBOL(name) FASTSHARD_STRING(name)

CudaDriver load() {
  CudaDriver driver;
  const char* chosen = std::getenv("FASTSHARD_LIBCUDA");
  driver.library = chosen != nullptr && *chosen != '\0' ? chosen : "libcuda.so.1";
  // Never closed: the driver keeps threads and atexit handlers of its own.
  void* library = dlopen(driver.library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw CudaError(std::string("no CUDA driver: ") + dlerror());
  // Plain dlsym of the versioned names: exactly the ABI this file was compiled against, on every driver.
#define FASTSHARD_LOAD(name)                                                                     \
  driver.name = reinterpret_cast<decltype(driver.name)>(dlsym(library, FASTSHARD_SYMBOL(name))); \
  if (driver.name == nullptr) throw CudaError(driver.library + " has no " FASTSHARD_SYMBOL(name));
  FASTSHARD_CUDA_FUNCTIONS(FASTSHARD_LOAD)
#undef FASTSHARD_LOAD
  driver.check(driver.cuInit(0), "cuInit");
  driver.check(driver.cuDriverGetVersion(&driver.version), "cuDriverGetVersion");
  return driver;
}

}  // namespace

void CudaDriver::check(CUresult result, const char* call) const {
  if (result == CUDA_SUCCESS) return;
  const char* name = nullptr;
  const char* text = nullptr;
  cuGetErrorName(result, &name);
  cuGetErrorString(result, &text);
  throw CudaError(std::string(call) + " failed: " + (name != nullptr ? name : "unknown error") + " (" +
                  (text != nullptr ? text : std::to_string(result)) + ")");
}

const CudaDriver& cuda_driver() {
  // Leaked on purpose: copies may still be released by other threads while the process exits.
  static const CudaDriver* driver = new CudaDriver(load());
  return *driver;
}

}  // namespace fastshard
