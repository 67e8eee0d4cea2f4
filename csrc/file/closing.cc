// SPDX-License-Identifier: Apache-2.0
#include "file/closing.h"

#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <thread>

#include "file/threads.h"

namespace fastshard {
namespace {

struct File {
  int descriptor;
  dev_t device;
  ino_t inode;
  uint64_t nbytes;

  static std::optional<File> of(int descriptor) {
    struct stat info;
    if (fstat(descriptor, &info) != 0) return std::nullopt;
    return File{descriptor, info.st_dev, info.st_ino, static_cast<uint64_t>(info.st_blocks) * 512};
  }
  bool is(const File& other) const { return device == other.device && inode == other.inode; }
};

}  // namespace

struct Closing::State {
  std::vector<File> files;
  size_t closed = 0;  // so many of them are; the next one may be
  bool done = false;
  std::condition_variable changed;
  State* next = nullptr;  // of the registry
};

namespace {

// When so many wait, whoever brings another one closes it: saves in a row then wait for the disk instead of piling up.
constexpr size_t kMostWaiting = 32;
// So much room may the files of earlier saves still take when a save is about to replace others.
constexpr uint64_t kMostNbytes = 32 << 20;
// So long the thread stays idle before it ends. Thousands of saves in a row then start it only once.
constexpr std::chrono::seconds kIdle(1);

// What close_soon() was given, the one that is being closed first.
struct Queue {
  std::deque<File> files;
  uint64_t nbytes = 0;  // that they take
  bool served = false;  // by a thread
  std::condition_variable posted, closed;
};

// What is being closed now. The mutex guards what the states hold; it is never held while a descriptor is closed, so
// that no fork waits for a disk. The registry is never destroyed, as a thread may outlive static objects.
struct Registry {
  std::mutex mutex;
  Closing::State* first = nullptr;
  Queue* queue = new Queue;

  void add(Closing::State& state) {
    state.next = first;
    first = &state;
  }
  void remove(const Closing::State& state) {
    Closing::State** link = &first;
    while (*link != nullptr && *link != &state) link = &(*link)->next;
    if (*link != nullptr) *link = state.next;
  }
};
// NOLINTNEXTLINE(bugprone-throwing-static-initialization): without memory for this nothing can be imported
Registry* const registry = new Registry;

bool leads_to(const File& file) {
  const auto found = File::of(file.descriptor);
  return found && found->is(file);
}

// The closing thread exists in the parent only. Whether it had closed the first descriptor already is told by the file
// that the descriptor leads to, as its number may have been given to another file since.
void close_in_child() {
  for (size_t index = 0; index < registry->queue->files.size(); ++index) {
    const File& file = registry->queue->files[index];
    if (index > 0 || leads_to(file)) close(file.descriptor);
  }
  registry->queue = new Queue;  // the other one may be waited on, by threads that are not here
  for (Closing::State* state = registry->first; state != nullptr; state = state->next) {
    for (size_t index = state->closed; index < state->files.size(); ++index) {
      const File& file = state->files[index];
      if (index > state->closed || leads_to(file)) close(file.descriptor);
    }
    state->done = true;
  }
  registry->first = nullptr;
  registry->mutex.unlock();
}

void watch_forks() {
  static const int once =
      pthread_atfork([] { registry->mutex.lock(); }, [] { registry->mutex.unlock(); }, close_in_child);
  static_cast<void>(once);
}

void close_all(const std::shared_ptr<Closing::State>& state) {
  for (const File& file : state->files) {
    close(file.descriptor);
    const std::lock_guard lock(registry->mutex);
    ++state->closed;
  }
  const std::lock_guard lock(registry->mutex);
  registry->remove(*state);
  state->done = true;
  state->changed.notify_all();
  registry->queue->closed.notify_all();
}

void serve(Queue& queue) {
  step_back();
  std::unique_lock lock(registry->mutex);
  while (queue.posted.wait_for(lock, kIdle, [&] { return !queue.files.empty(); })) {
    const File file = queue.files.front();
    lock.unlock();
    close(file.descriptor);
    lock.lock();
    queue.files.pop_front();
    queue.nbytes -= file.nbytes;
    queue.closed.notify_all();
  }
  queue.served = false;
}

// Whether a thread will close it.
bool posted(const File& file) {
  const std::lock_guard lock(registry->mutex);
  Queue& queue = *registry->queue;
  if (queue.files.size() >= kMostWaiting) return false;
  queue.files.push_back(file);
  if (!queue.served) {
    try {
      start_thread("fastshard-close", [&queue] { serve(queue); }).detach();
    } catch (...) {
      queue.files.pop_back();
      throw;
    }
    queue.served = true;
  }
  queue.nbytes += file.nbytes;
  queue.posted.notify_one();
  return true;
}

}  // namespace

void close_soon(int descriptor) noexcept {
  try {
    watch_forks();
    if (const auto file = File::of(descriptor); file && posted(*file)) return;
  } catch (const std::exception&) {  // no thread or no memory to be had
  }
  close(descriptor);
}

void wait_for_room() noexcept {
  std::unique_lock lock(registry->mutex);
  Queue& queue = *registry->queue;
  queue.closed.wait(lock, [&] { return queue.nbytes <= kMostNbytes; });
}

bool wait_for_closing() noexcept {
  std::unique_lock lock(registry->mutex);
  Queue& queue = *registry->queue;
  const auto all_closed = [&] { return queue.files.empty() && registry->first == nullptr; };
  if (all_closed()) return false;
  queue.closed.wait(lock, all_closed);
  return true;
}

void Closing::start(const std::vector<int>& descriptors) noexcept {
  try {
    watch_forks();
    auto state = std::make_shared<State>();
    state->files.reserve(descriptors.size());
    for (const int descriptor : descriptors) {
      if (const auto file = File::of(descriptor)) {
        state->files.push_back(*file);
      } else {
        close(descriptor);
      }
    }
    const std::lock_guard lock(registry->mutex);
    start_thread("fastshard-close", [state] { close_all(state); }).detach();
    registry->add(*state);
    state_ = std::move(state);
  } catch (const std::exception&) {  // no thread or no memory to be had
    for (const int descriptor : descriptors) close(descriptor);
  }
}

bool Closing::done() const {
  const std::lock_guard lock(registry->mutex);
  return state_ == nullptr || state_->done;
}

bool Closing::wait(double seconds) const {
  std::unique_lock lock(registry->mutex);
  if (state_ == nullptr) return true;
  return state_->changed.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return state_->done; });
}

}  // namespace fastshard
