// SPDX-License-Identifier: Apache-2.0
#include "closing.h"

#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <thread>

#include "threads.h"

namespace fastshard {
namespace {

struct File {
  int descriptor;
  dev_t device;
  ino_t inode;

  static std::optional<File> of(int descriptor) {
    struct stat info;
    if (fstat(descriptor, &info) != 0) return std::nullopt;
    return File{descriptor, info.st_dev, info.st_ino};
  }
  bool operator==(const File&) const = default;
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

// What is being closed now. The mutex guards what the states hold; it is never held while a descriptor is closed, so that
// no fork waits for a disk. Never destroyed: a thread may outlive static objects.
struct Registry {
  std::mutex mutex;
  Closing::State* first = nullptr;

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
Registry* const registry = new Registry;

// The thread that closes is the parent's. Whether the parent had closed the one in question is told by what it leads
// to: its number may have been given to another file since.
void close_in_child() {
  for (Closing::State* state = registry->first; state != nullptr; state = state->next) {
    for (size_t index = state->closed; index < state->files.size(); ++index) {
      const File& file = state->files[index];
      if (index > state->closed || File::of(file.descriptor) == file) close(file.descriptor);
    }
    state->done = true;
  }
  registry->first = nullptr;
  registry->mutex.unlock();
}

void watch_forks() {
  static const int once = pthread_atfork([] { registry->mutex.lock(); }, [] { registry->mutex.unlock(); },
                                         close_in_child);
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
}

}  // namespace

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
