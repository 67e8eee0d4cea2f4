// SPDX-License-Identifier: Apache-2.0
// What tests call (tests/simcuda.py wraps it). Functions that can be misused answer 0, or -1 when the
// arguments make no sense.
#include <algorithm>
#include <cstring>
#include <string_view>

#include "call.h"

using namespace simulated;

#define SIM_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr std::string_view kKindNames[kKindCount] = {"streams",          "events",          "modules",
                                                     "registrations",    "allocations",     "contexts",
                                                     "registered_bytes", "allocated_bytes", "requested_bytes"};

int kind_of(const char* name) {
  const auto found = std::ranges::find(kKindNames, std::string_view(name));
  return found == std::end(kKindNames) ? -1 : static_cast<int>(found - kKindNames);
}

int add_failure(std::string_view function, int nth, int result, bool asynchronous) {
  const auto known = std::ranges::any_of(entry_points(), [&](const auto& entry) { return function == entry.name; });
  if (!known || nth < 0 || result == CUDA_SUCCESS) return -1;
  if (asynchronous && !function.ends_with("Async") && function != "cuLaunchKernel") return -1;
  const std::lock_guard lock(state().mutex);
  state().functions[std::string(function)].failures.push_back({nth, static_cast<CUresult>(result), asynchronous});
  return 0;
}

int64_t figure_of(const std::map<int, int64_t>& figures, int key) {
  const auto found = figures.find(key);
  return found == figures.end() ? 0 : found->second;
}

std::shared_ptr<Stream> stream_of(CUstream handle) {
  const auto found = state().streams.find(reinterpret_cast<uintptr_t>(handle));
  return found == state().streams.end() ? nullptr : found->second;
}

}  // namespace

// The `nth` next call (1: the very next; 0: every one) of a function returns `result`.
SIM_EXPORT int sim_fail(const char* function, int nth, int result) { return add_failure(function, nth, result, false); }

// That call succeeds; its work fails later, and the context with it.
SIM_EXPORT int sim_fail_async(const char* function, int nth, int result) {
  return add_failure(function, nth, result, true);
}

// Ends jobs and captures and waits for all work; then forgets failures, violations, counts and settings. Objects stay,
// and so does the error of a context: sim_renew_context().
SIM_EXPORT void sim_reset() {
  State& s = state();
  std::unique_lock lock(s.mutex);
  s.restore_settings();
  for (Context& context : s.contexts) end_job(context);
  s.changed.wait(lock, [&] { return s.in_flight == 0; });
  for (Context& context : s.contexts) context.peak_enqueued_out = 0;
  for (auto& [handle, stream] : s.streams) {
    stream->capture = nullptr;
    stream->most_ahead = 0;
  }
  s.registered.clear();
  s.functions.clear();
  s.violations.clear();
  s.next_serial = 0;
  s.delayed_us = 0;
  s.streams_made.clear();
  s.launches.clear();
  std::ranges::copy(s.live, s.peak);
}

// As in a new process: a context whose work has failed is empty and can be used again. Returns whether it had failed.
SIM_EXPORT int sim_renew_context(int device) {
  State& s = state();
  std::unique_lock lock(s.mutex);
  Context& context = s.contexts[device];
  if (context.error == CUDA_SUCCESS) return 0;
  s.changed.wait(lock, [&] { return s.in_flight == 0; });
  clear_context(lock, &context);
  context.error = CUDA_SUCCESS;
  return 1;
}

SIM_EXPORT int sim_is_dead(int device) {
  const std::lock_guard lock(state().mutex);
  return state().contexts[device].error != CUDA_SUCCESS ? 1 : 0;
}

SIM_EXPORT int sim_set(const char* name, int64_t value) {
  const auto found = std::ranges::find(kSettings, std::string_view(name), &SettingName::name);
  if (found == std::end(kSettings) || value < 0) return -1;
  const std::lock_guard lock(state().mutex);
  state().settings.*found->setting = value;
  state().changed.notify_all();
  return 0;
}

SIM_EXPORT void sim_reset_failures() {
  const std::lock_guard lock(state().mutex);
  for (auto& [name, function] : state().functions) function.failures.clear();
}

SIM_EXPORT void sim_forget_peaks() {
  const std::lock_guard lock(state().mutex);
  std::ranges::copy(state().live, state().peak);
  for (Context& context : state().contexts) context.peak_enqueued_out = context.enqueued_out;
}

// Every copy, fill and kernel starts late by a random time in [min_us, max_us].
SIM_EXPORT int sim_set_delay_us(uint64_t min_us, uint64_t max_us, uint64_t seed) {
  if (max_us < min_us) return -1;
  const std::lock_guard lock(state().mutex);
  state().min_delay_us = min_us;
  state().max_delay_us = max_us;
  state().seed = seed;
  return 0;
}

// The sum of all delays since the last reset.
SIM_EXPORT int64_t sim_delayed_us() {
  const std::lock_guard lock(state().mutex);
  return state().delayed_us;
}

// Of each device's link to the host, shared by its streams; 0: no limit.
SIM_EXPORT void sim_set_bandwidth(double bytes_per_second) {
  const std::lock_guard lock(state().mutex);
  state().bandwidth = bytes_per_second;
}

// While paused no stream begins a further operation.
SIM_EXPORT void sim_pause(int paused) {
  const std::lock_guard lock(state().mutex);
  state().paused = paused != 0;
  state().changed.notify_all();
}

// A kernel that computes for `us` microseconds, on a stream (0: the legacy one) of `device`.
SIM_EXPORT int sim_enqueue_delay(int device, CUstream handle, uint64_t us) {
  if (device < 0 || device >= kDevices) return -1;
  const std::lock_guard lock(state().mutex);
  const auto stream = handle == nullptr ? legacy_stream(&state().contexts[device]) : stream_of(handle);
  if (stream == nullptr) return -1;
  enqueue(stream, {.sleep = std::chrono::microseconds(us), .kernel = true});
  return 0;
}

// A job's kernels fill the device from now on.
SIM_EXPORT int sim_begin_job(int device, int priority) {
  if (device < 0 || device >= kDevices || priority < kGreatestPriority || priority > kLeastPriority) return -1;
  const std::lock_guard lock(state().mutex);
  auto& job = state().contexts[device].job;
  if (job != nullptr) return -1;
  job = std::make_unique<Job>(Job{priority});
  return 0;
}

SIM_EXPORT int sim_step_job(int device) {
  const std::lock_guard lock(state().mutex);
  if (device < 0 || device >= kDevices || state().contexts[device].job == nullptr) return -1;
  step_job(state().contexts[device]);
  return 0;
}

SIM_EXPORT int sim_end_job(int device) {
  const std::lock_guard lock(state().mutex);
  if (device < 0 || device >= kDevices || state().contexts[device].job == nullptr) return -1;
  end_job(state().contexts[device]);
  return 0;
}

// Kernels that wait for the device now.
SIM_EXPORT int64_t sim_waiting_kernels(int device) {
  const std::lock_guard lock(state().mutex);
  return static_cast<int64_t>(state().contexts[device].waiting.size());
}

// A copy of `nbytes` to the host that has no source and no target, but needs the copy engine.
SIM_EXPORT int sim_enqueue_copy(CUstream handle, size_t nbytes) {
  const std::lock_guard lock(state().mutex);
  const auto stream = stream_of(handle);
  if (stream == nullptr) return -1;
  Operation operation;
  operation.copy_out = std::make_shared<CopyOut>(CopyOut{stream.get(), nbytes});
  operation.run = [context = stream->context, nbytes] {
    occupy_link(context, nbytes);
    return CUDA_SUCCESS;
  };
  enqueue(stream, std::move(operation));
  return 0;
}

// The most bytes of other streams that were before a copy of this stream in the queue of the copy engine.
SIM_EXPORT int64_t sim_most_ahead(CUstream handle) {
  const std::lock_guard lock(state().mutex);
  const auto stream = stream_of(handle);
  return stream == nullptr ? -1 : static_cast<int64_t>(stream->most_ahead);
}

// The most bytes to the host that were enqueued and not complete at once.
SIM_EXPORT int64_t sim_peak_enqueued(int device) {
  const std::lock_guard lock(state().mutex);
  return device < 0 || device >= kDevices ? -1 : static_cast<int64_t>(state().contexts[device].peak_enqueued_out);
}

// The size of each registration since the last reset.
SIM_EXPORT int64_t sim_registered(size_t index) {
  const std::lock_guard lock(state().mutex);
  return index < state().registered.size() ? static_cast<int64_t>(state().registered[index]) : -1;
}

// Device memory at once, whatever is enqueued.
SIM_EXPORT int sim_peek(CUdeviceptr source, void* out, size_t nbytes) {
  const std::lock_guard lock(state().mutex);
  const auto range = find_pieces(source, nbytes);
  if (range == nullptr) return -1;
  std::memcpy(out, range->at(source), nbytes);
  return 0;
}

SIM_EXPORT int sim_poke(CUdeviceptr target, const void* bytes, size_t nbytes) {
  const std::lock_guard lock(state().mutex);
  const auto range = find_pieces(target, nbytes);
  if (range == nullptr) return -1;
  std::memcpy(range->at(target), bytes, nbytes);
  return 0;
}

// Calls since the last reset, failed ones included.
SIM_EXPORT int64_t sim_count(const char* function) {
  const std::lock_guard lock(state().mutex);
  const auto found = state().functions.find(std::string_view(function));
  return found == state().functions.end() ? 0 : static_cast<int64_t>(found->second.calls);
}

// Streams that were made with a priority since the last reset, and launches on such streams.
SIM_EXPORT int64_t sim_streams_made(int priority) {
  const std::lock_guard lock(state().mutex);
  return figure_of(state().streams_made, priority);
}

SIM_EXPORT int64_t sim_launches(int priority) {
  const std::lock_guard lock(state().mutex);
  return figure_of(state().launches, priority);
}

// How many exist now, and how many did at once since the last reset. Contexts count each retain.
SIM_EXPORT int64_t sim_live(const char* kind) {
  const int index = kind_of(kind);
  const std::lock_guard lock(state().mutex);
  return index < 0 ? -1 : state().live[index];
}

SIM_EXPORT int64_t sim_peak(const char* kind) {
  const int index = kind_of(kind);
  const std::lock_guard lock(state().mutex);
  return index < 0 ? -1 : state().peak[index];
}

SIM_EXPORT int sim_violations() {
  const std::lock_guard lock(state().mutex);
  return static_cast<int>(state().violations.size());
}

SIM_EXPORT int sim_violation(int index, char* out, size_t size) {
  const std::lock_guard lock(state().mutex);
  const auto& violations = state().violations;
  if (index < 0 || static_cast<size_t>(index) >= violations.size() || size == 0) return -1;
  const size_t length = violations[static_cast<size_t>(index)].copy(out, size - 1);
  out[length] = '\0';
  return 0;
}

SIM_EXPORT int sim_last_violation(char* out, size_t size) { return sim_violation(sim_violations() - 1, out, size); }
