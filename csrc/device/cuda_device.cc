// SPDX-License-Identifier: Apache-2.0
// Device over CUDA: the device's primary context (so that torch's pointers and streams are valid), streams for
// each save, asynchronous copies into page-locked slots, and the pack kernel where it was built.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <set>
#include <vector>

#include "device/cast.h"
#include "device/cuda_context.h"
#include "device/cuda_scratch.h"
#include "device/device.h"
#include "device/kernels/embedded.h"
#include "device/kernels/table.h"
#include "device/numa.h"
#include "device/pack.h"

namespace fastshard {
namespace {

// A contiguous range of at least this many bytes is copied by the copy engine; smaller ones are cheaper
// together in one kernel launch than one by one.
constexpr uint64_t kEngineCopyNbytes = 64 << 10;
// Without device scratch: the copy engine takes rows of at least this many bytes, and of such together.
constexpr uint64_t kPitchedRunNbytes = 4096;
// Blocks of a launch that stores over the link: enough to fill it, few enough to leave the device to the running job.
constexpr unsigned kMaxLinkBlocks = 64;
// Blocks on each multiprocessor of a launch that stores to device memory: as many as fit at once.
constexpr unsigned kScratchBlocks = 2;
// Row distances above this are not accepted as a pitch (CU_DEVICE_ATTRIBUTE_MAX_PITCH is 2 GiB - 1 everywhere).
constexpr uint64_t kMaxPitch = (uint64_t{1} << 31) - 1;
// More copies out of scratch, and small ones, cost more than stores over the link.
constexpr uint64_t kManyPieces = 16;
// Left in the staging scratch beside tables, for casts that the kernel cannot do.
constexpr uint64_t kCastNbytes = 4096;

// How gathers travel. For benchmarks: $FASTSHARD_GATHER chooses another one than the engine would.
enum class Gather {
  automatic,  // through device scratch; without any: long rows by the copy engine, the others by the kernel
  link,       // by the kernel, over the link
  pitched,    // by the copy engine
};

Gather gather_chosen() {
  const char* const chosen = std::getenv("FASTSHARD_GATHER");
  const std::string name = chosen == nullptr ? "" : chosen;
  return name == "link" ? Gather::link : name == "pitched" ? Gather::pitched : Gather::automatic;
}

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

// One save's copies out of one device. Gathers are packed on one stream and copied on another, so that the packing
// of a chunk overlaps the copy of the one before.
class CudaStream final : public CopyStream {
 public:
  CudaStream(std::shared_ptr<Context> context, std::shared_ptr<Kernels> kernels, std::shared_ptr<Scratch> scratch,
             Gather gather, CUstream producer)
      : context_(std::move(context)),
        kernels_(std::move(kernels)),
        scratch_(std::move(scratch)),
        gather_(gather),
        stream_(context_) {
    const Current current(*context_);
    const Event ready(context_);
    FASTSHARD_CUDA(driver(), cuEventRecord, ready.get(), producer);
    FASTSHARD_CUDA(driver(), cuStreamWaitEvent, stream_.get(), ready.get(), 0);
    if (gather_ != Gather::automatic || !scratch_->enabled()) return;
    scratch_->ask_again();
    pack_stream_.emplace(context_);
    FASTSHARD_CUDA(driver(), cuStreamWaitEvent, pack_stream_->get(), ready.get(), 0);
  }

  std::unique_ptr<Ticket> pack(std::span<const CopyOp> ops, Staging& staging) override {
    const Current current(*context_);
    // Made first: nothing is enqueued unless its completion can be waited for.
    auto ticket = std::make_unique<CudaTicket>(context_);
    try {
      std::vector<CopyOp> gathers;
      for (const CopyOp& op : ops) {
        if (op.source->contiguous() && op.nbytes >= kEngineCopyNbytes) {
          copy(op.source->data + op.first_byte, op.nbytes, staging.bytes.data() + op.chunk_offset);
        } else {
          gathers.push_back(op);
        }
      }
      if (!gathers.empty()) gather(gathers, staging);
      ticket->record(stream_.get());
    } catch (...) {
      // Whatever was enqueued must not reach the slot after it has been given away.
      driver().cuStreamSynchronize(stream_.get());
      throw;
    }
    return ticket;
  }

  void add_use(DeviceUse& use) const override {
    const std::lock_guard lock(mutex_);
    use.scratch_nbytes += blocks_used_.size() * scratch_->block_nbytes();
    if (scratch_refused_) use.fallbacks.push_back("no device memory for scratch: gathered over the link");
  }

 private:
  const CudaDriver& driver() const { return context_->driver(); }

  void copy(const std::byte* source, uint64_t nbytes, std::byte* out) {
    FASTSHARD_CUDA(driver(), cuMemcpyDtoHAsync, out, reinterpret_cast<CUdeviceptr>(source), nbytes, stream_.get());
  }

  // The tables of the kernel go into the staging scratch, so they live exactly as long as the launch needs them.
  void gather(std::vector<CopyOp>& gathers, Staging& staging) {
    const CUfunction kernel = gather_ == Gather::pitched ? nullptr : kernels_->pack(context_);
    CUdeviceptr tables = 0;
    if (kernel == nullptr || driver().cuMemHostGetDevicePointer(&tables, staging.scratch.data(), 0) != CUDA_SUCCESS) {
      for (const CopyOp& op : gathers) copy_gather(op, staging);
      return;
    }
    if (pack_stream_ && !scattered(gathers) && gather_through_scratch(kernel, gathers, staging)) return;
    gather_over_link(kernel, gathers, staging);
  }

  // Whether other things lie between most of them in the slot: each piece would be a copy of its own.
  static bool scattered(const std::vector<CopyOp>& gathers) {
    uint64_t pieces = 1;
    uint64_t nbytes = gathers[0].nbytes;
    for (size_t i = 1; i < gathers.size(); ++i) {
      pieces += gathers[i - 1].chunk_offset + gathers[i - 1].nbytes != gathers[i].chunk_offset;
      nbytes += gathers[i].nbytes;
    }
    return pieces >= kManyPieces && nbytes / pieces < kEngineCopyNbytes;
  }

  static uint64_t table_capacity(const Staging& staging) {
    return staging.scratch.size() > kCastNbytes ? staging.scratch.size() - kCastNbytes : 0;
  }

  void launch(CUfunction kernel, CUstream stream, const PackTable& table, CUdeviceptr out, unsigned max_blocks,
              Staging& staging) {
    CUdeviceptr entries = 0;
    FASTSHARD_CUDA(driver(), cuMemHostGetDevicePointer, &entries, staging.scratch.data(), 0);
    table.write(staging.scratch.data());
    staging.scratch = staging.scratch.subspan(table.nbytes());
    CUdeviceptr dims = entries + table.entries_nbytes();
    uint32_t count = table.count();
    std::array<void*, 4> parameters = {&entries, &count, &dims, &out};
    FASTSHARD_CUDA(driver(), cuLaunchKernel, kernel, std::min(count, max_blocks), 1, 1, kPackThreads, 1, 1, 0, stream,
                   parameters.data(), nullptr);
  }

  // A block of device memory after the other: packed by the kernel, copied by the copy engine. False when there is
  // no device memory; `gathers` then is what is left to do.
  bool gather_through_scratch(CUfunction kernel, std::vector<CopyOp>& gathers, Staging& staging) {
    size_t next = 0;
    while (next < gathers.size()) {
      Scratch::Lease block = scratch_->acquire();
      if (!block) {
        gathers.erase(gathers.begin(), gathers.begin() + static_cast<std::ptrdiff_t>(next));
        const std::lock_guard lock(mutex_);
        scratch_refused_ = true;
        return false;
      }
      {
        const std::lock_guard lock(mutex_);
        blocks_used_.insert(block->memory);
      }
      try {
        next = fill_and_drain(kernel, gathers, next, *block.operator->(), staging);
      } catch (...) {
        // Neither may anything reach the block once it has been given back.
        driver().cuStreamSynchronize(pack_stream_->get());
        driver().cuStreamSynchronize(stream_.get());
        throw;
      }
    }
    return true;
  }

  // As many of the gathers from `next` on as the block holds; it is the image of a part of the slot. Returns
  // the first that is not done, of which a part may be.
  size_t fill_and_drain(CUfunction kernel, std::vector<CopyOp>& gathers, size_t next, Scratch::Block& block,
                        Staging& staging) {
    // The same place between multiples of 16 bytes as in the slot.
    const uint32_t begin = gathers[next].chunk_offset / 16 * 16;
    const uint64_t end = begin + scratch_->block_nbytes();
    PackTable table(table_capacity(staging), 0);
    std::vector<std::pair<uint64_t, uint64_t>> ranges;
    while (next < gathers.size()) {
      CopyOp& op = gathers[next];
      uint64_t take = op.chunk_offset < end ? std::min(op.nbytes, end - op.chunk_offset) : 0;
      if (op.source->cast()) take -= take % itemsize(op.source->to);
      if (take == 0) break;
      if (table.add(*op.source, op.first_byte, take, op.chunk_offset - begin)) {
        if (!ranges.empty() && ranges.back().second == op.chunk_offset) {
          ranges.back().second += take;
        } else {
          ranges.emplace_back(op.chunk_offset, op.chunk_offset + take);
        }
      } else {
        copy_gather({op.source, op.item, op.chunk_offset, op.first_byte, take}, staging);
      }
      op.chunk_offset += static_cast<uint32_t>(take);
      op.first_byte += take;
      op.nbytes -= take;
      if (op.nbytes == 0) ++next;
    }
    if (table.empty()) return next;
    FASTSHARD_CUDA(driver(), cuStreamWaitEvent, pack_stream_->get(), block.drained.get(), 0);
    launch(kernel, pack_stream_->get(), table, block.memory, kScratchBlocks * context_->processors(), staging);
    FASTSHARD_CUDA(driver(), cuEventRecord, block.packed.get(), pack_stream_->get());
    FASTSHARD_CUDA(driver(), cuStreamWaitEvent, stream_.get(), block.packed.get(), 0);
    for (const auto& [first, last] : ranges) {
      copy(reinterpret_cast<const std::byte*>(block.memory + first - begin), last - first,
           staging.bytes.data() + first);
    }
    FASTSHARD_CUDA(driver(), cuEventRecord, block.drained.get(), stream_.get());
    return next;
  }

  // One launch that stores into the slot itself. Long rows are left to the copy engine.
  void gather_over_link(CUfunction kernel, const std::vector<CopyOp>& gathers, Staging& staging) {
    CUdeviceptr slot = 0;
    const bool mapped = driver().cuMemHostGetDevicePointer(&slot, staging.bytes.data(), 0) == CUDA_SUCCESS;
    PackTable table(table_capacity(staging), slot);
    std::vector<CopyOp> others;
    for (const CopyOp& op : gathers) {
      const bool rows = gather_ != Gather::link && long_rows(*op.source);
      if (!mapped || rows || !table.add(*op.source, op.first_byte, op.nbytes, op.chunk_offset)) others.push_back(op);
    }
    if (!table.empty()) launch(kernel, stream_.get(), table, slot, kMaxLinkBlocks, staging);
    for (const CopyOp& op : others) copy_gather(op, staging);
  }

  static bool long_rows(const TensorView& view) {
    return !view.cast() && !view.contiguous() && view.run_nbytes >= kPitchedRunNbytes &&
           view.run_nbytes * static_cast<uint64_t>(view.shape[view.ndim - 1]) >= kEngineCopyNbytes;
  }

  // Without the kernel.
  void copy_gather(const CopyOp& op, Staging& staging) {
    std::byte* const out = staging.bytes.data() + op.chunk_offset;
    op.source->cast() ? copy_and_cast(op, staging.scratch, out) : copy_strided(op, out);
  }

  // Pitched copies, one for each row of runs. A run cut by either end of the range is
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

  // Cast by the CPU, a piece after the other through the scratch.
  void copy_and_cast(const CopyOp& op, std::span<std::byte> scratch, std::byte* out) {
    TensorView source = *op.source;
    source.to = DType::raw;
    const uint64_t in_nbytes = itemsize(op.source->from);
    const uint64_t out_nbytes = itemsize(op.source->to);
    const uint64_t end = (op.first_byte + op.nbytes) / out_nbytes;
    for (uint64_t next = op.first_byte / out_nbytes; next < end;) {
      const uint64_t count = std::min(end - next, scratch.size() / in_nbytes);
      copy_strided({&source, op.item, 0, next * in_nbytes, count * in_nbytes}, scratch.data());
      FASTSHARD_CUDA(driver(), cuStreamSynchronize, stream_.get());
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
    FASTSHARD_CUDA(driver(), cuMemcpy2DAsync, &copy2d, stream_.get());
  }

  std::shared_ptr<Context> context_;
  std::shared_ptr<Kernels> kernels_;
  std::shared_ptr<Scratch> scratch_;
  const Gather gather_;
  Stream stream_;
  std::optional<Stream> pack_stream_;  // with scratch
  mutable std::mutex mutex_;
  std::set<CUdeviceptr> blocks_used_;
  bool scratch_refused_ = false;
};

class CudaDevice final : public Device {
 public:
  CudaDevice(int ordinal, uint64_t scratch_nbytes, uint64_t slot_nbytes)
      : context_(std::make_shared<Context>(ordinal)),
        scratch_(std::make_shared<Scratch>(context_, scratch_nbytes, slot_nbytes)) {}

  std::unique_ptr<Registration> register_staging(std::span<std::byte> slot) override {
    const Current current(*context_);
    const CUresult result = context_->driver().cuMemHostRegister(
        slot.data(), slot.size(), CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP);
    if (result != CUDA_SUCCESS) return nullptr;
    return std::make_unique<PinnedRegion>(context_, slot.data());
  }

  std::unique_ptr<CopyStream> open(uintptr_t stream) override {
    return std::make_unique<CudaStream>(context_, kernels_, scratch_, gather_, reinterpret_cast<CUstream>(stream));
  }

  int numa_node() const override { return numa_node_; }

 private:
  std::shared_ptr<Context> context_;
  std::shared_ptr<Kernels> kernels_ = std::make_shared<Kernels>();
  std::shared_ptr<Scratch> scratch_;
  const Gather gather_ = gather_chosen();
  const int numa_node_ = node_of_pci_device(context_->pci_address());
};

}  // namespace

std::unique_ptr<Device> make_cuda_device(int ordinal, uint64_t scratch_nbytes, uint64_t slot_nbytes) {
  return std::make_unique<CudaDevice>(ordinal, scratch_nbytes, slot_nbytes);
}

}  // namespace fastshard
