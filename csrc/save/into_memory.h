// SPDX-License-Identifier: Apache-2.0
// What the writers have in common whose target is memory, be it the plan's or a mapped file.
#pragma once

#include <optional>
#include <span>
#include <utility>

#include "device/streaming.h"
#include "save/chunk_writer.h"

namespace fastshard {

// What is done with a chunk once its part of the target is there.
class IntoMemoryWriter : public InTurnWriter {
 public:
  IntoMemoryWriter(WriterParts parts, const ScheduleLimits& limits, size_t threads)
      : InTurnWriter(std::move(parts), limits, threads) {}
  void write_chunks() override { write_in_turn(); }

 protected:
  void pack(const Chunk& chunk, std::span<std::byte> target, bool streaming) {
    {
      const Timer timer(progress_.copy_ns);
      const SourcePages::Held sources(sources_, chunk);
      Staging staging{.bytes = target, .scratch = {}, .streaming = streaming};
      gather(chunk, staging);
    }
    add_checksums(chunk, target);
    wrote(chunk);
  }

  // Has the CPU pack the chunk into its part of the target.
  virtual void gather(const Chunk& chunk, Staging& staging) { host_->pack(schedule_.ops_of(chunk), staging); }

 private:
  // Packs the chunk into its part of the target.
  virtual void pack_into_target(const Chunk& chunk) = 0;
  // The chunk's part of the target, which make_target() has made ready. It stays there as long as `staged`.
  virtual std::span<std::byte> target_of(StagedChunk& staged) = 0;
  // The bytes of a chunk with device memory are there, and about to be stored into the target unless they lie in it.
  virtual void arrived(const Chunk&, std::span<const std::byte>) {}
  virtual void wrote(const Chunk& chunk) { count(chunk); }

  bool write_unstaged(const Chunk& chunk, End) override {
    if (chunk.route != Route::packed) return false;
    pack_into_target(chunk);
    return true;
  }

  void write_staged(StagedChunk& staged, End) override {
    staged.wait();
    add_checksums(staged.chunk, staged.bytes);
    arrived(staged.chunk, staged.bytes);
    if (!staged.in_target) {
      const std::span<std::byte> target = target_of(staged);
      const Timer timer(progress_.write_ns);
      copy_streaming(target.data(), staged.bytes.data(), staged.bytes.size());
    }
    wrote(staged.chunk);
  }
};

// Memory that the plan names. Devices copy straight into it where it is page-locked.
class MemoryWriter : public IntoMemoryWriter {
 public:
  using IntoMemoryWriter::IntoMemoryWriter;

 protected:
  std::span<std::byte> memory_of(const Chunk& chunk) const { return {memory_.bytes + chunk.file_offset, chunk.nbytes}; }
  // Registration::base_of() that; null if it is pageable.
  const std::byte* base_of(const Chunk& chunk) const {
    const uint64_t part = memory_.locked_part_nbytes;
    if (part == 0) return memory_.locked_begin;
    const auto before = static_cast<uint64_t>(memory_of(chunk).data() - memory_.locked_begin);
    return memory_.locked_begin + before / part * part;
  }

  const Memory& memory_ = *fastshard::memory_of(plan_.target);

 private:
  // Before the first byte of it is stored.
  virtual void make_writable(std::span<std::byte>) {}

  std::optional<Mapping> make_target(const Chunk& chunk, End) override {
    make_writable(memory_of(chunk));
    return std::nullopt;
  }

  void pack_into_target(const Chunk& chunk) override {
    make_writable(memory_of(chunk));
    pack(chunk, memory_of(chunk), memory_.streaming);
  }

  std::span<std::byte> target_of(StagedChunk& staged) override { return memory_of(staged.chunk); }
  bool copies_into_target() const override { return memory_.page_locked(); }

  void place(StagedChunk& staged) override {
    if (!memory_.page_locked()) return place_in_slot(staged);
    staged.copy_into_target(memory_of(staged.chunk), base_of(staged.chunk));
  }
};

}  // namespace fastshard
