// SPDX-License-Identifier: Apache-2.0
#include "save/snapshot_writer.h"

#include <algorithm>
#include <utility>

namespace fastshard {
namespace {

// Host memory that the thread packs which starts the save: counters of an optimizer, for instance, which the caller
// changes at once. A writer thread may be busy with another save.
constexpr uint64_t kPackedAtOnce = 1 << 20;

bool on_device(const CopyOp& op) { return op.source->device >= 0; }
bool on_host(const CopyOp& op) { return op.source->device == kHost; }

std::vector<CopyOp> those(std::span<const CopyOp> ops, bool (*wanted)(const CopyOp&)) {
  std::vector<CopyOp> chosen;
  std::ranges::copy_if(ops, std::back_inserter(chosen), wanted);
  return chosen;
}

uint64_t nbytes_of(std::span<const CopyOp> ops) {
  uint64_t nbytes = 0;
  for (const CopyOp& op : ops) nbytes += op.nbytes;
  return nbytes;
}

}  // namespace

SnapshotWriter::SnapshotWriter(WriterParts parts, const ScheduleLimits& limits, size_t threads)
    : MemoryWriter(std::move(parts), limits, threads), enqueued_(schedule_.chunks.size()) {}

// Of a save that has failed, chunks may be left that nobody has claimed. The memory may go only after their copies.
SnapshotWriter::~SnapshotWriter() {
  for (const Enqueued& chunk : enqueued_) {
    for (const auto& ticket : chunk.tickets) {
      try {
        ticket->wait();
      } catch (...) {
        // The save has failed with something else.
      }
    }
  }
}

// Once one chunk cannot be enqueued, all that follow are left to the writer's threads.
std::string SnapshotWriter::enqueue(EarlyScratch& scratch) {
  std::string refusal;
  uint64_t host_nbytes = 0;
  for (const Chunk& chunk : schedule_.chunks) {
    if (chunk.route == Route::device && refusal.empty()) refusal = enqueue(chunk, scratch);
    if (chunk.route == Route::device && !enqueued(chunk).all) continue;
    const uint64_t nbytes = nbytes_of(those(schedule_.ops_of(chunk), on_host));
    if (nbytes == 0) continue;
    host_nbytes += nbytes;
    with_host_.push_back(&chunk);
    ++progress_.unpacked;
  }
  if (host_nbytes <= kPackedAtOnce && !sources_.any()) {
    for (; packed_ < with_host_.size(); ++packed_) pack_from_host(*with_host_[packed_]);
  }
  return refusal;
}

std::string SnapshotWriter::enqueue(const Chunk& chunk, EarlyScratch& scratch) {
  if (!memory_.page_locked()) return "copies go through staging buffers, as the memory is not page-locked";
  const std::vector<CopyOp> ops = by_device(chunk);
  if (!std::ranges::all_of(ops, [](const CopyOp& op) { return on_device(op) || on_host(op); })) {
    return "some of the bytes can only be fetched by Python";
  }
  const std::vector<CopyOp> copies = those(ops, on_device);
  size_t tables = 0;
  for (std::span<const CopyOp> left = copies; !left.empty(); left = left.subspan(first_group(left).size())) {
    const PackNeeds needs = streams_.at(left.front().source->device)->needs(first_group(left));
    if (needs.waiting) return "without kernels the CPU casts, and it has to wait for the bytes";
    tables += needs.scratch;
  }
  if (std::string refusal = take(scratch, tables * kScratchNbytes, chunk); !refusal.empty()) return refusal;
  const Timer timer(progress_.copy_ns);
  Enqueued& work = enqueued(chunk);
  work.tickets.reserve(copies.size());  // no ticket may be lost
  Staging staging{.bytes = memory_of(chunk),
                  .scratch = scratch.left,
                  .in_target = true,
                  .bytes_base = base_of(chunk),
                  .scratch_base = scratch.base()};
  for (std::span<const CopyOp> left = copies; !left.empty(); left = left.subspan(first_group(left).size())) {
    const std::span<const CopyOp> group = first_group(left);
    if (auto ticket = streams_.at(group.front().source->device)->pack(group, staging)) {
      work.tickets.push_back(std::move(ticket));
    }
  }
  scratch.left = staging.scratch;  // without the tables
  work.all = true;
  progress_.copied_in_place = true;
  return "";
}

// Sees to it that so much scratch is left, page-locked. It waits for nobody.
std::string SnapshotWriter::take(EarlyScratch& scratch, size_t nbytes, const Chunk& chunk) {
  if (nbytes <= scratch.left.size()) return "";
  Device& device = *device_of(chunk);
  std::optional<Slot> slot = resources_.ring.try_acquire_spare(device.numa_node());
  if (!slot || slot->all().size() < nbytes) return "no staging memory was free for the kernels' tables";
  pin(*slot, device);
  if (!slot->pinned()) return "the kernels' tables are not page-locked";
  scratch.left = slot->all();
  scratch.slots.push_back(std::move(*slot));
  return "";
}

// Host memory first: streams may go on once the devices have been read, and whoever holds them waits for this.
void SnapshotWriter::write_chunks() {
  for (size_t next; (next = packed_++) < with_host_.size();) {
    check_stop();
    pack_from_host(*with_host_[next]);
  }
  write_in_turn();
}

void SnapshotWriter::pack_from_host(const Chunk& chunk) {
  const std::vector<CopyOp> ops = those(schedule_.ops_of(chunk), on_host);
  const std::span<std::byte> target = memory_of(chunk);
  {
    const Timer timer(progress_.copy_ns);
    const SourcePages::Held sources(sources_, chunk);
    Staging staging{.bytes = target, .scratch = {}, .streaming = memory_.streaming};
    host_->pack(ops, staging);
  }
  add_checksums(ops, target);
  progress_.nbytes_written += nbytes_of(ops);
  --progress_.unpacked;
  progress_.unpacked.notify_all();
}

void SnapshotWriter::wait_for(const Chunk& chunk) {
  {
    const Timer timer(progress_.copy_ns);
    for (const auto& ticket : enqueued(chunk).tickets) ticket->wait();
  }
  const std::vector<CopyOp> ops = those(schedule_.ops_of(chunk), on_device);
  add_checksums(ops, memory_of(chunk));
  progress_.nbytes_written += nbytes_of(ops);
}

bool SnapshotWriter::write_unstaged(const Chunk& chunk, End) {
  if (chunk.route == Route::packed) return true;  // done, or by another thread whose share has not ended
  if (!enqueued(chunk).all) return false;
  wait_for(chunk);
  return true;
}

}  // namespace fastshard
