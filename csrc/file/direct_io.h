// SPDX-License-Identifier: Apache-2.0
// Writes past the page cache, several at a time: by io_uring, or by a few threads with blocking pwrite where io_uring
// is forbidden (by seccomp filters of containers, or the sysctl kernel.io_uring_disabled).
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

  // Starts writing `bytes` at `offset`. Address, length and offset must be multiples of the file's block, and the bytes
  // must not change until `token` has been reaped. At most `depth` writes may be in flight.
  virtual void submit(std::span<const std::byte> bytes, uint64_t offset, uint64_t token) = 0;
  // Returns the token of a completed write. If there is none, returns null, or with `wait` blocks until there is one; a
  // write must be in flight then. Throws IoError, naming the file, for a write that has failed.
  virtual std::optional<uint64_t> reap(bool wait) = 0;
};

// Returns 0 if this process may use io_uring, else the errno of the refusal.
int io_uring_refusal();

// `path` is for messages. Threads write if `io_uring` is false, or if io_uring is refused after all.
std::unique_ptr<DirectQueue> make_direct_queue(int fd, const std::string& path, uint64_t block_nbytes, unsigned depth,
                                               bool io_uring);

}  // namespace fastshard
