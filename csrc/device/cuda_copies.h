// SPDX-License-Identifier: Apache-2.0
// Copies that the copy engine of a device can do by itself: ranges, rows with a pitch, and gathers made of these.
#pragma once

#include <cstdint>
#include <span>

#include "device/cuda_context.h"
#include "device/device.h"

namespace fastshard {

// A contiguous range of at least this many bytes is copied by the copy engine; smaller ones are cheaper
// together in one kernel launch than one by one.
inline constexpr uint64_t kEngineCopyNbytes = 64 << 10;
// Bytes of the staging scratch that gather() needs at least for a cast.
inline constexpr uint64_t kCastNbytes = 4096;

// Copies to the host on one stream, enqueued in the order of the calls. The context must be current.
class CudaCopies {
 public:
  CudaCopies(const CudaDriver& driver, CUstream stream) : driver_(driver), stream_(stream) {}

  void copy(const std::byte* source, uint64_t nbytes, std::byte* out);
  // A gather without the kernel. One that casts is done by the CPU, through the scratch: it waits for the copies.
  void gather(const CopyOp& op, const Staging& staging);

 private:
  void gather_runs(const CopyOp& op, std::byte* out);
  void gather_and_cast(const CopyOp& op, std::span<std::byte> scratch, std::byte* out);
  void copy_rows(const std::byte* source, uint64_t stride, uint64_t run, uint64_t rows, std::byte* out);

  const CudaDriver& driver_;
  const CUstream stream_;
};

}  // namespace fastshard
