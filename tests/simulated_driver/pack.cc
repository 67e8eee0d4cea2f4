// SPDX-License-Identifier: Apache-2.0
// The pack kernel by itself, without streams: what tests/test_kernels.py calls.
#include "device/pack.h"

#include <cstring>
#include <exception>
#include <span>
#include <string>

#include "device.h"
#include "device/kernels/table.h"

#define SIM_EXPORT extern "C" __attribute__((visibility("default")))

using fastshard::DType;
using fastshard::TensorView;

// tests/test_kernels.py has the same structure.
struct SimOp {
  uint64_t data;
  uint64_t begin, end;  // what may be read
  uint32_t itemsize;
  uint32_t ndim;
  int64_t shape[16];
  int64_t strides[16];  // in elements
  uint8_t from, to;
  uint32_t offset;
  uint64_t first_byte, nbytes;
  uint32_t taken;  // out: whether the kernel does it
};

namespace {

TensorView view_of(const SimOp& op) {
  TensorView view = fastshard::make_view(reinterpret_cast<const std::byte*>(op.data), 0, op.itemsize,
                                         {op.shape, op.shape + op.ndim}, {op.strides, op.strides + op.ndim});
  view.from = static_cast<DType>(op.from);
  view.to = static_cast<DType>(op.to);
  return view;
}

}  // namespace

// Entries and dimensions of the table, in `sizes`; what went wrong, in `error`, and then -1.
SIM_EXPORT int sim_pack(SimOp* ops, size_t count, std::byte* out, size_t out_nbytes, size_t capacity, unsigned grid,
                        int backwards, uint32_t* sizes, char* error, size_t error_nbytes) {
  std::string what;
  try {
    std::vector<simulated::Window> windows = {{reinterpret_cast<uintptr_t>(out), out_nbytes, out, true}};
    fastshard::PackTable table(capacity, reinterpret_cast<uintptr_t>(out));
    for (SimOp& op : std::span(ops, count)) {
      op.taken = table.add(view_of(op), op.first_byte, op.nbytes, op.offset);
      windows.push_back({op.begin, op.end - op.begin, reinterpret_cast<std::byte*>(op.begin), false});
    }
    std::vector<uint64_t> memory(table.nbytes() / 8);
    auto* const bytes = reinterpret_cast<std::byte*>(memory.data());
    table.write(bytes);
    const auto begin = reinterpret_cast<uintptr_t>(bytes);
    windows.push_back({begin, table.nbytes(), bytes, false});
    sizes[0] = table.count();
    sizes[1] = static_cast<uint32_t>((table.nbytes() - table.entries_nbytes()) / sizeof(fastshard::PackDim));
    if (table.nbytes() <= capacity) {
      what = simulated::run_pack_kernel(
                 windows, {begin, table.count(), begin + table.entries_nbytes(), reinterpret_cast<uintptr_t>(out)},
                 grid, backwards != 0, capacity + count)
                 .what;
    } else {
      what = "the table is larger than allowed";
    }
  } catch (const std::exception& failure) {
    what = failure.what();
  }
  if (what.empty()) return 0;
  error[what.copy(error, error_nbytes - 1)] = '\0';
  return -1;
}

SIM_EXPORT void sim_pack_reference(const SimOp* op, std::byte* out) {
  fastshard::pack_bytes(view_of(*op), op->first_byte, op->nbytes, out);
}
