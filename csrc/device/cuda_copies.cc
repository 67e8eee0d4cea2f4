// SPDX-License-Identifier: Apache-2.0
#include "device/cuda_copies.h"

#include <algorithm>

#include "device/cast.h"
#include "device/pack.h"

namespace fastshard {
namespace {

// Row distances above this are not accepted as a pitch (CU_DEVICE_ATTRIBUTE_MAX_PITCH is 2 GiB - 1 everywhere).
constexpr uint64_t kMaxPitch = (uint64_t{1} << 31) - 1;

}  // namespace

void CudaCopies::copy(const std::byte* source, uint64_t nbytes, std::byte* out) {
  FASTSHARD_CUDA(driver_, cuMemcpyDtoHAsync, out, reinterpret_cast<CUdeviceptr>(source), nbytes, stream_);
}

void CudaCopies::gather(const CopyOp& op, const Staging& staging) {
  std::byte* const out = staging.bytes.data() + op.chunk_offset;
  op.source->cast() ? gather_and_cast(op, staging.scratch, out) : gather_runs(op, out);
}

// Pitched copies, one for each row of runs. A run cut by either end of the range is copied by itself.
void CudaCopies::gather_runs(const CopyOp& op, std::byte* out) {
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

// A piece after the other through the scratch.
void CudaCopies::gather_and_cast(const CopyOp& op, std::span<std::byte> scratch, std::byte* out) {
  TensorView source = *op.source;
  source.to = DType::raw;
  const uint64_t in_nbytes = itemsize(op.source->from);
  const uint64_t out_nbytes = itemsize(op.source->to);
  const uint64_t end = (op.first_byte + op.nbytes) / out_nbytes;
  for (uint64_t next = op.first_byte / out_nbytes; next < end;) {
    const uint64_t count = std::min(end - next, scratch.size() / in_nbytes);
    gather_runs({&source, op.item, 0, next * in_nbytes, count * in_nbytes}, scratch.data());
    FASTSHARD_CUDA(driver_, cuStreamSynchronize, stream_);
    row_cast(op.source->from, op.source->to)(scratch.data(), itemsize(op.source->from), count, out);
    out += count * out_nbytes;
    next += count;
  }
}

void CudaCopies::copy_rows(const std::byte* source, uint64_t stride, uint64_t run, uint64_t rows, std::byte* out) {
  if (rows == 1) return copy(source, run, out);
  // NOLINTNEXTLINE(bugprone-invalid-enum-default-initialization): both kinds of memory are set below
  CUDA_MEMCPY2D copy2d = {};
  copy2d.srcMemoryType = CU_MEMORYTYPE_DEVICE;
  copy2d.srcDevice = reinterpret_cast<CUdeviceptr>(source);
  copy2d.srcPitch = stride;
  copy2d.dstMemoryType = CU_MEMORYTYPE_HOST;
  copy2d.dstHost = out;
  copy2d.dstPitch = run;
  copy2d.WidthInBytes = run;
  copy2d.Height = rows;
  FASTSHARD_CUDA(driver_, cuMemcpy2DAsync, &copy2d, stream_);
}

}  // namespace fastshard
