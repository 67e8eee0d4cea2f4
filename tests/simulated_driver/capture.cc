// SPDX-License-Identifier: Apache-2.0
// Captures of graphs, and which calls must not be made meanwhile.
#include "call.h"

using namespace simulated;

namespace {

thread_local CUstreamCaptureMode thread_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

const void* this_thread() { return &thread_mode; }

}  // namespace

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
    stream->capture = std::make_shared<Capture>(Capture{mode, this_thread()});
  });
}

// What was captured is not kept: the graph is a handle that nothing accepts.
CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
  return entry("cuStreamEndCapture", Needs::kContext, [&](Call&) {
    const auto stream = find(state().streams, handle, "stream");
    require(graph != nullptr && stream->capture != nullptr);
    const Capture& capture = *stream->capture;
    require(capture.mode == CU_STREAM_CAPTURE_MODE_RELAXED || capture.thread == this_thread(),
            CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
    const bool invalidated = capture.invalidated;
    stream->capture = nullptr;
    *graph = nullptr;
    require(!invalidated, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
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
