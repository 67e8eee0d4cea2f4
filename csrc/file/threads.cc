// SPDX-License-Identifier: Apache-2.0
#include "file/threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <exception>
#include <system_error>

namespace fastshard {

// Signals are the interpreter's business: a thread of ours must not be the one that is interrupted.
std::thread start_thread(const char* name, std::function<void()> function) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread thread;
  try {
    thread = std::thread(std::move(function));
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  pthread_setname_np(thread.native_handle(), name);
  return thread;
}

void step_back() noexcept {
  const sched_param none = {};
  pthread_setschedparam(pthread_self(), SCHED_BATCH, &none);
}

void give_way() noexcept {
  constexpr int kNicer = 10;  // a weight of 110 beside 1024 (kernel/sched/core.c)
  // On Linux this is the calling thread, and what is too much is the most that there is.
  setpriority(PRIO_PROCESS, 0, getpriority(PRIO_PROCESS, 0) + kNicer);
}

namespace {

thread_local bool has_stepped_aside = false;

}  // namespace

int step_aside() noexcept {
  has_stepped_aside = true;
  const sched_param none = {};
  const int refused = pthread_setschedparam(pthread_self(), SCHED_IDLE, &none);
  if (refused != 0) give_way();
  return refused;
}

bool stepped_aside() noexcept { return has_stepped_aside; }

WorkerPool::~WorkerPool() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
  }
  posted_.notify_all();
  for (std::thread& thread : running_) thread.join();
}

void WorkerPool::post(std::function<void()> task) {
  {
    const std::lock_guard lock(mutex_);
    tasks_.push_back(std::move(task));
    try {
      start_one_if_needed();
    } catch (const std::exception&) {
      // No more threads to be had: those that run will do it, if there is one.
      if (running_.empty()) {
        tasks_.pop_back();
        throw;
      }
    }
    waiting_ = tasks_.size();
  }
  posted_.notify_one();
}

void WorkerPool::offer(std::function<void()> task) noexcept {
  try {
    const std::lock_guard lock(mutex_);
    offered_.push_back(std::move(task));
    try {
      start_one_if_needed();
    } catch (const std::exception&) {
      if (running_.empty()) offered_.pop_back();
    }
  } catch (const std::exception&) {
    return;  // no memory for it
  }
  posted_.notify_one();
}

// Under the lock.
void WorkerPool::start_one_if_needed() {
  if (tasks_.size() + offered_.size() > idle_ && running_.size() < threads_) start_one();
}

// Under the lock. The place in the list first: a thread that runs cannot be dropped any more.
void WorkerPool::start_one() {
  if (stepped_aside()) throw std::system_error(EAGAIN, std::generic_category());
  running_.emplace_back();
  try {
    running_.back() = start_thread("fastshard-write", [this] { run(); });
  } catch (...) {
    running_.pop_back();
    throw;
  }
}

void WorkerPool::require_thread() noexcept {
  try {
    const std::lock_guard lock(mutex_);
    if (running_.empty()) start_one();
  } catch (const std::exception&) {
    // Whoever posts does without.
  }
}

void WorkerPool::hasten() noexcept {
  const std::lock_guard lock(mutex_);
  const sched_param none = {};
  for (std::thread& thread : running_) pthread_setschedparam(thread.native_handle(), SCHED_OTHER, &none);
}

void WorkerPool::run_all(size_t count, const std::function<void(size_t)>& work) {
  // Shared, as a worker may come to its task when all is done.
  struct Shared {
    std::atomic<size_t> next = 0;
    std::mutex mutex;
    std::condition_variable all_done;
    size_t done = 0;
  };
  const auto shared = std::make_shared<Shared>();
  const auto take_part = [shared, count, &work] {
    for (size_t index; (index = shared->next++) < count;) {
      work(index);
      const std::lock_guard lock(shared->mutex);
      if (++shared->done == count) shared->all_done.notify_all();
    }
  };
  try {
    for (size_t helpers = std::min(count, threads_ + 1); helpers > 1; --helpers) post(take_part);
  } catch (const std::exception&) {
    // With those there are.
  }
  take_part();
  std::unique_lock lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->done == count; });
}

void WorkerPool::run() {
  int refused = 0;
  std::unique_lock lock(mutex_);
  for (;;) {
    ++idle_;
    posted_.wait(lock, [&] { return closing_ || !tasks_.empty() || !offered_.empty(); });
    --idle_;
    std::deque<std::function<void()>>& queue = tasks_.empty() ? offered_ : tasks_;
    if (queue.empty()) return;
    {
      const std::function<void()> task = std::move(queue.front());
      queue.pop_front();
      waiting_ = tasks_.size();
      lock.unlock();
      if (aside_ && refused == 0) aside_refused_ = refused = step_aside();
      task();
    }  // what it holds goes without the lock
    lock.lock();
  }
}

LoneThreads::~LoneThreads() {
  closing_ = true;
  for (Lone& lone : started_) lone.thread.join();
}

void LoneThreads::start(const char* name, std::function<void()> task) {
  const std::lock_guard lock(mutex_);
  started_.remove_if([](Lone& lone) {
    if (!lone.ended) return false;
    lone.thread.join();
    return true;
  });
  Lone& lone = started_.emplace_back();
  try {
    lone.thread = start_thread(name, [&lone, work = std::move(task)]() mutable {
      work();
      work = nullptr;  // what it holds
      lone.ended = true;
    });
  } catch (...) {
    started_.pop_back();
    throw;
  }
}

WriteBehind::~WriteBehind() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
    ranges_.clear();
  }
  posted_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void WriteBehind::require_thread() noexcept {
  try {
    const std::lock_guard lock(mutex_);
    start_if_needed();
  } catch (const std::exception&) {
    // Hints are dropped.
  }
}

// Under the lock.
void WriteBehind::start_if_needed() {
  if (!thread_.joinable() && !stepped_aside()) thread_ = start_thread("fastshard-flush", [this] { run(); });
}

void WriteBehind::post(std::shared_ptr<OutputFile> file, uint64_t offset, uint64_t nbytes) noexcept {
  try {
    const std::lock_guard lock(mutex_);
    start_if_needed();
    if (!thread_.joinable()) return;
    ranges_.push_back({std::move(file), offset, nbytes});
  } catch (const std::exception&) {
    return;
  }
  posted_.notify_one();
}

void WriteBehind::forget(const OutputFile* file) {
  const std::lock_guard lock(mutex_);
  std::erase_if(ranges_, [&](const Range& range) { return range.file.get() == file; });
}

void WriteBehind::settle(const OutputFile* file) {
  std::unique_lock lock(mutex_);
  std::erase_if(ranges_, [&](const Range& range) { return range.file.get() == file; });
  settled_.wait(lock, [&] { return followed_ != file; });
}

void WriteBehind::run() {
  step_back();
  std::unique_lock lock(mutex_);
  for (;;) {
    posted_.wait(lock, [&] { return closing_ || !ranges_.empty(); });
    if (closing_) return;
    Range range = std::move(ranges_.front());
    ranges_.pop_front();
    followed_ = range.file.get();
    lock.unlock();
    range.file->start_writeback(range.offset, range.nbytes);
    lock.lock();
    followed_ = nullptr;
    settled_.notify_all();
    lock.unlock();
    range.file.reset();  // the last reference may close the file: not under the lock
    lock.lock();
  }
}

}  // namespace fastshard
