// SPDX-License-Identifier: Apache-2.0
#include "file/linked.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "file/hidden_names.h"

namespace fastshard {
namespace {

// Only read: whoever watches the file must not believe that somebody writes it.
Descriptor open_existing(const std::string& path) {
  Descriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK));
  if (!file) throw IoError(errno, path, "open");
  struct stat info;
  if (fstat(file.get(), &info) != 0) throw IoError(errno, path, "fstat");
  if (S_ISDIR(info.st_mode)) throw IoError(EISDIR, path, "open");
  if (!S_ISREG(info.st_mode)) throw IoError(EINVAL, path, "open", "it is not a regular file");
  return file;
}

}  // namespace

LinkedFile::LinkedFile(const std::string& path, const std::string& existing, const Intent& intent)
    : PlacedFile(path, 0, intent, site_of(path, intent)), existing_(existing) {
  fd_ = open_existing(existing);
  note_fallbacks(remove_leftovers(place_.target(), one_machine()));
}

int LinkedFile::refusal() { return place_.link_refusal(); }

void LinkedFile::put_in_place(bool keep_old) {
  const Awake awake(*this);
  place_.look_again();
  if (place_.is_at(place_.target().path)) return;  // the name is its own already
  mark_as_read(fd_.get());
  place_.put(keep_old);
}

// Once all files stand. 0, or the errno of what failed.
int LinkedFile::remove_old() noexcept {
  const int error = place_.remove_old();
  if (fd_) give_up(fd_.get());
  return error;
}

}  // namespace fastshard
