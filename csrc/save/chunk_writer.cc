// SPDX-License-Identifier: Apache-2.0
#include "save/chunk_writer.h"

#include <algorithm>
#include <utility>

#include "plan/error.h"

namespace fastshard {
namespace {

// How many chunks ahead the disk is asked for tensors that lie in files.
constexpr size_t kChunksAhead = 4;

}  // namespace

StagedChunk::~StagedChunk() {
  for (const auto& ticket : tickets) {
    try {
      ticket->wait();
    } catch (...) {
      // Already known, or about to be thrown for the chunk that failed first.
    }
  }
  progress.staged_nbytes -= staged_nbytes;
}

void StagedChunk::wait() {
  const Timer timer(progress.copy_ns);
  for (const auto& ticket : tickets) ticket->wait();
  tickets.clear();
}

void StagedChunk::copy_into_slot() {
  bytes = slot.bytes().first(chunk.nbytes);
  bytes_base = slot.base();
  staged_nbytes = chunk.nbytes;
  const uint64_t now = progress.staged_nbytes += staged_nbytes;
  uint64_t peak = progress.peak_staged_nbytes;
  while (now > peak && !progress.peak_staged_nbytes.compare_exchange_weak(peak, now)) {
  }
  (slot.pinned() ? progress.staged_pinned : progress.staged_pageable) = true;
}

void StagedChunk::copy_into_target(std::span<std::byte> target, const std::byte* base) {
  bytes = target;
  bytes_base = base;
  in_target = true;
  progress.copied_in_place = true;
}

ChunkWriter::ChunkWriter(WriterParts parts, const ScheduleLimits& limits, size_t writers)
    : plan_(parts.plan),
      resources_(parts.resources),
      streams_(parts.streams),
      progress_(parts.progress),
      schedule_(make_schedule(parts.plan, limits)),
      sources_(plan_, schedule_),
      host_(resources_.host.open(0)),
      fetched_(std::move(parts.fetched)),
      writers_(std::clamp<size_t>(schedule_.chunks.size(), 1, writers)) {
  if (!parts.checksums) return;
  for (const WriteItem& item : plan_.items) checksums_.emplace_back(item.source.packed_nbytes());
}

std::vector<uint32_t> ChunkWriter::checksums() const {
  std::vector<uint32_t> values;
  values.reserve(checksums_.size());
  for (const Crc32& checksum : checksums_) values.push_back(checksum.value());
  return values;
}

void ChunkWriter::add_checksums(std::span<const CopyOp> ops, std::span<const std::byte> bytes) {
  if (checksums_.empty()) return;
  const Timer timer(progress_.copy_ns);
  for (const CopyOp& op : ops) {
    checksums_[op.item].add(op.first_byte, bytes.subspan(op.chunk_offset, op.nbytes));
  }
}

void ChunkWriter::check_stop() const {
  if (progress_.stop) throw Cancelled();
}

// The ends meet, as each claim counts: the chunks from both are as many as there are.
const Chunk* ChunkWriter::claim(End end) {
  const size_t count = schedule_.chunks.size();
  if (relieved_ && stepped_aside()) return nullptr;
  if (exhausted() || claimed_++ >= count) return nullptr;
  const size_t index = end == End::front ? front_++ : count - 1 - back_++;
  const size_t ahead = kChunksAhead * writers_;
  if (end == End::front && index + ahead < count) sources_.ask_for(schedule_.chunks[index + ahead]);
  if (end == End::back && index >= ahead) sources_.ask_for(schedule_.chunks[index - ahead]);
  return &schedule_.chunks[index];
}

std::optional<Slot> ChunkWriter::slot_for(const Chunk& chunk, bool holds_none) {
  Device* const device = first_device_of(chunk);
  if (device != nullptr && !copies_into_target() && device->link_full(schedule_.ops_of(chunk))) {
    if (!holds_none) return std::nullopt;
    device->await_link(schedule_.ops_of(chunk));  // without a slot, which others may want
  }
  const int node = device == nullptr ? -1 : device->numa_node();
  return holds_none ? resources_.ring.acquire(node) : resources_.ring.try_acquire(node);
}

Device* ChunkWriter::first_device_of(const Chunk& chunk) const {
  if (chunk.route != Route::device) return nullptr;
  for (const CopyOp& op : schedule_.ops_of(chunk)) {
    const auto device = resources_.devices.find(op.source->device);
    if (device != resources_.devices.end()) return device->second;
  }
  return nullptr;
}

std::unique_ptr<StagedChunk> ChunkWriter::stage(const Chunk& chunk, Slot slot, std::optional<Mapping> window) {
  auto staged = std::make_unique<StagedChunk>(progress_, chunk, std::move(slot), std::move(window));
  place(*staged);
  enqueue_copies(*staged);
  return staged;
}

Device* ChunkWriter::device_of(const Chunk& chunk) const {
  if (chunk.route != Route::device || resources_.devices.empty()) return nullptr;
  return resources_.devices.begin()->second;  // one registration serves all devices
}

void ChunkWriter::place_in_slot(StagedChunk& staged) {
  if (Device* const device = device_of(staged.chunk)) pin(staged.slot, *device);
  staged.copy_into_slot();
}

void ChunkWriter::pin(Slot& slot, Device& device) {
  slot.pin(device);
  if (!slot.refusal().empty()) progress_.fallbacks.add("page-locking of staging memory refused: " + slot.refusal());
}

// Ops of one device are handed over together: many small ones then cost one launch.
void ChunkWriter::enqueue_copies(StagedChunk& staged) {
  const Timer timer(progress_.copy_ns);
  const SourcePages::Held sources(sources_, staged.chunk);  // of those in host memory, which this thread packs
  Staging staging{.bytes = staged.bytes,
                  .scratch = staged.in_target ? staged.slot.all() : staged.slot.scratch(),
                  .in_target = staged.in_target,
                  .bytes_base = staged.bytes_base,
                  .locker = [&]() -> const std::byte* {
                    if (Device* const device = device_of(staged.chunk)) pin(staged.slot, *device);
                    return staged.slot.base();
                  }};
  const std::vector<CopyOp> ops = by_device(staged.chunk);
  for (std::span<const CopyOp> left = ops; !left.empty();) {
    const std::span<const CopyOp> group = first_group(left);
    const int device = group.front().source->device;
    if (auto ticket = stream_for(device).pack(group, staging)) staged.tickets.push_back(std::move(ticket));
    left = left.subspan(group.size());
  }
}

std::vector<CopyOp> ChunkWriter::by_device(const Chunk& chunk) const {
  const std::span<const CopyOp> all = schedule_.ops_of(chunk);
  std::vector<CopyOp> ops(all.begin(), all.end());
  std::ranges::stable_sort(ops, {}, [](const CopyOp& op) { return op.source->device; });
  return ops;
}

std::span<const CopyOp> first_group(std::span<const CopyOp> ops) {
  const auto of_another = [&](const CopyOp& op) { return op.source->device != ops.front().source->device; };
  return {ops.begin(), std::ranges::find_if(ops, of_another)};
}

CopyStream& ChunkWriter::stream_for(int device) {
  if (device == kHost) return *host_;
  if (device == kFetched) return *fetched_;
  return *streams_.at(device);
}

void InTurnWriter::write_in_turn(End end) {
  const Ring::Share share(resources_.ring);
  std::deque<std::unique_ptr<StagedChunk>> in_flight;
  const Chunk* chunk = next(end);
  bool ready = false;  // the chunk's target
  std::optional<Mapping> window;
  while (chunk != nullptr || !in_flight.empty()) {
    check_stop();
    if (chunk != nullptr && !ready && write_unstaged(*chunk, end)) {
      chunk = next(end);
      continue;
    }
    if (chunk != nullptr && in_flight.size() < std::min(kMaxCopying, share.slots())) {
      if (!std::exchange(ready, true)) window = make_target(*chunk, end);
      if (std::optional<Slot> slot = slot_for(*chunk, in_flight.empty())) {
        auto staged = stage(*chunk, std::move(*slot), std::exchange(window, std::nullopt));
        ready = false;
        if (staged->tickets.empty()) {
          write_staged(*staged, end);  // packed by this thread, and still in its cache
        } else {
          in_flight.push_back(std::move(staged));
        }
        chunk = next(end);
        continue;
      }
    }
    write_staged(*in_flight.front(), end);
    in_flight.pop_front();
  }
}

}  // namespace fastshard
