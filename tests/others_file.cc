// SPDX-License-Identifier: Apache-2.0
// OutputFile by itself: linked with nothing that makes a temporary or publishes one, and called from
// test_others_file.py.
#include <cstring>

#include "file/output.h"

using fastshard::Descriptor;
using fastshard::Intent;
using fastshard::IoError;
using fastshard::OutputFile;

namespace {

void write_to(OutputFile& file, const char* bytes, uint64_t nbytes, uint64_t offset, bool suspend) {
  if (suspend) file.suspend();
  const OutputFile::Awake awake(file);
  iovec part{const_cast<char*>(bytes), nbytes};
  file.write({&part, 1}, offset);
  file.start_writeback(offset, nbytes);
  if (!file.keep_cached()) file.evict_behind(offset, nbytes);
  file.end_writing();
  file.sync();
  file.check_stored();
}

}  // namespace

// 0, or the errno of what failed; `action` is then what that was. By descriptor, if `fd` is one.
extern "C" int write_at(int fd, const char* path, const char* bytes, uint64_t nbytes, uint64_t offset, bool keep_cached,
                        bool suspend, char* action) {
  const Intent intent{.wanted = fastshard::WritePath::direct, .keep_cached = keep_cached, .nbytes = 2 * nbytes};
  try {
    if (fd >= 0) {
      OutputFile file(Descriptor(fd), path, nbytes, intent);
      write_to(file, bytes, nbytes, offset, suspend);
    } else {
      OutputFile file(path, nbytes, intent);
      write_to(file, bytes, nbytes, offset, suspend);
    }
  } catch (const IoError& error) {
    std::strncpy(action, error.what(), 99);
    return error.code().value();
  }
  return 0;
}

// Suspends a file by its name, lets `meanwhile` happen, and awakes it. 0, or an errno.
extern "C" int awake_after(const char* path, void (*meanwhile)()) {
  try {
    OutputFile file(path, 0, Intent{});
    file.suspend();
    meanwhile();
    const OutputFile::Awake awake(file);
  } catch (const IoError& error) {
    return error.code().value();
  }
  return 0;
}
