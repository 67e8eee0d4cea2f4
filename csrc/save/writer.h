// SPDX-License-Identifier: Apache-2.0
// One file's writers: chunk by chunk, from where the tensors lie to where the file's bytes belong.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "save/crc32.h"
#include "device/device.h"
#include "file/output.h"
#include "device/ring.h"
#include "plan/schedule.h"
#include "file/source_file.h"
#include "file/threads.h"

namespace fastshard {

// What a save uses of its engine; all of it outlives the save.
struct Resources {
  Ring& ring;
  WorkerPool& workers;
  WriteBehind& write_behind;
  Device& host;
  std::map<int, Device*> devices;  // by CUDA ordinal, for those in the plan
  int io_uring_refused = 0;        // errno; 0: direct writes may use it
};

// What all writers of a save add up, and what stops them.
struct Progress {
  std::atomic<bool> stop = false;
  std::atomic<uint64_t> nbytes_written = 0;
  std::atomic<int64_t> copy_ns = 0, write_ns = 0, sync_ns = 0;
  std::atomic<uint64_t> staged_nbytes = 0, peak_staged_nbytes = 0;
  std::atomic<bool> staged_pinned = false, staged_pageable = false, copied_in_place = false;
  std::atomic<int> io_uring_refused = 0;  // errno
};

// Adds the time it lives to a counter of nanoseconds.
class Timer {
 public:
  explicit Timer(std::atomic<int64_t>& total) : total_(total) {}
  ~Timer() {
    const auto spent = std::chrono::steady_clock::now() - started_;
    total_ += std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count();
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

 private:
  std::atomic<int64_t>& total_;
  const std::chrono::steady_clock::time_point started_ = std::chrono::steady_clock::now();
};

// One copy stream for each device of a save; files share them.
using CopyStreams = std::map<int, std::unique_ptr<CopyStream>>;

// A file of the plan on its way. A file of the page cache has one writer (a second one only fights for the
// inode's lock) and one that takes checksums, a direct one, which holds that lock with others, two writers; mapped
// files and memory are shared by all.
class FileWriter {
 public:
  // `file` is null when the plan's target is memory. `fetched` brings what only Python can.
  FileWriter(const FilePlan& plan, std::shared_ptr<OutputFile> file, const Resources& resources,
             const CopyStreams& streams, std::unique_ptr<CopyStream> fetched, bool checksums, Progress& progress);

  // Threads that can work on it at once.
  size_t writers() const { return writers_; }
  // One writer's share: claims chunks until none is left. Throws Cancelled when the save has been stopped.
  void write_chunks();
  // CRC-32 of each item, once all chunks are written, if they were asked for.
  std::vector<uint32_t> checksums() const;

 private:
  struct InFlight;
  class SourcePages;

  bool buffered() const { return file_ != nullptr && file_->write_path() == WritePath::buffered; }
  bool direct() const { return file_ != nullptr && file_->write_path() == WritePath::direct; }
  void write_chunks_in_turn();
  void write_chunks_directly();
  void check_chunks_in_place();
  void check_in_place(const Chunk& chunk);
  const Chunk* claim();
  int node_of(const Chunk& chunk) const;
  bool write_unstaged(const Chunk& chunk);
  void write_in_place(const Chunk& chunk);
  void pack_into_target(const Chunk& chunk);
  std::span<std::byte> target_memory(const Chunk& chunk);
  Mapping window_of(const Chunk& chunk);
  std::unique_ptr<InFlight> stage(const Chunk& chunk, Slot slot);
  void place(InFlight& staged);
  void write_staged(InFlight& staged);
  std::span<const std::byte> whole_blocks(const InFlight& staged) const;
  void put(const Chunk& chunk, std::span<iovec> parts);
  void wrote(const Chunk& chunk);
  void add_checksums(const Chunk& chunk, std::span<const std::byte> bytes);
  CopyStream& stream_for(int device);

  const FilePlan& plan_;
  const std::shared_ptr<OutputFile> file_;
  const Resources& resources_;
  const CopyStreams& streams_;
  const std::unique_ptr<CopyStream> fetched_;
  const std::unique_ptr<CopyStream> host_;
  Progress& progress_;
  const bool from_files_;        // some items lie in files
  std::deque<Crc32> checksums_;  // of the items; none if not asked for
  FileSchedule schedule_;
  size_t writers_ = 1;
  std::atomic<size_t> next_chunk_ = 0, next_checked_ = 0;
  std::atomic<bool> has_writer_ = false;
  std::atomic<bool> registration_refused_ = false;
};

}  // namespace fastshard
