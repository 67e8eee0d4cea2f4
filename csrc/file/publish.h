// SPDX-License-Identifier: Apache-2.0
// How finished files get their names: all of a save, or none.
#pragma once

#include <span>

#include "file/temporary.h"

namespace fastshard {

// Makes all files visible under their targets, or none of them: when one cannot be put in place, those that
// were get their old contents back. Contents must be complete. `durable`: the names are on stable storage too.
// Between the first and the last rename a kill leaves some files new and some old, each complete. An error that comes
// when all of them stand is an IoError that says so.
void publish(std::span<TemporaryFile* const> files, bool durable);

// publish() for a file that will be written again: `previous`, the one published before, is a hidden file
// afterwards, to be published again. Should somebody else have taken its place, that file goes instead.
void swap_into_place(TemporaryFile& file, TemporaryFile* previous, bool durable);

}  // namespace fastshard
