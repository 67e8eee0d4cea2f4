// SPDX-License-Identifier: Apache-2.0
// Modules, and the pack kernel of csrc/kernels/pack.cu: done by the CPU pack, with every promise to it
// checked first.
#include <cstring>

#include "../../csrc/pack.h"
#include "call.h"

using namespace simulated;

namespace {

using fastshard::PackEntry;
using fastshard::TensorView;

// The kernel's parameters as of its launch, as host addresses.
struct PackLaunch {
  Context* context;
  uintptr_t table;
  uint32_t count;
  uintptr_t slot;
  std::shared_ptr<Range> table_range;
  std::shared_ptr<Range> slot_range;

  std::vector<PackEntry> entries() const {
    std::vector<PackEntry> result(count);
    std::memcpy(result.data(), reinterpret_cast<const void*>(table), count * sizeof(PackEntry));
    return result;
  }
  bool in_slot(const PackEntry& entry) const {
    return entry.slot_offset < slot_range->nbytes && slot_range->contains(slot + entry.slot_offset, entry.nbytes);
  }
  std::byte* target(const PackEntry& entry) const { return reinterpret_cast<std::byte*>(slot + entry.slot_offset); }
};

// A checked entry: the allocation it reads, and the view of it that the simulator may read.
struct Gather {
  std::shared_ptr<Range> range;
  TensorView view;
};

[[noreturn]] void fault(CUresult result, const char* what) {
  reject(result, std::string(fastshard::kPackKernelName) + ": " + what);
}

// Whether every load the kernel makes, a unit (of a cast: an element) at a time, is aligned and stays in one run.
bool loads_are_aligned(const PackEntry& entry) {
  if (entry.view.cast()) {
    const bool whole = entry.first_byte % entry.unit == 0 && entry.nbytes % entry.unit == 0;
    return whole && entry.unit == fastshard::pack_unit(entry.view, entry.first_byte, entry.nbytes, entry.slot_offset);
  }
  if (entry.nbytes % entry.unit != 0) return false;
  for (uint64_t done = 0; done < entry.nbytes; done += entry.unit) {
    const uint64_t offset = entry.first_byte + done;
    if (reinterpret_cast<uintptr_t>(fastshard::packed_address(entry.view, offset)) % entry.unit != 0) return false;
    if (!entry.view.contiguous() && offset % entry.view.run_nbytes + entry.unit > entry.view.run_nbytes) return false;
  }
  return true;
}

Gather check_entry(const PackLaunch& launch, const PackEntry& entry) {
  const TensorView& view = entry.view;
  if (view.ndim < 0 || view.ndim > fastshard::kMaxDims) fault(CUDA_ERROR_ILLEGAL_ADDRESS, "number of dimensions");
  // From the first to the last byte of the tensor: all of it must be one allocation's.
  auto begin = reinterpret_cast<uintptr_t>(view.data);
  auto end = begin + view.run_nbytes;
  for (int dim = 0; dim < view.ndim; ++dim) {
    if (view.shape[dim] <= 0) fault(CUDA_ERROR_ILLEGAL_ADDRESS, "empty dimension");
    const int64_t extent = (view.shape[dim] - 1) * view.stride_nbytes[dim];
    (extent < 0 ? begin : end) += static_cast<uintptr_t>(extent);
  }
  if (entry.nbytes > view.packed_nbytes() || entry.first_byte > view.packed_nbytes() - entry.nbytes) {
    fault(CUDA_ERROR_ILLEGAL_ADDRESS, "gathers beyond the end of the tensor");
  }
  auto range = find_range(state().allocations, begin, end - begin);
  if (range == nullptr || range->context != launch.context) {
    fault(CUDA_ERROR_ILLEGAL_ADDRESS, "reads outside the device's allocations");
  }
  if (!launch.in_slot(entry)) fault(CUDA_ERROR_ILLEGAL_ADDRESS, "writes outside the registered slot");
  const bool is_unit = entry.unit != 0 && entry.unit <= 16 && (entry.unit & (entry.unit - 1)) == 0;
  if (!is_unit || !loads_are_aligned(entry) || (launch.slot + entry.slot_offset) % entry.unit != 0) {
    fault(CUDA_ERROR_MISALIGNED_ADDRESS, "unit does not divide the entry");
  }
  Gather gather{std::move(range), view};
  gather.view.data = gather.range->at(reinterpret_cast<uintptr_t>(view.data));
  return gather;
}

CUresult run_pack(const PackLaunch& launch) {
  std::unique_lock lock(state().mutex);
  // Only now: whoever reuses the table before the kernel has run changes what it does.
  const std::vector<PackEntry> entries = launch.entries();
  std::vector<Gather> gathers;
  size_t nbytes = 0;
  try {
    for (const PackEntry& entry : entries) {
      gathers.push_back(check_entry(launch, entry));
      nbytes += entry.nbytes;
    }
  } catch (CUresult result) {
    return result;
  }
  for (const Gather& gather : gathers) ++gather.range->running;
  lock.unlock();
  occupy_link(launch.context, nbytes);
  for (size_t i = 0; i < entries.size(); ++i) {
    fastshard::pack_bytes(gathers[i].view, entries[i].first_byte, entries[i].nbytes, launch.target(entries[i]));
  }
  lock.lock();
  for (const Gather& gather : gathers) --gather.range->running;
  return CUDA_SUCCESS;
}

Operation pack_operation(Context* context, void** parameters) {
  PackLaunch launch{};
  launch.context = context;
  std::memcpy(&launch.table, parameters[0], sizeof launch.table);
  std::memcpy(&launch.count, parameters[1], sizeof launch.count);
  std::memcpy(&launch.slot, parameters[2], sizeof launch.slot);
  launch.table -= kHostAlias;
  launch.slot -= kHostAlias;
  launch.table_range = find_range(state().registrations, launch.table, launch.count * sizeof(PackEntry));
  launch.slot_range = find_range(state().registrations, launch.slot, 1);
  // As on a device: the launch succeeds, and what it does fails.
  if (!registered_for(context, launch.table_range) || !registered_for(context, launch.slot_range)) {
    note_violation("kernel parameter is not the device address of registered memory");
    return {.run = [] { return CUDA_ERROR_ILLEGAL_ADDRESS; }};
  }
  if (launch.table % alignof(PackEntry) != 0) {
    note_violation("kernel parameter is misaligned");
    return {.run = [] { return CUDA_ERROR_MISALIGNED_ADDRESS; }};
  }
  for (const PackEntry& entry : launch.entries()) {
    if (launch.in_slot(entry)) std::memset(launch.target(entry), kPoison, entry.nbytes);
  }
  return {.run = [launch] { return run_pack(launch); }, .uses = {launch.table_range, launch.slot_range}};
}

}  // namespace

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  return entry("cuModuleLoadData", Needs::kContext, [&](Call& call) {
    require(image != nullptr);
    add(state().modules, kModules, std::make_shared<Module>(call.context), module);
  });
}

CUresult cuModuleUnload(CUmodule handle) {
  return entry("cuModuleUnload", Needs::kRelease, [&](Call&) {
    find(state().modules, handle, "module");
    remove(state().modules, kModules, reinterpret_cast<uintptr_t>(handle));
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
    call.submit(stream, pack_operation(call.context, parameters));
  });
}
