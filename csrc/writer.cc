// SPDX-License-Identifier: Apache-2.0
#include "writer.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <optional>
#include <unordered_map>
#include <vector>

#include "direct_io.h"
#include "error.h"
#include "pack.h"

namespace fastshard {
namespace {

// Staged chunks one writer keeps under way: enough for the copy engine never to wait for the disk.
constexpr size_t kMaxInFlight = 4;
// Windows of memory targets and mapped files: few calls, and shares small enough for all writers.
constexpr uint64_t kWindowNbytes = 16 << 20;
// Direct writes under way: enough for the disk never to wait for the copies.
constexpr unsigned kMaxDirect = 8;
constexpr uint64_t kDirectNbytes = 8 << 20;

uint64_t knob(const char* n, uint64_t d) {
  const char* v = getenv(n);
  return v ? strtoull(v, nullptr, 10) : d;
}

}  // namespace

// A chunk being copied into its slot. The destructor waits for the copies: only then may the slot go.
struct FileWriter::InFlight {
  InFlight(Progress& totals, const Chunk& what, Slot where) : progress(totals), chunk(what), slot(std::move(where)) {
    const uint64_t now = progress.staged_nbytes += chunk.nbytes;
    uint64_t peak = progress.peak_staged_nbytes;
    while (now > peak && !progress.peak_staged_nbytes.compare_exchange_weak(peak, now)) {
    }
  }
  ~InFlight() {
    for (const auto& ticket : tickets) {
      try {
        ticket->wait();
      } catch (...) {
        // Already known, or about to be thrown for the chunk that failed first.
      }
    }
    progress.staged_nbytes -= chunk.nbytes;
  }
  InFlight(const InFlight&) = delete;
  InFlight& operator=(const InFlight&) = delete;

  void wait() {
    const Timer timer(progress.copy_ns);
    for (const auto& ticket : tickets) ticket->wait();
    tickets.clear();
  }

  Progress& progress;
  const Chunk& chunk;
  Slot slot;
  std::vector<std::unique_ptr<Ticket>> tickets;
};

FileWriter::FileWriter(const FilePlan& plan, std::shared_ptr<OutputFile> file, const Resources& resources,
                       const CopyStreams& streams, std::unique_ptr<CopyStream> fetched, Progress& progress)
    : plan_(plan),
      file_(std::move(file)),
      resources_(resources),
      streams_(streams),
      fetched_(std::move(fetched)),
      host_(resources.host.open(0)),
      progress_(progress) {
  ScheduleLimits limits;
  limits.slot_nbytes = resources_.ring.slot_nbytes();
  if (direct()) {
    limits.in_place = false;
    limits.block_nbytes = file_->block_nbytes();
    limits.slot_nbytes =
        std::min(limits.slot_nbytes, knob("DCHUNK", kDirectNbytes)) / limits.block_nbytes * limits.block_nbytes;
    limits.packed_nbytes = limits.slot_nbytes;
    writers_ = knob("DWRITERS", 1);
  } else if (!buffered()) {
    limits.in_place = false;
    limits.packed_nbytes = kWindowNbytes;
    writers_ = resources_.workers.threads();
  }
  schedule_ = make_schedule(plan_, limits);
  writers_ = std::clamp<size_t>(schedule_.chunks.size(), 1, writers_);
}

const Chunk* FileWriter::claim() {
  const size_t index = next_chunk_++;
  return index < schedule_.chunks.size() ? &schedule_.chunks[index] : nullptr;
}

// For each chunk: take a slot, ask each device that owns a part to pack into it, wait for the oldest, write
// it at its offset and let the slot go. A writer blocks for a slot only while it holds none, so one slot is
// enough to finish.
void FileWriter::write_chunks() {
  if (direct()) return write_chunks_directly();
  std::deque<std::unique_ptr<InFlight>> in_flight;
  const Chunk* next = claim();
  while (next != nullptr || !in_flight.empty()) {
    if (progress_.stop) throw Cancelled();
    if (next != nullptr && write_unstaged(*next)) {
      next = claim();
      continue;
    }
    if (next != nullptr && in_flight.size() < kMaxInFlight) {
      std::optional<Slot> slot = in_flight.empty() ? resources_.ring.acquire() : resources_.ring.try_acquire();
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
  std::deque<std::unique_ptr<InFlight>> copying;
  std::unordered_map<uint64_t, std::unique_ptr<InFlight>> writing;  // by file offset
  const unsigned depth = (unsigned)knob("DDEPTH", kMaxDirect);
  const std::unique_ptr<DirectQueue> queue =  // the first to go: waits for the writes
      make_direct_queue(file_->descriptor(), file_->path(), file_->block_nbytes(), depth,
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
    const bool none_held = copying.empty() && writing.empty();
    if (next != nullptr && copying.size() < kMaxInFlight && writing.size() < depth) {
      std::optional<Slot> slot = none_held ? resources_.ring.acquire() : resources_.ring.try_acquire();
      if (slot) {
        auto staged = stage(*next, std::move(*slot));
        // One that this thread has packed is ready, whatever devices still bring for those before it.
        const bool ready = staged->tickets.empty();
        ready ? copying.push_front(std::move(staged)) : copying.push_back(std::move(staged));
        next = claim();
        if (!ready) continue;
      }
    }
    if (copying.empty() || writing.size() == depth) {
      if (!writing.empty()) finish_one(true);
      continue;
    }
    std::unique_ptr<InFlight> staged = std::move(copying.front());
    copying.pop_front();
    staged->wait();
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
  std::vector<iovec> parts;
  parts.reserve(chunk.op_count);
  for (const CopyOp& op : schedule_.ops_of(chunk)) {
    for (uint64_t done = 0; done < op.nbytes;) {
      const uint64_t at = op.first_byte + done;
      const uint64_t run_left =
          op.source->contiguous() ? op.nbytes - done : op.source->run_nbytes - at % op.source->run_nbytes;
      const uint64_t nbytes = std::min(op.nbytes - done, run_left);
      parts.push_back({const_cast<std::byte*>(packed_address(*op.source, at)), nbytes});
      done += nbytes;
    }
  }
  put(chunk, parts);
}

void FileWriter::pack_into_target(const Chunk& chunk) {
  const auto pack = [&](std::span<std::byte> bytes) {
    const Timer timer(progress_.copy_ns);
    Staging target{bytes, {}};
    host_->pack(schedule_.ops_of(chunk), target);
  };
  if (file_ == nullptr) {
    pack({plan_.memory + chunk.file_offset, chunk.nbytes});
  } else {
    const Window window = [&] {
      const Timer timer(progress_.write_ns);
      return file_->window(chunk.file_offset, chunk.nbytes);
    }();
    pack(window.bytes());
  }
  wrote(chunk);
}

std::unique_ptr<FileWriter::InFlight> FileWriter::stage(const Chunk& chunk, Slot slot) {
  auto staged = std::make_unique<InFlight>(progress_, chunk, std::move(slot));
  if (chunk.route == Route::device && !streams_.empty()) staged->slot.pin(*resources_.devices.begin()->second);
  (staged->slot.pinned() ? progress_.staged_pinned : progress_.staged_pageable) = true;
  const Timer timer(progress_.copy_ns);
  Staging staging{staged->slot.bytes(), staged->slot.scratch()};
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
  const std::span<std::byte> bytes = staged.slot.bytes().first(chunk.nbytes);
  if (buffered()) {
    iovec part{bytes.data(), bytes.size()};
    return put(chunk, {&part, 1});
  }
  {
    const Timer timer(progress_.write_ns);
    if (file_ == nullptr) {
      std::memcpy(plan_.memory + chunk.file_offset, bytes.data(), bytes.size());
    } else {
      const Window window = file_->window(chunk.file_offset, chunk.nbytes);
      std::memcpy(window.bytes().data(), bytes.data(), bytes.size());
    }
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
