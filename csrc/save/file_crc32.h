// SPDX-License-Identifier: Apache-2.0
// CRC-32 of what lies in a file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace fastshard {

// Returns the CRC-32 of each of several ranges that follow one another from `offset` on. They are read once, into
// `block`, as much as it holds at a time: its pages are best those of the call before. `direct`: the descriptor reads
// past the page cache; then the block is aligned.
//
// Returns nothing where the file ends before the ranges do. Throws IoError, naming `path`.
std::optional<std::vector<uint32_t>> crc32_of_ranges(int fd, const std::string& path, uint64_t offset,
                                                     std::span<const uint64_t> sizes, bool direct,
                                                     std::span<std::byte> block);

// Returns the CRC-32 of bytes that `nbytes` others follow, from those of both.
uint32_t crc32_joined(uint32_t first, uint32_t second, uint64_t nbytes);

}  // namespace fastshard
