// SPDX-License-Identifier: Apache-2.0
// Streams and events.
#include "call.h"

using namespace simulated;

std::shared_ptr<Stream> simulated::find_stream(Call& call, CUstream handle) {
  if (handle == nullptr || handle == CU_STREAM_LEGACY) {
    check_legacy(call.context);
    return legacy_stream(call.context);
  }
  return find(state().streams, handle, "stream");
}

namespace {

std::shared_ptr<Event> find_event(CUevent handle) { return find(state().events, handle, "event"); }

// For calls that ask how far the work before it has come.
std::shared_ptr<Event> find_uncaptured(CUevent handle) {
  auto event = find_event(handle);
  if (event->capture == nullptr) return event;
  invalidate(*event->capture);
  throw CUDA_ERROR_CAPTURED_EVENT;
}

void create_stream(const Call& call, CUstream* out, unsigned flags, int priority) {
  require((flags & ~static_cast<unsigned>(CU_STREAM_NON_BLOCKING)) == 0);
  auto stream = start_stream(call.context, flags, priority);
  ++state().streams_made[stream->priority];
  add(state().streams, kStreams, std::move(stream), out);
}

}  // namespace

CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
  return entry("cuStreamCreate", Needs::kContext, [&](Call& call) { create_stream(call, stream, flags, 0); });
}

// A priority beyond the range is taken for the nearest in it.
CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int priority) {
  return entry("cuStreamCreateWithPriority", Needs::kContext,
               [&](Call& call) { create_stream(call, stream, flags, priority); });
}

CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  return entry("cuCtxGetStreamPriorityRange", Needs::kContext, [&](Call&) {
    if (least != nullptr) *least = kLeastPriority;
    if (greatest != nullptr) *greatest = kGreatestPriority;
  });
}

CUresult cuStreamGetPriority(CUstream handle, int* priority) {
  return entry("cuStreamGetPriority", Needs::kContext, [&](Call& call) {
    require(priority != nullptr);
    *priority = find_stream(call, handle)->priority;
  });
}

CUresult cuStreamDestroy(CUstream handle) {
  return entry("cuStreamDestroy", Needs::kRelease, [&](Call&) {
    // Its worker finishes what is enqueued.
    find(state().streams, handle, "stream")->destroyed = true;
    remove(state().streams, kStreams, reinterpret_cast<uintptr_t>(handle));
    state().changed.notify_all();
  });
}

CUresult cuStreamSynchronize(CUstream handle) {
  return entry("cuStreamSynchronize", Needs::kContext, [&](Call& call) {
    const auto stream = find_stream(call, handle);
    require_not_capturing(*stream);
    call.wait_for(stream);
  });
}

CUresult cuStreamQuery(CUstream handle) {
  return entry("cuStreamQuery", Needs::kContext, [&](Call& call) {
    const auto stream = find_stream(call, handle);
    require_not_capturing(*stream);
    require(stream->context->error == CUDA_SUCCESS, stream->context->error);
    require(stream->idle(), CUDA_ERROR_NOT_READY);
  });
}

CUresult cuStreamWaitEvent(CUstream handle, CUevent event, unsigned) {
  return entry("cuStreamWaitEvent", Needs::kContext, [&](Call& call) {
    const auto stream = find_stream(call, handle);
    const auto awaited = find_event(event);
    if (awaited->capture != nullptr) {
      require(!awaited->capture->ended, CUDA_ERROR_CAPTURED_EVENT);
      if (stream->capture != nullptr && stream->capture != awaited->capture) {
        reject(CUDA_ERROR_STREAM_CAPTURE_MERGE, "an event of one capture waited for in another");
      }
      stream->capture = awaited->capture;  // and what comes later is captured, too
      return;
    }
    if (stream->capture != nullptr) {
      invalidate(*stream->capture);
      throw CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    }
    call.submit(stream, {.after = awaited->latest});
  });
}

CUresult cuEventCreate(CUevent* event, unsigned) {
  return entry("cuEventCreate", Needs::kContext, [&](Call& call) {
    add(state().events, kEvents, std::make_shared<Event>(Event{call.context, {}, {}}), event);
  });
}

CUresult cuEventRecord(CUevent handle, CUstream stream_handle) {
  return entry("cuEventRecord", Needs::kContext, [&](Call& call) {
    const auto event = find_event(handle);
    const auto stream = find_stream(call, stream_handle);
    if (event->context != stream->context) reject(CUDA_ERROR_INVALID_HANDLE, "event recorded on another device");
    auto completion = std::make_shared<Completion>();
    call.submit(stream, {.signal = completion});
    event->latest = std::move(completion);
    event->capture = stream->capture;
  });
}

CUresult cuEventQuery(CUevent handle) {
  return entry("cuEventQuery", Needs::kContext, [&](Call&) {
    const auto event = find_uncaptured(handle);
    require(event->context->error == CUDA_SUCCESS, event->context->error);
    require(event->latest == nullptr || event->latest->done, CUDA_ERROR_NOT_READY);
  });
}

CUresult cuEventSynchronize(CUevent handle) {
  return entry("cuEventSynchronize", Needs::kContext, [&](Call& call) {
    const auto event = find_uncaptured(handle);
    // The record this call found, whatever is recorded meanwhile.
    if (const auto record = event->latest) state().changed.wait(call.lock, [&] { return record->done; });
    require(event->context->error == CUDA_SUCCESS, event->context->error);
  });
}

CUresult cuEventDestroy(CUevent handle) {
  return entry("cuEventDestroy", Needs::kRelease, [&](Call&) {
    find_event(handle);
    remove(state().events, kEvents, reinterpret_cast<uintptr_t>(handle));
  });
}
