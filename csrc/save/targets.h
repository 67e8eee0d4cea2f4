// SPDX-License-Identifier: Apache-2.0
// The targets of a save's files, made or opened.
#pragma once

#include <memory>

#include "file/placement.h"
#include "file/source_file.h"
#include "file/temporary.h"
#include "plan/plan.h"

namespace fastshard {

// Replaces a link that was refused: the existing file, and the plan of a new file with its bytes.
struct LinkCopy {
  std::unique_ptr<SourceFile> source;  // none of an empty file
  FilePlan plan;
};

struct OpenTarget {
  std::shared_ptr<OutputFile> file;  // null where the target is memory
  PlacedFile* placed = nullptr;      // the same, where the save gives it its name
  TemporaryFile* made = nullptr;     // the same, where the save makes it
  std::unique_ptr<LinkCopy> copy = nullptr;
};

// Makes or opens what the plan's bytes go into. Throws IoError, and leaves nothing behind, if that is not possible:
// there is no directory or no space, or somebody else's file is missing, not open for writing or too small.
OpenTarget open_target(const FilePlan& plan, const Intent& intent);

}  // namespace fastshard
