// SPDX-License-Identifier: Apache-2.0
// Writes a file past the page cache, in whole blocks out of staging slots.
#pragma once

#include <memory>

#include "save/chunk_writer.h"

namespace fastshard {

// Two threads write, as a direct write shares the inode's lock with others: one copies while the other hands a write to
// the kernel, which takes its time.
std::unique_ptr<FileWriter> make_direct_writer(WriterParts parts, std::shared_ptr<OutputFile> file);

}  // namespace fastshard
