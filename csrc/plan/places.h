// SPDX-License-Identifier: Apache-2.0
// Where the bytes of a plan lie in a file that they do not fill one behind the other, such as columns of a tensor.
// Nothing here allocates for each run: there may be millions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fastshard {

inline constexpr uint32_t kMaxPlaceDims = 8;

// A range of packed bytes, in the file: an array of `shape` runs of `run_nbytes` contiguous bytes each, in that order.
// Without dimensions it is one run. The file's bytes between the runs are others'.
struct Place {
  uint64_t nbytes = 0;
  uint64_t file_offset = 0;  // of the first run
  uint64_t run_nbytes = 0;
  uint32_t ndim = 0;
  uint64_t shape[kMaxPlaceDims] = {};
  uint64_t stride_nbytes[kMaxPlaceDims] = {};
  uint64_t packed_offset = 0;  // where the range begins: behind the place before it

  // From the first byte to the last, in the file. Of a place that has been checked.
  uint64_t extent_nbytes() const;
};

// A range of the file.
struct FileRun {
  uint64_t file_offset;
  uint64_t nbytes;

  uint64_t end() const { return file_offset + nbytes; }
};

// Visits where packed bytes lie in the file: runs that meet there count as one. It may be copied, to look ahead.
class RunCursor {
 public:
  // The bytes [first, first + nbytes), which the places have. They outlive the cursor.
  RunCursor(const std::vector<Place>& places, uint64_t first, uint64_t nbytes);

  bool done() const { return run_.nbytes == 0; }
  const FileRun& run() const { return run_; }
  void next();

 private:
  uint64_t here() const { return run_begin_ + in_run_; }
  void enter(uint64_t byte_of_place);
  void advance(uint64_t nbytes);
  void begin_next_run();

  const Place* place_;
  uint64_t left_;           // of the bytes, behind run_
  uint64_t run_begin_ = 0;  // in the file, of the place's run that comes next
  uint64_t in_run_ = 0;
  uint64_t index_[kMaxPlaceDims] = {};
  FileRun run_ = {0, 0};
};

// Throws std::invalid_argument, naming the file, unless the places have `nbytes`, the runs of each follow each other
// within the first `file_nbytes` of the file, and no two places share a byte. It takes time by the number of places,
// or, where they lie between each other in unlike patterns, of runs.
void check(const std::vector<Place>& places, uint64_t nbytes, uint64_t file_nbytes, const std::string& file);

}  // namespace fastshard
