// SPDX-License-Identifier: Apache-2.0
// Writes a file through the page cache, in large calls of write(2).
#pragma once

#include <memory>

#include "save/chunk_writer.h"

namespace fastshard {

// One thread writes: a second one would only wait for the inode's lock. With checksums there are two, of which the
// other reads the tensors that the kernel takes from where they lie.
std::unique_ptr<FileWriter> make_page_cache_writer(WriterParts parts, std::shared_ptr<OutputFile> file);

}  // namespace fastshard
