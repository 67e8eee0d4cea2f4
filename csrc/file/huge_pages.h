// SPDX-License-Identifier: Apache-2.0
// Memory of the process that the kernel is asked to put together in huge pages, of which a fork copies one entry where
// it copies 512 otherwise.
#pragma once

#include <atomic>
#include <cstddef>
#include <span>

namespace fastshard {

// Whether the kernel puts memory together when it is asked to, and nobody has turned that off.
bool can_collapse();

// Puts private memory together in huge pages where all of it is there, and none of it is shared with another process.
// Nothing changes but the time that it takes to use it. The memory may be gone by now, or may be somebody else's.
// Ends soon when `stop` is true.
void collapse(std::span<const std::span<const std::byte>> memory, const std::atomic<bool>& stop);

}  // namespace fastshard
