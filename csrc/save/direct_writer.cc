// SPDX-License-Identifier: Apache-2.0
#include "save/direct_writer.h"

#include <algorithm>
#include <deque>
#include <unordered_map>
#include <utility>

#include "device/pack.h"
#include "file/direct_io.h"

namespace fastshard {
namespace {

// Writes that one thread has under way, each of a slot: enough for the disk never to wait for the copies. Depths of 2
// to 8, writes of 4 to 16 MiB, and io_uring and threads differ by less than the noise.
constexpr unsigned kMaxWriting = 8;
constexpr size_t kWriters = 2;

ScheduleLimits limits_of(const WriterParts& parts, const OutputFile& file) {
  ScheduleLimits limits;
  limits.in_place = false;
  limits.block_nbytes = file.block_nbytes();
  limits.slot_nbytes = parts.resources.ring.slot_nbytes() / limits.block_nbytes * limits.block_nbytes;
  limits.packed_nbytes = limits.slot_nbytes;
  return limits;
}

class DirectWriter final : public ChunkWriter {
 public:
  DirectWriter(WriterParts parts, const ScheduleLimits& limits, size_t writers, std::shared_ptr<OutputFile> file)
      : ChunkWriter(std::move(parts), limits, writers), file_(std::move(file)) {}

  void write_chunks() override;

 private:
  class Share;

  // The chunk as it is written: the file's last one is filled up with zeros, which end_writing() cuts off.
  std::span<const std::byte> whole_blocks(const StagedChunk& staged) const {
    const uint64_t nbytes = staged.chunk.nbytes;
    const uint64_t block = file_->block_nbytes();
    const std::span<std::byte> bytes = staged.slot.bytes().first((nbytes + block - 1) / block * block);
    std::ranges::fill(bytes.subspan(nbytes), std::byte{0});
    return bytes;
  }

  // The chunk's bytes where they lie, if that is in one piece and on boundaries of blocks; else nothing. Where somebody
  // waits, the memory is the caller's, who may have it from a driver: the kernel may refuse to write from there.
  std::span<const std::byte> in_place(const Chunk& chunk) const {
    if (!resources_.workers.aside() || sources_.any()) return {};
    const std::span<const CopyOp> ops = schedule_.ops_of(chunk);
    const std::byte* const begin = packed_address(*ops.front().source, ops.front().first_byte);
    const uint64_t block = file_->block_nbytes();
    if (reinterpret_cast<uintptr_t>(begin) % block != 0 || chunk.nbytes % block != 0) return {};
    const bool in_one_piece = std::ranges::all_of(ops, [&](const CopyOp& op) {
      const TensorView& source = *op.source;
      return source.device == kHost && !source.cast() && source.contiguous() &&
             packed_address(source, op.first_byte) == begin + op.chunk_offset;
    });
    if (!in_one_piece) return {};
    return {begin, chunk.nbytes};
  }

  std::unique_ptr<DirectQueue> make_queue() {
    auto queue = make_direct_queue(file_->descriptor(), file_->path(), file_->block_nbytes(), kMaxWriting,
                                   resources_.io_uring_refused == 0);
    progress_.io_uring_refused = resources_.io_uring_refused;
    return queue;
  }

  const std::shared_ptr<OutputFile> file_;
};

// One thread's share. Its writes go on while further chunks are copied, and a slot is given back when its write is
// complete.
class DirectWriter::Share {
 public:
  explicit Share(DirectWriter& writer) : writer_(writer), slots_(writer.resources_.ring), queue_(writer.make_queue()) {}

  void write_chunks() {
    next_ = writer_.claim();
    while (next_ != nullptr || !copying_.empty() || !writing_.empty()) {
      writer_.check_stop();
      while (!writing_.empty() && finish_one(false)) {
      }
      if (submit_next() || stage_next()) continue;
      if (copying_.empty() || writing_.size() == kMaxWriting) {
        if (!writing_.empty()) finish_one(true);
        continue;
      }
      submit_first();
    }
  }

 private:
  struct Writing {
    const Chunk& chunk;
    std::unique_ptr<StagedChunk> staged;  // null: from where it lies
  };

  // Writes the next chunk from where it lies, if that is possible.
  bool submit_next() {
    if (next_ == nullptr || writing_.size() >= kMaxWriting) return false;
    const std::span<const std::byte> bytes = writer_.in_place(*next_);
    if (bytes.empty()) return false;
    writer_.add_checksums(*next_, bytes);
    submit({*next_, nullptr}, bytes);
    next_ = writer_.claim();
    return true;
  }

  // Stages the next chunk if there is a slot for it. Whether that is all for now, as its copies go on by themselves.
  bool stage_next() {
    const size_t held = copying_.size() + staged_;
    if (next_ == nullptr || copying_.size() >= kMaxCopying || writing_.size() >= kMaxWriting) return false;
    if (held >= slots_.slots()) return false;
    std::optional<Slot> slot = writer_.slot_for(*next_, held == 0);
    if (!slot) return false;
    auto staged = writer_.stage(*next_, std::move(*slot));
    // One that this thread has packed is ready, whatever devices still bring for those before it.
    const bool ready = staged->tickets.empty();
    ready ? copying_.push_front(std::move(staged)) : copying_.push_back(std::move(staged));
    next_ = writer_.claim();
    return !ready;
  }

  void submit_first() {
    std::unique_ptr<StagedChunk> staged = std::move(copying_.front());
    copying_.pop_front();
    staged->wait();
    writer_.add_checksums(staged->chunk, staged->bytes);
    const std::span<const std::byte> blocks = writer_.whole_blocks(*staged);
    ++staged_;
    submit({staged->chunk, std::move(staged)}, blocks);
  }

  void submit(Writing writing, std::span<const std::byte> bytes) {
    const Timer timer(writer_.progress_.write_ns);
    const uint64_t offset = writing.chunk.file_offset;
    writing_.emplace(offset, std::move(writing));
    queue_->submit(bytes, offset, offset);
  }

  // Takes one completed write off the queue, or waits for one. Whether there was one.
  bool finish_one(bool wait) {
    const Timer timer(writer_.progress_.write_ns);
    const std::optional<uint64_t> offset = queue_->reap(wait);
    if (!offset) return false;
    const auto written = writing_.find(*offset);
    writer_.count(written->second.chunk);
    if (written->second.staged != nullptr) --staged_;
    writing_.erase(written);
    return true;
  }

  DirectWriter& writer_;
  const Ring::Share slots_;
  std::deque<std::unique_ptr<StagedChunk>> copying_;
  std::unordered_map<uint64_t, Writing> writing_;  // by file offset
  size_t staged_ = 0;                              // of these
  const std::unique_ptr<DirectQueue> queue_;       // destroyed first: that waits for the writes
  const Chunk* next_ = nullptr;
};

void DirectWriter::write_chunks() { Share(*this).write_chunks(); }

}  // namespace

std::unique_ptr<FileWriter> make_direct_writer(WriterParts parts, std::shared_ptr<OutputFile> file) {
  const ScheduleLimits limits = limits_of(parts, *file);
  const size_t writers = std::min(parts.resources.workers.threads(), kWriters);
  return std::make_unique<DirectWriter>(std::move(parts), limits, writers, std::move(file));
}

}  // namespace fastshard
