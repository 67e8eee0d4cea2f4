// SPDX-License-Identifier: Apache-2.0
// Every access of the kernels to global memory. The tests run the kernels on a CPU and put checked ones here.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef FASTSHARD_CHECKED_MEMORY
namespace fastshard::global {

// Addresses come out of a table, so that the compiler cannot know what they lead to, and would ask the hardware.
__device__ __forceinline__ void assume_global(const std::byte* address) { __builtin_assume(__isGlobal(address)); }

template <typename T>
__device__ __forceinline__ T load(const std::byte* address) {
  assume_global(address);
  return *reinterpret_cast<const T*>(address);
}

template <typename T>
__device__ __forceinline__ void store(std::byte* address, T value) {
  assume_global(address);
  *reinterpret_cast<T*>(address) = value;
}

}  // namespace fastshard::global
#endif
