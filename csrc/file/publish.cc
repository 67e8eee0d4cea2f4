// SPDX-License-Identifier: Apache-2.0
#include "file/publish.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <set>
#include <string>

#include "file/closing.h"
#include "file/hidden_names.h"

namespace fastshard {
namespace {

// Returns 0, or the errno of what failed.
int sync_directory(const std::string& directory) {
  const Descriptor folder(open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!folder) return errno;
  return fsync(folder.get()) == 0 || errno == EINVAL ? 0 : errno;  // EINVAL: there is nothing to sync
}

// Syncs all of them, even after one has failed. Returns 0, or the first errno.
int sync_directories(const std::set<std::string>& directories) {
  int error = 0;
  for (const std::string& directory : directories) {
    const int now = sync_directory(directory);
    if (error == 0) error = now;
  }
  return error;
}

std::string all_of(size_t files) {
  return files == 1 ? "the new file is in place" : "all " + std::to_string(files) + " new files are in place";
}

IoError not_durable(int error, const std::string& path, size_t files) {
  return {error, path, "fsync", all_of(files) + ", but not known to be on stable storage", true};
}

IoError not_removed(int error, const std::string& path, size_t files) {
  return {error, path, "unlink", all_of(files) + ", but the old one could not be removed and still occupies space",
          true};
}

}  // namespace

// What publish() and swap_into_place() may do with a file that they put in place.
class Publication {
 public:
  Publication(std::span<PlacedFile* const> files, bool durable) : files_(files) {
    if (!durable) return;
    for (const PlacedFile* file : files) directories_.insert(file->place_.target().directory);
  }

  // For a single file nothing comes after its rename that could fail and make it necessary to undo it.
  void publish_all() {
    const bool keep_old = files_.size() > 1;
    int unsynced = 0;
    wait_for_room();
    try {
      for (PlacedFile* file : files_) file->put_in_place(keep_old);
      const bool can_be_undone = keep_old && std::ranges::none_of(files_, is_irrevocable);
      unsynced = sync_directories(directories_);
      if (unsynced != 0 && can_be_undone) files_.front()->fail("fsync", unsynced);
    } catch (const IoError& error) {
      const std::string stands = put_back_all();
      if (stands.empty()) throw;
      const std::string before = error.detail().empty() ? "" : error.detail() + "; ";
      throw IoError(error.code().value(), error.path(), "publish",
                    before + "some files could not be restored and have their new content: " + stands);
    }
    end(unsynced);
  }

  // Of a single file.
  void put_in_place_of(PlacedFile* previous) {
    PlacedFile& file = *files_.front();
    // Before it is hidden, so that nobody takes it for a leftover. A reader's lock is not in the way of anything else.
    if (previous != nullptr) mark_in_use(previous->descriptor());
    file.put_in_place(true);
    if (previous != nullptr) file.place_.hand_old_to(previous->place_);
    const int refused = file.remove_old();
    const int unsynced = sync_directories(directories_);
    if (unsynced != 0) throw not_durable(unsynced, file.path(), 1);
    if (refused != 0) throw not_removed(refused, file.path(), 1);
  }

 private:
  static bool is_irrevocable(const PlacedFile* file) { return file->place_.state() == Placement::State::replaced; }

  // Returns the paths of the files that could not be put back.
  std::string put_back_all() {
    std::string stands;
    for (auto file = files_.rbegin(); file != files_.rend(); ++file) {
      const bool irrevocable = is_irrevocable(*file);
      const int refused = (*file)->place_.put_back();
      if (!irrevocable && refused == 0) continue;
      (*file)->place_.settle();
      stands += (stands.empty() ? "" : ", ") + (*file)->path();
    }
    return stands;
  }

  // Removes the old files, as all new ones stand. What fails from here on is told by an error that says so.
  void end(int unsynced) {
    const PlacedFile* not_removed_of = nullptr;
    int refused = 0;
    for (PlacedFile* file : files_) {
      const int error = file->remove_old();
      if (error == 0 || refused != 0) continue;
      refused = error;
      not_removed_of = file;
    }
    if (unsynced != 0) throw not_durable(unsynced, files_.front()->path(), files_.size());
    if (refused != 0) throw not_removed(refused, not_removed_of->path(), files_.size());
  }

  const std::span<PlacedFile* const> files_;
  std::set<std::string> directories_;  // to be synced
};

void publish(std::span<PlacedFile* const> files, bool durable) { Publication(files, durable).publish_all(); }

void swap_into_place(TemporaryFile& file, TemporaryFile* previous, bool durable) {
  PlacedFile* const alone = &file;
  Publication({&alone, 1}, durable).put_in_place_of(previous);
}

}  // namespace fastshard
