// SPDX-License-Identifier: Apache-2.0
#include "save/memory_writer.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "save/changes.h"
#include "save/into_memory.h"
#include "save/snapshot_writer.h"

namespace fastshard {
namespace {

// Chunks that the CPU packs straight into the target. Windows of a mapped file are large, as each takes a few calls;
// pieces of memory small enough for all threads to end together.
constexpr uint64_t kMappedChunkNbytes = 16 << 20;
constexpr uint64_t kMemoryChunkNbytes = 4 << 20;
// Chunks that devices copy straight into the target, in slots with their scratch: 16 MiB, unless the budget is small.
// The gaps between copies count there.
constexpr uint64_t kBlocksInTarget = 4;
// What is compared with the generation before at a time, and then copied: a part of the second cache.
constexpr uint64_t kComparedNbytes = 64 << 10;

ScheduleLimits limits_of(const WriterParts& parts, uint64_t packed_nbytes) {
  ScheduleLimits limits;
  limits.slot_nbytes = parts.resources.ring.slot_nbytes();
  limits.in_place = false;
  limits.packed_nbytes = reads_files(parts.plan) ? std::min(packed_nbytes, kFromFilesNbytes) : packed_nbytes;
  return limits;
}

uint64_t in_target_nbytes(const WriterParts& parts) { return kBlocksInTarget * parts.resources.ring.block_nbytes(); }

std::string file_refused(const PageLocking& locking) {
  return "page-locking the file refused by the driver: " + locking.refusal;
}

// The memory of a file that stands.
class StandingWriter final : public MemoryWriter {
 public:
  using MemoryWriter::MemoryWriter;

 private:
  void make_writable(std::span<std::byte> bytes) override {
    if (!standing_.populate) return;
    const Timer timer(progress_.write_ns);
    populate(bytes, standing_.path);
  }

  void gather(const Chunk& chunk, Staging& staging) override {
    if (!compares()) return MemoryWriter::gather(chunk, staging);
    for (const CopyOp& op : schedule_.ops_of(chunk)) {
      std::span<std::byte> target = staging.bytes.subspan(op.chunk_offset, op.nbytes);
      uint64_t offset = chunk.file_offset + op.chunk_offset;
      if (!op.source->contiguous() || op.source->cast()) {
        host_->pack({&op, 1}, staging);
        standing_.changes->compare(op.item, offset, target);
        continue;
      }
      // In pieces that stay in a cache between the comparison and the copy.
      std::span source(op.source->data + op.first_byte, op.nbytes);
      while (!source.empty()) {
        const uint64_t nbytes = std::min<uint64_t>(source.size(), kComparedNbytes - offset % kComparedNbytes);
        standing_.changes->compare(op.item, offset, source.first(nbytes));
        copy_streaming(target.data(), source.data(), nbytes);
        offset += nbytes;
        source = source.subspan(nbytes);
        target = target.subspan(nbytes);
      }
    }
  }

  void arrived(const Chunk& chunk, std::span<const std::byte> bytes) override {
    if (!compares()) return;
    const Timer timer(progress_.copy_ns);
    for (const CopyOp& op : schedule_.ops_of(chunk)) {
      standing_.changes->compare(op.item, chunk.file_offset + op.chunk_offset,
                                 bytes.subspan(op.chunk_offset, op.nbytes));
    }
  }

  bool compares() const { return standing_.changes != nullptr && standing_.changes->compares(); }

  const StandingMapping& standing_ = std::get<StandingMapping>(plan_.target);
};

class MappedWriter : public IntoMemoryWriter {
 public:
  MappedWriter(WriterParts parts, const ScheduleLimits& limits, size_t threads, std::shared_ptr<OutputFile> file)
      : IntoMemoryWriter(std::move(parts), limits, threads), file_(std::move(file)) {}

 protected:
  std::optional<Mapping> make_target(const Chunk& chunk, End) override { return window_of(chunk); }

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
    return staged.window->bytes();  // NOLINT(bugprone-unchecked-optional-access): make_target() has made it
  }

  void wrote(const Chunk& chunk) override {
    count(chunk);
    if (file_->sent_behind()) resources_.write_behind.post(file_, chunk.file_offset, chunk.nbytes);
  }

  const std::shared_ptr<OutputFile> file_;
};

// A window of a file, and what page-locks it: that goes before it.
struct LockedWindow {
  Mapping window;
  PageLocking locking;
};

// Windows that devices copy into stay page-locked until the file is complete, as whenever one is let go the driver may
// wait for all that runs on the device. Their chunks are larger than a slot; a window that is refused is filled as
// pageable memory.
class RegisteredWriter final : public MappedWriter {
 public:
  // `first`: a window that has been accepted.
  RegisteredWriter(WriterParts parts, const ScheduleLimits& limits, size_t threads, std::shared_ptr<OutputFile> file,
                   LockedWindow first)
      : MappedWriter(std::move(parts), limits, threads, std::move(file)), first_(std::move(first)) {}

 private:
  std::optional<Mapping> make_target(const Chunk& chunk, End) override {
    Mapping window = window_of(chunk);
    if (refused_) return window;
    PageLocking locking = device_of(chunk)->page_lock(window.pages());
    if (locking.registration == nullptr) {
      refused_ = true;
      progress_.fallbacks.add(file_refused(locking));
      return window;
    }
    const std::lock_guard lock(mutex_);
    locked_.emplace(chunk.file_offset, LockedWindow{std::move(window), std::move(locking)});
    return std::nullopt;
  }

  bool copies_into_target() const override { return true; }

  void place(StagedChunk& staged) override {
    if (staged.window) return staged.copy_into_target(staged.window->bytes(), nullptr);
    const std::lock_guard lock(mutex_);
    const auto& [window, locking] = locked_.at(staged.chunk.file_offset);
    staged.copy_into_target(window.bytes(), locking.registration->base_of(window.bytes().data()));
  }

  const LockedWindow first_;
  std::atomic<bool> refused_ = false;  // for all that follow
  std::mutex mutex_;
  std::map<uint64_t, LockedWindow> locked_;  // by file offset
};

}  // namespace

std::unique_ptr<FileWriter> make_memory_writer(WriterParts parts) {
  ScheduleLimits limits = limits_of(parts, kMemoryChunkNbytes);
  const size_t threads = parts.resources.workers.threads();
  const Memory& memory = *memory_of(parts.plan.target);
  if (memory.page_locked()) {
    limits.slot_nbytes = in_target_nbytes(parts);
    limits.boundary_nbytes = memory.locked_part_nbytes;
    if (limits.boundary_nbytes != 0) {
      limits.begin_nbytes = static_cast<uint64_t>(memory.bytes - memory.locked_begin) % limits.boundary_nbytes;
    }
  }
  if (std::holds_alternative<StandingMapping>(parts.plan.target)) {
    return std::make_unique<StandingWriter>(std::move(parts), limits, threads);
  }
  if (!parts.resources.devices.empty()) return std::make_unique<SnapshotWriter>(std::move(parts), limits, threads);
  return std::make_unique<MemoryWriter>(std::move(parts), limits, threads);
}

std::unique_ptr<FileWriter> make_mapped_writer(WriterParts parts, std::shared_ptr<OutputFile> file) {
  const ScheduleLimits limits = limits_of(parts, kMappedChunkNbytes);
  const size_t threads = parts.resources.workers.threads();
  return std::make_unique<MappedWriter>(std::move(parts), limits, threads, std::move(file));
}

std::unique_ptr<FileWriter> make_registered_writer(WriterParts parts, std::shared_ptr<OutputFile> file) {
  if (parts.resources.devices.empty() || parts.plan.nbytes == 0)
    return make_mapped_writer(std::move(parts), std::move(file));
  // One page tells whether the driver takes such a file at all, before chunks are made for it.
  Mapping page = file->window(0, 1);
  PageLocking locking = parts.resources.devices.begin()->second->page_lock(page.pages());
  if (locking.registration == nullptr) {
    parts.progress.fallbacks.add(file_refused(locking));
    return make_mapped_writer(std::move(parts), std::move(file));
  }
  ScheduleLimits limits = limits_of(parts, kMappedChunkNbytes);
  limits.slot_nbytes = in_target_nbytes(parts);
  const size_t threads = parts.resources.workers.threads();
  return std::make_unique<RegisteredWriter>(std::move(parts), limits, threads, std::move(file),
                                            LockedWindow{std::move(page), std::move(locking)});
}

}  // namespace fastshard
