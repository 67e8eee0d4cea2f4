// SPDX-License-Identifier: Apache-2.0
// Every access of the kernels to global memory. The tests run the kernels on a CPU and put checked ones here.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef FASTSHARD_CHECKED_MEMORY
namespace fastshard::global {

template <typename T>
__device__ __forceinline__ T load(const std::byte* address) {
  return *reinterpret_cast<const T*>(address);
}

template <typename T>
__device__ __forceinline__ void store(std::byte* address, T value) {
  *reinterpret_cast<T*>(address) = value;
}

}  // namespace fastshard::global
#endif
