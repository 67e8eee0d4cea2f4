// SPDX-License-Identifier: Apache-2.0
// Where tensors live, and how their bytes get into a staging slot. HostDevice, CudaDevice and FetchDevice
// (bytes that Python brings) implement it; the engine knows only this.
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

// Where a chunk is staged: pack() fills `bytes`, of a slot or of a page-locked target, and takes what it needs
// from the front of `scratch` (memory of a slot, page-locked where the slot is).
struct Staging {
  std::span<std::byte> bytes;
  std::span<std::byte> scratch;
  bool streaming = false;  // `bytes` are the target itself: stores of the CPU go past its caches
};
// Enough for the tables of the kernel: an entry for each op of a chunk and each 64 KiB of it, and dimensions.
inline constexpr uint64_t kScratchNbytes = 256 << 10;

// What a save made use of beside its slots.
struct DeviceUse {
  uint64_t scratch_nbytes = 0;  // device memory
  std::vector<std::string> fallbacks;
};

// One save's copies out of one device: a copy stream ordered behind the caller's work.
// pack() may be called by several threads at once.
class CopyStream {
 public:
  virtual ~CopyStream() = default;
  // Gathers `ops`, all of this device, into the staging bytes. Returns once enqueued, or null when already
  // done. Throws with nothing left under way.
  virtual std::unique_ptr<Ticket> pack(std::span<const CopyOp> ops, Staging& staging) = 0;
  virtual void add_use(DeviceUse&) const {}
};

class Device {
 public:
  virtual ~Device() = default;
  // Page-locks `pages`, whole ones, for this device's copy engine; null where that is refused (copies then take
  // the driver's slower pageable way).
  virtual std::unique_ptr<Registration> register_staging(std::span<std::byte> pages) = 0;
  // A copy stream ordered behind what is enqueued on the caller's `stream` now.
  virtual std::unique_ptr<CopyStream> open(uintptr_t stream) = 0;
  // The memory node it is next to, or -1.
  virtual int numa_node() const { return -1; }
};

std::unique_ptr<Device> make_host_device();
// With at most `scratch_nbytes` of the device's memory, taken when first used, in blocks of at most `slot_nbytes`.
// Throws CudaError when there is no driver or no such device.
std::unique_ptr<Device> make_cuda_device(int ordinal, uint64_t scratch_nbytes, uint64_t slot_nbytes);

}  // namespace fastshard
