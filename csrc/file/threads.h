// SPDX-License-Identifier: Apache-2.0
// The engine's threads: writers that run whatever is posted, and one that starts writeback behind them.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "file/output.h"

namespace fastshard {

// Starts a thread that no signal of the process interrupts. Throws std::system_error or std::bad_alloc when it cannot
// be started; `function` has not run then.
std::thread start_thread(const char* name, std::function<void()> function);

// Called by a thread that nobody waits for: from then on, waking it up takes no processor from whoever does.
void step_back() noexcept;
// Called by a thread that works beside a job: wherever both want a processor, it gets a tenth of it. For good: without
// privileges a thread cannot take that back.
void give_way() noexcept;
// The same for a thread that others can relieve: it gets a processor that nobody else wants, and hardly ever another
// one (SCHED_IDLE). Such a thread must not hold what others wait for: a lock of the process's memory, of the
// interpreter or of a driver. Returns 0, or the errno of what was refused; then it gives way.
int step_aside() noexcept;
// Returns whether the calling thread has stepped aside. Threads that it starts would be as it is.
bool stepped_aside() noexcept;

// Runs posted tasks on at most `threads` threads, first come first served; threads start when needed. What is offered
// runs on threads for which nothing is posted. Tasks must not throw. Thread-safe.
class WorkerPool {
 public:
  // `aside`: the threads step aside.
  explicit WorkerPool(size_t threads, bool aside = false) : threads_(threads), aside_(aside) {}
  ~WorkerPool();  // runs what was posted, then joins

  // Throws std::system_error or std::bad_alloc when no thread runs and none can be started, or when there is no memory
  // for the task; the task was not posted then.
  void post(std::function<void()> task);
  // Offers a task that may as well not run, or run late. It is dropped when there is no thread or no memory for it.
  void offer(std::function<void()> task) noexcept;
  // Returns whether something that was posted waits for a thread. Offered tasks that take long end then.
  bool wanted() const { return waiting_.load(std::memory_order_relaxed) != 0; }
  // Calls work(0) to work(count - 1) on the workers and on the calling thread, which does all of it when no worker can
  // be started. Returns when all calls have returned; `work` must not throw.
  void run_all(size_t count, const std::function<void(size_t)>& work);
  size_t threads() const { return threads_; }
  // Sees to it that there is a thread if one can be started: threads that have stepped aside start none.
  void require_thread() noexcept;
  bool aside() const { return aside_; }
  // What the threads are at they do as others do, where the process has the right to that; then they step aside again.
  void hasten() noexcept;
  // Why the threads could not step aside; 0 if they could, or have not tried yet.
  int aside_refused() const { return aside_refused_; }

 private:
  void start_one();
  void start_one_if_needed();
  void run();

  const size_t threads_;
  const bool aside_;
  std::atomic<int> aside_refused_ = 0;  // errno
  std::mutex mutex_;
  std::condition_variable posted_;
  std::deque<std::function<void()>> tasks_, offered_;
  std::atomic<size_t> waiting_ = 0;  // tasks_.size()
  std::vector<std::thread> running_;
  size_t idle_ = 0;
  bool closing_ = false;
};

// Threads of which each runs one task and ends: for tasks that mostly wait. Thread-safe.
class LoneThreads {
 public:
  ~LoneThreads();  // waits for all of them

  // Throws std::system_error or std::bad_alloc when no thread can be started; `task`, which must not throw, has not run
  // then.
  void start(const char* name, std::function<void()> task);
  // Becomes true when the threads are waited for: what nobody needs ends then.
  const std::atomic<bool>& closing() const { return closing_; }

 private:
  struct Lone {
    std::thread thread;
    std::atomic<bool> ended = false;
  };

  std::mutex mutex_;
  std::list<Lone> started_;  // those that have ended go when the next one is started
  std::atomic<bool> closing_ = false;
};

// Tells the kernel to start writing out what the writers have put into the page cache. sync_file_range can
// block for as long as the disk is busy, so it must not run on a writer (DESIGN.md, "Write paths").
// Thread-safe.
class WriteBehind {
 public:
  ~WriteBehind();  // drops what has not been started

  // As WorkerPool's.
  void require_thread() noexcept;
  // Posts a written range. It is a hint only, and dropped when there is no thread or no memory for it.
  void post(std::shared_ptr<OutputFile> file, uint64_t offset, uint64_t nbytes) noexcept;
  // Drops the hints for a finished file.
  void forget(const OutputFile* file);
  // Drops the hints for a file that is about to be synced, and waits for the one that is being followed: its error is
  // known then. The wait costs nothing, as the sync waits for the same disk.
  void settle(const OutputFile* file);

 private:
  struct Range {
    std::shared_ptr<OutputFile> file;
    uint64_t offset;
    uint64_t nbytes;
  };
  void start_if_needed();
  void run();

  std::mutex mutex_;
  std::condition_variable posted_;
  std::condition_variable settled_;
  std::deque<Range> ranges_;
  const OutputFile* followed_ = nullptr;  // whose hint is being followed
  std::thread thread_;
  bool closing_ = false;
};

}  // namespace fastshard
