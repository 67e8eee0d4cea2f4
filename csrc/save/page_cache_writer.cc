// SPDX-License-Identifier: Apache-2.0
#include "save/page_cache_writer.h"

#include <sys/uio.h>

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "file/shared_pages.h"
#include "save/runs.h"

namespace fastshard {
namespace {

// A file of fewer bytes is written before another thread is awake.
constexpr uint64_t kMinSharedNbytes = 16 << 20;
// Pieces of a file that several threads write: they end within one of each other.
constexpr uint64_t kSharedNbytes = 4 << 20;
bool only_python_has_some(const FilePlan& plan) {
  return std::ranges::any_of(plan.items, [](const WriteItem& item) { return item.source.device == kFetched; });
}

// Whether several threads may write the file. What only Python brings, it brings to one.
bool shared(const WriterParts& parts, const OutputFile& file) {
  return file.storable() && parts.plan.written_nbytes() >= kMinSharedNbytes && !only_python_has_some(parts.plan);
}

size_t writers_of(const WriterParts& parts, bool shared) {
  const size_t threads = parts.resources.workers.threads();
  return shared ? threads : parts.checksums ? std::min<size_t>(threads, 2) : 1;
}

ScheduleLimits limits_of(const WriterParts& parts, bool shared) {
  ScheduleLimits limits;
  limits.slot_nbytes = parts.resources.ring.slot_nbytes();
  if (shared) limits.in_place_nbytes = std::min(limits.in_place_nbytes, kSharedNbytes);
  if (reads_files(parts.plan)) {
    limits.in_place_nbytes = std::min(limits.in_place_nbytes, kFromFilesNbytes);
    limits.packed_nbytes = std::min(limits.packed_nbytes, kFromFilesNbytes);
  }
  return limits;
}

// One thread writes from the front of the file: the kernel lets nobody else write to it meanwhile. Others store from
// the back, through mappings, until they meet. Checksums of what the first one writes are the others' first business,
// as it would have to read these bytes once more.
class PageCacheWriter final : public InTurnWriter {
 public:
  PageCacheWriter(WriterParts parts, const ScheduleLimits& limits, size_t writers, bool shared,
                  std::shared_ptr<OutputFile> file)
      : InTurnWriter(std::move(parts), limits, writers), file_(std::move(file)), shared_(shared) {}

  void write_chunks() override {
    const End end = has_writer_.exchange(true) ? End::back : End::front;
    write_in_turn(end);
    check_written_in_place(end);
  }

 private:
  // Whether others wait for this thread. At the front there is one who goes on.
  bool leaves(End end) const { return end == End::back && resources_.workers.wanted(); }

  const Chunk* next(End end) override {
    if (end == End::front) return claim(end);
    check_written_in_place(end);
    return shared_ && progress_.may_map() && !leaves(end) ? claim(end) : nullptr;
  }

  std::optional<Mapping> make_target(const Chunk& chunk, End end) override {
    if (end == End::front || !progress_.may_map()) return std::nullopt;
    const Timer timer(progress_.write_ns);
    return file_->map_for_store(chunk.file_offset, chunk.nbytes);
  }

  bool write_unstaged(const Chunk& chunk, End end) override {
    if (chunk.route != Route::in_place) return false;
    write_in_place(chunk, end);
    return true;
  }

  void write_staged(StagedChunk& staged, End end) override {
    staged.wait();
    add_checksums(staged.chunk, staged.bytes);
    iovec part{staged.bytes.data(), staged.bytes.size()};
    write(staged.chunk, {&part, 1}, end, staged.window);
  }

  // Host memory in long runs: the kernel reads it from where it lies.
  void write_in_place(const Chunk& chunk, End end) {
    const SourcePages::Held sources(sources_, chunk);
    if (end == End::back || !checked_by_others()) check_in_place(chunk);
    std::vector<iovec> parts;
    parts.reserve(chunk.op_count);
    for (const CopyOp& op : schedule_.ops_of(chunk)) {
      for_each_run(op, [&](uint64_t, std::span<const std::byte> run) {
        parts.push_back({const_cast<std::byte*>(run.data()), run.size()});
      });
    }
    write(chunk, parts, end);
  }

  // Tensors that lie in files are there only while they are written, so that the one who writes them checks them, too.
  bool checked_by_others() const { return !sources_.any(); }

  // Checks the chunks of the front, until there is none left or this thread leaves.
  void check_written_in_place(End end) {
    if (checksums_.empty() || !checked_by_others()) return;
    size_t index = next_checked_;
    while (index < (shared_ ? claimed_in_front() : schedule_.chunks.size()) && !leaves(end)) {
      if (!next_checked_.compare_exchange_weak(index, index + 1)) continue;
      check_stop();
      const Chunk& chunk = schedule_.chunks[index];
      if (chunk.route == Route::in_place) check_in_place(chunk);
      index = next_checked_;
    }
  }

  void check_in_place(const Chunk& chunk) {
    if (checksums_.empty()) return;
    const Timer timer(progress_.copy_ns);
    for (const CopyOp& op : schedule_.ops_of(chunk)) {
      for_each_run(op, [&](uint64_t first, std::span<const std::byte> run) { checksums_[op.item].add(first, run); });
    }
  }

  void write(const Chunk& chunk, std::span<iovec> parts, End end, const std::optional<Mapping>& target = std::nullopt) {
    {
      const Timer timer(progress_.write_ns);
      if (end == End::front || !store(chunk, parts, target)) file_->write(parts, chunk.file_offset);
    }
    count(chunk);
    if (!file_->keep_cached()) return file_->evict_behind(chunk.file_offset, chunk.nbytes);
    if (file_->has_writeback()) resources_.write_behind.post(file_, chunk.file_offset, chunk.nbytes);
  }

  // Returns false where that is refused, for all of the save.
  bool store(const Chunk& chunk, std::span<const iovec> parts, const std::optional<Mapping>& target) {
    if (chunk.route == Route::in_place && copied_on_read(parts)) {
      progress_.source_shared = true;
      return false;
    }
    const int refused = file_->store(parts, chunk.file_offset, target);
    if (refused == 0) {
      progress_.mapped_nbytes += chunk.nbytes;
    } else {
      progress_.mapping_refused = refused;
    }
    return refused == 0;
  }

  const std::shared_ptr<OutputFile> file_;
  const bool shared_;
  std::atomic<bool> has_writer_ = false;
  std::atomic<size_t> next_checked_ = 0;
};

}  // namespace

std::unique_ptr<FileWriter> make_page_cache_writer(WriterParts parts, std::shared_ptr<OutputFile> file) {
  const bool by_several = shared(parts, *file);
  const ScheduleLimits limits = limits_of(parts, by_several);
  const size_t writers = writers_of(parts, by_several);
  return std::make_unique<PageCacheWriter>(std::move(parts), limits, writers, by_several, std::move(file));
}

}  // namespace fastshard
