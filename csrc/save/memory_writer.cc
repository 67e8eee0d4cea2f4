// SPDX-License-Identifier: Apache-2.0
#include "save/memory_writer.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "device/streaming.h"

namespace fastshard {
namespace {

// Chunks that the CPU packs straight into the target. Windows of a mapped file are large, as each takes a few calls;
// pieces of memory small enough for all threads to end together.
constexpr uint64_t kMappedChunkNbytes = 16 << 20;
constexpr uint64_t kMemoryChunkNbytes = 4 << 20;

ScheduleLimits limits_of(const WriterParts& parts, uint64_t packed_nbytes) {
  ScheduleLimits limits;
  limits.slot_nbytes = parts.resources.ring.slot_nbytes();
  limits.in_place = false;
  limits.packed_nbytes = reads_files(parts.plan) ? std::min(packed_nbytes, kFromFilesNbytes) : packed_nbytes;
  return limits;
}

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
      Staging staging{target, {}, streaming};
      host_->pack(schedule_.ops_of(chunk), staging);
    }
    add_checksums(chunk, target);
    wrote(chunk);
  }

 private:
  // Packs the chunk into its part of the target.
  virtual void pack_into_target(const Chunk& chunk) = 0;
  // The chunk's part of the target, its pages writable. It stays there as long as `staged`.
  virtual std::span<std::byte> target_of(StagedChunk& staged) = 0;
  virtual void wrote(const Chunk& chunk) { count(chunk); }

  bool write_unstaged(const Chunk& chunk, End) override {
    if (chunk.route != Route::packed) return false;
    pack_into_target(chunk);
    return true;
  }

  void write_staged(StagedChunk& staged, End) override {
    staged.wait();
    add_checksums(staged.chunk, staged.bytes);
    if (!staged.in_target) {
      const std::span<std::byte> target = target_of(staged);
      const Timer timer(progress_.write_ns);
      copy_streaming(target.data(), staged.bytes.data(), staged.bytes.size());
    }
    wrote(staged.chunk);
  }
};

class MemoryWriter : public IntoMemoryWriter {
 public:
  using IntoMemoryWriter::IntoMemoryWriter;

 protected:
  std::span<std::byte> memory_of(const Chunk& chunk) const {
    return {fastshard::memory_of(plan_.target) + chunk.file_offset, chunk.nbytes};
  }

 private:
  void pack_into_target(const Chunk& chunk) override { pack(chunk, memory_of(chunk), false); }
  std::span<std::byte> target_of(StagedChunk& staged) override { return memory_of(staged.chunk); }
  void place(StagedChunk& staged) override { place_in_slot(staged); }
};

// The memory of a file that stands.
class StandingWriter final : public MemoryWriter {
 public:
  using MemoryWriter::MemoryWriter;

 private:
  std::span<std::byte> writable_memory_of(const Chunk& chunk) {
    const std::span<std::byte> bytes = memory_of(chunk);
    if (standing_.populate) {
      const Timer timer(progress_.write_ns);
      populate(bytes, standing_.path);
    }
    return bytes;
  }

  void pack_into_target(const Chunk& chunk) override { pack(chunk, writable_memory_of(chunk), true); }
  std::span<std::byte> target_of(StagedChunk& staged) override { return writable_memory_of(staged.chunk); }

  void place(StagedChunk& staged) override {
    standing_.page_locked ? staged.copy_into_target(writable_memory_of(staged.chunk)) : place_in_slot(staged);
  }

  const StandingMapping& standing_ = std::get<StandingMapping>(plan_.target);
};

class MappedWriter : public IntoMemoryWriter {
 public:
  MappedWriter(WriterParts parts, const ScheduleLimits& limits, size_t threads, std::shared_ptr<OutputFile> file)
      : IntoMemoryWriter(std::move(parts), limits, threads), file_(std::move(file)) {}

 protected:
  Mapping window_of(const Chunk& chunk) {
    const Timer timer(progress_.write_ns);
    return file_->window(chunk.file_offset, chunk.nbytes);
  }

 private:
  void pack_into_target(const Chunk& chunk) override {
    const Mapping window = window_of(chunk);
    pack(chunk, window.bytes(), true);
  }

  std::span<std::byte> target_of(StagedChunk& staged) override {
    if (!staged.window) staged.window = window_of(staged.chunk);
    return staged.window->bytes();
  }

  void wrote(const Chunk& chunk) override {
    count(chunk);
    if (file_->has_writeback()) resources_.write_behind.post(file_, chunk.file_offset, chunk.nbytes);
  }

  const std::shared_ptr<OutputFile> file_;
};

class RegisteredWriter final : public MappedWriter {
 public:
  using MappedWriter::MappedWriter;

 private:
  void place(StagedChunk& staged) override {
    Device* const device = device_of(staged.chunk);
    if (device == nullptr || refused_) return place_in_slot(staged);
    staged.window = window_of(staged.chunk);
    staged.registration = device->register_staging(staged.window->pages());
    if (staged.registration != nullptr) return staged.copy_into_target(staged.window->bytes());
    refused_ = true;
    place_in_slot(staged);
  }

  std::atomic<bool> refused_ = false;  // by the driver, once and for all windows
};

template <typename Writer>
std::unique_ptr<FileWriter> make_windows_writer(WriterParts parts, std::shared_ptr<OutputFile> file) {
  const ScheduleLimits limits = limits_of(parts, kMappedChunkNbytes);
  const size_t threads = parts.resources.workers.threads();
  return std::make_unique<Writer>(std::move(parts), limits, threads, std::move(file));
}

}  // namespace

std::unique_ptr<FileWriter> make_memory_writer(WriterParts parts) {
  const ScheduleLimits limits = limits_of(parts, kMemoryChunkNbytes);
  const size_t threads = parts.resources.workers.threads();
  if (std::holds_alternative<StandingMapping>(parts.plan.target)) {
    return std::make_unique<StandingWriter>(std::move(parts), limits, threads);
  }
  return std::make_unique<MemoryWriter>(std::move(parts), limits, threads);
}

std::unique_ptr<FileWriter> make_mapped_writer(WriterParts parts, std::shared_ptr<OutputFile> file) {
  return make_windows_writer<MappedWriter>(std::move(parts), std::move(file));
}

std::unique_ptr<FileWriter> make_registered_writer(WriterParts parts, std::shared_ptr<OutputFile> file) {
  return make_windows_writer<RegisteredWriter>(std::move(parts), std::move(file));
}

}  // namespace fastshard
