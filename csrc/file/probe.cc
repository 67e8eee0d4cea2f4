// SPDX-License-Identifier: Apache-2.0
#include "file/probe.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <system_error>

#include "file/filesystem.h"
#include "file/hidden_names.h"

namespace fastshard {
namespace {

std::string reason(int error) { return std::generic_category().message(error); }

}  // namespace

std::vector<std::pair<std::string, std::string>> probe(const std::string& directory) {
  constexpr off_t kNbytes = 1 << 16;
  std::vector<std::pair<std::string, std::string>> answers;
  const auto ask = [&](const char* ability, const std::function<bool()>& works) {
    errno = 0;
    const bool yes = works();
    answers.emplace_back(ability, yes ? "yes" : "no: " + reason(errno));
    return yes;
  };
  const auto link_nameless = [&](int fd, const std::string& name) {
    return linkat(AT_FDCWD, self_path(fd).c_str(), AT_FDCWD, name.c_str(), AT_SYMLINK_FOLLOW) == 0;
  };

  const std::string first = random_temporary_name(directory, directory);
  const std::string second = random_temporary_name(directory, directory);
  ask("nameless temporary files (O_TMPFILE)", [&] {
    const Descriptor fd(open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
    const bool works = fd && link_nameless(fd.get(), first);
    const int error = errno;
    unlink(first.c_str());
    errno = error;
    return works;
  });
  const Descriptor file(open(first.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!ask("new files", [&] { return bool(file); })) return answers;
  ask("preallocation (fallocate)", [&] { return fallocate(file.get(), 0, 0, kNbytes) == 0; });
  ask("changing the size (ftruncate)", [&] { return ftruncate(file.get(), kNbytes) == 0; });
  ask("shared writable mappings (mmap)", [&] {
    void* memory = mmap(nullptr, kNbytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
    if (memory == MAP_FAILED) return false;
    munmap(memory, kNbytes);
    return true;
  });
  ask("early writeback (sync_file_range)",
      [&] { return sync_file_range(file.get(), 0, kNbytes, SYNC_FILE_RANGE_WRITE) == 0; });
  ask("direct I/O (O_DIRECT, 4 KiB)", [&] {
    const Descriptor direct(open(first.c_str(), O_WRONLY | O_DIRECT | O_CLOEXEC));
    if (!direct) return false;
    void* block = std::aligned_alloc(4096, 4096);
    if (block == nullptr) return false;
    const bool works = pwrite(direct.get(), block, 4096, 0) == 4096;
    std::free(block);
    return works;
  });
  ask("hard links", [&] { return link(first.c_str(), second.c_str()) == 0; });
  unlink(second.c_str());
  ask("exchange of two files (renameat2)", [&] {
    const Descriptor other(open(second.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
    return other && renameat2(AT_FDCWD, first.c_str(), AT_FDCWD, second.c_str(), RENAME_EXCHANGE) == 0;
  });
  ask("rename", [&] { return rename(first.c_str(), second.c_str()) == 0; });
  ask("fsync of the directory", [&] {
    const Descriptor folder(open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    return folder && fsync(folder.get()) == 0;
  });
  unlink(first.c_str());
  unlink(second.c_str());
  return answers;
}

}  // namespace fastshard
