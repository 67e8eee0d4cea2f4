// SPDX-License-Identifier: Apache-2.0
// Under which name a new file stands: none, a hidden one or its target's, and how it gets from one to the next.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <utility>

#include "file/output.h"
#include "file/target.h"

namespace fastshard {

// The names of one file that is made to be put in the place of a target, and what undoing that takes.
class Placement {
 public:
  // How far the file has come.
  enum class State {
    temporary,  // nameless, or under the hidden name
    created,    // in place, where there was nothing
    exchanged,  // in place; the hidden name holds the old file
    replaced,   // in place; the old file is gone
  };

  Placement(OutputFile& file, Target target) : file_(file), target_(std::move(target)) {}
  Placement(const Placement&) = delete;
  Placement& operator=(const Placement&) = delete;

  State state() const { return state_; }
  const Target& target() const { return target_; }
  // Empty while the file has none.
  const std::string& hidden_name() const { return hidden_; }

  // Looks at what stands at the target now, and returns the file that is replaced. If that has gone since, what was
  // known of it is returned: the new file takes over its attributes all the same. Throws IoError for a directory.
  const std::optional<struct stat>& look_again();

  // Calls `make`, which returns 0 or an errno, with hidden names until one is free. Throws an IoError of `action`.
  void take_hidden_name(const std::function<int(const std::string&)>& make, const char* action);
  // Gives a nameless file a hidden name.
  void link_hidden();
  // Why the file cannot be linked here: 0, or an errno. Tries it, under a hidden name.
  int link_refusal();

  // Puts the file, whose contents are complete, under its target's name. With `keep_old` that can be undone, as the old
  // file is then under the hidden name, if the filesystem allows that.
  void put(bool keep_old);
  // Undoes put(), unless somebody else has replaced the file meanwhile. Returns 0, or the errno of what failed; the new
  // file stands then.
  int put_back() noexcept;
  // The new file stays where it is.
  void settle() noexcept { state_ = State::replaced; }
  // Removes the old file, when all files of the save stand. Returns 0, or the errno of what failed.
  int remove_old() noexcept;
  // Makes the old file, which is under the hidden name, the hidden file of `previous` again, if it is the same file.
  void hand_old_to(Placement& previous) noexcept;
  // Puts back what was not settled, and removes the new file.
  void discard() noexcept;

  // Whether the file under `name` is this one.
  bool is_at(const std::string& name) const;
  // Whether the name is known to be another file's, or nobody's. What cannot be looked at is not lost.
  bool lost(const std::string& name) const;

 private:
  bool exchange_with_target();
  bool keep_old_by_link();
  Descriptor held_old(const std::string& name) const;
  void rename_to_target();
  void copy_to_target();
  int link_as(const std::string& name) const;

  OutputFile& file_;
  Target target_;
  std::string hidden_;
  State state_ = State::temporary;
};

// A file that a save gives its name, together with the others (publish.h). The destructor undoes what was not
// published.
class PlacedFile : public OutputFile {
 public:
  ~PlacedFile() override { discard(); }
  // Removes the file, unless it is published.
  void discard() noexcept { place_.discard(); }

  friend class Publication;  // in publish.cc

 protected:
  // Where the file gets its name.
  struct Site {
    Target target;
    FileSystem filesystem;
  };
  // Checks the target. Throws IoError.
  static Site site_of(const std::string& path, const Intent& intent);
  PlacedFile(const std::string& path, uint64_t nbytes, const Intent& intent, Site site)
      : OutputFile(path, nbytes, intent, site.filesystem), place_(*this, std::move(site.target)) {}

  Placement place_;

 private:
  // What a publication does with each file: puts it in place, and, once all of them stand, removes the old one (0, or
  // the errno of what failed).
  virtual void put_in_place(bool keep_old) = 0;
  virtual int remove_old() noexcept = 0;
};

}  // namespace fastshard
