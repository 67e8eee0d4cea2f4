// SPDX-License-Identifier: Apache-2.0
// Captures of graphs, and which calls must not be made meanwhile, as cuThreadExchangeStreamCaptureMode() has it.
// Nothing that is captured is kept.
#include <algorithm>

#include "call.h"

using namespace simulated;

namespace {

thread_local CUstreamCaptureMode thread_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

const void* this_thread() { return &thread_mode; }

// "Potentially unsafe" calls, of which CUDA has no list: those that wait, and those whose effect no graph would have.
constexpr std::string_view kUnsafe[] = {
    "cuMemAlloc",   "cuMemFree",          "cuMemHostRegister",   "cuMemHostUnregister",
    "cuMemcpyDtoH", "cuMemcpyHtoD",       "cuModuleLoadData",    "cuModuleUnload",
    "cuEventQuery", "cuEventSynchronize", "cuStreamSynchronize", "cuStreamQuery",
};

bool forbids(const Capture& capture) {
  if (capture.mode == CU_STREAM_CAPTURE_MODE_RELAXED || thread_mode == CU_STREAM_CAPTURE_MODE_RELAXED) return false;
  if (capture.thread == this_thread()) return true;
  return capture.mode == CU_STREAM_CAPTURE_MODE_GLOBAL && thread_mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
}

}  // namespace

void simulated::invalidate(Capture& capture) { capture.invalidated = true; }

void simulated::check_captures(std::string_view name) {
  if (std::ranges::find(kUnsafe, name) == std::end(kUnsafe)) return;
  bool forbidden = false;
  for (const auto& [handle, stream] : state().streams) {
    if (stream->capture == nullptr || !forbids(*stream->capture)) continue;
    forbidden = true;
    invalidate(*stream->capture);
  }
  require(!forbidden, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
}

void simulated::check_legacy(const Context* context) {
  for (const auto& [handle, stream] : state().streams) {
    if (stream->context != context || !stream->blocking || stream->capture == nullptr) continue;
    invalidate(*stream->capture);
    throw CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  }
}

void simulated::require_not_capturing(const Stream& stream) {
  if (stream.capture == nullptr) return;
  invalidate(*stream.capture);
  throw CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  return entry("cuThreadExchangeStreamCaptureMode", Needs::kDriver, [&](Call&) {
    require(mode != nullptr && *mode >= CU_STREAM_CAPTURE_MODE_GLOBAL && *mode <= CU_STREAM_CAPTURE_MODE_RELAXED);
    std::swap(thread_mode, *mode);
  });
}

CUresult cuStreamBeginCapture(CUstream handle, CUstreamCaptureMode mode) {
  return entry("cuStreamBeginCapture", Needs::kContext, [&](Call&) {
    require(handle != nullptr && handle != CU_STREAM_LEGACY);
    const auto stream = find(state().streams, handle, "stream");
    require(stream->capture == nullptr);
    stream->capture = std::make_shared<Capture>(Capture{mode, this_thread(), stream.get()});
  });
}

// The graph is a handle that nothing accepts.
CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
  return entry("cuStreamEndCapture", Needs::kContext, [&](Call&) {
    const auto stream = find(state().streams, handle, "stream");
    const auto capture = stream->capture;
    require(graph != nullptr && capture != nullptr);
    require(capture->origin == stream.get(), CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
    require(capture->mode == CU_STREAM_CAPTURE_MODE_RELAXED || capture->thread == this_thread(),
            CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
    capture->ended = true;
    bool joined = false;
    for (const auto& [other, member] : state().streams) {
      if (member->capture != capture) continue;
      joined = joined || member != stream;
      member->capture = nullptr;
    }
    *graph = nullptr;
    require(!capture->invalidated, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    require(!joined, CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
    *graph = reinterpret_cast<CUgraph>(state().new_handle());
  });
}

CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
  return entry("cuStreamIsCapturing", Needs::kContext, [&](Call& call) {
    const auto capture = find_stream(call, handle)->capture;
    *status = capture == nullptr     ? CU_STREAM_CAPTURE_STATUS_NONE
              : capture->invalidated ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                     : CU_STREAM_CAPTURE_STATUS_ACTIVE;
  });
}
