// SPDX-License-Identifier: Apache-2.0
#include "file/filesystem.h"

#include <linux/magic.h>
#include <sys/statfs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string_view>

namespace fastshard {
namespace {

struct KnownType {
  uint32_t magic;
  const char* name;
};

// Smaller saves are over before direct writes could overlap.
constexpr uint64_t kMinDirectSaveNbytes = 16 << 20;
// Durable saves of device memory are staged in any case, so direct writes spare them a copy. That is not measured on a
// GPU yet. From host memory direct writes cost a copy and gain nothing (DESIGN.md). When other processes use up the
// memory, they keep their 1.6 to 1.9 GiB/s, while buffered writes fall to 0.4 to 1.5.
constexpr bool kDirectFromDevice = true;

// Magic numbers that linux/magic.h does not have are the filesystems' own (statfs(2)). Files cannot be saved to
// hugetlbfs: it has no write(2), and its sizes are whole huge pages, which readers of safetensors refuse. A tmpfs
// mounted with `huge=` has huge pages, too.
constexpr KnownType kKnownTypes[] = {
    {EXT4_SUPER_MAGIC, "ext4"}, {0x58465342, "xfs"},      {BTRFS_SUPER_MAGIC, "btrfs"},
    {TMPFS_MAGIC, "tmpfs"},     {RAMFS_MAGIC, "ramfs"},   {OVERLAYFS_SUPER_MAGIC, "overlayfs"},
    {NFS_SUPER_MAGIC, "nfs"},   {0x65735546, "fuse"},     {0x0BD00BD0, "lustre"},
    {0x47504653, "gpfs"},       {0x2FC12FC1, "zfs"},      {F2FS_SUPER_MAGIC, "f2fs"},
    {0xFF534D42, "cifs"},       {0xFE534D42, "smb2"},     {V9FS_MAGIC, "9p"},
    {CEPH_SUPER_MAGIC, "ceph"}, {0x6A656A63, "virtiofs"}, {HUGETLBFS_MAGIC, "hugetlbfs"},
    {0x19830326, "beegfs"},
};

// Filesystems of which only one machine has the files, so whoever has one open is seen there.
constexpr std::string_view kOneMachine[] = {"ext4", "xfs", "btrfs", "tmpfs", "ramfs", "overlayfs", "zfs", "f2fs"};

FileSystem described(const struct statfs& info) {
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
  found.one_machine = std::ranges::find(kOneMachine, found.type) != std::end(kOneMachine);
  found.direct_io = found.type == "ext4" || found.type == "xfs";
  return found;
}

}  // namespace

Descriptor::~Descriptor() { close(); }

int Descriptor::close() noexcept {
  const int fd = std::exchange(fd_, -1);
  // EINTR: it is closed all the same.
  return fd < 0 || ::close(fd) == 0 || errno == EINTR ? 0 : errno;
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
  return described(info);
}

FileSystem filesystem_of(int fd, const std::string& path) {
  struct statfs info;
  if (fstatfs(fd, &info) != 0) throw IoError(errno, path, "fstatfs");
  return described(info);
}

bool page_cache_takes(uint64_t nbytes) {
  constexpr uint64_t kUnasked = 16 << 20;
  if (nbytes < kUnasked) return true;
  std::ifstream counters("/proc/vmstat");
  uint64_t waiting = nbytes / static_cast<uint64_t>(sysconf(_SC_PAGESIZE)), count = 0;
  for (std::string name; counters >> name >> count;) {
    if (name == "nr_dirty" || name == "nr_writeback") waiting += count;
    if (name == "nr_dirty_background_threshold") return waiting < count;  // it comes after the others
  }
  return false;
}

namespace {

Choice choose(const FileSystem& filesystem, const Intent& intent) {
  if (intent.wanted != WritePath::automatic) return {intent.wanted, "requested"};
  if (filesystem.memory_backed) {
    return {WritePath::buffered, "new file in memory: write(2) fills fresh pages without a fault for each"};
  }
  const bool large = intent.nbytes >= kMinDirectSaveNbytes;
  if (!intent.keep_cached && large)
    return {WritePath::direct, "the page cache is to stay as it is, so the file bypasses it"};
  if (intent.durable && large && filesystem.direct_io && intent.from_device && kDirectFromDevice) {
    return {WritePath::direct, "the save waits for the disk and is staged in any case, so it bypasses the page cache"};
  }
  if (intent.past_cache && large && filesystem.direct_io) {
    return {WritePath::direct,
            "written in the background: bypassing the page cache costs the job no memory and little time"};
  }
  return {WritePath::buffered, "new file: preallocated, one writer of large pwrites, helped by idle threads"};
}

}  // namespace

Choice choose_write_path(const FileSystem& filesystem, const Intent& intent) {
  Choice choice = choose(filesystem, intent);
  if (intent.gaps && choice.path == WritePath::direct)
    return {WritePath::buffered, "the gaps in the file are not whole blocks, which direct writes need"};
  return choice;
}

bool is_unsupported(int error) { return error == EOPNOTSUPP || error == ENOSYS || error == EINVAL; }

std::string self_path(int fd) { return "/proc/self/fd/" + std::to_string(fd); }

}  // namespace fastshard
