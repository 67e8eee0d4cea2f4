// SPDX-License-Identifier: Apache-2.0
#include "file/mapping.h"

#include <limits.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace fastshard {

Mapping::Mapping(int fd, uint64_t offset, uint64_t nbytes, const std::string& path) {
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const uint64_t lead = offset % page;
  mapped_nbytes_ = (lead + nbytes + page - 1) / page * page;
  base_ = mmap(nullptr, mapped_nbytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, static_cast<off_t>(offset - lead));
  if (base_ == MAP_FAILED) throw IoError(errno, path, "mmap");
  bytes_ = {static_cast<std::byte*>(base_) + lead, nbytes};
  // A tmpfs mounted with huge=advise then has a fault for each 2 MiB; nowhere else does it mean anything.
  madvise(base_, mapped_nbytes_, MADV_HUGEPAGE);
}

Mapping::~Mapping() {
  if (base_ != nullptr) munmap(base_, mapped_nbytes_);
}

// A process may read its own memory, whatever may be read of others (ptrace(2)). The source is the remote side: of a
// file that is mapped the kernel pins no page.
int copy_by_kernel(std::span<const iovec> targets, std::span<const iovec> parts) {
  size_t wanted = 0;
  for (const iovec& part : parts) wanted += part.iov_len;
  const ssize_t copied = process_vm_readv(getpid(), targets.data(), targets.size(), parts.data(), parts.size(), 0);
  if (copied < 0) return errno;
  return static_cast<size_t>(copied) == wanted ? 0 : EFAULT;
}

int copy_by_kernel(std::span<std::byte> target, std::span<const iovec> parts) {
  while (!parts.empty()) {
    const auto now = parts.first(std::min<size_t>(parts.size(), IOV_MAX));
    size_t wanted = 0;
    for (const iovec& part : now) wanted += part.iov_len;
    const iovec local{target.data(), wanted};
    if (const int refused = copy_by_kernel({&local, 1}, now); refused != 0) return refused;
    target = target.subspan(wanted);
    parts = parts.subspan(now.size());
  }
  return 0;
}

void populate(std::span<std::byte> bytes, const std::string& path) {
#ifdef MADV_POPULATE_WRITE
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t lead = reinterpret_cast<uintptr_t>(bytes.data()) % page;
  while (madvise(bytes.data() - lead, bytes.size() + lead, MADV_POPULATE_WRITE) != 0) {
    if (errno == EINVAL) return;  // a kernel before 5.14: the stores will fault
    if (errno == EINTR) continue;
    throw IoError(errno == EFAULT ? ENOSPC : errno, path, "populate");
  }
#endif
}

bool can_populate() {
#ifdef MADV_POPULATE_WRITE
  return madvise(nullptr, 0, MADV_POPULATE_WRITE) == 0;
#else
  return false;
#endif
}

}  // namespace fastshard
