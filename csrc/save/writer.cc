// SPDX-License-Identifier: Apache-2.0
#include "save/writer.h"

#include <algorithm>
#include <deque>
#include <optional>
#include <unordered_map>
#include <vector>

#include "file/direct_io.h"
#include "plan/error.h"
#include "device/pack.h"
#include "device/streaming.h"

namespace fastshard {
namespace {

// Staged chunks one writer keeps under way: enough for the copy engine never to wait for the disk.
constexpr size_t kMaxInFlight = 4;
// Chunks of host memory packed straight into the target: windows of a mapped file, few calls for each; of
// memory, small enough for all writers to end together.
constexpr uint64_t kWindowNbytes = 16 << 20;
constexpr uint64_t kMemoryNbytes = 4 << 20;
// Direct writes under way: enough for the disk never to wait for the copies.
constexpr unsigned kMaxDirect = 8;
constexpr uint64_t kDirectNbytes = 8 << 20;
// One copies while the other hands a write to the kernel, which takes its time.
constexpr size_t kDirectWriters = 2;
// Of tensors that lie in files, smaller chunks: what all writers have of them at once is resident.
constexpr uint64_t kFromFilesNbytes = 4 << 20;
// How many chunks ahead the disk is asked for them.
constexpr size_t kChunksAhead = 4;
// A range is read whole when it is at most so many times what is wanted of it, and so much.
constexpr uint64_t kSparse = 4;
constexpr uint64_t kGapNbytes = 64 << 10;

// The pieces of host memory an op that is not cast is made of: (their first byte among the packed ones, where they
// lie).
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

}  // namespace

// A chunk being copied: into its slot, or, where the target is page-locked, straight into that (the slot then
// only lends its scratch). The destructor waits for the copies: only then may the memory go.
struct FileWriter::InFlight {
  InFlight(Progress& totals, const Chunk& what, Slot where)
      : progress(totals), chunk(what), slot(std::move(where)), bytes(slot.bytes().first(chunk.nbytes)) {}
  ~InFlight() {
    for (const auto& ticket : tickets) {
      try {
        ticket->wait();
      } catch (...) {
        // Already known, or about to be thrown for the chunk that failed first.
      }
    }
    progress.staged_nbytes -= staged_nbytes;
  }
  InFlight(const InFlight&) = delete;
  InFlight& operator=(const InFlight&) = delete;

  void wait() {
    const Timer timer(progress.copy_ns);
    for (const auto& ticket : tickets) ticket->wait();
    tickets.clear();
  }

  void copy_into_slot() {
    staged_nbytes = chunk.nbytes;
    const uint64_t now = progress.staged_nbytes += staged_nbytes;
    uint64_t peak = progress.peak_staged_nbytes;
    while (now > peak && !progress.peak_staged_nbytes.compare_exchange_weak(peak, now)) {
    }
    (slot.pinned() ? progress.staged_pinned : progress.staged_pageable) = true;
  }
  void copy_into_target(std::span<std::byte> target) {
    bytes = target;
    in_target = true;
    progress.copied_in_place = true;
  }

  Progress& progress;
  const Chunk& chunk;
  Slot slot;
  std::span<std::byte> bytes;  // where the copies go
  bool in_target = false;
  uint64_t staged_nbytes = 0;
  std::optional<Mapping> window;
  std::unique_ptr<Registration> registration;  // of the window; goes before it
  std::vector<std::unique_ptr<Ticket>> tickets;
};

// The pages of files that a chunk's tensors lie in: there while its bytes are read, dropped afterwards.
class FileWriter::SourcePages {
 public:
  // Throws IoError where a file no longer has them.
  SourcePages(const FileWriter& writer, const Chunk& chunk) : ranges_(ranges_of(writer, chunk)) {
    for (const Range& range : ranges_) {
      // Of what is not read whole the end tells at least whether the file has been cut.
      range.file->bring_in(range.dense ? range.bytes : range.bytes.last(1));
    }
  }
  ~SourcePages() {
    for (const Range& range : ranges_) {
      if (range.last_use) range.file->drop(range.bytes);
    }
  }
  SourcePages(const SourcePages&) = delete;
  SourcePages& operator=(const SourcePages&) = delete;

  // Has the disk begin with a chunk whose turn comes later.
  static void ask_for(const FileWriter& writer, const Chunk& chunk) {
    for (const Range& range : ranges_of(writer, chunk)) {
      if (range.dense) range.file->ask_for(range.bytes);
    }
  }

 private:
  struct Range {
    const SourceFile* file;
    std::span<const std::byte> bytes;
    bool dense;     // most of it is read
    bool last_use;  // no other chunk reads there, but for the edges
  };

  // What the chunk's ops read of files; neighbours count as one.
  static std::vector<Range> ranges_of(const FileWriter& writer, const Chunk& chunk) {
    std::vector<Range> ranges;
    if (!writer.from_files_) return ranges;
    for (const CopyOp& op : writer.schedule_.ops_of(chunk)) {
      const SourceFile* const file = writer.plan_.items[op.item].mapped;
      if (file == nullptr || !file->is_engine_address(op.source->data)) continue;
      if (!in_memory_order(*op.source)) {  // every chunk of it reads all over the tensor
        const bool last = op.first_byte + op.nbytes == op.source->packed_nbytes();
        ranges.push_back({file, source_extent(*op.source), false, last});
        continue;
      }
      const std::span<const std::byte> bytes = source_extent(*op.source, op.first_byte, op.nbytes);
      const bool dense = bytes.size() <= kSparse * op.nbytes + kGapNbytes;
      if (dense && !ranges.empty()) {
        Range& before = ranges.back();
        const std::byte* const begin = before.bytes.data();
        if (before.file == file && before.dense && bytes.data() >= begin &&
            bytes.data() <= begin + before.bytes.size() + kGapNbytes) {
          const auto nbytes = static_cast<size_t>(bytes.data() - begin) + bytes.size();
          before.bytes = {begin, std::max(before.bytes.size(), nbytes)};
          continue;
        }
      }
      ranges.push_back({file, bytes, dense, true});
    }
    return ranges;
  }

  const std::vector<Range> ranges_;
};

FileWriter::FileWriter(const FilePlan& plan, std::shared_ptr<OutputFile> file, const Resources& resources,
                       const CopyStreams& streams, std::unique_ptr<CopyStream> fetched, bool checksums,
                       Progress& progress)
    : plan_(plan),
      file_(std::move(file)),
      resources_(resources),
      streams_(streams),
      fetched_(std::move(fetched)),
      host_(resources.host.open(0)),
      progress_(progress),
      from_files_(std::ranges::any_of(plan.items, [](const WriteItem& item) { return item.mapped != nullptr; })) {
  if (checksums) {
    for (const WriteItem& item : plan_.items) checksums_.emplace_back(item.source.packed_nbytes());
  }
  ScheduleLimits limits;
  limits.slot_nbytes = resources_.ring.slot_nbytes();
  if (direct()) {
    limits.in_place = false;
    limits.block_nbytes = file_->block_nbytes();
    limits.slot_nbytes = std::min(limits.slot_nbytes, kDirectNbytes) / limits.block_nbytes * limits.block_nbytes;
    limits.packed_nbytes = limits.slot_nbytes;
    writers_ = std::min(resources_.workers.threads(), kDirectWriters);
  } else if (!buffered()) {
    limits.in_place = false;
    limits.packed_nbytes = file_ == nullptr ? kMemoryNbytes : kWindowNbytes;
    writers_ = resources_.workers.threads();
  } else if (checksums && !from_files_) {
    writers_ = std::min<size_t>(resources_.workers.threads(), 2);
  }
  if (from_files_) {
    limits.in_place_nbytes = std::min(limits.in_place_nbytes, kFromFilesNbytes);
    if (!direct()) limits.packed_nbytes = std::min(limits.packed_nbytes, kFromFilesNbytes);
  }
  schedule_ = make_schedule(plan_, limits);
  writers_ = std::clamp<size_t>(schedule_.chunks.size(), 1, writers_);
}

std::vector<uint32_t> FileWriter::checksums() const {
  std::vector<uint32_t> values;
  for (const Crc32& checksum : checksums_) values.push_back(checksum.value());
  return values;
}

// While the bytes are in a cache, if they are.
void FileWriter::add_checksums(const Chunk& chunk, std::span<const std::byte> bytes) {
  if (checksums_.empty()) return;
  const Timer timer(progress_.copy_ns);
  for (const CopyOp& op : schedule_.ops_of(chunk)) {
    checksums_[op.item].add(op.first_byte, bytes.subspan(op.chunk_offset, op.nbytes));
  }
}

const Chunk* FileWriter::claim() {
  const size_t index = next_chunk_++;
  if (index >= schedule_.chunks.size()) return nullptr;
  const size_t ahead = index + kChunksAhead * writers_;
  if (ahead < schedule_.chunks.size()) SourcePages::ask_for(*this, schedule_.chunks[ahead]);
  return &schedule_.chunks[index];
}

void FileWriter::write_chunks() {
  if (direct()) return write_chunks_directly();
  if (!buffered() || !has_writer_.exchange(true)) write_chunks_in_turn();
  check_chunks_in_place();
}

// What no writer ever has in its cache may as well be read by another thread, beside the write. Tensors that lie in
// files are there only while they are written.
void FileWriter::check_chunks_in_place() {
  if (checksums_.empty() || from_files_) return;
  for (size_t index; (index = next_checked_++) < schedule_.chunks.size();) {
    if (progress_.stop) throw Cancelled();
    const Chunk& chunk = schedule_.chunks[index];
    if (chunk.route == Route::in_place) check_in_place(chunk);
  }
}

void FileWriter::check_in_place(const Chunk& chunk) {
  const Timer timer(progress_.copy_ns);
  for (const CopyOp& op : schedule_.ops_of(chunk)) {
    for_each_run(op, [&](uint64_t first, std::span<const std::byte> run) { checksums_[op.item].add(first, run); });
  }
}

// For each chunk: take a slot, ask each device that owns a part to pack into it, wait for the oldest, write
// it at its offset and let the slot go. A writer blocks for a slot only while it holds none, so one slot is
// enough to finish.
void FileWriter::write_chunks_in_turn() {
  const Ring::Share share(resources_.ring);
  std::deque<std::unique_ptr<InFlight>> in_flight;
  const Chunk* next = claim();
  while (next != nullptr || !in_flight.empty()) {
    if (progress_.stop) throw Cancelled();
    if (next != nullptr && write_unstaged(*next)) {
      next = claim();
      continue;
    }
    if (next != nullptr && in_flight.size() < std::min(kMaxInFlight, share.slots())) {
      const int node = node_of(*next);
      std::optional<Slot> slot = in_flight.empty() ? resources_.ring.acquire(node) : resources_.ring.try_acquire(node);
      if (slot) {
        auto staged = stage(*next, std::move(*slot));
        if (staged->tickets.empty()) {
          write_staged(*staged);  // packed by this thread, and still in its cache
        } else {
          in_flight.push_back(std::move(staged));
        }
        next = claim();
        continue;
      }
    }
    write_staged(*in_flight.front());
    in_flight.pop_front();
  }
}

// The same past the page cache, where writes go on while further chunks are copied: a slot goes when its write is
// complete. Here, too, a writer blocks for a slot only while it holds none.
void FileWriter::write_chunks_directly() {
  const Ring::Share share(resources_.ring);
  std::deque<std::unique_ptr<InFlight>> copying;
  std::unordered_map<uint64_t, std::unique_ptr<InFlight>> writing;  // by file offset
  const std::unique_ptr<DirectQueue> queue =                        // the first to go: waits for the writes
      make_direct_queue(file_->descriptor(), file_->path(), file_->block_nbytes(), kMaxDirect,
                        resources_.io_uring_refused == 0);
  progress_.io_uring_refused = resources_.io_uring_refused;
  const auto finish_one = [&](bool wait) {
    const Timer timer(progress_.write_ns);
    const std::optional<uint64_t> offset = queue->reap(wait);
    if (!offset) return false;
    const auto written = writing.find(*offset);
    wrote(written->second->chunk);
    writing.erase(written);
    return true;
  };
  const Chunk* next = claim();
  while (next != nullptr || !copying.empty() || !writing.empty()) {
    if (progress_.stop) throw Cancelled();
    while (!writing.empty() && finish_one(false)) {
    }
    const size_t held = copying.size() + writing.size();
    if (next != nullptr && copying.size() < kMaxInFlight && writing.size() < kMaxDirect && held < share.slots()) {
      const int node = node_of(*next);
      std::optional<Slot> slot = held == 0 ? resources_.ring.acquire(node) : resources_.ring.try_acquire(node);
      if (slot) {
        auto staged = stage(*next, std::move(*slot));
        // One that this thread has packed is ready, whatever devices still bring for those before it.
        const bool ready = staged->tickets.empty();
        ready ? copying.push_front(std::move(staged)) : copying.push_back(std::move(staged));
        next = claim();
        if (!ready) continue;
      }
    }
    if (copying.empty() || writing.size() == kMaxDirect) {
      if (!writing.empty()) finish_one(true);
      continue;
    }
    std::unique_ptr<InFlight> staged = std::move(copying.front());
    copying.pop_front();
    staged->wait();
    add_checksums(staged->chunk, staged->bytes);
    const Timer timer(progress_.write_ns);
    const uint64_t offset = staged->chunk.file_offset;
    const std::span<const std::byte> blocks = whole_blocks(*staged);
    writing.emplace(offset, std::move(staged));
    queue->submit(blocks, offset, offset);
  }
}

// The chunk as it is written: the file's last one is filled up with zeros, which end_writing() cuts off.
std::span<const std::byte> FileWriter::whole_blocks(const InFlight& staged) const {
  const uint64_t nbytes = staged.chunk.nbytes;
  const uint64_t block = file_->block_nbytes();
  const std::span<std::byte> bytes = staged.slot.bytes().first((nbytes + block - 1) / block * block);
  std::ranges::fill(bytes.subspan(nbytes), std::byte{0});
  return bytes;
}

// Of the first device that packs into the chunk's slot.
int FileWriter::node_of(const Chunk& chunk) const {
  if (chunk.route != Route::device) return -1;
  for (const CopyOp& op : schedule_.ops_of(chunk)) {
    const auto device = resources_.devices.find(op.source->device);
    if (device != resources_.devices.end()) return device->second->numa_node();
  }
  return -1;
}

// Chunks that need no slot: written from where they lie, or packed straight into a target that is memory.
bool FileWriter::write_unstaged(const Chunk& chunk) {
  if (chunk.route == Route::in_place) {
    write_in_place(chunk);
    return true;
  }
  if (chunk.route == Route::packed && !buffered()) {
    pack_into_target(chunk);
    return true;
  }
  return false;
}

// Host memory in long runs: the kernel reads it from where it lies.
void FileWriter::write_in_place(const Chunk& chunk) {
  const SourcePages sources(*this, chunk);
  if (from_files_ && !checksums_.empty()) check_in_place(chunk);
  std::vector<iovec> parts;
  parts.reserve(chunk.op_count);
  for (const CopyOp& op : schedule_.ops_of(chunk)) {
    for_each_run(op, [&](uint64_t, std::span<const std::byte> run) {
      parts.push_back({const_cast<std::byte*>(run.data()), run.size()});
    });
  }
  put(chunk, parts);
}

void FileWriter::pack_into_target(const Chunk& chunk) {
  const auto pack = [&](std::span<std::byte> bytes, bool streaming) {
    {
      const Timer timer(progress_.copy_ns);
      const SourcePages sources(*this, chunk);
      Staging target{bytes, {}, streaming};
      host_->pack(schedule_.ops_of(chunk), target);
    }
    add_checksums(chunk, bytes);
  };
  if (file_ == nullptr) {
    pack(target_memory(chunk), plan_.memory.streaming);
  } else {
    const Mapping window = window_of(chunk);
    pack(window.bytes(), true);
  }
  wrote(chunk);
}

// The chunk's part of a target that is memory, its pages writable.
std::span<std::byte> FileWriter::target_memory(const Chunk& chunk) {
  const std::span<std::byte> bytes{plan_.memory.bytes + chunk.file_offset, chunk.nbytes};
  if (plan_.memory.populate) {
    const Timer timer(progress_.write_ns);
    populate(bytes, plan_.path);
  }
  return bytes;
}

Mapping FileWriter::window_of(const Chunk& chunk) {
  const Timer timer(progress_.write_ns);
  return file_->window(chunk.file_offset, chunk.nbytes);
}

// Where the chunk's copies go: straight into the target if a device can write there, else into the slot.
void FileWriter::place(InFlight& staged) {
  const Chunk& chunk = staged.chunk;
  if (file_ == nullptr && plan_.memory.page_locked) return staged.copy_into_target(target_memory(chunk));
  if (chunk.route == Route::device && !resources_.devices.empty()) {
    Device& device = *resources_.devices.begin()->second;
    if (file_ != nullptr && file_->write_path() == WritePath::registered && !registration_refused_) {
      staged.window = window_of(chunk);
      staged.registration = device.register_staging(staged.window->pages());
      if (staged.registration != nullptr) return staged.copy_into_target(staged.window->bytes());
      registration_refused_ = true;
    }
    staged.slot.pin(device);
  }
  staged.copy_into_slot();
}

std::unique_ptr<FileWriter::InFlight> FileWriter::stage(const Chunk& chunk, Slot slot) {
  auto staged = std::make_unique<InFlight>(progress_, chunk, std::move(slot));
  place(*staged);
  const Timer timer(progress_.copy_ns);
  const SourcePages sources(*this, chunk);  // of those in host memory, which this thread packs
  Staging staging{staged->bytes, staged->slot.scratch()};
  // Ops of one device are handed over together: many small ones then cost one launch.
  std::vector<CopyOp> ops(schedule_.ops_of(chunk).begin(), schedule_.ops_of(chunk).end());
  std::ranges::stable_sort(ops, {}, [](const CopyOp& op) { return op.source->device; });
  for (auto first = ops.begin(); first != ops.end();) {
    const int device = first->source->device;
    const auto last = std::find_if(first, ops.end(), [&](const CopyOp& op) { return op.source->device != device; });
    if (auto ticket = stream_for(device).pack({first, last}, staging)) {
      staged->tickets.push_back(std::move(ticket));
    }
    first = last;
  }
  return staged;
}

void FileWriter::write_staged(InFlight& staged) {
  staged.wait();
  const Chunk& chunk = staged.chunk;
  add_checksums(chunk, staged.bytes);
  if (staged.in_target) return wrote(chunk);
  if (buffered()) {
    iovec part{staged.bytes.data(), staged.bytes.size()};
    return put(chunk, {&part, 1});
  }
  const Timer timer(progress_.write_ns);
  if (file_ == nullptr) {
    copy_streaming(target_memory(chunk).data(), staged.bytes.data(), staged.bytes.size());
  } else {
    if (!staged.window) staged.window = window_of(chunk);
    copy_streaming(staged.window->bytes().data(), staged.bytes.data(), staged.bytes.size());
  }
  wrote(chunk);
}

void FileWriter::put(const Chunk& chunk, std::span<iovec> parts) {
  {
    const Timer timer(progress_.write_ns);
    file_->write(parts, chunk.file_offset);
  }
  wrote(chunk);
}

void FileWriter::wrote(const Chunk& chunk) {
  progress_.nbytes_written.fetch_add(chunk.nbytes, std::memory_order_relaxed);
  if (buffered() && !file_->keep_cached()) return file_->evict_behind(chunk.file_offset, chunk.nbytes);
  if (file_ != nullptr && file_->has_writeback()) {
    resources_.write_behind.post(file_, chunk.file_offset, chunk.nbytes);
  }
}

CopyStream& FileWriter::stream_for(int device) {
  if (device == kHost) return *host_;
  if (device == kFetched) return *fetched_;
  return *streams_.at(device);
}

}  // namespace fastshard
