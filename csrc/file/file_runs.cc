// SPDX-License-Identifier: Apache-2.0
#include "file/file_runs.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <span>

#include "device/streaming.h"
#include "plan/error.h"

namespace fastshard {
namespace {

// A gap is read over if the run before it is at least so many times as long.
constexpr uint64_t kGapShare = 5;
// Of a file that is not cached: runs that are shorter, with gaps that are not longer, are asked for as one range, as a
// disk takes longer to find a run than to read across the gap. Nor are they worth a call each.
constexpr uint64_t kSeekNbytes = 64 << 10;
// Shorter runs stay in the caches until the line of the target that they share is complete.
constexpr uint64_t kStreamedRunNbytes = 256;
// What is wanted of the source and should be asked for ahead.
constexpr uint64_t kAheadNbytes = 8192;
constexpr uint64_t kReadNbytes = 16 << 20;
// A mapping begins and ends at multiples of it, so that large folios of the page cache are mapped by one fault each.
constexpr uint64_t kMappedNbytes = 2 << 20;

uint64_t page_nbytes() {
  static const auto nbytes = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  return nbytes;
}

// The innermost dimension of the array: `count` runs.
struct Row {
  uint64_t offset;
  std::byte* out;
};

class Reader {
 public:
  Reader(int fd, const std::string& path, const FileRuns& runs, std::byte* out, bool streaming)
      : fd_(fd), path_(path), runs_(runs), out_(out), streaming_(streaming) {
    if (!runs.counts.empty()) {
      count_ = runs.counts.back();
      step_ = runs.in_file.back();
      out_step_ = runs.in_memory.back();
    }
    end_ = runs.offset + runs.nbytes;
    for (size_t dim = 0; dim < runs.counts.size(); ++dim) end_ += (runs.counts[dim] - 1) * runs.in_file[dim];
  }

  std::optional<RunsRead> read() {
    struct stat info;
    if (fstat(fd_, &info) != 0) fail("fstat");
    if (static_cast<uint64_t>(info.st_size) < end_) return std::nullopt;
    const bool cached = is_cached();
    if (!cached) ask_for();
    const bool whole = by_calls(cached) ? read_by_calls() : copy_mapped(cached);
    return whole ? std::optional(read_) : std::nullopt;
  }

 private:
  [[noreturn]] void fail(const char* action) const { throw IoError(errno, path_, action); }

  uint64_t gap() const { return count_ > 1 ? step_ - runs_.nbytes : 0; }

  bool by_calls(bool cached) const { return !cached && (!dense() || gap() * kGapShare <= runs_.nbytes); }
  // Whether the disk had better read all of a row.
  bool dense() const { return runs_.nbytes < kSeekNbytes && gap() <= kSeekNbytes; }

  // Whether the page cache has all of it; false where the kernel does not tell (before Linux 6.5; of files that the
  // process could not write to).
  bool is_cached() const {
    constexpr long kCachestat = 451;
    struct {
      uint64_t offset, nbytes;
    } const range{runs_.offset, end_ - runs_.offset};
    struct {
      uint64_t cached, dirty, writeback, evicted, recently_evicted;
    } pages{};
    if (syscall(kCachestat, fd_, &range, &pages, 0) != 0) return false;
    const uint64_t first = runs_.offset / page_nbytes(), last = (end_ - 1) / page_nbytes();
    return pages.cached >= last - first + 1;
  }

  void ask_for() const {
    if (dense()) {
      for_each_row([&](const Row& row) { return ask_for(row.offset, (count_ - 1) * step_ + runs_.nbytes); });
    } else {
      for_each_run([&](uint64_t offset, std::byte*) { return ask_for(offset, runs_.nbytes); });
    }
  }

  bool ask_for(uint64_t offset, uint64_t nbytes) const {
    return posix_fadvise(fd_, static_cast<off_t>(offset), static_cast<off_t>(nbytes), POSIX_FADV_WILLNEED) == 0;
  }

  template <typename Function>
  bool for_each_row(Function function) const {
    const size_t dims = runs_.counts.empty() ? 0 : runs_.counts.size() - 1;
    std::vector<uint64_t> index(dims, 0);
    for (;;) {
      Row row{runs_.offset, out_};
      for (size_t dim = 0; dim < dims; ++dim) {
        row.offset += index[dim] * runs_.in_file[dim];
        row.out += static_cast<int64_t>(index[dim]) * runs_.in_memory[dim];
      }
      if (!function(row)) return false;
      size_t dim = dims;
      while (dim != 0 && ++index[dim - 1] == runs_.counts[dim - 1]) index[--dim] = 0;
      if (dim == 0) return true;
    }
  }

  template <typename Function>
  bool for_each_run(Function function) const {
    return for_each_row([&](const Row& row) {
      for (uint64_t run = 0; run < count_; ++run) {
        if (!function(row.offset + run * step_, row.out + static_cast<int64_t>(run) * out_step_)) return false;
      }
      return true;
    });
  }

  // Runs with short gaps are read by one call for many, the gaps into memory that nobody looks at.
  bool read_by_calls() {
    if (count_ == 1 || gap() * kGapShare > runs_.nbytes) {
      return for_each_run([&](uint64_t offset, std::byte* out) {
        iovec part{out, runs_.nbytes};
        return read_at({&part, 1}, offset);
      });
    }
    std::vector<std::byte> skipped(gap());
    std::vector<iovec> parts;
    return for_each_row([&](const Row& row) {
      for (uint64_t run = 0; run < count_;) {
        parts.clear();
        const uint64_t first = run;
        uint64_t nbytes = 0;
        for (; run < count_ && parts.size() < kMostParts && nbytes < kReadNbytes; ++run, nbytes += step_) {
          if (run != first && gap() != 0) parts.push_back({skipped.data(), skipped.size()});
          parts.push_back({row.out + static_cast<int64_t>(run) * out_step_, runs_.nbytes});
        }
        if (!read_at(parts, row.offset + first * step_)) return false;
      }
      return true;
    });
  }

  // False where the file ends before. `parts` are changed.
  bool read_at(std::span<iovec> parts, uint64_t offset) {
    ++read_.calls;
    while (!parts.empty()) {
      ssize_t done = preadv(fd_, parts.data(), static_cast<int>(parts.size()), static_cast<off_t>(offset));
      if (done < 0 && errno == EINTR) continue;
      if (done < 0) fail("read");
      if (done == 0) return false;
      offset += static_cast<uint64_t>(done);
      read_.nbytes += static_cast<uint64_t>(done);
      while (!parts.empty() && static_cast<size_t>(done) >= parts.front().iov_len) {
        done -= static_cast<ssize_t>(parts.front().iov_len);
        parts = parts.subspan(1);
      }
      if (done != 0) {
        parts.front().iov_base = static_cast<std::byte*>(parts.front().iov_base) + done;
        parts.front().iov_len -= static_cast<size_t>(done);
      }
    }
    return true;
  }

  bool copy_mapped(bool cached) {
    const uint64_t first = runs_.offset / kMappedNbytes * kMappedNbytes;
    const uint64_t nbytes = (end_ - first + kMappedNbytes - 1) / kMappedNbytes * kMappedNbytes;
    void* const base = mmap(nullptr, nbytes, PROT_READ, MAP_SHARED, fd_, static_cast<off_t>(first));
    if (base == MAP_FAILED) fail("mmap");
    const auto* const mapped = static_cast<const std::byte*>(base);
    const bool there = cached || populate_rows(mapped, first);
    const int error = errno;
    if (there) {
      ++read_.calls;
      for_each_row([&](const Row& row) {
        copy_row(mapped + (row.offset - first), row.out);
        return true;
      });
    }
    munmap(base, nbytes);
    errno = error;
    if (!there) throw IoError(error == EFAULT ? EIO : error, path_, "read");
    return true;
  }

  bool populate_rows(const std::byte* mapped, uint64_t first) const {
#ifdef MADV_POPULATE_READ
    return for_each_row([&](const Row& row) {
      const uint64_t begin = (row.offset - first) / page_nbytes() * page_nbytes();
      const uint64_t end = row.offset - first + (count_ - 1) * step_ + runs_.nbytes;
      void* const pages = const_cast<std::byte*>(mapped) + begin;
      while (madvise(pages, end - begin, MADV_POPULATE_READ) != 0) {
        if (errno == EINVAL) return true;  // a kernel before 5.14
        if (errno != EINTR && errno != EAGAIN) return false;
      }
      return true;
    });
#else
    static_cast<void>(mapped), static_cast<void>(first);
    return true;
#endif
  }

  void copy_row(const std::byte* source, std::byte* out) {
    const uint64_t run = runs_.nbytes;
    const uint64_t ahead = run >= kAheadNbytes || count_ == 1 ? 4096 : step_ * (kAheadNbytes / run);
    for (uint64_t i = 0; i < count_; ++i) {
      if (streaming_ && run >= kStreamedRunNbytes) {
        copy_streaming(out, source, run, ahead);
      } else {
        copy_run(out, source, run);
      }
      source += step_;
      out += out_step_;
    }
    read_.nbytes += count_ * run;
  }

  // Fixed sizes compile to plain loads and stores.
  static void copy_run(std::byte* out, const std::byte* source, uint64_t nbytes) {
    switch (nbytes) {
      case 1:
        std::memcpy(out, source, 1);
        break;
      case 2:
        std::memcpy(out, source, 2);
        break;
      case 4:
        std::memcpy(out, source, 4);
        break;
      case 8:
        std::memcpy(out, source, 8);
        break;
      default:
        std::memcpy(out, source, nbytes);
    }
  }

  static constexpr size_t kMostParts = 1023;  // of IOV_MAX: one more is a gap
  const int fd_;
  const std::string& path_;
  const FileRuns& runs_;
  std::byte* const out_;
  const bool streaming_;
  uint64_t count_ = 1, step_ = 0, end_ = 0;
  int64_t out_step_ = 0;
  RunsRead read_;
};

}  // namespace

std::optional<RunsRead> read_runs(int fd, const std::string& path, const FileRuns& runs, std::byte* out,
                                  bool streaming) {
  for (const uint64_t count : runs.counts) {
    if (count == 0) return RunsRead{};
  }
  if (runs.nbytes == 0) return RunsRead{};
  return Reader(fd, path, runs, out, streaming).read();
}

}  // namespace fastshard
