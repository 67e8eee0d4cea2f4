// SPDX-License-Identifier: Apache-2.0
// What the writers of all routes share: they claim chunks one after the other, stage them, and take checksums.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "file/mapping.h"
#include "plan/schedule.h"
#include "save/crc32.h"
#include "save/source_pages.h"
#include "save/writer.h"

namespace fastshard {

// Staged chunks that one thread has being copied: enough for the copy engine never to wait for the disk.
inline constexpr size_t kMaxCopying = 4;

// What a writer is made of. The references outlive it.
struct WriterParts {
  const FilePlan& plan;
  const Resources& resources;
  const CopyStreams& streams;
  std::unique_ptr<CopyStream> fetched;
  bool checksums;
  Progress& progress;
};

// A chunk that is being copied into its slot, or straight into its target, which may be larger than a slot; the slot
// then only lends its memory as scratch. The destructor waits for the copies, as the memory may go only after them.
struct StagedChunk {
  StagedChunk(Progress& totals, const Chunk& what, Slot where, std::optional<Mapping> target)
      : progress(totals), chunk(what), slot(std::move(where)), window(std::move(target)) {}
  ~StagedChunk();
  StagedChunk(const StagedChunk&) = delete;
  StagedChunk& operator=(const StagedChunk&) = delete;

  // Returns when the bytes are where the copies go. Throws what a copy has failed with.
  void wait();
  // One of the two is called before the copies are enqueued.
  void copy_into_slot();
  // `base`: Registration::base_of() the target; null if it is pageable.
  void copy_into_target(std::span<std::byte> target, const std::byte* base);

  Progress& progress;
  const Chunk& chunk;
  Slot slot;
  std::span<std::byte> bytes = {};  // where the copies go
  const std::byte* bytes_base = nullptr;
  bool in_target = false;
  uint64_t staged_nbytes = 0;
  std::optional<Mapping> window;  // of the target, if that is a file that is mapped
  std::vector<std::unique_ptr<Ticket>> tickets;
};

// The ops at the front that are on the same device.
std::span<const CopyOp> first_group(std::span<const CopyOp> ops);

// The end of a file from which a thread takes its chunks.
enum class End { front, back };

// Claims, stages and checks; how the bytes get into the target is the derived classes' business.
class ChunkWriter : public FileWriter {
 public:
  size_t writers() const final { return writers_; }
  void relieve() final { relieved_ = true; }
  bool exhausted() const final { return claimed_ >= schedule_.chunks.size(); }
  std::vector<uint32_t> checksums() const final;

 protected:
  // The chunks are cut to `limits`, and at most `writers` threads work on them.
  ChunkWriter(WriterParts parts, const ScheduleLimits& limits, size_t writers);

  // Claims the next chunk from one end for the calling thread; null when there is none left.
  const Chunk* claim(End end = End::front);
  // A slot for the chunk, near the device that it comes from. A thread blocks for one only while it holds none, so that
  // one slot is enough to finish; else there may be none, or the device's link may have enough to do.
  std::optional<Slot> slot_for(const Chunk& chunk, bool holds_none);
  // Asks each device that owns a part of the chunk to pack it into the slot, or where place() says. `window` is what
  // the writer has made of the chunk's target.
  std::unique_ptr<StagedChunk> stage(const Chunk& chunk, Slot slot, std::optional<Mapping> window = {});
  // Page-locks the slot for the copies of a device, and has them go there.
  void place_in_slot(StagedChunk& staged);
  // Page-locks the slot if it can be.
  void pin(Slot& slot, Device& device);
  // The device whose copies the chunk's memory is page-locked for; null if only the CPU packs it.
  Device* device_of(const Chunk& chunk) const;
  // Adds the bytes of a whole chunk to the checksums, if these were asked for: while they are in a cache, if they are.
  void add_checksums(const Chunk& chunk, std::span<const std::byte> bytes) {
    add_checksums(schedule_.ops_of(chunk), bytes);
  }
  // The same for some of a chunk's ops.
  void add_checksums(std::span<const CopyOp> ops, std::span<const std::byte> bytes);
  // A chunk's ops, those of one device together.
  std::vector<CopyOp> by_device(const Chunk& chunk) const;
  // Throws Cancelled when the save has been stopped.
  void check_stop() const;
  // Tells the progress that the chunk is written.
  void count(const Chunk& chunk) { progress_.nbytes_written.fetch_add(chunk.nbytes, std::memory_order_relaxed); }

  const FilePlan& plan_;
  const Resources& resources_;
  const CopyStreams& streams_;
  Progress& progress_;
  const FileSchedule schedule_;
  const SourcePages sources_;
  const std::unique_ptr<CopyStream> host_;
  std::deque<Crc32> checksums_;  // of the items; none if not asked for

 private:
  // Decides where the chunk's copies go: into the slot, unless the target itself can take them.
  virtual void place(StagedChunk& staged) { place_in_slot(staged); }
  // Whether it mostly can: such copies are to have all of the link.
  virtual bool copies_into_target() const { return false; }
  void enqueue_copies(StagedChunk& staged);
  Device* first_device_of(const Chunk& chunk) const;
  CopyStream& stream_for(int device);

  const std::unique_ptr<CopyStream> fetched_;
  const size_t writers_;
  std::atomic<size_t> claimed_ = 0;  // at both ends together, and calls that found none left
  std::atomic<size_t> front_ = 0, back_ = 0;
  std::atomic<bool> relieved_ = false;
};

// A writer whose threads write one chunk after the other, while further ones are copied into their slots.
class InTurnWriter : public ChunkWriter {
 protected:
  using ChunkWriter::ChunkWriter;

  // One thread's share, from one end of the file. For each chunk that needs a slot: make its target ready, take one,
  // ask each device that owns a part to pack into it, wait for the oldest, write it at its offset and let the slot go.
  void write_in_turn(End end = End::front);

 private:
  // The next chunk for a thread that takes them from `end`; null when it is to take no more.
  virtual const Chunk* next(End end) { return claim(end); }
  // Writes a chunk that needs no slot. Whether it was one.
  virtual bool write_unstaged(const Chunk& chunk, End end) = 0;
  // Makes the target of a chunk ready, and maps it if it is a file that has to be mapped: before the chunk has a slot,
  // as others can use that while pages are made.
  virtual std::optional<Mapping> make_target(const Chunk&, End) { return std::nullopt; }
  // Waits for the chunk's copies and writes it.
  virtual void write_staged(StagedChunk& staged, End end) = 0;
};

}  // namespace fastshard
