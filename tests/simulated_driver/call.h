// SPDX-License-Identifier: Apache-2.0
// What all entry points have in common: the checks the driver makes before it does anything, counting and
// failure injection.
#pragma once

#include <string_view>
#include <utility>

#include "simulator.h"

namespace simulated {

enum class Needs {
  kNothing,
  kDriver,   // cuInit
  kContext,  // a current context without errors
  kRelease,  // a current context; with errors, which it returns, it counts as a release all the same
};

// One call of an entry point; it holds the lock.
struct Call {
  std::unique_lock<std::mutex> lock;
  Context* context = nullptr;            // current on this thread
  CUresult late_failure = CUDA_SUCCESS;  // injected into the work this call enqueues

  // Counts the call; throws the CUresult it fails with already.
  void begin(std::string_view name, Needs needs);
  void submit(const std::shared_ptr<Stream>& stream, Operation operation);
  // Until all that is enqueued is done; throws what it failed with.
  void wait_for(const std::shared_ptr<Stream>& stream);
  // What calls do that CUDA calls implicitly synchronizing: they wait for what runs, and all other calls wait for them.
  void synchronize_implicitly();
};

// In capture.cc. Throws if a capture forbids the call to this thread, and ends that capture.
void check_captures(std::string_view name);
// For what would order a capture of `context` behind the legacy stream, or wait for it.
void check_legacy(const Context* context);
void invalidate(Capture& capture);
// The stream as one whose work can be waited for.
void require_not_capturing(const Stream& stream);

// False before cuInit and in a forked child, where nobody may be left to release the lock.
bool usable(Needs needs);
void set_initialized();

// `body` does the work, and throws a CUresult to fail.
template <class Body>
CUresult entry(std::string_view name, Needs needs, Body body) {
  if (!usable(needs)) return CUDA_ERROR_NOT_INITIALIZED;
  Call call{std::unique_lock(state().mutex)};
  try {
    call.begin(name, needs);
    body(call);
    return call.context == nullptr ? CUDA_SUCCESS : call.context->error;
  } catch (CUresult result) {
    return result;
  }
}

inline void require(bool condition, CUresult otherwise = CUDA_ERROR_INVALID_VALUE) {
  if (!condition) throw otherwise;
}

// The stack of current contexts of this thread.
void push_context(Context* context);
Context* pop_context();
Context* current_context();  // or null

template <class Object>
using Objects = std::map<uintptr_t, std::shared_ptr<Object>>;

template <class Handle, class Object>
std::shared_ptr<Object> find(const Objects<Object>& objects, Handle handle, const char* what) {
  const auto found = objects.find(reinterpret_cast<uintptr_t>(handle));
  if (found == objects.end()) reject(CUDA_ERROR_INVALID_HANDLE, std::string("unknown or destroyed ") + what);
  return found->second;
}

template <class Handle, class Object>
void add(Objects<Object>& objects, Kind kind, std::shared_ptr<Object> object, Handle* out) {
  require(out != nullptr);
  const uintptr_t handle = state().new_handle();
  objects.emplace(handle, std::move(object));
  state().count(kind, 1);
  *out = reinterpret_cast<Handle>(handle);
}

template <class Object>
void remove(Objects<Object>& objects, Kind kind, uintptr_t handle) {
  objects.erase(handle);
  state().count(kind, -1);
}

std::shared_ptr<Stream> find_stream(Call& call, CUstream handle);
void remove_allocation(std::unique_lock<std::mutex>& lock, std::shared_ptr<Range> range);
void remove_registration(std::unique_lock<std::mutex>& lock, std::shared_ptr<Range> range);
void remove_module(uintptr_t handle);
// Takes away all that is left in a context; returns whether there was anything.
bool clear_context(std::unique_lock<std::mutex>& lock, Context* context);
// Of device memory, in granules and with the modules.
size_t used_nbytes(const Context* context);
size_t free_nbytes(const Context* context);
size_t whole_pages(size_t nbytes);
constexpr size_t rounded_up(size_t nbytes, size_t unit) { return (nbytes + unit - 1) / unit * unit; }
// Whether copies of this context may use the range directly.
bool registered_for(const Context* context, const std::shared_ptr<Range>& range);

}  // namespace simulated
