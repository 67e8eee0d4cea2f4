// SPDX-License-Identifier: Apache-2.0
#include "save/crc32.h"

#include <array>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define FASTSHARD_CLMUL 1
#endif

namespace fastshard {
namespace {

constexpr uint32_t kPolynomial = 0xEDB88320;

// Eight tables, so that eight bytes are divided at once.
constexpr auto kTables = [] {
  std::array<std::array<uint32_t, 256>, 8> tables = {};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t value = byte;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ (value & 1 ? kPolynomial : 0);
    tables[0][byte] = value;
  }
  for (size_t table = 1; table < 8; ++table) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[table - 1][byte];
      tables[table][byte] = (before >> 8) ^ tables[0][before & 0xFF];
    }
  }
  return tables;
}();

uint32_t by_tables(uint32_t remainder, const std::byte* bytes, size_t nbytes) {
  for (; nbytes >= 8; nbytes -= 8, bytes += 8) {
    uint64_t word;
    std::memcpy(&word, bytes, 8);  // little-endian, as all machines with a CUDA driver are
    word ^= remainder;
    remainder = 0;
    for (size_t i = 0; i < 8; ++i) remainder ^= kTables[7 - i][(word >> (8 * i)) & 0xFF];
  }
  for (; nbytes != 0; --nbytes, ++bytes) {
    remainder = (remainder >> 8) ^ kTables[0][(remainder ^ static_cast<uint32_t>(*bytes)) & 0xFF];
  }
  return remainder;
}

// Product of two polynomials modulo kPolynomial; the highest bit is the coefficient of x^0.
constexpr uint32_t multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t bit = uint32_t{1} << 31; bit != 0; bit >>= 1) {
    if (a & bit) product ^= b;
    b = (b >> 1) ^ (b & 1 ? kPolynomial : 0);
  }
  return product;
}

// x^(8 * 2^i): one byte, two bytes, four bytes, ...
constexpr auto kPowers = [] {
  std::array<uint32_t, 64> powers = {};
  powers[0] = uint32_t{1} << 23;
  for (size_t i = 1; i < powers.size(); ++i) powers[i] = multiply(powers[i - 1], powers[i - 1]);
  return powers;
}();

#ifdef FASTSHARD_CLMUL
// Folding by carry-less multiplication: V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using
// PCLMULQDQ Instruction", Intel 2009; the constants are those of its CRC-32 example (bit-reflected).
// `nbytes`: at least 64, a multiple of 16.
__attribute__((target("pclmul,sse4.1"))) uint32_t by_clmul(const std::byte* bytes, size_t nbytes) {
  const auto load = [](const std::byte* from) __attribute__((target("pclmul,sse4.1"))) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  };
  const auto fold = [](__m128i value, __m128i keys, __m128i next) __attribute__((target("pclmul,sse4.1"))) {
    const __m128i low = _mm_clmulepi64_si128(value, keys, 0x00);
    const __m128i high = _mm_clmulepi64_si128(value, keys, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
  };
  const __m128i by64 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4);
  const __m128i by16 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
  __m128i a = load(bytes), b = load(bytes + 16), c = load(bytes + 32), d = load(bytes + 48);
  for (bytes += 64, nbytes -= 64; nbytes >= 64; bytes += 64, nbytes -= 64) {
    a = fold(a, by64, load(bytes));
    b = fold(b, by64, load(bytes + 16));
    c = fold(c, by64, load(bytes + 32));
    d = fold(d, by64, load(bytes + 48));
  }
  a = fold(fold(fold(a, by16, b), by16, c), by16, d);
  for (; nbytes != 0; bytes += 16, nbytes -= 16) a = fold(a, by16, load(bytes));
  // 128 bits to 64, to 32 (Barrett).
  const __m128i mask = _mm_setr_epi32(~0, 0, ~0, 0);
  a = _mm_xor_si128(_mm_srli_si128(a, 8), _mm_clmulepi64_si128(a, by16, 0x10));
  const __m128i key = _mm_set_epi64x(0, 0x0163cd6124);
  a = _mm_xor_si128(_mm_clmulepi64_si128(_mm_and_si128(a, mask), key, 0x00), _mm_srli_si128(a, 4));
  const __m128i barrett = _mm_set_epi64x(0x01f7011641, 0x01db710641);
  b = _mm_clmulepi64_si128(_mm_and_si128(a, mask), barrett, 0x10);
  b = _mm_clmulepi64_si128(_mm_and_si128(b, mask), barrett, 0x00);
  return static_cast<uint32_t>(_mm_extract_epi32(_mm_xor_si128(a, b), 1));
}
#endif

}  // namespace

uint32_t crc32_remainder(std::span<const std::byte> bytes) {
  uint32_t remainder = 0;
#ifdef FASTSHARD_CLMUL
  static const bool usable = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  if (usable && bytes.size() >= 64) {
    const size_t folded = bytes.size() / 16 * 16;
    remainder = by_clmul(bytes.data(), folded);
    bytes = bytes.subspan(folded);
  }
#endif
  return by_tables(remainder, bytes.data(), bytes.size());
}

uint32_t crc32_shift(uint32_t remainder, uint64_t nbytes) {
  for (size_t i = 0; nbytes != 0; ++i, nbytes >>= 1) {
    if (nbytes & 1) remainder = multiply(kPowers[i], remainder);
  }
  return remainder;
}

}  // namespace fastshard
