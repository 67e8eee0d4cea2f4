// SPDX-License-Identifier: Apache-2.0
#include "save/page_cache_writer.h"

#include <sys/uio.h>

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "device/pack.h"

namespace fastshard {
namespace {

// Visits the pieces of host memory that an op which is not cast is made of: their first byte among the packed ones, and
// where they lie.
template <typename Visit>
void for_each_run(const CopyOp& op, Visit visit) {
  for (uint64_t done = 0; done < op.nbytes;) {
    const uint64_t first = op.first_byte + done;
    const uint64_t run_left =
        op.source->contiguous() ? op.nbytes - done : op.source->run_nbytes - first % op.source->run_nbytes;
    const uint64_t nbytes = std::min(op.nbytes - done, run_left);
    visit(first, std::span(packed_address(*op.source, first), nbytes));
    done += nbytes;
  }
}

ScheduleLimits limits_of(const WriterParts& parts) {
  ScheduleLimits limits;
  limits.slot_nbytes = parts.resources.ring.slot_nbytes();
  if (reads_files(parts.plan)) {
    limits.in_place_nbytes = std::min(limits.in_place_nbytes, kFromFilesNbytes);
    limits.packed_nbytes = std::min(limits.packed_nbytes, kFromFilesNbytes);
  }
  return limits;
}

size_t writers_of(const WriterParts& parts) {
  // Tensors that lie in files are there only while they are written, so that the one who writes them checks them, too.
  const bool checked_beside = parts.checksums && !reads_files(parts.plan);
  return checked_beside ? std::min<size_t>(parts.resources.workers.threads(), 2) : 1;
}

class PageCacheWriter final : public InTurnWriter {
 public:
  PageCacheWriter(WriterParts parts, const ScheduleLimits& limits, size_t writers, std::shared_ptr<OutputFile> file)
      : InTurnWriter(std::move(parts), limits, writers), file_(std::move(file)) {}

  void write_chunks() override {
    if (!has_writer_.exchange(true)) write_in_turn();
    check_chunks_in_place();
  }

 private:
  bool write_unstaged(const Chunk& chunk) override {
    if (chunk.route != Route::in_place) return false;
    write_in_place(chunk);
    return true;
  }

  void write_staged(StagedChunk& staged) override {
    staged.wait();
    add_checksums(staged.chunk, staged.bytes);
    iovec part{staged.bytes.data(), staged.bytes.size()};
    write(staged.chunk, {&part, 1});
  }

  // Host memory in long runs: the kernel reads it from where it lies.
  void write_in_place(const Chunk& chunk) {
    const SourcePages::Held sources(sources_, chunk);
    if (sources_.any() && !checksums_.empty()) check_in_place(chunk);
    std::vector<iovec> parts;
    parts.reserve(chunk.op_count);
    for (const CopyOp& op : schedule_.ops_of(chunk)) {
      for_each_run(op, [&](uint64_t, std::span<const std::byte> run) {
        parts.push_back({const_cast<std::byte*>(run.data()), run.size()});
      });
    }
    write(chunk, parts);
  }

  void write(const Chunk& chunk, std::span<iovec> parts) {
    {
      const Timer timer(progress_.write_ns);
      file_->write(parts, chunk.file_offset);
    }
    count(chunk);
    if (!file_->keep_cached()) return file_->evict_behind(chunk.file_offset, chunk.nbytes);
    if (file_->has_writeback()) resources_.write_behind.post(file_, chunk.file_offset, chunk.nbytes);
  }

  // What no thread ever has in its cache may as well be read by another one, beside the write.
  void check_chunks_in_place() {
    if (checksums_.empty() || sources_.any()) return;
    for (size_t index; (index = next_checked_++) < schedule_.chunks.size();) {
      check_stop();
      const Chunk& chunk = schedule_.chunks[index];
      if (chunk.route == Route::in_place) check_in_place(chunk);
    }
  }

  void check_in_place(const Chunk& chunk) {
    const Timer timer(progress_.copy_ns);
    for (const CopyOp& op : schedule_.ops_of(chunk)) {
      for_each_run(op, [&](uint64_t first, std::span<const std::byte> run) { checksums_[op.item].add(first, run); });
    }
  }

  const std::shared_ptr<OutputFile> file_;
  std::atomic<size_t> next_checked_ = 0;
  std::atomic<bool> has_writer_ = false;
};

}  // namespace

std::unique_ptr<FileWriter> make_page_cache_writer(WriterParts parts, std::shared_ptr<OutputFile> file) {
  const ScheduleLimits limits = limits_of(parts);
  const size_t writers = writers_of(parts);
  return std::make_unique<PageCacheWriter>(std::move(parts), limits, writers, std::move(file));
}

}  // namespace fastshard
