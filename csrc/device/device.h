// SPDX-License-Identifier: Apache-2.0
// A device on which tensors live, and its copies into staging buffers. The CPU, CUDA devices and Python, which brings
// bytes from other accelerators, implement it; the engine knows only this interface.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "plan/schedule.h"

namespace fastshard {

// Completion of one pack().
class Ticket {
 public:
  virtual ~Ticket() = default;
  // Blocks until the bytes are in the slot; throws what the copy failed with. Also after a failure nothing
  // writes to the slot any more.
  virtual void wait() = 0;
};

// Page-locked staging memory; released by the destructor.
class Registration {
 public:
  virtual ~Registration() = default;
};

// The memory in which a chunk is staged. pack() fills `bytes`, which belong to a slot or to a page-locked target, and
// takes scratch memory from the front of `scratch`, which belongs to a slot and is page-locked if the slot is.
struct Staging {
  std::span<std::byte> bytes;
  std::span<std::byte> scratch;
  bool streaming = false;  // `bytes` are the target itself: stores of the CPU go past its caches
};
// Bytes of scratch in a slot: enough for the table of the kernel, which has an entry for each op of a chunk and for
// each 64 KiB of it, and their dimensions.
inline constexpr uint64_t kScratchNbytes = 256 << 10;

// What a save has used besides its slots.
struct DeviceUse {
  uint64_t scratch_nbytes = 0;  // device memory
  std::vector<std::string> fallbacks;
};

// One save's copies out of one device: a copy stream ordered behind the caller's work.
// pack() may be called by several threads at once.
class CopyStream {
 public:
  virtual ~CopyStream() = default;
  // Gathers `ops`, all of which are on this device, into the staging bytes. Returns when the copies are enqueued, and
  // null when they are done already. After an exception nothing is under way.
  virtual std::unique_ptr<Ticket> pack(std::span<const CopyOp> ops, Staging& staging) = 0;
  virtual void add_use(DeviceUse&) const {}
};

class Device {
 public:
  virtual ~Device() = default;
  // Page-locks whole pages for this device's copy engine. Null if that is refused; the driver then copies more slowly,
  // by way of pageable memory.
  virtual std::unique_ptr<Registration> register_staging(std::span<std::byte> pages) = 0;
  // Makes a copy stream that is ordered behind what is enqueued on the caller's `stream` now.
  virtual std::unique_ptr<CopyStream> open(uintptr_t stream) = 0;
  // The memory node that the device is next to, or -1 if that is not known.
  virtual int numa_node() const { return -1; }
};

std::unique_ptr<Device> make_host_device();
// Opens a CUDA device. It uses at most `scratch_nbytes` of the device's memory, in blocks of at most `slot_nbytes`,
// which are allocated at the first gather. Throws CudaError if there is no driver or no such device.
std::unique_ptr<Device> make_cuda_device(int ordinal, uint64_t scratch_nbytes, uint64_t slot_nbytes);

}  // namespace fastshard
