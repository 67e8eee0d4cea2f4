// SPDX-License-Identifier: Apache-2.0
// The engine's threads: writers that run whatever is posted, and one that starts writeback behind them.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "file.h"

namespace fastshard {

// A thread that no signal of the process interrupts. Throws std::system_error or std::bad_alloc where there is none to
// be had; `function` has not run then.
std::thread start_thread(const char* name, std::function<void()> function);

// Runs posted tasks on at most `threads` threads, first come first served; threads start when needed.
// Tasks must not throw. Thread-safe.
class WorkerPool {
 public:
  explicit WorkerPool(size_t threads) : threads_(threads) {}
  ~WorkerPool();  // runs what was posted, then joins

  void post(std::function<void()> task);
  size_t threads() const { return threads_; }

 private:
  void run();

  const size_t threads_;
  std::mutex mutex_;
  std::condition_variable posted_;
  std::deque<std::function<void()>> tasks_;
  std::vector<std::thread> running_;
  size_t idle_ = 0;
  bool closing_ = false;
};

// Tells the kernel to start writing out what the writers have put into the page cache. sync_file_range can
// block for as long as the disk is busy, so it must not run on a writer (DESIGN.md, "Write paths").
// Thread-safe.
class WriteBehind {
 public:
  ~WriteBehind();  // drops what has not been started

  void post(std::shared_ptr<OutputFile> file, uint64_t offset, uint64_t nbytes);
  // Drops the hints for a finished file.
  void forget(const OutputFile* file);

 private:
  struct Range {
    std::shared_ptr<OutputFile> file;
    uint64_t offset;
    uint64_t nbytes;
  };
  void run();

  std::mutex mutex_;
  std::condition_variable posted_;
  std::deque<Range> ranges_;
  std::thread thread_;
  bool closing_ = false;
};

}  // namespace fastshard
