// SPDX-License-Identifier: Apache-2.0
// One save under way: its files, their chunks, and what the writers do with them.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "device.h"
#include "fetch.h"
#include "file.h"
#include "ring.h"
#include "schedule.h"
#include "threads.h"

namespace fastshard {

struct Stats {
  uint64_t files = 0;
  uint64_t nbytes = 0;                 // of the finished files
  double seconds = 0;                  // from submit to finish
  double copy_seconds = 0;             // thread-seconds spent packing or waiting for device copies
  double write_seconds = 0;            // thread-seconds in pwrite (mapped: in page population)
  double sync_seconds = 0;             // thread-seconds in fsync
  std::string write_path;              // "buffered", "mapped", "memory"; joined by "+" where files differ
  std::string staging;                 // "none", "pageable", "pinned"
  uint64_t staging_nbytes = 0;         // peak of staged bytes held at once
  uint64_t device_scratch_nbytes = 0;  // device memory that was packed in
  std::vector<std::string> fallbacks;
};

// What a save uses of its engine; all of it outlives the save.
struct Resources {
  Ring& ring;
  WorkerPool& workers;
  WriteBehind& write_behind;
  Device& host;
  std::map<int, Device*> devices;  // by CUDA ordinal, for those in the plan
};

// Thread-safe. Tensors must stay alive and unchanged until the save is finished.
class Save : public std::enable_shared_from_this<Save> {
 public:
  // Orders the copies behind the caller's `streams` (by CUDA ordinal), makes and reserves every file. Throws
  // with nothing left behind.
  Save(SavePlan plan, const std::map<int, uintptr_t>& streams, WritePath write_path, bool durable, Resources resources);
  ~Save();

  // Gives the work to the writers; once.
  void start();

  // True when finished, false after `seconds` or when fetch() has something. Throws what the save failed with.
  bool wait(double seconds);
  bool finished() const;
  // Blocks until the save is finished, however it ends.
  void settle();
  // Stops as soon as the chunks under way are done; a save that is through with them stays as it is.
  void cancel();
  // What this thread, or anybody, took with fetch() will not be brought any more.
  void disown_fetches(bool anybodys) { fetches_.disown(anybodys); }

  std::optional<FetchRequest> fetch() { return fetches_.take(); }
  void fetched(uint64_t id) { fetches_.complete(id); }

  uint64_t nbytes() const { return nbytes_; }
  uint64_t nbytes_written() const { return nbytes_written_.load(std::memory_order_relaxed); }
  Stats stats() const;

 private:
  struct FileJob;
  struct InFlight;
  using Clock = std::chrono::steady_clock;

  void run(FileJob& job);
  void write_chunks(FileJob& job);
  int node_of(FileJob& job, const Chunk& chunk) const;
  bool write_unstaged(FileJob& job, const Chunk& chunk);
  void write_in_place(FileJob& job, const Chunk& chunk);
  void pack_into_target(FileJob& job, const Chunk& chunk);
  std::unique_ptr<InFlight> stage(FileJob& job, const Chunk& chunk, Slot slot);
  void write_staged(FileJob& job, InFlight& staged);
  void put(FileJob& job, const Chunk& chunk, std::span<iovec> parts);
  void wrote(FileJob& job, const Chunk& chunk);
  CopyStream& stream_for(FileJob& job, int device);
  std::vector<OutputFile*> files() const;
  void describe_files(Stats& stats) const;
  void fail(std::exception_ptr error);
  void finish();

  const SavePlan plan_;
  const bool durable_;
  Resources resources_;
  uint64_t nbytes_ = 0;
  const Clock::time_point started_ = Clock::now();
  std::unique_ptr<CopyStream> host_stream_;
  std::map<int, std::unique_ptr<CopyStream>> streams_;
  FetchQueue fetches_;
  std::vector<std::unique_ptr<FileJob>> jobs_;

  std::atomic<bool> stop_ = false;
  std::atomic<size_t> unfinished_files_ = 0;
  std::atomic<uint64_t> nbytes_written_ = 0;
  std::atomic<int64_t> copy_ns_ = 0, write_ns_ = 0, sync_ns_ = 0;
  std::atomic<uint64_t> staged_nbytes_ = 0, peak_staged_nbytes_ = 0;
  std::atomic<bool> staged_pinned_ = false, staged_pageable_ = false;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::exception_ptr error_;
  bool ending_ = false;  // all chunks are through: too late to fail or cancel
  bool finished_ = false;
  Stats final_;  // what cannot be told any more once the files are closed
};

}  // namespace fastshard
