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
// A piece that a thread writes which has stepped aside: what others may have to wait for.
constexpr uint64_t kAsideNbytes = 1 << 20;
// Written up to a multiple of this in the file, and then checked: few enough bytes for the processor's caches still to
// have them, and enough for the kernel to put them into its largest pages.
constexpr uint64_t kCheckedNbytes = 2 << 20;

bool only_python_has_some(const FilePlan& plan) {
  return std::ranges::any_of(plan.items, [](const WriteItem& item) { return item.source.device == kFetched; });
}

// Whether several threads may write the file. What only Python brings, it brings to one. Threads that have stepped
// aside make no mappings: each of these takes the lock of the process's memory.
bool shared(const WriterParts& parts, const OutputFile& file) {
  return file.storable() && !parts.resources.workers.aside() && parts.plan.written_nbytes() >= kMinSharedNbytes &&
         !only_python_has_some(parts.plan);
}

size_t writers_of(const WriterParts& parts, bool shared) {
  const size_t threads = parts.resources.workers.threads();
  return shared ? threads : 1;
}

ScheduleLimits limits_of(const WriterParts& parts, bool shared) {
  ScheduleLimits limits;
  limits.slot_nbytes = parts.resources.ring.slot_nbytes();
  if (shared) limits.in_place_nbytes = std::min(limits.in_place_nbytes, kSharedNbytes);
  if (parts.resources.workers.aside()) limits.in_place_nbytes = std::min(limits.in_place_nbytes, kAsideNbytes);
  if (reads_files(parts.plan)) {
    limits.in_place_nbytes = std::min(limits.in_place_nbytes, kFromFilesNbytes);
    limits.packed_nbytes = std::min(limits.packed_nbytes, kFromFilesNbytes);
  }
  return limits;
}

// One thread writes from the front of the file: the kernel lets nobody else write to it meanwhile. Others store from
// the back, through mappings, until they meet.
class PageCacheWriter final : public InTurnWriter {
 public:
  PageCacheWriter(WriterParts parts, const ScheduleLimits& limits, size_t writers, bool shared,
                  std::shared_ptr<OutputFile> file)
      : InTurnWriter(std::move(parts), limits, writers), file_(std::move(file)), shared_(shared) {}

  void write_chunks() override {
    // Beside another thread, unless it is to be relieved.
    const End end = shared_ && has_writer_.exchange(true) ? End::back : End::front;
    write_in_turn(end);
  }

 private:
  // A part of a run of host memory.
  struct Piece {
    uint32_t item;
    uint64_t first_byte;
    std::span<const std::byte> bytes;
  };

  // Whether others wait for this thread. At the front there is one who goes on.
  bool leaves(End end) const { return end == End::back && resources_.workers.wanted(); }

  const Chunk* next(End end) override {
    if (end == End::front) return claim(end);
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
    if (end == End::front && !checksums_.empty()) return write_checked(chunk);
    std::vector<iovec> parts;
    parts.reserve(chunk.op_count);
    for_each_piece(chunk, UINT64_MAX, [&](const Piece& piece) {
      if (!checksums_.empty()) check(piece);
      append(parts, piece.bytes);
    });
    write(chunk, parts, end);
  }

  // The kernel reads a piece from memory faster than the sum does. Then it lies in a cache.
  void write_checked(const Chunk& chunk) {
    std::vector<iovec> parts;
    std::vector<Piece> pieces;
    uint64_t written = chunk.file_offset, end = written;
    for_each_piece(chunk, kCheckedNbytes, [&](const Piece& piece) {
      append(parts, piece.bytes);
      pieces.push_back(piece);
      end += piece.bytes.size();
      if (end % kCheckedNbytes != 0 && end != chunk.file_offset + chunk.nbytes) return;
      {
        const Timer timer(progress_.write_ns);
        file_->write(parts, written);
      }
      std::ranges::for_each(pieces, [&](const Piece& one) { check(one); });
      written = end;
      parts.clear();
      pieces.clear();
    });
    wrote(chunk);
  }

  void check(const Piece& piece) {
    const Timer timer(progress_.copy_ns);
    checksums_[piece.item].add(piece.first_byte, piece.bytes);
  }

  // Visits the pieces of a chunk. None of them reaches across a multiple of `boundary` in the file.
  template <typename Visit>
  void for_each_piece(const Chunk& chunk, uint64_t boundary, Visit visit) {
    for (const CopyOp& op : schedule_.ops_of(chunk)) {
      for_each_run(op, [&](uint64_t first, std::span<const std::byte> run) {
        while (!run.empty()) {
          const uint64_t at = chunk.file_offset + op.chunk_offset + (first - op.first_byte);
          const Piece piece{op.item, first, run.first(std::min<uint64_t>(run.size(), boundary - at % boundary))};
          first += piece.bytes.size();
          run = run.subspan(piece.bytes.size());
          visit(piece);
        }
      });
    }
  }

  static void append(std::vector<iovec>& parts, std::span<const std::byte> piece) {
    parts.push_back({const_cast<std::byte*>(piece.data()), piece.size()});
  }

  void write(const Chunk& chunk, std::span<iovec> parts, End end, const std::optional<Mapping>& target = std::nullopt) {
    {
      const Timer timer(progress_.write_ns);
      if (end == End::front || !store(chunk, parts, target)) file_->write(parts, chunk.file_offset);
    }
    wrote(chunk);
  }

  void wrote(const Chunk& chunk) {
    count(chunk);
    if (!file_->keep_cached()) return file_->evict_behind(chunk.file_offset, chunk.nbytes);
    if (file_->sent_behind()) resources_.write_behind.post(file_, chunk.file_offset, chunk.nbytes);
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
};

}  // namespace

std::unique_ptr<FileWriter> make_page_cache_writer(WriterParts parts, std::shared_ptr<OutputFile> file) {
  const bool by_several = shared(parts, *file);
  const ScheduleLimits limits = limits_of(parts, by_several);
  const size_t writers = writers_of(parts, by_several);
  return std::make_unique<PageCacheWriter>(std::move(parts), limits, writers, by_several, std::move(file));
}

}  // namespace fastshard
