// SPDX-License-Identifier: Apache-2.0
// Writes what a plan has places for to the runs of a file that these name, between the bytes of others.
#pragma once

#include <memory>

#include "save/chunk_writer.h"

namespace fastshard {

// Never reads a byte to write it again: others may write to the same pages at the same time.
std::unique_ptr<FileWriter> make_placed_writer(WriterParts parts, std::shared_ptr<OutputFile> file);

}  // namespace fastshard
