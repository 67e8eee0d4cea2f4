// SPDX-License-Identifier: Apache-2.0
#include "filesystem.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <system_error>

namespace fastshard {
namespace {

struct KnownType {
  uint32_t magic;
  const char* name;
};

// Smaller saves are over before direct writes could overlap.
constexpr uint64_t kDirectNbytes = 16 << 20;
// Durable saves of device memory: staged in any case, so that direct writes save them a copy. Not measured on a GPU
// yet; from host memory it costs one, and gains nothing (DESIGN.md).
constexpr bool kDirectFromDevice = true;

// Magic numbers that linux/magic.h does not have are the filesystems' own (statfs(2)).
constexpr KnownType kKnownTypes[] = {
    {EXT4_SUPER_MAGIC, "ext4"}, {0x58465342, "xfs"},      {BTRFS_SUPER_MAGIC, "btrfs"},
    {TMPFS_MAGIC, "tmpfs"},     {RAMFS_MAGIC, "ramfs"},   {OVERLAYFS_SUPER_MAGIC, "overlayfs"},
    {NFS_SUPER_MAGIC, "nfs"},   {0x65735546, "fuse"},     {0x0BD00BD0, "lustre"},
    {0x47504653, "gpfs"},       {0x2FC12FC1, "zfs"},      {F2FS_SUPER_MAGIC, "f2fs"},
    {0xFF534D42, "cifs"},       {0xFE534D42, "smb2"},     {V9FS_MAGIC, "9p"},
    {CEPH_SUPER_MAGIC, "ceph"}, {0x6A656A63, "virtiofs"}, {HUGETLBFS_MAGIC, "hugetlbfs"},
    {0x19830326, "beegfs"},
};

// Populating pages costs a thread about twice the time of a write(2) into them, but any number of threads can do it
// for one file, of which only one can write.
constexpr size_t kMappingWriters = 4;

constexpr char kTemporaryPrefix[] = ".fastshard-";
constexpr char kTemporarySuffix[] = ".tmp";

std::string reason(int error) { return std::generic_category().message(error); }

}  // namespace

Descriptor::~Descriptor() {
  if (fd_ >= 0) close(fd_);
}

const char* name_of(WritePath path) {
  switch (path) {
    case WritePath::automatic:
      return "auto";
    case WritePath::buffered:
      return "buffered";
    case WritePath::direct:
      return "direct";
    case WritePath::mapped:
      return "mapped";
    case WritePath::registered:
      return "registered";
  }
  return "unknown";
}

FileSystem filesystem_of(const std::string& directory, const std::string& path) {
  struct statfs info;
  if (statfs(directory.c_str(), &info) != 0) throw IoError(errno, path, "statfs");
  FileSystem found;
  const auto magic = static_cast<uint32_t>(info.f_type);
  for (const KnownType& known : kKnownTypes) {
    if (known.magic == magic) found.type = known.name;
  }
  if (found.type.empty()) {
    std::array<char, 16> text;
    std::snprintf(text.data(), text.size(), "0x%x", magic);
    found.type = text.data();
  }
  found.memory_backed = magic == TMPFS_MAGIC || magic == RAMFS_MAGIC;
  found.direct_io = found.type == "ext4" || found.type == "xfs";
  return found;
}

Choice choose_write_path(const FileSystem& filesystem, const Intent& intent) {
  if (intent.wanted != WritePath::automatic) return {intent.wanted, "asked for"};
  if (filesystem.memory_backed && intent.writers >= (intent.host_casts ? 2 : kMappingWriters)) {
    return {WritePath::mapped, "new file in memory, and threads enough for each to fill it in parallel"};
  }
  if (filesystem.memory_backed) {
    return {WritePath::buffered, "new file in memory: write(2) fills fresh pages without a fault for each"};
  }
  const bool large = intent.nbytes >= kDirectNbytes;
  if (!intent.keep_cached && large) return {WritePath::direct, "nothing is to stay in the page cache"};
  if (intent.durable && large && filesystem.direct_io && intent.from_device && kDirectFromDevice) {
    return {WritePath::direct, "waits for the disk anyway, and is staged anyway: past the page cache"};
  }
  return {WritePath::buffered,
          "new file: preallocated, one writer of large pwrites a file, writeback started behind it"};
}

std::string temporary_name(const std::string& directory) {
  uint64_t number;
  if (getrandom(&number, sizeof number, 0) != sizeof number) throw IoError(errno, directory, "getrandom");
  std::array<char, 17> digits;
  std::snprintf(digits.data(), digits.size(), "%016llx", static_cast<unsigned long long>(number));
  return directory + "/" + kTemporaryPrefix + digits.data() + kTemporarySuffix;
}

void mark_in_use(int fd) { flock(fd, LOCK_EX | LOCK_NB); }

void remove_leftovers(const std::string& directory) {
  std::error_code failed;  // nothing to be done about it, and nothing that has to be
  for (const auto& entry : std::filesystem::directory_iterator(directory, failed)) {
    const std::string name = entry.path().filename();
    if (!name.starts_with(kTemporaryPrefix) || !name.ends_with(kTemporarySuffix)) continue;
    const Descriptor file(open(entry.path().c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
    struct stat info;
    if (!file || fstat(file.get(), &info) != 0 || !S_ISREG(info.st_mode)) continue;
    if (flock(file.get(), LOCK_EX | LOCK_NB) == 0) unlink(entry.path().c_str());
  }
}

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
    const std::string self = "/proc/self/fd/" + std::to_string(fd);
    return linkat(AT_FDCWD, self.c_str(), AT_FDCWD, name.c_str(), AT_SYMLINK_FOLLOW) == 0;
  };

  const std::string first = temporary_name(directory);
  const std::string second = temporary_name(directory);
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
