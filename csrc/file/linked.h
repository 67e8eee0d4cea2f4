// SPDX-License-Identifier: Apache-2.0
// New names for files that exist already.
#pragma once

#include <string>

#include "file/placement.h"

namespace fastshard {

// A hard link to a file that has the contents. It is put in place together with the other files of a save, and does not
// exist before. The file itself keeps its mode, its times and its other names.
class LinkedFile final : public PlacedFile {
 public:
  // Checks the target, and removes what killed saves of it have left. Throws IoError unless `existing` is a regular
  // file; a symbolic link is followed.
  LinkedFile(const std::string& path, const std::string& existing, const Intent& intent);

  // Returns 0, or the errno that says why the file cannot have a name there: another filesystem, one without hard
  // links, no permission, too many links. Then its contents have to be copied.
  int refusal();
  // Its name is opened again, and must lead to the same file.
  void suspend() override { suspend_under(existing_, 0); }

 private:
  void put_in_place(bool keep_old) override;
  int remove_old() noexcept override;

  const std::string existing_;
};

}  // namespace fastshard
