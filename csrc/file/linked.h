// SPDX-License-Identifier: Apache-2.0
// New names of files that are there already.
#pragma once

#include <string>

#include "file/placement.h"

namespace fastshard {

// A hard link to a file that has the contents, which is put in place with the other files of a save. The file itself
// stays as it is: its mode, its times, its other names. Until it is published there is no link.
class LinkedFile final : public PlacedFile {
 public:
  // Checks the target, and removes what killed saves of it have left. Throws IoError unless `existing` is a regular
  // file; a symbolic link is followed.
  LinkedFile(const std::string& path, const std::string& existing, const Intent& intent);

  // 0, or why the file cannot have a name there (errno): another filesystem, one without hard links, no permission, too
  // many links. Then its contents have to be copied.
  int refusal();
  // Its name is opened again, and must lead to the same file.
  void suspend() override { suspend_under(existing_, 0); }

 private:
  void put_in_place(bool keep_old) override;
  int remove_old() noexcept override;

  const std::string existing_;
};

}  // namespace fastshard
