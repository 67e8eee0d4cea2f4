// SPDX-License-Identifier: Apache-2.0
#include "save/placed_writer.h"

#include <limits.h>
#include <sys/uio.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "file/shared_pages.h"
#include "save/runs.h"

namespace fastshard {
namespace {

// Runs that begin within so many bytes of each other, so that there is one in each page, are stored together through a
// mapping: a call for each costs more than its bytes. Others are written one by one, as making pages of which little or
// nothing is this save's costs more than calls.
constexpr uint64_t kNearNbytes = 4096;
// Of fewer runs each has a call of its own.
constexpr uint64_t kMinStoredRuns = 8;
constexpr uint64_t kWindowNbytes = 4 << 20;
// What the kernel cannot read from where it lies is copied so many bytes at a time.
constexpr uint64_t kBounceNbytes = 256 << 10;
// Longer runs are sent to the disk at once. Pages of shorter ones others may still be writing to.
constexpr uint64_t kSentRunNbytes = 1 << 20;

// The pieces of memory that a chunk's bytes lie in, one behind the other. It may be copied, to begin again.
class SourceCursor {
 public:
  explicit SourceCursor(std::span<const iovec> parts) : parts_(parts) {}

  // The next bytes that lie together, at most `nbytes`.
  std::span<std::byte> take(uint64_t nbytes) {
    const iovec& part = parts_.front();
    nbytes = std::min<uint64_t>(nbytes, part.iov_len - taken_);
    const std::span bytes(static_cast<std::byte*>(part.iov_base) + taken_, nbytes);
    taken_ += nbytes;
    if (taken_ == part.iov_len) {
      parts_ = parts_.subspan(1);
      taken_ = 0;
    }
    return bytes;
  }

 private:
  std::span<const iovec> parts_;  // none of them empty
  uint64_t taken_ = 0;            // of the first
};

void append(std::vector<iovec>& parts, std::span<std::byte> bytes) {
  if (!parts.empty() && static_cast<std::byte*>(parts.back().iov_base) + parts.back().iov_len == bytes.data()) {
    parts.back().iov_len += bytes.size();
  } else {
    parts.push_back({bytes.data(), bytes.size()});
  }
}

// What one thread copies into one window of the file, in calls of up to IOV_MAX pieces. The kernel makes the stores, so
// a page that cannot be had, or a file that was cut, is an errno.
class Batch {
 public:
  Batch() {
    targets_.reserve(IOV_MAX);
    sources_.reserve(IOV_MAX);
  }

  // `bounced`: by way of memory of its own, which the kernel can read.
  void begin(bool bounced) {
    clear();
    if (bounced && bounce_ == nullptr) bounce_ = std::make_unique_for_overwrite<std::byte[]>(kBounceNbytes);
    bounced_ = bounced;
  }

  // Copies `nbytes` to `target`, now or later. Returns 0, or the errno of what was refused.
  int add(std::byte* target, uint64_t nbytes, SourceCursor& source) {
    while (nbytes != 0) {
      if (full()) {
        if (const int refused = flush(); refused != 0) return refused;
      }
      std::span<std::byte> bytes = source.take(bounced_ ? std::min(nbytes, kBounceNbytes - nbytes_) : nbytes);
      if (bounced_) bytes = kept(bytes);
      append(targets_, {target, bytes.size()});
      append(sources_, bytes);
      nbytes_ += bytes.size();
      target += bytes.size();
      nbytes -= bytes.size();
    }
    return 0;
  }

  int flush() {
    const int refused = nbytes_ == 0 ? 0 : copy_by_kernel(targets_, sources_);
    clear();
    return refused;
  }

  // The memory that append() may use between two calls of begin().
  std::vector<iovec>& parts() {
    clear();
    return sources_;
  }

 private:
  bool full() const {
    return targets_.size() == IOV_MAX || sources_.size() == IOV_MAX || (bounced_ && nbytes_ == kBounceNbytes);
  }

  std::span<std::byte> kept(std::span<const std::byte> bytes) {
    std::byte* const copy = bounce_.get() + nbytes_;
    std::memcpy(copy, bytes.data(), bytes.size());
    return {copy, bytes.size()};
  }

  void clear() {
    targets_.clear();
    sources_.clear();
    nbytes_ = 0;
  }

  std::vector<iovec> targets_, sources_;
  uint64_t nbytes_ = 0;
  bool bounced_ = false;
  std::unique_ptr<std::byte[]> bounce_;
};

// Runs that are written together.
struct Stretch {
  uint64_t begin = 0, end = 0;  // in the file
  uint64_t runs = 0;
};

Stretch first_stretch(RunCursor runs) {
  Stretch found{.begin = runs.run().file_offset, .end = runs.run().end(), .runs = 1};
  uint64_t before = found.begin;
  for (runs.next(); !runs.done(); runs.next()) {
    const FileRun& run = runs.run();
    const bool near = run.file_offset >= found.end && run.file_offset - before <= kNearNbytes;
    if (!near || run.end() > found.begin + kWindowNbytes) break;
    before = run.file_offset;
    found.end = run.end();
    ++found.runs;
  }
  return found;
}

bool only_python_has_some(const FilePlan& plan) {
  return std::ranges::any_of(plan.items, [](const WriteItem& item) { return item.source.device == kFetched; });
}

size_t writers_of(const WriterParts& parts) {
  // What only Python brings, it brings to one.
  return only_python_has_some(parts.plan) ? 1 : parts.resources.workers.threads();
}

ScheduleLimits limits_of(const WriterParts& parts) {
  ScheduleLimits limits;
  limits.slot_nbytes = parts.resources.ring.slot_nbytes();
  limits.in_place_nbytes = std::min<uint64_t>(limits.in_place_nbytes, kFromFilesNbytes);  // threads end together
  return limits;
}

// Each thread takes chunks, whose packed bytes are cut into runs of the file. Short runs that lie close together are
// copied by the kernel into a mapping of the file, so they neither cost a call each nor wait for the file's lock.
class PlacedWriter final : public InTurnWriter {
 public:
  PlacedWriter(WriterParts parts, const ScheduleLimits& limits, size_t writers, std::shared_ptr<OutputFile> file)
      : InTurnWriter(std::move(parts), limits, writers), file_(std::move(file)) {}

  void write_chunks() override { write_in_turn(has_writer_.exchange(true) ? End::back : End::front); }

 private:
  // The first thread stays to the end; the others leave when other files wait.
  const Chunk* next(End end) override { return end == End::back && resources_.workers.wanted() ? nullptr : claim(end); }

  bool write_unstaged(const Chunk& chunk, End) override {
    if (chunk.route != Route::in_place) return false;
    const SourcePages::Held sources(sources_, chunk);
    std::vector<iovec> parts;
    parts.reserve(chunk.op_count);
    for (const CopyOp& op : schedule_.ops_of(chunk)) {
      for_each_run(op, [&](uint64_t first, std::span<const std::byte> run) {
        parts.push_back({const_cast<std::byte*>(run.data()), run.size()});
        if (checksums_.empty()) return;
        const Timer timer(progress_.copy_ns);
        checksums_[op.item].add(first, run);
      });
    }
    write(chunk, parts);
    return true;
  }

  void write_staged(StagedChunk& staged, End) override {
    staged.wait();
    add_checksums(staged.chunk, staged.bytes);
    const iovec part{staged.bytes.data(), staged.bytes.size()};
    write(staged.chunk, {&part, 1});
  }

  void write(const Chunk& chunk, std::span<const iovec> parts) {
    const Timer timer(progress_.write_ns);
    file_->check_size(plan_.placed_in_nbytes);
    std::unique_ptr<Batch> batch = take_batch();
    if (!bounced_ && copied_on_read(parts)) bounced_ = true;
    RunCursor runs(plan_.places, chunk.file_offset, chunk.nbytes);
    SourceCursor source(parts);
    while (!runs.done()) {
      check_stop();
      const Stretch stretch = first_stretch(runs);
      if (stretch.runs < kMinStoredRuns || !store(stretch, runs, source, *batch)) {
        write_each(stretch.runs, runs, source, *batch);
      }
      progress_.written_runs += stretch.runs;
    }
    file_->check_size(plan_.placed_in_nbytes);
    give_back(std::move(batch));
    count(chunk);
  }

  // One call for each run.
  void write_each(uint64_t count, RunCursor& runs, SourceCursor& source, Batch& batch) {
    for (; count != 0; --count, runs.next()) {
      const FileRun& run = runs.run();
      std::vector<iovec>& parts = batch.parts();
      for (uint64_t left = run.nbytes; left != 0;) {
        const std::span<std::byte> bytes = source.take(left);
        append(parts, bytes);
        left -= bytes.size();
      }
      file_->write(parts, run.file_offset);
      if (run.nbytes >= kSentRunNbytes && file_->sent_behind() && file_->keep_cached()) {
        resources_.write_behind.post(file_, run.file_offset, run.nbytes);
      }
    }
  }

  // Through a mapping. Returns false where that is refused; then nothing has been taken.
  bool store(const Stretch& stretch, RunCursor& runs, SourceCursor& source, Batch& batch) {
    if (!file_->stores_runs()) {
      if (!file_->one_machine()) {
        progress_.fallbacks.add("short runs are written one by one, as other machines may write to the same pages");
      }
      return false;
    }
    if (!progress_.may_store_runs) return false;
    const std::optional<Mapping> window = file_->map_for_store(stretch.begin, stretch.end - stretch.begin);
    int refused = window ? 0 : ENOSPC;
    if (window) {
      const bool bounced = bounced_;
      refused = copy(stretch, runs, source, *window, bounced, batch);
      if (refused == EFAULT && !bounced) {  // memory that the kernel does not read for anybody
        refused = copy(stretch, runs, source, *window, true, batch);
        if (refused == 0) bounced_ = true;
      }
    }
    if (refused == 0) return true;
    file_->check_size(plan_.placed_in_nbytes);  // else a write would make a file that was cut longer again
    if (refused == EPERM || refused == ENOSYS) {
      progress_.may_store_runs = false;
      progress_.fallbacks.add("storing short runs together refused: " + std::generic_category().message(refused));
    }
    return false;
  }

  int copy(const Stretch& stretch, RunCursor& runs, SourceCursor& source, const Mapping& window, bool bounced,
           Batch& batch) {
    RunCursor next_run = runs;
    SourceCursor next_source = source;
    batch.begin(bounced);
    for (uint64_t count = stretch.runs; count != 0; --count, next_run.next()) {
      const FileRun& run = next_run.run();
      std::byte* const target = window.bytes().data() + (run.file_offset - stretch.begin);
      if (const int refused = batch.add(target, run.nbytes, next_source); refused != 0) return refused;
    }
    if (const int refused = batch.flush(); refused != 0) return refused;
    runs = next_run;
    source = next_source;
    return 0;
  }

  // Kept from chunk to chunk: one for each thread.
  std::unique_ptr<Batch> take_batch() {
    const std::lock_guard lock(mutex_);
    if (batches_.empty()) return std::make_unique<Batch>();
    std::unique_ptr<Batch> batch = std::move(batches_.back());
    batches_.pop_back();
    return batch;
  }

  void give_back(std::unique_ptr<Batch> batch) {
    const std::lock_guard lock(mutex_);
    batches_.push_back(std::move(batch));
  }

  const std::shared_ptr<OutputFile> file_;
  std::atomic<bool> has_writer_ = false;
  std::atomic<bool> bounced_ = false;  // what is stored goes by way of a copy
  std::mutex mutex_;
  std::vector<std::unique_ptr<Batch>> batches_;
};

}  // namespace

std::unique_ptr<FileWriter> make_placed_writer(WriterParts parts, std::shared_ptr<OutputFile> file) {
  const ScheduleLimits limits = limits_of(parts);
  const size_t writers = writers_of(parts);
  return std::make_unique<PlacedWriter>(std::move(parts), limits, writers, std::move(file));
}

}  // namespace fastshard
