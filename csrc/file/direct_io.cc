// SPDX-License-Identifier: Apache-2.0
#include "file/direct_io.h"

#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#endif
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <utility>
#include <vector>

#include "file/filesystem.h"
#include "file/threads.h"
#include "plan/error.h"

namespace fastshard {
namespace {

// More blocking writers gain nothing on any disk measured.
constexpr unsigned kMaxThreads = 4;
// Calls that write less than a block, of one submission.
constexpr unsigned kMaxInVain = 4;

// What is left to be written of one submission.
struct Write {
  const std::byte* data;
  uint64_t nbytes;
  uint64_t offset;
  uint64_t token;
  unsigned in_vain = 0;

  // Counts in what a write call has returned (a negative errno for a failure); the errno that ends this write, or 0.
  int advance(int64_t result, uint64_t block_nbytes) {
    if (result == -EINTR || result == -EAGAIN) return 0;
    if (result < 0) return static_cast<int>(-result);
    auto done = std::min(static_cast<uint64_t>(result), nbytes);
    // What is left must begin with a whole block.
    if (done < nbytes) done -= done % block_nbytes;
    // Nothing done: the next call may say why (a disk that is full).
    if (done == 0) return ++in_vain < kMaxInVain ? 0 : EIO;
    data += done;
    nbytes -= done;
    offset += done;
    return 0;
  }
};

#ifdef IORING_FEAT_RW_CUR_POS  // Linux 5.6, as IORING_OP_WRITE

int io_uring_enter(int ring, unsigned submit, unsigned wait_for) {
  const unsigned flags = wait_for != 0 ? IORING_ENTER_GETEVENTS : 0;
  return static_cast<int>(syscall(SYS_io_uring_enter, ring, submit, wait_for, flags, nullptr, 0));
}

// Memory the kernel shares with us.
class SharedMapping {
 public:
  SharedMapping(int ring, uint64_t nbytes, off_t what) : nbytes_(nbytes) {
    memory_ = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring, what);
    if (memory_ == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "io_uring mmap");
  }
  ~SharedMapping() { munmap(memory_, nbytes_); }
  SharedMapping(const SharedMapping&) = delete;
  SharedMapping& operator=(const SharedMapping&) = delete;

  template <typename T>
  T* at(uint32_t offset) const {
    return reinterpret_cast<T*>(static_cast<std::byte*>(memory_) + offset);
  }

 private:
  void* memory_;
  const uint64_t nbytes_;
};

// An io_uring and its two queues. What either side has put into an entry is visible to the other once the tail is:
// hence release and acquire on the tails. Throws std::system_error where io_uring is refused.
class Uring {
 public:
  explicit Uring(unsigned entries)
      : params_(),
        fd_(static_cast<int>(syscall(SYS_io_uring_setup, entries, &params_))),
        ring_(checked(), ring_nbytes(), IORING_OFF_SQ_RING),
        submissions_(fd_.get(), params_.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES) {
    if (io_uring_enter(fd_.get(), 0, 0) != 0) throw std::system_error(errno, std::generic_category(), "io_uring_enter");
  }

  // Starts the write; `id` comes back with its completion. Throws what refuses it; then it is not in flight.
  void start(int fd, const Write& write, uint64_t id) {
    // Only this thread moves the tail of the submission queue, and each entry is consumed at once.
    auto* const tail = ring_.at<uint32_t>(params_.sq_off.tail);
    const uint32_t index = *tail & *ring_.at<uint32_t>(params_.sq_off.ring_mask);
    io_uring_sqe entry = {};
    entry.opcode = IORING_OP_WRITE;
    entry.fd = fd;
    entry.addr = reinterpret_cast<uintptr_t>(write.data);
    entry.len = static_cast<uint32_t>(write.nbytes);
    entry.off = write.offset;
    entry.user_data = id;
    submissions_.at<io_uring_sqe>(0)[index] = entry;
    ring_.at<uint32_t>(params_.sq_off.array)[index] = index;
    std::atomic_ref(*tail).store(*tail + 1, std::memory_order_release);
    for (;;) {
      const int consumed = io_uring_enter(fd_.get(), 1, 0);
      if (consumed == 1) return;
      // Out of memory for a moment, or interrupted: the entry is still there.
      if (consumed < 0 && errno != EINTR && errno != EAGAIN && errno != EBUSY) {
        const int error = errno;
        std::atomic_ref(*tail).store(*tail - 1, std::memory_order_release);
        throw std::system_error(error, std::generic_category(), "io_uring_enter");
      }
      usleep(100);
    }
  }

  // A completion, if there is one: (id, result).
  std::optional<std::pair<uint64_t, int64_t>> completion() {
    auto* const head = ring_.at<uint32_t>(params_.cq_off.head);
    if (*head == std::atomic_ref(*ring_.at<uint32_t>(params_.cq_off.tail)).load(std::memory_order_acquire)) {
      return std::nullopt;
    }
    const uint32_t index = *head & *ring_.at<uint32_t>(params_.cq_off.ring_mask);
    const io_uring_cqe& entry = ring_.at<io_uring_cqe>(params_.cq_off.cqes)[index];
    const std::pair<uint64_t, int64_t> found{entry.user_data, entry.res};
    std::atomic_ref(*head).store(*head + 1, std::memory_order_release);  // the kernel may use the entry again
    return found;
  }

  // Blocks until there may be one. Never gives up: the kernel reads our memory until then.
  void wait() noexcept {
    if (io_uring_enter(fd_.get(), 0, 1) < 0 && errno != EINTR) usleep(100);
  }

 private:
  int checked() const {
    if (!fd_) throw std::system_error(errno, std::generic_category(), "io_uring_setup");
    constexpr uint32_t kNeeded = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_RW_CUR_POS;
    if ((params_.features & kNeeded) != kNeeded) {
      throw std::system_error(ENOSYS, std::generic_category(), "io_uring_setup");
    }
    return fd_.get();
  }
  uint64_t ring_nbytes() const {
    return std::max<uint64_t>(params_.sq_off.array + params_.sq_entries * sizeof(uint32_t),
                              params_.cq_off.cqes + params_.cq_entries * sizeof(io_uring_cqe));
  }

  io_uring_params params_;
  const Descriptor fd_;
  const SharedMapping ring_;
  const SharedMapping submissions_;
};

class UringQueue final : public DirectQueue {
 public:
  UringQueue(int fd, const std::string& path, uint64_t block_nbytes, unsigned depth)
      : fd_(fd), path_(path), block_nbytes_(block_nbytes), ring_(depth), writes_(depth) {
    for (uint32_t id = 0; id < depth; ++id) free_.push_back(id);
  }
  ~UringQueue() override {
    while (in_flight_ != 0) {
      if (ring_.completion()) {
        --in_flight_;
      } else {
        ring_.wait();
      }
    }
  }

  void submit(std::span<const std::byte> bytes, uint64_t offset, uint64_t token) override {
    const uint32_t id = free_.back();
    writes_[id] = {bytes.data(), bytes.size(), offset, token};
    start(id);
    free_.pop_back();
  }

  std::optional<uint64_t> reap(bool wait) override {
    for (;;) {
      const auto done = ring_.completion();
      if (!done) {
        if (!wait) return std::nullopt;
        ring_.wait();
        continue;
      }
      --in_flight_;
      const auto id = static_cast<uint32_t>(done->first);
      Write& write = writes_[id];
      const int error = write.advance(done->second, block_nbytes_);
      if (error == 0 && write.nbytes != 0) {
        start(id);
        continue;
      }
      free_.push_back(id);
      if (error != 0) throw IoError(error, path_, "write");
      return write.token;
    }
  }

 private:
  void start(uint32_t id) {
    try {
      ring_.start(fd_, writes_[id], id);
    } catch (const std::system_error& error) {
      throw IoError(error.code().value(), path_, "write");
    }
    ++in_flight_;
  }

  const int fd_;
  const std::string path_;
  const uint64_t block_nbytes_;
  Uring ring_;
  std::vector<Write> writes_;  // by id
  std::vector<uint32_t> free_;
  unsigned in_flight_ = 0;
};

std::unique_ptr<DirectQueue> make_uring_queue(int fd, const std::string& path, uint64_t block_nbytes, unsigned depth) {
  return std::make_unique<UringQueue>(fd, path, block_nbytes, depth);
}

#else

std::unique_ptr<DirectQueue> make_uring_queue(int, const std::string&, uint64_t, unsigned) {
  throw std::system_error(ENOSYS, std::generic_category(), "io_uring: not in the headers compiled against");
}

#endif

class ThreadQueue final : public DirectQueue {
 public:
  ThreadQueue(int fd, const std::string& path, uint64_t block_nbytes, unsigned depth)
      : fd_(fd), path_(path), block_nbytes_(block_nbytes), threads_(std::min(depth, kMaxThreads)) {
    done_.reserve(depth);  // a thread must not need memory to say what it has done
  }

  void submit(std::span<const std::byte> bytes, uint64_t offset, uint64_t token) override {
    const Write write{bytes.data(), bytes.size(), offset, token};
    try {
      threads_.post([this, write] { carry_out(write); });
    } catch (const std::exception&) {
      carry_out(write);  // no thread to be had: by the caller
    }
  }

  std::optional<uint64_t> reap(bool wait) override {
    std::unique_lock lock(mutex_);
    if (!wait && done_.empty()) return std::nullopt;
    completed_.wait(lock, [&] { return !done_.empty(); });
    const auto [token, error] = done_.front();
    done_.erase(done_.begin());
    if (error != 0) throw IoError(error, path_, "write");
    return token;
  }

 private:
  void carry_out(Write write) {
    int error = 0;
    while (error == 0 && write.nbytes != 0) {
      const ssize_t result = pwrite(fd_, write.data, write.nbytes, static_cast<off_t>(write.offset));
      error = write.advance(result < 0 ? -errno : result, block_nbytes_);
    }
    const std::lock_guard lock(mutex_);
    done_.emplace_back(write.token, error);
    completed_.notify_one();
  }

  const int fd_;
  const std::string path_;
  const uint64_t block_nbytes_;
  std::mutex mutex_;
  std::condition_variable completed_;
  std::vector<std::pair<uint64_t, int>> done_;
  WorkerPool threads_;  // the last: its threads end before what they use goes
};

}  // namespace

int io_uring_refusal() {
  try {
    make_uring_queue(-1, "", 1, 1);
  } catch (const std::system_error& error) {
    return error.code().value();
  }
  return 0;
}

std::unique_ptr<DirectQueue> make_direct_queue(int fd, const std::string& path, uint64_t block_nbytes, unsigned depth,
                                               bool io_uring) {
  if (io_uring) {
    try {
      return make_uring_queue(fd, path, block_nbytes, depth);
    } catch (const std::system_error&) {
      // Threads, then.
    }
  }
  return std::make_unique<ThreadQueue>(fd, path, block_nbytes, depth);
}

}  // namespace fastshard
