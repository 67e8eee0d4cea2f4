// SPDX-License-Identifier: Apache-2.0
// A device on which tensors live, and its copies into staging buffers. The CPU, CUDA devices and Python, which brings
// bytes from other accelerators, implement it; the engine knows only this interface.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
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

// Page-locked memory; released by the destructor. The driver may know it in parts: no copy reaches from one part into
// the next, and only at the beginning of a part may the driver be asked where a device sees it.
class Registration {
 public:
  virtual ~Registration() = default;
  // Where the part begins that holds `address`.
  virtual const std::byte* base_of(const std::byte* address) const = 0;
  // The length of all parts but the last; 0 if there is only one.
  virtual uint64_t part_nbytes() const = 0;
};

// A registration, or why there is none: empty where nobody wants one.
struct PageLocking {
  std::unique_ptr<Registration> registration;
  std::string refusal;
};

// The memory in which a chunk is staged. pack() fills `bytes`, which belong to a slot or to the target, and takes
// scratch memory from the front of `scratch`, which belongs to a slot.
struct Staging {
  std::span<std::byte> bytes;
  std::span<std::byte> scratch;
  bool streaming = false;  // `bytes` are the target itself: stores of the CPU go past its caches
  bool in_target = false;  // `bytes` are the target itself, so that the link's whole rate is wanted
  // Registration::base_of() the two; null where they are pageable.
  const std::byte* bytes_base = nullptr;
  const std::byte* scratch_base = nullptr;
  // Page-locks the scratch if it can be, and returns its base. Whoever needs the scratch calls lock_scratch(), as a
  // chunk that is copied straight into its target mostly needs none.
  std::function<const std::byte*()> locker = {};

  void lock_scratch() {
    if (const auto lock = std::exchange(locker, nullptr)) scratch_base = lock();
  }
};
// Bytes of scratch in a slot: enough for the table of the kernel, which has an entry for each op of a chunk and for
// each 64 KiB of it, and their dimensions.
inline constexpr uint64_t kScratchNbytes = 256 << 10;

// What a save has used besides its slots.
struct DeviceUse {
  uint64_t scratch_nbytes = 0;  // device memory
  std::vector<std::string> fallbacks;
};

// The end of what one save reads on one device, of all that was enqueued when the mark was made.
class Mark {
 public:
  virtual ~Mark() = default;
  // What is enqueued later on `stream`, of the device of this mark, waits for `other` there, a mark of the same save.
  // Returns at once. Throws CudaError.
  virtual void hold(uintptr_t stream, const Mark& other) const = 0;
};

// What pack() takes besides the bytes.
struct PackNeeds {
  bool scratch = false;  // kScratchNbytes of page-locked memory
  bool waiting = false;  // it waits for the device
};

// One save's copies out of one device: a copy stream ordered behind the caller's work.
// pack() may be called by several threads at once.
class CopyStream {
 public:
  virtual ~CopyStream() = default;
  // Of pack() with the same ops, into page-locked memory.
  virtual PackNeeds needs(std::span<const CopyOp>) { return {.waiting = true}; }
  // Marks the end of all that is enqueued. Null where there is nothing to wait for.
  virtual std::shared_ptr<const Mark> mark() { return nullptr; }
  // Gathers `ops`, all of which are on this device, into the staging bytes. Returns when the copies are enqueued, and
  // null when they are done already. After an exception nothing is under way.
  virtual std::unique_ptr<Ticket> pack(std::span<const CopyOp> ops, Staging& staging) = 0;
  virtual void add_use(DeviceUse&) const {}
};

class Device {
 public:
  virtual ~Device() = default;
  // Page-locks whole pages for the copy engines of all devices. If that is refused, the driver copies more slowly, by
  // way of pageable memory. Throws CudaError where the device can do nothing more.
  virtual PageLocking page_lock(std::span<std::byte> pages) = 0;
  // Makes a copy stream that is ordered behind what is enqueued on the caller's `stream` now.
  virtual std::unique_ptr<CopyStream> open(uintptr_t stream) = 0;
  // Whether the ops of a chunk that are on this device are not to be staged just now, as a running job's own copies
  // would wait for all that is on its way already.
  virtual bool link_full(std::span<const CopyOp>) { return false; }
  // Blocks until they may be. pack() blocks, too, where somebody else was first.
  virtual void await_link(std::span<const CopyOp>) {}
  // The memory node that the device is next to, or -1 if that is not known.
  virtual int numa_node() const { return -1; }
  // Loads and allocates now what the first save would.
  virtual void warm_up() {}
};

std::unique_ptr<Device> make_host_device();
// Opens a CUDA device. It uses at most `scratch_nbytes` of the device's memory, which is allocated at the first gather.
// Throws CudaError if there is no driver or no such device.
std::unique_ptr<Device> make_cuda_device(int ordinal, uint64_t scratch_nbytes);

}  // namespace fastshard
