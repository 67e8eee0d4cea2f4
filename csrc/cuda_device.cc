// SPDX-License-Identifier: Apache-2.0
// Device over CUDA: the device's primary context (so that torch's pointers and streams are valid), a copy
// stream for each save, asynchronous copies into page-locked slots, and the pack kernel where it was built.
#include <algorithm>
#include <array>
#include <mutex>
#include <vector>

#include "cast.h"
#include "cuda_driver.h"
#include "device.h"
#include "kernels/embedded.h"
#include "pack.h"

namespace fastshard {
namespace {

// A contiguous range of at least this many bytes is copied by the copy engine; smaller ones are cheaper
// together in one kernel launch than one by one.
constexpr uint64_t kEngineCopyNbytes = 64 << 10;
// A block of the kernel gathers at most this much, so that one large view uses many of them.
constexpr uint64_t kEntryNbytes = 64 << 10;
// Enough blocks to fill the link, few enough to leave the device to the running job.
constexpr unsigned kMaxBlocks = 64;
// Row distances above this are not accepted as a pitch (CU_DEVICE_ATTRIBUTE_MAX_PITCH is 2 GiB - 1 everywhere).
constexpr uint64_t kMaxPitch = (uint64_t{1} << 31) - 1;

class Context {
 public:
  explicit Context(int ordinal) : driver_(cuda_driver()) {
    int count = 0;
    FASTSHARD_CUDA(driver_, cuDeviceGetCount, &count);
    if (ordinal >= count) {
      throw CudaError("no CUDA device " + std::to_string(ordinal) + ": the driver sees " + std::to_string(count));
    }
    FASTSHARD_CUDA(driver_, cuDeviceGet, &device_, ordinal);
    FASTSHARD_CUDA(driver_, cuDevicePrimaryCtxRetain, &context_, device_);
  }
  ~Context() { driver_.cuDevicePrimaryCtxRelease(device_); }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  const CudaDriver& driver() const { return driver_; }
  CUcontext get() const { return context_; }

 private:
  const CudaDriver& driver_;
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
};

// Makes the device current on this thread for a scope; what was current before comes back.
class Current {
 public:
  explicit Current(const Context& context) : driver_(context.driver()) {
    FASTSHARD_CUDA(driver_, cuCtxPushCurrent, context.get());
  }
  ~Current() {
    CUcontext popped;
    driver_.cuCtxPopCurrent(&popped);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  const CudaDriver& driver_;
};

class Event {
 public:
  explicit Event(std::shared_ptr<Context> context) : context_(std::move(context)) {
    // Sleeping in cuEventSynchronize leaves the cores to the writers.
    FASTSHARD_CUDA(driver(), cuEventCreate, &event_, CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC);
  }
  ~Event() {
    try {
      const Current current(*context_);
      driver().cuEventDestroy(event_);
    } catch (const CudaError&) {
      // The context is gone, and the event with it.
    }
  }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  CUevent get() const { return event_; }
  const CudaDriver& driver() const { return context_->driver(); }

 private:
  std::shared_ptr<Context> context_;
  CUevent event_ = nullptr;
};

class PinnedRegion final : public Registration {
 public:
  PinnedRegion(std::shared_ptr<Context> context, void* address) : context_(std::move(context)), address_(address) {}
  ~PinnedRegion() override {
    try {
      const Current current(*context_);
      context_->driver().cuMemHostUnregister(address_);
    } catch (const CudaError&) {
    }
  }

 private:
  std::shared_ptr<Context> context_;
  void* address_;
};

// The kernels, loaded into one context by the first gather that wants them.
class Kernels {
 public:
  ~Kernels() {
    if (module_ == nullptr) return;
    try {
      const Current current(*context_);
      context_->driver().cuModuleUnload(module_);
    } catch (const CudaError&) {
    }
  }

  // Null where none were built, or the driver has no use for them (an architecture older than the PTX).
  CUfunction pack(const std::shared_ptr<Context>& context) {
    std::call_once(once_, [&] {
      if (embedded_kernels() == nullptr) return;
      const CudaDriver& driver = context->driver();
      CUmodule module;
      const CUresult loaded = driver.cuModuleLoadData(&module, embedded_kernels());
      if (loaded == CUDA_ERROR_NO_BINARY_FOR_GPU || loaded == CUDA_ERROR_UNSUPPORTED_PTX_VERSION) return;
      driver.check(loaded, "cuModuleLoadData");
      const CUresult found = driver.cuModuleGetFunction(&pack_, module, kPackKernelName);
      if (found != CUDA_SUCCESS) driver.cuModuleUnload(module);
      driver.check(found, "cuModuleGetFunction");
      context_ = context;
      module_ = module;
    });
    return pack_;
  }

 private:
  std::once_flag once_;
  std::shared_ptr<Context> context_;
  CUmodule module_ = nullptr;
  CUfunction pack_ = nullptr;
};

class CudaTicket final : public Ticket {
 public:
  CudaTicket(std::shared_ptr<Context> context) : context_(std::move(context)), event_(context_) {}

  void record(CUstream stream) { FASTSHARD_CUDA(context_->driver(), cuEventRecord, event_.get(), stream); }

  void wait() override {
    const Current current(*context_);
    FASTSHARD_CUDA(context_->driver(), cuEventSynchronize, event_.get());
  }

 private:
  std::shared_ptr<Context> context_;
  Event event_;
};

class CudaStream final : public CopyStream {
 public:
  CudaStream(std::shared_ptr<Context> context, std::shared_ptr<Kernels> kernels, CUstream producer)
      : context_(std::move(context)), kernels_(std::move(kernels)) {
    const Current current(*context_);
    FASTSHARD_CUDA(driver(), cuStreamCreate, &stream_, CU_STREAM_NON_BLOCKING);
    try {
      const Event ready(context_);
      FASTSHARD_CUDA(driver(), cuEventRecord, ready.get(), producer);
      FASTSHARD_CUDA(driver(), cuStreamWaitEvent, stream_, ready.get(), 0);
    } catch (...) {
      driver().cuStreamDestroy(stream_);
      throw;
    }
  }

  ~CudaStream() override {
    try {
      const Current current(*context_);
      driver().cuStreamDestroy(stream_);
    } catch (const CudaError&) {
    }
  }

  std::unique_ptr<Ticket> pack(std::span<const CopyOp> ops, Staging& staging) override {
    const Current current(*context_);
    // Made first: nothing is enqueued unless its completion can be waited for.
    auto ticket = std::make_unique<CudaTicket>(context_);
    try {
      std::vector<const CopyOp*> gathers;
      for (const CopyOp& op : ops) {
        if (op.source->contiguous() && op.nbytes >= kEngineCopyNbytes) {
          copy(op.source->data + op.first_byte, op.nbytes, staging.bytes.data() + op.chunk_offset);
        } else {
          gathers.push_back(&op);
        }
      }
      if (!gathers.empty() && !launch(gathers, staging)) {
        for (const CopyOp* op : gathers) {
          std::byte* const out = staging.bytes.data() + op->chunk_offset;
          op->source->cast() ? copy_and_cast(*op, staging.scratch, out) : copy_strided(*op, out);
        }
      }
      ticket->record(stream_);
    } catch (...) {
      // Whatever was enqueued must not reach the slot after it has been given away.
      driver().cuStreamSynchronize(stream_);
      throw;
    }
    return ticket;
  }

 private:
  const CudaDriver& driver() const { return context_->driver(); }

  void copy(const std::byte* source, uint64_t nbytes, std::byte* out) {
    FASTSHARD_CUDA(driver(), cuMemcpyDtoHAsync, out, reinterpret_cast<CUdeviceptr>(source), nbytes, stream_);
  }

  // One launch for all gathers of a chunk; its table goes into the staging scratch, so it lives exactly as
  // long as the launch needs it. False where there is no kernel, the slot is not page-locked, or a cast is of
  // what is not aligned.
  bool launch(const std::vector<const CopyOp*>& gathers, Staging& staging) {
    const CUfunction kernel = kernels_->pack(context_);
    CUdeviceptr slot = 0;
    CUdeviceptr scratch = 0;
    if (kernel == nullptr || driver().cuMemHostGetDevicePointer(&slot, staging.bytes.data(), 0) != CUDA_SUCCESS ||
        driver().cuMemHostGetDevicePointer(&scratch, staging.scratch.data(), 0) != CUDA_SUCCESS) {
      return false;
    }
    auto* const table = reinterpret_cast<PackEntry*>(staging.scratch.data());
    const size_t capacity = staging.scratch.size() / sizeof(PackEntry);
    uint32_t count = 0;
    for (const CopyOp* op : gathers) {
      for (uint64_t done = 0; done < op->nbytes; done += kEntryNbytes) {
        if (count == capacity) return false;
        PackEntry entry{*op->source, op->first_byte + done, std::min(kEntryNbytes, op->nbytes - done),
                        op->chunk_offset + done, 0};
        entry.unit = pack_unit(entry.view, entry.first_byte, entry.nbytes, entry.slot_offset);
        if (entry.unit == 0) return false;
        table[count++] = entry;
      }
    }
    staging.scratch = staging.scratch.subspan(count * sizeof(PackEntry));
    std::array<void*, 3> parameters = {&scratch, &count, &slot};
    FASTSHARD_CUDA(driver(), cuLaunchKernel, kernel, std::min(count, kMaxBlocks), 1, 1, kPackThreads, 1, 1, 0, stream_,
                   parameters.data(), nullptr);
    return true;
  }

  // Without the kernel: pitched copies, one for each row of runs. A run cut by either end of the range is
  // copied by itself.
  void copy_strided(const CopyOp& op, std::byte* out) {
    const TensorView& view = *op.source;
    uint64_t next = op.first_byte;
    const uint64_t end = op.first_byte + op.nbytes;
    while (next < end) {
      const uint64_t run = view.run_nbytes;
      if (view.contiguous() || next % run != 0 || end - next < run) {
        const uint64_t nbytes = view.contiguous() ? end - next : std::min(run - next % run, end - next);
        copy(packed_address(view, next), nbytes, out);
        out += nbytes;
        next += nbytes;
        continue;
      }
      const auto columns = static_cast<uint64_t>(view.shape[view.ndim - 1]);
      const auto stride = static_cast<uint64_t>(view.stride_nbytes[view.ndim - 1]);
      uint64_t rows = std::min(columns - next / run % columns, (end - next) / run);
      if (stride < run || stride > kMaxPitch) rows = 1;  // expanded or overlapping rows have no pitch
      copy_rows(packed_address(view, next), stride, run, rows, out);
      out += rows * run;
      next += rows * run;
    }
  }

  // Without the kernel: cast by the CPU, a piece after the other through the scratch.
  void copy_and_cast(const CopyOp& op, std::span<std::byte> scratch, std::byte* out) {
    TensorView source = *op.source;
    source.to = DType::raw;
    const uint64_t in_nbytes = itemsize(op.source->from);
    const uint64_t out_nbytes = itemsize(op.source->to);
    const uint64_t end = (op.first_byte + op.nbytes) / out_nbytes;
    for (uint64_t next = op.first_byte / out_nbytes; next < end;) {
      const uint64_t count = std::min(end - next, scratch.size() / in_nbytes);
      copy_strided({&source, op.item, 0, next * in_nbytes, count * in_nbytes}, scratch.data());
      FASTSHARD_CUDA(driver(), cuStreamSynchronize, stream_);
      row_cast(op.source->from, op.source->to)(scratch.data(), itemsize(op.source->from), count, out);
      out += count * out_nbytes;
      next += count;
    }
  }

  void copy_rows(const std::byte* source, uint64_t stride, uint64_t run, uint64_t rows, std::byte* out) {
    if (rows == 1) return copy(source, run, out);
    CUDA_MEMCPY2D copy2d = {};
    copy2d.srcMemoryType = CU_MEMORYTYPE_DEVICE;
    copy2d.srcDevice = reinterpret_cast<CUdeviceptr>(source);
    copy2d.srcPitch = stride;
    copy2d.dstMemoryType = CU_MEMORYTYPE_HOST;
    copy2d.dstHost = out;
    copy2d.dstPitch = run;
    copy2d.WidthInBytes = run;
    copy2d.Height = rows;
    FASTSHARD_CUDA(driver(), cuMemcpy2DAsync, &copy2d, stream_);
  }

  std::shared_ptr<Context> context_;
  std::shared_ptr<Kernels> kernels_;
  CUstream stream_ = nullptr;
};

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int ordinal) : context_(std::make_shared<Context>(ordinal)) {}

  std::unique_ptr<Registration> register_staging(std::span<std::byte> slot) override {
    const Current current(*context_);
    const CUresult result = context_->driver().cuMemHostRegister(
        slot.data(), slot.size(), CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP);
    if (result != CUDA_SUCCESS) return nullptr;
    return std::make_unique<PinnedRegion>(context_, slot.data());
  }

  std::unique_ptr<CopyStream> open(uintptr_t stream) override {
    return std::make_unique<CudaStream>(context_, kernels_, reinterpret_cast<CUstream>(stream));
  }

 private:
  std::shared_ptr<Context> context_;
  std::shared_ptr<Kernels> kernels_ = std::make_shared<Kernels>();
};

}  // namespace

std::unique_ptr<Device> make_cuda_device(int ordinal) { return std::make_unique<CudaDevice>(ordinal); }

}  // namespace fastshard
