// SPDX-License-Identifier: Apache-2.0
#include "device/ring.h"

#include <sys/mman.h>
#include <unistd.h>

#include <iterator>
#include <new>

#include "device/numa.h"
#include "device/page_lock.h"

namespace fastshard {
namespace {

constexpr uint64_t kHugePageNbytes = 2 << 20;

// Where there is room for huge pages, it begins at a multiple of their size.
std::span<std::byte> map_aligned(uint64_t nbytes) {
  const uint64_t slack = nbytes < kHugePageNbytes ? 0 : kHugePageNbytes;
  void* const mapped = mmap(nullptr, nbytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  auto* const begin = static_cast<std::byte*>(mapped);
  if (slack == 0) return {begin, nbytes};
  const uint64_t lead = (slack - reinterpret_cast<uintptr_t>(begin) % kHugePageNbytes) % kHugePageNbytes;
  // If this is refused, addresses are lost, but no memory.
  if (lead != 0) munmap(begin, lead);
  if (lead != slack) munmap(begin + lead + nbytes, slack - lead);
  return {begin + lead, nbytes};
}

}  // namespace

Ring::Ring(uint64_t slot_nbytes, size_t slots) : slot_nbytes_(slot_nbytes), slots_(slots), process_(getpid()) {
  blocks_.reserve(slots);
  free_.reserve(slots);  // giving a slot back must not need memory
}

Ring::~Ring() {
  const bool forked = getpid() != process_;
  for (Block& block : blocks_) {
    if (forked) {
      // Its addresses may be those of other memory now, and the driver is the parent's.
      static_cast<void>(block.locking.registration.release());
      continue;
    }
    block.locking.registration.reset();
    munmap(block.memory.data(), block.memory.size());
  }
}

void Ring::Slot::pin(Device& device) {
  if (block_->locking_tried) return;
  make_lockable(block_->memory);
  block_->locking = device.page_lock(block_->memory);
  block_->locking_tried = true;
}

void Ring::warm_up(Device& device) {
  std::vector<Slot> slots;  // held until all are there: one that is given back would be the next one taken
  slots.reserve(slots_);
  while (std::optional<Slot> slot = try_acquire(device.numa_node())) {
    slot->pin(device);
    slots.push_back(std::move(*slot));
  }
}

Slot Ring::take(int node, bool is_spare) {
  const auto near =
      std::find_if(free_.rbegin(), free_.rend(), [&](const Block* block) { return node < 0 || block->node == node; });
  const bool make = free_.empty() || (near == free_.rend() && blocks_.size() < slots_);
  if (make) {
    const std::span<std::byte> memory = map_aligned(block_nbytes());
    prefer_node(memory, node);
    blocks_.push_back({.memory = memory, .node = node});
    return {this, &blocks_.back(), is_spare};
  }
  const auto chosen = near == free_.rend() ? free_.rbegin() : near;
  Block* block = *chosen;
  free_.erase(std::next(chosen).base());
  return {this, block, is_spare};
}

}  // namespace fastshard
