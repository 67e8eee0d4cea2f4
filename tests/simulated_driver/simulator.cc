// SPDX-License-Identifier: Apache-2.0
#include "simulator.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <cstring>
#include <string_view>
#include <thread>
#include <utility>

namespace simulated {
namespace {

using std::chrono::microseconds;

// splitmix64: a stream's n-th delay depends on nothing but the seed, however threads are scheduled.
uint64_t mix(uint64_t value) {
  value += 0x9e3779b97f4a7c15;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
  value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
  return value ^ (value >> 31);
}

microseconds delay_of(const Stream& stream, const Operation& operation) {
  if (!operation.run) return {};
  const State& s = state();
  const uint64_t random = mix(mix(s.seed ^ mix(stream.serial)) + stream.completed);
  return microseconds(s.min_delay_us + random % (s.max_delay_us - s.min_delay_us + 1));
}

void sleep(std::unique_lock<std::mutex>& lock, microseconds delay) {
  if (delay.count() == 0) return;
  state().delayed_us += delay.count();
  lock.unlock();
  std::this_thread::sleep_for(delay);
  lock.lock();
}

void run(Context& context, Operation& operation, std::unique_lock<std::mutex>& lock) {
  CUresult result = operation.failure;
  const bool live = std::ranges::all_of(operation.uses, [](const auto& range) { return range->live; });
  if (result == CUDA_SUCCESS && !live) result = CUDA_ERROR_ILLEGAL_ADDRESS;
  if (result == CUDA_SUCCESS && operation.run) {
    for (const auto& range : operation.uses) ++range->running;
    lock.unlock();
    result = operation.run();
    lock.lock();
    for (const auto& range : operation.uses) --range->running;
  }
  if (context.error == CUDA_SUCCESS) context.error = result;
}

void execute(Stream& stream, Operation& operation, std::unique_lock<std::mutex>& lock) {
  State& s = state();
  Context& context = *stream.context;
  if (operation.after) s.changed.wait(lock, [&] { return operation.after->done; });
  sleep(lock, delay_of(stream, operation));
  if (operation.kernel) wait_for_multiprocessors(lock, stream);
  if (operation.copy_out) wait_for_copy_engine(lock, context, *operation.copy_out);
  const uint64_t number = ++context.begun;
  context.running.insert(number);
  sleep(lock, operation.sleep);
  if (context.error == CUDA_SUCCESS) run(context, operation, lock);
  context.running.erase(number);
  if (operation.copy_out) leave_copy_engine(context, *operation.copy_out);
}

void work(std::shared_ptr<Stream> stream) {
  State& s = state();
  std::unique_lock lock(s.mutex);
  for (;;) {
    s.changed.wait(lock, [&] { return stream->queue.empty() ? stream->destroyed : !s.paused; });
    if (stream->queue.empty()) return;
    Operation operation = std::move(stream->queue.front());
    stream->queue.pop_front();
    stream->held_up = operation.copy_out == nullptr;
    execute(*stream, operation, lock);
    stream->held_up = false;
    if (operation.signal) operation.signal->done = true;
    for (const auto& range : operation.uses) --range->pending;
    ++stream->completed;
    --s.in_flight;
    issue_copies(*stream);
    s.changed.notify_all();
  }
}

}  // namespace

State& state() {
  static State* const instance = new State;
  return *instance;
}

void State::restore_settings() {
  settings = {};
  paused = false;
  min_delay_us = 0;
  max_delay_us = 2000;
  seed = 0;
  bandwidth = 0;
}

void State::count(Kind kind, int64_t change) {
  live[kind] += change;
  peak[kind] = std::max(peak[kind], live[kind]);
}

void note_violation(std::string what) { state().violations.push_back(std::move(what)); }

void reject(CUresult result, std::string what) {
  note_violation(std::move(what));
  throw result;
}

std::shared_ptr<Range> find_range(const Ranges& ranges, uintptr_t address, size_t count) {
  auto next = ranges.upper_bound(address);
  if (next == ranges.begin()) return nullptr;
  const auto& range = std::prev(next)->second;
  return range->contains(address, count) ? range : nullptr;
}

std::shared_ptr<Range> find_pieces(uintptr_t address, size_t nbytes) {
  const auto first = find_range(state().allocations, address, 1);
  auto last = first;
  while (last != nullptr && last->begin + last->nbytes < address + nbytes) {
    const auto next = find_range(state().allocations, last->begin + last->nbytes, 1);
    last = next != nullptr && next->bytes == last->bytes + last->nbytes ? next : nullptr;
  }
  return last == nullptr ? nullptr : first;
}

bool overlaps(const Ranges& ranges, uintptr_t address, size_t count) {
  const auto next = ranges.lower_bound(address);
  if (next != ranges.end() && next->first - address < count) return true;
  return find_range(ranges, address, 1) != nullptr;
}

std::shared_ptr<Stream> start_stream(Context* context, unsigned flags, int priority) {
  auto stream = std::make_shared<Stream>();
  stream->context = context;
  stream->priority = std::clamp(priority, kGreatestPriority, kLeastPriority);
  stream->blocking = (flags & CU_STREAM_NON_BLOCKING) == 0;
  stream->serial = state().next_serial++;
  // Signals are for the program's own threads, as with the real driver's workers.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread(work, stream).detach();
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return stream;
}

std::shared_ptr<Stream> legacy_stream(Context* context) {
  if (context->legacy_stream == nullptr) context->legacy_stream = start_stream(context);
  return context->legacy_stream;
}

void enqueue(const std::shared_ptr<Stream>& stream, Operation operation) {
  for (const auto& range : operation.uses) ++range->pending;
  if (operation.copy_out) {
    Context& context = *stream->context;
    context.enqueued_out += operation.copy_out->nbytes;
    context.peak_enqueued_out = std::max(context.peak_enqueued_out, context.enqueued_out);
  }
  stream->queue.push_back(std::move(operation));
  ++stream->enqueued;
  ++state().in_flight;
  issue_copies(*stream);
  state().changed.notify_all();
}

void retire(std::unique_lock<std::mutex>& lock, Range& range, const char* what) {
  if (range.pending != 0) note_violation(std::string(what) + " with copies pending");
  range.live = false;
  state().changed.wait(lock, [&] { return range.running == 0; });
}

}  // namespace simulated
