// SPDX-License-Identifier: Apache-2.0
#include "device.h"

// longjmp() between stacks is not what glibc's check of it expects.
#undef _FORTIFY_SOURCE
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>

namespace {

// The names that nvcc knows by itself.
struct Dim3 {
  unsigned x;
};
thread_local Dim3 threadIdx, blockIdx, gridDim;

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};

using std::min;

void meet();

}  // namespace

#define __device__ [[maybe_unused]]
#define __global__
#define __shared__ static thread_local
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __syncthreads meet

namespace simulated {
namespace {

struct Memory {
  const std::vector<Window>* windows;
  const Window* last;  // most accesses are to the same as the one before
  Fault fault;
};
thread_local Memory* memory;

std::byte* translate(const std::byte* pointer, size_t nbytes, bool write) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  Memory& m = *memory;
  const auto inside = [&](const Window& window) {
    return address >= window.begin && nbytes <= window.nbytes && address - window.begin <= window.nbytes - nbytes;
  };
  if (m.last == nullptr || !inside(*m.last) || (write && !m.last->writable)) {
    const auto found = std::ranges::find_if(
        *m.windows, [&](const Window& window) { return inside(window) && (window.writable || !write); });
    m.last = found == m.windows->end() ? nullptr : &*found;
  }
  const bool misaligned = address % nbytes != 0;
  if (m.last != nullptr && !misaligned) return m.last->bytes + (address - m.last->begin);
  if (m.fault.what.empty()) {
    const char* what = misaligned ? "misaligned " : "out of bounds: ";
    m.fault = {std::string(what) + (write ? "store of " : "load of ") + std::to_string(nbytes) + " bytes", misaligned};
  }
  return nullptr;
}

}  // namespace
}  // namespace simulated

#define FASTSHARD_CHECKED_MEMORY
namespace fastshard::global {

// A fault is noted, and the kernel goes on with zeros.
template <typename T>
T load(const std::byte* address) {
  T value{};
  if (const std::byte* bytes = simulated::translate(address, sizeof(T), false)) std::memcpy(&value, bytes, sizeof(T));
  return value;
}

template <typename T>
void store(std::byte* address, T value) {
  if (std::byte* bytes = simulated::translate(address, sizeof(T), true)) std::memcpy(bytes, &value, sizeof(T));
}

}  // namespace fastshard::global

#include "device/kernels/pack.cu"

namespace simulated {
namespace {

constexpr size_t kStack = 64 << 10;
constexpr unsigned kThreads = fastshard::kPackThreads;

// The threads of one block. Contexts are made once; from then on they are switched by longjmp(), which, unlike
// swapcontext(), is no system call.
class Block {
 public:
  Block() {
    stacks_ = static_cast<std::byte*>(
        mmap(nullptr, kThreads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks_ == MAP_FAILED) std::abort();
  }
  ~Block() { munmap(stacks_, kThreads * kStack); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void run(const PackArguments& arguments, bool backwards) {
    arguments_ = &arguments;
    backwards_ = backwards;
    std::ranges::fill(ended_, false);
    for (unsigned running = kThreads; running != 0;) {
      // From meeting to meeting, one thread after the other.
      unsigned met = 0;
      for (unsigned i = 0; i < kThreads; ++i) {
        const unsigned thread = backwards_ ? kThreads - 1 - i : i;
        if (ended_[thread]) continue;
        resume(thread);
        ended_[thread] ? --running : ++met;
      }
      if (met != 0 && met != kThreads && memory->fault.what.empty()) {
        memory->fault.what = "threads that do not all meet";
      }
    }
  }

  void meet() {
    if (_setjmp(threads_[current_]) == 0) _longjmp(host_, 1);
  }

 private:
  void resume(unsigned thread) {
    current_ = thread;
    threadIdx.x = thread;
    if (_setjmp(host_) != 0) return;
    if (begun_[thread]) _longjmp(threads_[thread], 1);
    begun_[thread] = true;
    getcontext(&first_);
    first_.uc_stack = {stacks_ + thread * kStack, 0, kStack};
    first_.uc_link = nullptr;
    makecontext(&first_, reinterpret_cast<void (*)()>(&Block::enter), 0);
    setcontext(&first_);
  }

  static void enter();

  // A thread lives on for the next block.
  void live() {
    for (;;) {
      fastshard_pack(reinterpret_cast<const fastshard::PackEntry*>(arguments_->entries), arguments_->count,
                     reinterpret_cast<const fastshard::PackDim*>(arguments_->dims),
                     reinterpret_cast<std::byte*>(arguments_->out));
      ended_[current_] = true;
      meet();
    }
  }

  std::byte* stacks_;
  const PackArguments* arguments_ = nullptr;
  bool backwards_ = false;
  unsigned current_ = 0;
  bool begun_[kThreads] = {};
  bool ended_[kThreads] = {};
  jmp_buf host_;
  jmp_buf threads_[kThreads];
  ucontext_t first_;
};

thread_local Block* block;

void Block::enter() { block->live(); }

}  // namespace

Fault run_pack_kernel(const std::vector<Window>& windows, const PackArguments& arguments, unsigned grid, bool backwards,
                      uint64_t seed) {
  static thread_local Block threads;  // of a stream's worker
  Memory checked{&windows, nullptr, {}};
  memory = &checked;
  block = &threads;
  gridDim.x = grid;
  std::vector<unsigned> order(grid);
  std::iota(order.begin(), order.end(), 0u);
  std::ranges::shuffle(order, std::mt19937_64(seed));
  for (const unsigned index : order) {
    blockIdx.x = index;
    threads.run(arguments, backwards);
  }
  memory = nullptr;
  return checked.fault;
}

}  // namespace simulated

namespace {

void meet() { simulated::block->meet(); }

}  // namespace
