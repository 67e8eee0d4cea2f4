// SPDX-License-Identifier: Apache-2.0
// The writer of one file of a save, which brings the tensors' bytes to their places in the file. There is a writer for
// each route: through the page cache, past it, and into memory.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "device/device.h"
#include "device/ring.h"
#include "file/output.h"
#include "file/threads.h"
#include "plan/plan.h"

namespace fastshard {

// The parts of its engine that a save uses. All of them outlive the save.
struct Resources {
  Ring& ring;
  WorkerPool& workers;
  WorkerPool& relief;  // what ends a save and takes it over, if the workers step aside; else the workers
  WriteBehind& write_behind;
  LoneThreads& lone_threads;
  Device& host;
  std::map<int, Device*> devices;  // by CUDA ordinal, for those in the plan
  int io_uring_refused = 0;        // errno; 0: direct writes may use it
};

// Texts for Stats::fallbacks, each of them once. Thread-safe.
class Fallbacks {
 public:
  void add(const std::string& text) {
    const std::lock_guard lock(mutex_);
    texts_.insert(text);
  }
  std::set<std::string> all() const {
    const std::lock_guard lock(mutex_);
    return texts_;
  }

 private:
  mutable std::mutex mutex_;
  std::set<std::string> texts_;
};

// What all writers of a save add up, and what stops them.
struct Progress {
  std::atomic<bool> stop = false;
  std::atomic<uint64_t> nbytes_written = 0;
  std::atomic<int64_t> copy_ns = 0, write_ns = 0, sync_ns = 0;
  std::atomic<uint64_t> staged_nbytes = 0, peak_staged_nbytes = 0;
  std::atomic<bool> staged_pinned = false, staged_pageable = false, copied_in_place = false;
  std::atomic<uint64_t> unpacked = 0;       // chunks that enqueue() has left host memory of
  std::atomic<int> io_uring_refused = 0;    // errno
  std::atomic<uint64_t> mapped_nbytes = 0;  // stored through mappings, beside what is written
  std::atomic<int> mapping_refused = 0;     // errno
  std::atomic<uint64_t> written_runs = 0;   // of files with places
  std::atomic<bool> may_store_runs = true;  // the kernel copies short ones into mappings
  std::atomic<bool> source_shared = false;  // with a forked process, so that mappings are not used
  Fallbacks fallbacks;

  bool may_map() const { return mapping_refused == 0 && !source_shared; }
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

// Page-locked scratch for what is enqueued before a save begins, from the front: slots that are kept until it has
// ended.
struct EarlyScratch {
  std::vector<Slot> slots{};
  std::span<std::byte> left{};  // of the last

  const std::byte* base() const { return slots.empty() ? nullptr : slots.back().base(); }
};

// What writes one file of the plan. Threads are given to it by the save: one for certain, and while they have nothing
// else to do up to writers() at once.
class FileWriter {
 public:
  virtual ~FileWriter() = default;
  // The number of threads that can work on the file at once.
  virtual size_t writers() const = 0;
  // Called once, before any share begins, by the thread that starts the save: enqueues copies out of devices whose
  // target can take them all at once. Returns why not all that the file has of devices is enqueued; empty if it is.
  virtual std::string enqueue(EarlyScratch&) { return "copies go through staging buffers"; }
  // One thread's share: claims chunks until none is left, or, beside another thread's share, until other work waits.
  // Throws Cancelled when the save has been stopped.
  virtual void write_chunks() = 0;
  // From now on threads that have stepped aside claim no more chunks: one that has not does them all.
  virtual void relieve() {}
  // Returns whether all chunks are claimed.
  virtual bool exhausted() const = 0;
  // The CRC-32 of each item, once all chunks are written, if they were asked for.
  virtual std::vector<uint32_t> checksums() const = 0;
};

// The writer for the file's write path, or for the plan's memory where `file` is null. `fetched` brings the bytes that
// only Python can.
std::unique_ptr<FileWriter> make_writer(const FilePlan& plan, std::shared_ptr<OutputFile> file,
                                        const Resources& resources, const CopyStreams& streams,
                                        std::unique_ptr<CopyStream> fetched, bool checksums, Progress& progress);

}  // namespace fastshard
