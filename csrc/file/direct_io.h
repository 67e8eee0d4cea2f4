// SPDX-License-Identifier: Apache-2.0
// Writes past the page cache, several at a time: io_uring, or a few threads of blocking pwrite where that is
// forbidden (seccomp filters of containers, the sysctl kernel.io_uring_disabled).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

namespace fastshard {

// One thread's writes to one file that was opened with O_DIRECT. Not thread-safe.
class DirectQueue {
 public:
  // Waits for the writes in flight: only then may their memory go.
  virtual ~DirectQueue() = default;

  // Starts writing `bytes` at `offset`: address, length and offset multiples of the file's block. The bytes must
  // stay as they are until `token` was reaped. No more than `depth` writes may be in flight.
  virtual void submit(std::span<const std::byte> bytes, uint64_t offset, uint64_t token) = 0;
  // The token of a write that is complete. Without one: null, or with `wait` blocks until there is one, which there
  // must be. Throws IoError, naming the file, for a write that failed.
  virtual std::optional<uint64_t> reap(bool wait) = 0;
};

// 0 where this process may use io_uring, else why not (errno).
int io_uring_refusal();

// `path` is for messages. Without `io_uring`, and where it is refused after all, threads write.
std::unique_ptr<DirectQueue> make_direct_queue(int fd, const std::string& path, uint64_t block_nbytes, unsigned depth,
                                               bool io_uring);

}  // namespace fastshard
