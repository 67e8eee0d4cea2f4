// SPDX-License-Identifier: Apache-2.0
// How finished files get their names: all of a save, or none.
#pragma once

#include <span>

#include "file/temporary.h"

namespace fastshard {

// Makes all files visible under their targets, or none of them: when one cannot be put in place, those that were get
// their old contents back. Contents must be complete. With `durable` the names are on stable storage, too, when it
// returns. A process that is killed between the first and the last rename leaves some files new and some old, each
// complete. An error that comes when all files stand is an IoError that says so.
void publish(std::span<PlacedFile* const> files, bool durable);

// As publish(), for a file that will be written again: `previous`, the file that was published before, is a hidden file
// afterwards, and can be published again. If somebody has put another file in its place, that one is removed.
void swap_into_place(TemporaryFile& file, TemporaryFile* previous, bool durable);

}  // namespace fastshard
