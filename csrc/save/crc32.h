// SPDX-License-Identifier: Apache-2.0
// CRC-32 as in zip, gzip and zlib.crc32 (reflected polynomial 0xEDB88320), at the speed of memory, and of pieces
// in any order: what writers can compute of a tensor while its bytes pass.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>

namespace fastshard {

// The remainder of `bytes` alone: no initial value, no final inversion. Linear, so that remainders of pieces add
// up (by XOR) once each is shifted past what follows it.
uint32_t crc32_remainder(std::span<const std::byte> bytes);
// `remainder` as if `nbytes` zeros followed.
uint32_t crc32_shift(uint32_t remainder, uint64_t nbytes);

// The CRC of `nbytes` bytes that come in pieces, each once, from any thread.
class Crc32 {
 public:
  explicit Crc32(uint64_t nbytes) : nbytes_(nbytes) {}
  void add(uint64_t first_byte, std::span<const std::byte> piece) {
    sum_.fetch_xor(crc32_shift(crc32_remainder(piece), nbytes_ - first_byte - piece.size()), std::memory_order_relaxed);
  }
  // Once all have been added: what zlib.crc32 says of the whole.
  uint32_t value() const { return sum_ ^ crc32_shift(~uint32_t{0}, nbytes_) ^ ~uint32_t{0}; }

 private:
  const uint64_t nbytes_;
  std::atomic<uint32_t> sum_ = 0;
};

}  // namespace fastshard
