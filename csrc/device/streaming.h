// SPDX-License-Identifier: Apache-2.0
// Copies that go past the caches: for targets larger than any cache, written once and read by somebody else.
#pragma once

#include <cstddef>

namespace fastshard {

// memcpy with non-temporal stores where the processor has them (x86-64: about 1.5 times memcpy's rate, as the
// lines of the target are not read first). Visible to other threads when it returns. `ahead_nbytes` behind each line
// of the source is one that will be copied soon: by default in the next page.
void copy_streaming(std::byte* out, const std::byte* source, size_t nbytes, size_t ahead_nbytes = 4096);

}  // namespace fastshard
