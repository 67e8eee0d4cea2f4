// SPDX-License-Identifier: Apache-2.0
// What the streams of a device have to share: its multiprocessors, its copy engine, its link.
#include <algorithm>
#include <thread>
#include <utility>
#include <vector>

#include "simulator.h"

namespace simulated {

using std::chrono::steady_clock;

void issue_copies(Stream& stream) {
  if (stream.held_up) return;
  auto& engine = stream.context->copies_out;
  for (Operation& operation : stream.queue) {
    if (operation.after && !operation.after->done) return;
    if (operation.copy_out == nullptr) {
      if (operation.run || operation.sleep.count() != 0) return;
      continue;
    }
    CopyOut& copy = *operation.copy_out;
    if (copy.issued) continue;
    copy.issued = true;
    size_t ahead = 0;
    for (const auto& other : engine) ahead += other->stream == &stream ? 0 : other->nbytes;
    stream.most_ahead = std::max(stream.most_ahead, ahead);
    engine.push_back(operation.copy_out);
  }
}

void wait_for_copy_engine(std::unique_lock<std::mutex>& lock, Context& context, const CopyOut& copy) {
  const State& s = state();
  state().changed.wait(lock, [&] {
    return context.copies_out.front().get() == &copy || s.settings.copy_fifo == 0 || context.error != CUDA_SUCCESS;
  });
}

void leave_copy_engine(Context& context, const CopyOut& copy) {
  std::erase_if(context.copies_out, [&](const auto& other) { return other.get() == &copy; });
  context.enqueued_out -= copy.nbytes;
}

void wait_for_multiprocessors(std::unique_lock<std::mutex>& lock, const Stream& stream) {
  Context& context = *stream.context;
  WaitingKernel kernel{stream.priority};
  context.waiting.push_back(&kernel);
  state().changed.wait(lock,
                       [&] { return context.job == nullptr || kernel.admitted || context.error != CUDA_SUCCESS; });
  std::erase(context.waiting, &kernel);
}

void step_job(Context& context) {
  ++context.job->ended;
  for (WaitingKernel* kernel : context.waiting) kernel->admitted |= kernel->priority < context.job->priority;
  state().changed.notify_all();
}

void end_job(Context& context) {
  context.job = nullptr;
  state().changed.notify_all();
}

void wait_for_running_work(std::unique_lock<std::mutex>& lock, Context& context) {
  const uint64_t last = context.begun;
  const Job* const job = context.job.get();
  const uint64_t ended = job == nullptr ? 0 : job->ended;
  state().changed.wait(lock, [&] {
    const bool job_waits = job != nullptr && context.job.get() == job && job->ended == ended;
    return !job_waits && (context.running.empty() || *context.running.begin() > last);
  });
}

void wait_for_enqueued_work(std::unique_lock<std::mutex>& lock, Context& context) {
  std::vector<std::pair<std::shared_ptr<Stream>, uint64_t>> ends;
  if (context.legacy_stream != nullptr) ends.emplace_back(context.legacy_stream, context.legacy_stream->enqueued);
  for (const auto& [handle, stream] : state().streams) {
    if (stream->context == &context) ends.emplace_back(stream, stream->enqueued);
  }
  state().changed.wait(lock, [&] {
    return std::ranges::all_of(ends, [](const auto& end) { return end.first->completed >= end.second; });
  });
}

void occupy_link(Context* context, size_t nbytes) {
  State& s = state();
  steady_clock::time_point done;
  {
    const std::lock_guard lock(s.mutex);
    if (s.bandwidth <= 0) return;
    const std::chrono::duration<double> needed(static_cast<double>(nbytes) / s.bandwidth);
    done = std::max(steady_clock::now(), context->link_busy_until) +
           std::chrono::duration_cast<steady_clock::duration>(needed);
    context->link_busy_until = done;
  }
  std::this_thread::sleep_until(done);
}

}  // namespace simulated
