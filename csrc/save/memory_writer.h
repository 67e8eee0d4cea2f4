// SPDX-License-Identifier: Apache-2.0
// Puts the bytes of a file into memory: the plan's own, or the file's, mapped window by window. Any number of threads
// can do that at once.
#pragma once

#include <memory>

#include "save/chunk_writer.h"

namespace fastshard {

// Into the memory that the plan's target names. Devices copy straight into it where it is page-locked.
std::unique_ptr<FileWriter> make_memory_writer(WriterParts parts);
// Into windows of the file.
std::unique_ptr<FileWriter> make_mapped_writer(WriterParts parts, std::shared_ptr<OutputFile> file);
// The same, where the windows that devices copy into are page-locked for them, so that they copy straight into the
// file; where the driver takes no page of it, as make_mapped_writer().
std::unique_ptr<FileWriter> make_registered_writer(WriterParts parts, std::shared_ptr<OutputFile> file);

}  // namespace fastshard
