// SPDX-License-Identifier: Apache-2.0
// Writes a file through the page cache: one thread by large calls of write(2), others through mappings.
#pragma once

#include <memory>

#include "save/chunk_writer.h"

namespace fastshard {

// One thread writes: a second one would only wait for the inode's lock. Where the file allows it, further threads store
// chunks from its back.
std::unique_ptr<FileWriter> make_page_cache_writer(WriterParts parts, std::shared_ptr<OutputFile> file);

}  // namespace fastshard
