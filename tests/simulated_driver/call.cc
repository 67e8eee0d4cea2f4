// SPDX-License-Identifier: Apache-2.0
#include "call.h"

#include <unistd.h>

#include <atomic>

namespace simulated {
namespace {

std::atomic<pid_t> owner_process = 0;  // set by cuInit; the driver does not survive fork()

// A plain array: usable until the very end of a thread.
constexpr int kMaxStack = 64;
struct {
  Context* contexts[kMaxStack];
  int depth;
} thread_local context_stack;

// Calls that only look at what has been enqueued.
bool passes_driver_lock(std::string_view name) {
  return name == "cuEventQuery" || name == "cuEventSynchronize" || name == "cuStreamQuery" ||
         name == "cuStreamSynchronize";
}

}  // namespace

bool usable(Needs needs) {
  const pid_t owner = owner_process;
  return owner == 0 ? needs == Needs::kNothing : owner == getpid();
}

void set_initialized() { owner_process = getpid(); }

void push_context(Context* context) {
  require(context_stack.depth < kMaxStack);
  context_stack.contexts[context_stack.depth++] = context;
}

Context* pop_context() {
  if (context_stack.depth == 0) reject(CUDA_ERROR_INVALID_CONTEXT, "cuCtxPopCurrent of an empty stack");
  return context_stack.contexts[--context_stack.depth];
}

Context* current_context() {
  return context_stack.depth == 0 ? nullptr : context_stack.contexts[context_stack.depth - 1];
}

void Call::begin(std::string_view name, Needs needs) {
  FunctionState& function = state().functions[std::string(name)];
  ++function.calls;
  CUresult failure = CUDA_SUCCESS;
  std::vector<FunctionState::Failure> kept;
  for (FunctionState::Failure injected : function.failures) {
    const bool always = injected.countdown == 0;
    const bool due = always || --injected.countdown == 0;
    if (due) (injected.asynchronous ? late_failure : failure) = injected.result;
    if (always || !due) kept.push_back(injected);
  }
  function.failures = std::move(kept);

  const bool in_context = needs == Needs::kContext || needs == Needs::kRelease;
  if (in_context && !passes_driver_lock(name)) state().changed.wait(lock, [] { return !state().synchronizing; });
  if (in_context) {
    context = current_context();
    if (context == nullptr) reject(CUDA_ERROR_INVALID_CONTEXT, std::string(name) + " without a current context");
    if (context->retained == 0) reject(CUDA_ERROR_CONTEXT_IS_DESTROYED, std::string(name) + " after the context");
    if (needs == Needs::kContext) require(context->error == CUDA_SUCCESS, context->error);
  }
  check_captures(name);
  require(failure == CUDA_SUCCESS, failure);
}

void Call::submit(const std::shared_ptr<Stream>& stream, Operation operation) {
  if (stream->capture != nullptr) {  // it goes into the graph, and nothing happens
    require(!stream->capture->invalidated, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    return;
  }
  operation.failure = late_failure;
  enqueue(stream, std::move(operation));
}

void Call::wait_for(const std::shared_ptr<Stream>& stream) {
  const uint64_t last = stream->enqueued;
  state().changed.wait(lock, [&] { return stream->completed >= last; });
  require(stream->context->error == CUDA_SUCCESS, stream->context->error);
}

void Call::synchronize_implicitly() {
  State& s = state();
  if (s.settings.implicit_sync == 0) return;
  s.synchronizing = true;
  wait_for_running_work(lock, *context);
  if (s.settings.implicit_sync == 2) wait_for_enqueued_work(lock, *context);
  s.synchronizing = false;
  s.changed.notify_all();
}

}  // namespace simulated
