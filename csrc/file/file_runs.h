// SPDX-License-Identifier: Apache-2.0
// Reads runs of bytes that lie apart in a file into memory, where they may lie apart as well.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace fastshard {

// An array of runs of `nbytes`, contiguous each. Strides are bytes between neighbours; in the file they are not
// negative, and each dimension reaches beyond what it contains.
struct FileRuns {
  uint64_t offset = 0;  // of the first one in the file
  uint64_t nbytes = 0;
  std::vector<uint64_t> counts;  // empty: one run
  std::vector<uint64_t> in_file;
  std::vector<int64_t> in_memory;
};

struct RunsRead {
  uint64_t nbytes = 0;  // copied out of the file: the runs, and gaps that were cheaper than another call
  uint64_t calls = 0;   // that read, or that mapped the file
};

// Reads all the runs; the first one goes to `out`. What is in the page cache is copied from a mapping, as a call for
// each run costs more than the copy of a short one; `streaming`: past the processor's caches. What is not is read by
// calls, so that a disk's error is an errno, and no signal. Only short runs with short gaps are copied from a mapping
// even then, once their pages are there. A file must not be cut or written to meanwhile (SIGBUS); one that has been cut
// before is noticed.
//
// Returns nothing where the file ends before the runs do. Throws IoError, naming `path`.
std::optional<RunsRead> read_runs(int fd, const std::string& path, const FileRuns& runs, std::byte* out,
                                  bool streaming);

}  // namespace fastshard
