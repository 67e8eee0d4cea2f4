// SPDX-License-Identifier: Apache-2.0
// Modules, and launches of the pack kernel: device.cc runs its source, and here is what it may touch.
#include <cstring>

#include "call.h"
#include "device.h"
#include "device/kernels/table.h"

using namespace simulated;

namespace {

using fastshard::DType;
using fastshard::PackDim;
using fastshard::PackEntry;
using fastshard::PackKind;

// The kernel's parameters as of its launch.
struct PackLaunch {
  Context* context;
  PackArguments arguments;
  unsigned grid;
  uint64_t seed;
  std::shared_ptr<Range> table;
  std::shared_ptr<Range> out;
  bool out_on_host;
};

std::shared_ptr<Range> find_alias(Context* context, uintptr_t address, size_t nbytes) {
  auto range = address < kHostAlias ? nullptr : find_range(state().registrations, address - kHostAlias, nbytes);
  return registered_for(context, range) ? range : nullptr;
}

Window window(const Range& range, bool on_host, bool writable) {
  return {range.begin + (on_host ? kHostAlias : 0), range.nbytes, range.bytes, writable};
}

// Calls `piece` with every run of bytes that the launch will store, as offsets from `out`.
void for_each_store(const PackLaunch& launch, const std::function<void(uint64_t, uint64_t)>& piece) {
  const auto* const entries = reinterpret_cast<const PackEntry*>(launch.arguments.entries - kHostAlias);
  const auto* const all_dims = reinterpret_cast<const PackDim*>(launch.arguments.dims - kHostAlias);
  for (const PackEntry& entry : std::span(entries, launch.arguments.count)) {
    if (entry.kind == PackKind::copy) piece(entry.out, entry.count);
    if (entry.kind == PackKind::gather) {
      piece(entry.out, uint64_t{entry.count} * (entry.to == DType::raw ? entry.unit : itemsize(entry.to)));
    }
    if (entry.kind != PackKind::tiles) continue;
    const PackDim* const dims = all_dims + entry.dims;
    for (uint64_t b = 0; b < dims[2].size; ++b) {
      for (uint64_t row = 0; row < dims[1].size; ++row) {
        piece(entry.out + b * dims[2].out_stride + row * dims[1].out_stride,
              uint64_t{dims[0].size} * dims[0].out_stride);
      }
    }
  }
}

CUresult run_pack(const PackLaunch& launch) {
  std::unique_lock lock(state().mutex);
  std::vector<Window> windows = {window(*launch.out, launch.out_on_host, true), window(*launch.table, true, false)};
  std::vector<std::shared_ptr<Range>> sources;
  for (const auto& [begin, range] : state().allocations) {
    if (range->context == launch.context && range != launch.out) sources.push_back(range);
  }
  for (const auto& range : sources) {
    windows.push_back(window(*range, false, false));
    ++range->running;
  }
  uint64_t nbytes = 0;
  if (launch.out_on_host) for_each_store(launch, [&](uint64_t, uint64_t count) { nbytes += count; });
  lock.unlock();
  occupy_link(launch.context, nbytes);
  // The table is read only now: whoever reuses it before the kernel has run changes what it does.
  const Fault fault = run_pack_kernel(windows, launch.arguments, launch.grid, false, launch.seed);
  lock.lock();
  for (const auto& range : sources) --range->running;
  if (fault.what.empty()) return CUDA_SUCCESS;
  note_violation(std::string(fastshard::kPackKernelName) + ": " + fault.what);
  return fault.misaligned ? CUDA_ERROR_MISALIGNED_ADDRESS : CUDA_ERROR_ILLEGAL_ADDRESS;
}

Operation pack_operation(Context* context, unsigned grid, void** parameters) {
  PackLaunch launch{};
  launch.context = context;
  launch.grid = grid;
  launch.seed = state().seed ^ state().functions["cuLaunchKernel"].calls;
  PackArguments& arguments = launch.arguments;
  std::memcpy(&arguments.entries, parameters[0], sizeof arguments.entries);
  std::memcpy(&arguments.count, parameters[1], sizeof arguments.count);
  std::memcpy(&arguments.dims, parameters[2], sizeof arguments.dims);
  std::memcpy(&arguments.out, parameters[3], sizeof arguments.out);
  launch.table = find_alias(context, arguments.entries, arguments.count * sizeof(PackEntry));
  launch.out = find_alias(context, arguments.out, 1);
  launch.out_on_host = launch.out != nullptr;
  if (launch.out == nullptr) launch.out = find_range(state().allocations, arguments.out, 1);
  // As on a device: the launch succeeds, and what it does fails.
  if (launch.table == nullptr || find_alias(context, arguments.dims, 1) != launch.table || launch.out == nullptr ||
      (!launch.out_on_host && launch.out->context != context)) {
    note_violation("kernel parameter is not the device address of registered or device memory");
    return {.run = [] { return CUDA_ERROR_ILLEGAL_ADDRESS; }};
  }
  if (launch.out_on_host) {
    const uint64_t begin = arguments.out - kHostAlias - launch.out->begin;
    for_each_store(launch, [&](uint64_t offset, uint64_t nbytes) {
      if (begin + offset + nbytes <= launch.out->nbytes)
        std::memset(launch.out->bytes + begin + offset, kPoison, nbytes);
    });
  }
  return {.run = [launch] { return run_pack(launch); }, .uses = {launch.table, launch.out}, .kernel = true};
}

}  // namespace

void simulated::remove_module(uintptr_t handle) {
  remove(state().modules, kModules, handle);
  state().count(kAllocatedBytes, -static_cast<int64_t>(kGranule));
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  return entry("cuModuleLoadData", Needs::kContext, [&](Call& call) {
    require(image != nullptr && module != nullptr);
    call.synchronize_implicitly();
    require(kGranule <= free_nbytes(call.context), CUDA_ERROR_OUT_OF_MEMORY);
    add(state().modules, kModules, std::make_shared<Module>(Module{call.context}), module);
    state().count(kAllocatedBytes, kGranule);
  });
}

CUresult cuModuleUnload(CUmodule handle) {
  return entry("cuModuleUnload", Needs::kRelease, [&](Call&) {
    find(state().modules, handle, "module");
    remove_module(reinterpret_cast<uintptr_t>(handle));
  });
}

// A module has one function, so both have the same handle.
CUresult cuModuleGetFunction(CUfunction* function, CUmodule handle, const char* name) {
  return entry("cuModuleGetFunction", Needs::kContext, [&](Call&) {
    find(state().modules, handle, "module");
    require(std::string_view(name) == fastshard::kPackKernelName, CUDA_ERROR_NOT_FOUND);
    *function = reinterpret_cast<CUfunction>(handle);
  });
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned, CUstream handle, void** parameters,
                        void** extra) {
  return entry("cuLaunchKernel", Needs::kContext, [&](Call& call) {
    const auto module = find(state().modules, function, "module");
    const auto stream = find_stream(call, handle);
    if (module->context != call.context || stream->context != call.context) {
      reject(CUDA_ERROR_INVALID_HANDLE, "kernel launched with another device's function or stream");
    }
    if (grid_x == 0 || grid_y == 0 || grid_z == 0 || grid_x > 0x7fffffff || grid_y > 0xffff || grid_z > 0xffff ||
        block_x != fastshard::kPackThreads || block_y != 1 || block_z != 1) {
      reject(CUDA_ERROR_INVALID_VALUE, "kernel launched with wrong dimensions");
    }
    require(parameters != nullptr && extra == nullptr);
    call.submit(stream, pack_operation(call.context, grid_x, parameters));
    ++state().launches[stream->priority];
  });
}
