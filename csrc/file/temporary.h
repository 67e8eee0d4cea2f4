// SPDX-License-Identifier: Apache-2.0
// Files that this process makes: hidden siblings of their targets, until publish() puts them in place.
#pragma once

#include <sys/stat.h>

#include <optional>
#include <span>
#include <string>

#include "file/mapping.h"
#include "file/output.h"
#include "file/placement.h"

namespace fastshard {

// A new file, nameless or under a hidden name beside its target. It appears under its target's name complete or not at
// all: the destructor removes what was not published.
class TemporaryFile final : public PlacedFile {
 public:
  // Checks the target, removes what killed saves of it have left, makes the file, which nobody may read who may not
  // read the target, and preallocates `nbytes` where that is of use; a full disk is IoError(ENOSPC). 0: not known.
  TemporaryFile(const std::string& path, uint64_t nbytes, const Intent& intent);

  // Maps the whole file, which gets its size by this.
  Mapping map();
  void end_writing() override;
  // Before that, gives the file the attributes that it will be published with.
  void sync() override;
  // The file has a hidden name from here on, and is still marked as in use.
  void suspend() override;
  // Whether the file can be filled and published again: nobody has cut it or taken its name.
  bool intact() const;

  friend void require_space(std::span<TemporaryFile* const> files);

 private:
  TemporaryFile(const std::string& path, uint64_t nbytes, const Intent& intent, const Site& site);

  void make(bool at_once);
  bool make_nameless();
  int make_named(const std::string& name);
  void take_mode_back();
  void preallocate();
  void set_up_direct();
  bool direct_works();
  void take_attributes();
  std::string space_needed(int error) const override;

  void put_in_place(bool keep_old) override;
  int remove_old() noexcept override;

  const bool gaps_;                     // it may end in bytes that are not written
  std::optional<mode_t> new_mode_;      // that a new file under a hidden name will have once it is complete
  std::optional<struct stat> adopted_;  // of the file whose attributes it has
  std::optional<Mapping> mark_;         // of a suspended file: keeps the lock of the descriptor that is gone
};

// Throws IoError(ENOSPC) unless all files that could not be preallocated fit, together, into what is free now.
void require_space(std::span<TemporaryFile* const> files);

}  // namespace fastshard
