// SPDX-License-Identifier: Apache-2.0
#include "file/publish.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <set>
#include <string>

#include "file/hidden_names.h"

namespace fastshard {
namespace {

// 0, or the errno of what failed.
int sync_directory(const std::string& directory) {
  const Descriptor folder(open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!folder) return errno;
  return fsync(folder.get()) == 0 || errno == EINVAL ? 0 : errno;  // EINVAL: there is nothing to sync
}

// All of them, whatever fails. 0, or the first errno.
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
  return {error, path, "unlink", all_of(files) + ", but the old one could not be removed and still takes its room",
          true};
}

}  // namespace

void publish(std::span<TemporaryFile* const> files, bool durable) {
  using State = Placement::State;
  std::set<std::string> directories;
  if (durable) {
    for (const TemporaryFile* file : files) directories.insert(file->place_.target().directory);
  }

  // Nothing can fail after the only rename of a single file that would have to be undone.
  const bool keep_old = files.size() > 1;
  int unsynced = 0;
  try {
    for (TemporaryFile* file : files) file->put_in_place(keep_old);
    bool can_be_undone = keep_old;
    for (const TemporaryFile* file : files) can_be_undone = can_be_undone && file->place_.state() != State::replaced;
    unsynced = sync_directories(directories);
    if (unsynced != 0 && can_be_undone) files.front()->fail("fsync", unsynced);
  } catch (const IoError& error) {
    std::string stands;
    for (auto file = files.rbegin(); file != files.rend(); ++file) {
      Placement& place = (*file)->place_;
      const bool irrevocable = place.state() == State::replaced;
      const int refused = place.put_back();
      if (!irrevocable && refused == 0) continue;
      place.settle();
      stands += (stands.empty() ? "" : ", ") + (*file)->path();
    }
    if (stands.empty()) throw;
    const std::string before = error.detail().empty() ? "" : error.detail() + "; ";
    throw IoError(error.code().value(), error.path(), "publish",
                  before + "not all files could be put back as they were, these are the new ones: " + stands);
  }

  const TemporaryFile* not_removed_of = nullptr;
  int refused = 0;
  for (TemporaryFile* file : files) {
    const int error = file->remove_old();
    if (error == 0 || refused != 0) continue;
    refused = error;
    not_removed_of = file;
  }
  if (unsynced != 0) throw not_durable(unsynced, files.front()->path(), files.size());
  if (refused != 0) throw not_removed(refused, not_removed_of->path(), files.size());
}

void swap_into_place(TemporaryFile& file, TemporaryFile* previous, bool durable) {
  // Before it is hidden, so that nobody takes it for a leftover. A reader's lock is not in the way of anything else.
  if (previous != nullptr) mark_in_use(previous->descriptor());
  file.put_in_place(true);
  if (previous != nullptr) file.place_.hand_old_to(previous->place_);
  const int refused = file.remove_old();
  const int unsynced = durable ? sync_directory(file.place_.target().directory) : 0;
  if (unsynced != 0) throw not_durable(unsynced, file.path(), 1);
  if (refused != 0) throw not_removed(refused, file.path(), 1);
}

}  // namespace fastshard
