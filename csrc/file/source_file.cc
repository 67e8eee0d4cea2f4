// SPDX-License-Identifier: Apache-2.0
#include "file/source_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "device/pack.h"
#include "file/filesystem.h"
#include "plan/error.h"

namespace fastshard {
namespace {

// A fault makes that much around it present where it is cached (fault_around_bytes), so that much more is dropped.
constexpr uintptr_t kFaultAroundNbytes = 64 << 10;

struct Registry {
  std::mutex mutex;
  std::map<uintptr_t, const SourceFile*> by_begin;
};

Registry& registry() {
  static auto* const files = new Registry;  // never destroyed: tensors may outlive static objects
  return *files;
}

uintptr_t number(const std::byte* address) { return reinterpret_cast<uintptr_t>(address); }

uintptr_t page_nbytes() {
  static const auto nbytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  return nbytes;
}

std::byte* map(int fd, uint64_t nbytes, int protection, int flags, const std::string& path) {
  void* const address = mmap(nullptr, nbytes, protection, flags, fd, 0);
  if (address == MAP_FAILED) throw IoError(errno, path, "mmap");
  return static_cast<std::byte*>(address);
}

// What the kernel says of this process's pages, /proc/self/pagemap (proc_pid_pagemap(5)), read many at a time.
class Pagemap {
 public:
  // Whether any page of a private file mapping has been changed: it is anonymous memory then, no longer the file's.
  // Also where the kernel does not tell.
  bool changed(std::span<const std::byte> range) {
    const uintptr_t end = (number(range.data()) + range.size() + page_nbytes() - 1) / page_nbytes();
    for (uintptr_t page = number(range.data()) / page_nbytes(); page < end; ++page) {
      if (page - first_ >= count_ && !read_from(page)) return true;
      constexpr uint64_t kPresent = uint64_t{1} << 63, kSwapped = uint64_t{1} << 62, kOfFile = uint64_t{1} << 61;
      const uint64_t entry = entries_[page - first_];
      if ((entry & (kPresent | kSwapped)) != 0 && (entry & kOfFile) == 0) return true;
    }
    return false;
  }

 private:
  bool read_from(uintptr_t page) {
    first_ = page;
    count_ = 0;
    ssize_t got;
    do {
      got = pread(file_.get(), entries_.data(), sizeof entries_, static_cast<off_t>(page * sizeof(uint64_t)));
    } while (got < 0 && errno == EINTR);
    if (got > 0) count_ = static_cast<size_t>(got) / sizeof(uint64_t);
    return count_ != 0;
  }

  const Descriptor file_{open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)};
  std::array<uint64_t, 4096> entries_;
  uintptr_t first_ = 0;
  size_t count_ = 0;
};

}  // namespace

// MAP_NORESERVE: else a kernel counts what could be changed, all of it, and refuses files larger than the memory.
SourceFile::SourceFile(int fd, uint64_t nbytes, std::string path) : nbytes_(nbytes), path_(std::move(path)) {
  tensors_ = map(fd, nbytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, path_);
  try {
    engine_ = map(fd, nbytes_, PROT_READ, MAP_SHARED, path_);
    const std::lock_guard lock(registry().mutex);
    registry().by_begin.emplace(number(tensors_), this);
  } catch (...) {
    if (engine_ != nullptr) munmap(const_cast<std::byte*>(engine_), nbytes_);
    munmap(tensors_, nbytes_);
    throw;
  }
}

SourceFile::~SourceFile() {
  {
    const std::lock_guard lock(registry().mutex);
    registry().by_begin.erase(number(tensors_));
  }
  munmap(const_cast<std::byte*>(engine_), nbytes_);
  munmap(tensors_, nbytes_);
}

const SourceFile* SourceFile::at(const std::byte* address) {
  const std::lock_guard lock(registry().mutex);
  const auto after = registry().by_begin.upper_bound(number(address));
  if (after == registry().by_begin.begin()) return nullptr;
  const SourceFile* const file = std::prev(after)->second;
  return number(address) - number(file->tensors_) < file->nbytes_ ? file : nullptr;
}

void SourceFile::bring_in(std::span<const std::byte> range) const {
#ifdef MADV_POPULATE_READ
  const uintptr_t begin = number(range.data()) / page_nbytes() * page_nbytes();
  const size_t nbytes = number(range.data()) + range.size() - begin;
  while (madvise(reinterpret_cast<void*>(begin), nbytes, MADV_POPULATE_READ) != 0) {
    if (errno == EINVAL) return;  // a kernel before 5.14
    if (errno == EINTR || errno == EAGAIN) continue;
    throw IoError(errno == EFAULT ? EIO : errno, path_, "read");
  }
#endif
}

void SourceFile::ask_for(std::span<const std::byte> range) const noexcept {
  const uintptr_t begin = number(range.data()) / page_nbytes() * page_nbytes();
  madvise(reinterpret_cast<void*>(begin), number(range.data()) + range.size() - begin, MADV_WILLNEED);
}

void SourceFile::drop(std::span<const std::byte> range) const noexcept {
  const uintptr_t first = number(engine_), last = first + nbytes_;
  const uintptr_t begin = number(range.data()) - std::min(kFaultAroundNbytes, number(range.data()) - first);
  const uintptr_t end = std::min(last, number(range.data()) + range.size() + kFaultAroundNbytes);
  const uintptr_t page = begin / page_nbytes() * page_nbytes();
  madvise(reinterpret_cast<void*>(page), end - page, MADV_DONTNEED);
}

void read_from_files(SavePlan& plan) {
  std::optional<Pagemap> pagemap;
  for (FilePlan& file : plan.files) {
    for (WriteItem& item : file.items) {
      if (item.mapped == nullptr || item.source.packed_nbytes() == 0) continue;
      if (!pagemap) pagemap.emplace();
      item.source.data = item.mapped->tensor_address(item.source.data);
      if (!pagemap->changed(source_extent(item.source))) {
        item.source.data = item.mapped->engine_address(item.source.data);
      }
    }
  }
}

namespace {

// Memory being compared.
class Piece {
 public:
  Piece(Pagemap& pagemap, std::span<const std::byte> bytes) : file_(SourceFile::at(bytes.data())), bytes_(bytes) {
    if (file_ != nullptr && pagemap.changed(bytes)) file_ = nullptr;
    if (file_ == nullptr) return;
    bytes_ = {file_->engine_address(bytes.data()), bytes.size()};
    file_->bring_in(bytes_);
  }
  ~Piece() {
    if (file_ != nullptr) file_->drop(bytes_);
  }
  Piece(const Piece&) = delete;
  Piece& operator=(const Piece&) = delete;

  bool operator==(const Piece& other) const {
    return std::memcmp(bytes_.data(), other.bytes_.data(), bytes_.size()) == 0;
  }

 private:
  const SourceFile* file_;
  std::span<const std::byte> bytes_;
};

}  // namespace

bool same_bytes(const std::byte* one, const std::byte* other, uint64_t nbytes) {
  constexpr uint64_t kPieceNbytes = 1 << 20;
  Pagemap pagemap;
  for (uint64_t done = 0; done < nbytes; done += kPieceNbytes) {
    const uint64_t piece = std::min(kPieceNbytes, nbytes - done);
    if (!(Piece(pagemap, {one + done, piece}) == Piece(pagemap, {other + done, piece}))) return false;
  }
  return true;
}

}  // namespace fastshard
