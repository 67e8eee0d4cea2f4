// SPDX-License-Identifier: Apache-2.0
// Device memory, and copies between it and the host.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "call.h"

namespace simulated {

size_t whole_pages(size_t nbytes) { return rounded_up(nbytes, static_cast<size_t>(sysconf(_SC_PAGESIZE))); }

// Of a device's memory, modules included.
size_t used_nbytes(const Context* context) {
  constexpr size_t kAlignment = 512;
  size_t nbytes = 0;
  size_t sharing = 0;
  for (const auto& [begin, range] : state().allocations) {
    if (range->context != context) continue;
    if (range->nbytes < kSharesGranules) {
      sharing += rounded_up(range->nbytes, kAlignment);
    } else {
      nbytes += rounded_up(range->nbytes, kGranule);
    }
  }
  for (const auto& [handle, module] : state().modules) nbytes += module->context == context ? kGranule : 0;
  return nbytes + rounded_up(sharing, kGranule);
}

size_t free_nbytes(const Context* context) {
  const size_t used = used_nbytes(context);
  const auto all = static_cast<size_t>(state().settings.device_nbytes);
  return used > all ? 0 : all - used;
}

namespace {

// The address range programs see is only reserved, so that touching it is a fault, and is never given back;
// the bytes are in a mapping of the simulator's own.
std::shared_ptr<Range> allocate(Context* context, size_t nbytes) {
  const size_t guard = whole_pages(1);
  void* const address =
      mmap(nullptr, whole_pages(nbytes) + guard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  void* const bytes =
      mmap(nullptr, whole_pages(nbytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  require(address != MAP_FAILED && bytes != MAP_FAILED, CUDA_ERROR_OUT_OF_MEMORY);
  std::memset(bytes, kPoison, nbytes);
  return std::make_shared<Range>(
      Range{context, reinterpret_cast<uintptr_t>(address), nbytes, static_cast<std::byte*>(bytes)});
}

void add_allocation(std::shared_ptr<Range> range) {
  State& s = state();
  const auto before = static_cast<int64_t>(used_nbytes(range->context));
  s.count(kAllocations, 1);
  s.count(kRequestedBytes, static_cast<int64_t>(range->nbytes));
  Context* const context = range->context;
  s.allocations.emplace(range->begin, std::move(range));
  s.count(kAllocatedBytes, static_cast<int64_t>(used_nbytes(context)) - before);
}

std::shared_ptr<Range> device_range(const Context* context, CUdeviceptr address, size_t nbytes) {
  auto range = find_pieces(address, nbytes);
  if (range == nullptr) reject(CUDA_ERROR_INVALID_VALUE, "copy outside of any device allocation");
  if (range->context != context) reject(CUDA_ERROR_INVALID_VALUE, "copy of one device's memory on another's stream");
  return range;
}

// Null for memory that is pageable to this context.
std::shared_ptr<Range> host_range(const Context* context, const void* pointer, size_t nbytes) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (pointer == nullptr || address >= kHostAlias || overlaps(state().allocations, address, nbytes)) {
    reject(CUDA_ERROR_INVALID_VALUE, "copy to or from the host with an address that is not the host's");
  }
  auto range = find_range(state().registrations, address, nbytes);
  if (range == nullptr && overlaps(state().registrations, address, nbytes)) {
    reject(CUDA_ERROR_INVALID_VALUE, "copy reaches beyond the registered memory");
  }
  return registered_for(context, range) ? range : nullptr;
}

// Rows of equal length, each `pitch` behind the one before; a plain copy is a single one.
struct Rows {
  size_t width;
  size_t height = 1;
  size_t source_pitch = 0;
  size_t target_pitch = 0;

  size_t nbytes() const { return width * height; }
  size_t source_extent() const { return (height - 1) * source_pitch + width; }
  size_t target_extent() const { return (height - 1) * target_pitch + width; }
};

void copy_to_host(Call& call, CUstream handle, void* target, CUdeviceptr source, const Rows& rows, bool wait) {
  if (rows.nbytes() == 0) return;
  const auto stream = find_stream(call, handle);
  Context* const context = stream->context;
  const auto from = device_range(context, source, rows.source_extent());
  const auto to = host_range(context, target, rows.target_extent());
  Operation operation{.uses = {from}};
  operation.copy_out = std::make_shared<CopyOut>(CopyOut{stream.get(), rows.nbytes()});
  operation.run = [=, in = from->at(source), out = static_cast<std::byte*>(target)] {
    occupy_link(context, rows.nbytes());
    for (size_t row = 0; row < rows.height; ++row) {
      std::memcpy(out + row * rows.target_pitch, in + row * rows.source_pitch, rows.width);
    }
    return CUDA_SUCCESS;
  };
  if (to != nullptr) operation.uses.push_back(to);
  call.submit(stream, std::move(operation));
  if (stream->capture != nullptr) return;
  if (wait || to == nullptr) return call.wait_for(stream);
  for (size_t row = 0; row < rows.height; ++row) {
    std::memset(static_cast<std::byte*>(target) + row * rows.target_pitch, kPoison, rows.width);
  }
}

void copy_to_device(Call& call, CUstream handle, CUdeviceptr target, const void* source, size_t nbytes, bool wait) {
  if (nbytes == 0) return;
  const auto stream = find_stream(call, handle);
  const auto to = device_range(stream->context, target, nbytes);
  const auto from = host_range(stream->context, source, nbytes);
  const auto* const in = static_cast<const std::byte*>(source);
  Operation operation{.uses = {to}};
  if (from != nullptr) {
    operation.uses.push_back(from);
    operation.run = [=, out = to->at(target)] {
      std::memcpy(out, in, nbytes);
      return CUDA_SUCCESS;
    };
  } else {
    // Pageable: the bytes are taken now, and arrive later.
    operation.run = [bytes = std::vector(in, in + nbytes), out = to->at(target)] {
      std::memcpy(out, bytes.data(), bytes.size());
      return CUDA_SUCCESS;
    };
  }
  call.submit(stream, std::move(operation));
  if (wait) call.wait_for(stream);
}

}  // namespace

void remove_allocation(std::unique_lock<std::mutex>& lock, std::shared_ptr<Range> range) {
  State& s = state();
  const auto before = static_cast<int64_t>(used_nbytes(range->context));
  s.allocations.erase(range->begin);
  s.count(kAllocations, -1);
  s.count(kRequestedBytes, -static_cast<int64_t>(range->nbytes));
  s.count(kAllocatedBytes, static_cast<int64_t>(used_nbytes(range->context)) - before);
  retire(lock, *range, "device memory freed");
  munmap(range->bytes, whole_pages(range->nbytes));
}

}  // namespace simulated

using namespace simulated;

// Memory of `count` allocations, one right behind the other.
extern "C" __attribute__((visibility("default"))) int sim_alloc_pieces(int device, const uint64_t* nbytes, size_t count,
                                                                       uint64_t* address) {
  const std::lock_guard lock(state().mutex);
  size_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    if (nbytes[i] == 0 || nbytes[i] != whole_pages(nbytes[i])) return -1;
    total += nbytes[i];
  }
  const auto all = allocate(&state().contexts[device], total);
  *address = all->begin;
  for (size_t i = 0, done = 0; i < count; done += nbytes[i++]) {
    add_allocation(std::make_shared<Range>(Range{all->context, all->begin + done, nbytes[i], all->bytes + done}));
  }
  return 0;
}

CUresult cuMemAlloc(CUdeviceptr* address, size_t nbytes) {
  return entry("cuMemAlloc", Needs::kContext, [&](Call& call) {
    require(address != nullptr && nbytes != 0);
    call.synchronize_implicitly();
    require(nbytes <= free_nbytes(call.context), CUDA_ERROR_OUT_OF_MEMORY);
    auto range = allocate(call.context, nbytes);
    *address = range->begin;
    add_allocation(std::move(range));
  });
}

// It waits for what runs. Work that comes later and reads the memory is a violation: a caching allocator would have
// given the memory to somebody else.
CUresult cuMemFree(CUdeviceptr address) {
  return entry("cuMemFree", Needs::kRelease, [&](Call& call) {
    if (address == 0) return;
    const auto found = state().allocations.find(address);
    if (found == state().allocations.end()) reject(CUDA_ERROR_INVALID_VALUE, "cuMemFree of an unknown address");
    call.synchronize_implicitly();
    remove_allocation(call.lock, found->second);
  });
}

CUresult cuMemGetInfo(size_t* free, size_t* total) {
  return entry("cuMemGetInfo", Needs::kContext, [&](Call& call) {
    *free = free_nbytes(call.context);
    *total = static_cast<size_t>(state().settings.device_nbytes);
  });
}

CUresult cuMemcpyDtoHAsync(void* target, CUdeviceptr source, size_t nbytes, CUstream stream) {
  return entry("cuMemcpyDtoHAsync", Needs::kContext,
               [&](Call& call) { copy_to_host(call, stream, target, source, {nbytes}, false); });
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr target, const void* source, size_t nbytes, CUstream stream) {
  return entry("cuMemcpyHtoDAsync", Needs::kContext,
               [&](Call& call) { copy_to_device(call, stream, target, source, nbytes, false); });
}

CUresult cuMemcpyDtoH(void* target, CUdeviceptr source, size_t nbytes) {
  return entry("cuMemcpyDtoH", Needs::kContext,
               [&](Call& call) { copy_to_host(call, nullptr, target, source, {nbytes}, true); });
}

CUresult cuMemcpyHtoD(CUdeviceptr target, const void* source, size_t nbytes) {
  return entry("cuMemcpyHtoD", Needs::kContext,
               [&](Call& call) { copy_to_device(call, nullptr, target, source, nbytes, true); });
}

CUresult cuMemcpy2DAsync(const CUDA_MEMCPY2D* copy, CUstream stream) {
  return entry("cuMemcpy2DAsync", Needs::kContext, [&](Call& call) {
    require(copy != nullptr);
    if (copy->srcMemoryType != CU_MEMORYTYPE_DEVICE || copy->dstMemoryType != CU_MEMORYTYPE_HOST) {
      reject(CUDA_ERROR_NOT_SUPPORTED, "cuMemcpy2DAsync is simulated from device to host only");
    }
    require(copy->srcPitch <= kMaxPitch && copy->dstPitch <= kMaxPitch);
    require(copy->Height <= 1 || (copy->srcPitch >= copy->WidthInBytes && copy->dstPitch >= copy->WidthInBytes));
    const Rows rows{copy->WidthInBytes, copy->Height, copy->srcPitch, copy->dstPitch};
    auto* const target = static_cast<std::byte*>(copy->dstHost) + copy->dstY * copy->dstPitch + copy->dstXInBytes;
    const CUdeviceptr source = copy->srcDevice + copy->srcY * copy->srcPitch + copy->srcXInBytes;
    copy_to_host(call, stream, target, source, rows, false);
  });
}

CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t nbytes, CUstream handle) {
  return entry("cuMemsetD8Async", Needs::kContext, [&](Call& call) {
    if (nbytes == 0) return;
    const auto stream = find_stream(call, handle);
    const auto range = device_range(stream->context, target, nbytes);
    Operation operation{.uses = {range}};
    operation.run = [=, out = range->at(target)] {
      std::memset(out, value, nbytes);
      return CUDA_SUCCESS;
    };
    call.submit(stream, std::move(operation));
  });
}
