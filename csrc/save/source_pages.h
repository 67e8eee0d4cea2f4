// SPDX-License-Identifier: Apache-2.0
// The pages of files that a plan's tensors lie in. They are in memory while a chunk's bytes are read, and dropped then.
#pragma once

#include <span>
#include <vector>

#include "file/source_file.h"
#include "plan/schedule.h"

namespace fastshard {

// Chunks of tensors that lie in files are at most this large, as the chunks of all writers are resident at once.
inline constexpr uint64_t kFromFilesNbytes = 4 << 20;

// Returns whether some items of the plan lie in files.
bool reads_files(const FilePlan& plan);

// The source pages of one file of the plan. Both arguments outlive it. Thread-safe.
class SourcePages {
 public:
  SourcePages(const FilePlan& plan, const FileSchedule& schedule);

  bool any() const { return any_; }
  // Asks the disk for a chunk that will be read later.
  void ask_for(const Chunk& chunk) const;

 private:
  struct Range {
    const SourceFile* file;
    std::span<const std::byte> bytes;
    bool dense;     // most of it is read
    bool last_use;  // no other chunk reads there, but for the edges
  };

 public:
  // The pages that a chunk's ops read.
  class Held {
   public:
    // Brings them in. Throws IoError where a file no longer has them.
    Held(const SourcePages& pages, const Chunk& chunk);
    ~Held();
    Held(const Held&) = delete;
    Held& operator=(const Held&) = delete;

   private:
    const std::vector<Range> ranges_;
  };

 private:
  std::vector<Range> ranges_of(const Chunk& chunk) const;

  const FilePlan& plan_;
  const FileSchedule& schedule_;
  const bool any_;
};

}  // namespace fastshard
