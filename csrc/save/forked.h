// SPDX-License-Identifier: Apache-2.0
// Saves that are written by a forked process, so that the tensors may change as soon as that is made.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "file/inherited.h"
#include "plan/schedule.h"
#include "save/forked_child.h"
#include "save/writer.h"

namespace fastshard {

// Returns, by file, the items whose bytes a forked process would not have as they are now: those on devices, those that
// only Python can bring, and those in mappings that are shared.
std::vector<std::vector<uint32_t>> not_forkable(const SavePlan& plan);

// One save that a forked process writes, through the page cache. That process drops what it has written, so that memory
// is shared for as short as can be. What it lacks of the tensors, or a lack of processes, is NotForked, thrown before
// anything is written.
class ForkedSave {
 public:
  // Throws NotForked unless the plan's bytes can be written so. The arguments outlive this.
  ForkedSave(const SavePlan& plan, bool files_stay_open, bool checksums, Progress& progress);
  ~ForkedSave();

  // Adds the next file of the plan. `file` is not closed before the end of begin()'s thread.
  std::unique_ptr<FileWriter> add(const FilePlan& plan, std::shared_ptr<OutputFile> file);

  // Forks. Returns when the tensors may be changed, and throws NotForked where that was refused. Else `written` is
  // called, by a thread that lives as long as the process, for each file in that order, when its bytes are written or
  // it is known that they will not be: the file's writer then tells. The last call comes when the process has gone.
  void begin(std::vector<size_t> order, LoneThreads& threads, WriteBehind& write_behind,
             std::function<void(size_t)> written);
  // Ends the process.
  void stop() noexcept;

  // The number of the process; 0 before and after.
  pid_t process() const;
  // How much of the tensors' memory it has given back.
  uint64_t nbytes_dropped() const;
  // How long the fork has taken.
  double fork_seconds() const { return 1e-9 * static_cast<double>(fork_ns_); }

 private:
  class Writer;
  struct File {
    const FilePlan* plan;
    std::shared_ptr<OutputFile> output;
    FileSchedule schedule;
    uint32_t first_item;
  };
  enum class Outcome { pending, begun, refused };

  void prepare(const std::vector<size_t>& order);
  void divide_memory();
  bool fork();
  void refuse(const std::string& what, std::vector<std::vector<uint32_t>> items = {});
  void follow(const std::vector<size_t>& order, WriteBehind& write_behind, const std::function<void(size_t)>& written);
  void write_back(const std::vector<size_t>& order, WriteBehind& write_behind);
  void stop_now() noexcept;
  std::vector<std::span<const std::byte>> large_memory() const;
  bool ended(bool certainly);
  void throw_failure(size_t index) const;

  const bool wants_checksums_;
  Progress& progress_;
  std::vector<File> files_;
  uint32_t items_ = 0;
  std::optional<SharedMemory> shared_;
  ForkedWork work_ = {};
  std::unique_ptr<std::byte[]> packed_;
  std::atomic<int64_t> fork_ns_ = 0;
  // How far write_back() has come.
  size_t seen_chunks_ = 0, seen_file_ = 0, seen_chunk_ = 0;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  Outcome outcome_ = Outcome::pending;
  std::exception_ptr refusal_;
  pid_t process_ = 0;
  bool stopped_ = false;
  std::string death_;          // how the process has ended, unless by itself
  std::exception_ptr error_;   // of the parent's own part
  std::vector<size_t> place_;  // of each file in the order
};

}  // namespace fastshard
