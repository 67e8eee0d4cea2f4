// SPDX-License-Identifier: Apache-2.0
// Puts a file that has device memory in it into the plan's memory. Where that is page-locked, all copies out of the
// devices are enqueued before the save begins, so that streams can wait for the last of them and no host has to.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "save/into_memory.h"

namespace fastshard {

class SnapshotWriter final : public MemoryWriter {
 public:
  SnapshotWriter(WriterParts parts, const ScheduleLimits& limits, size_t threads);
  ~SnapshotWriter() override;

  std::string enqueue(EarlyScratch& scratch) override;
  void write_chunks() override;

 private:
  // What is enqueued of a chunk, and waited for by whoever claims it.
  struct Enqueued {
    bool all = false;  // that is on devices
    std::vector<std::unique_ptr<Ticket>> tickets{};
  };

  std::string enqueue(const Chunk& chunk, EarlyScratch& scratch);
  std::string take(EarlyScratch& scratch, size_t nbytes, const Chunk& chunk);
  void pack_from_host(const Chunk& chunk);
  void wait_for(const Chunk& chunk);
  bool write_unstaged(const Chunk& chunk, End end) override;
  Enqueued& enqueued(const Chunk& chunk) { return enqueued_[static_cast<size_t>(&chunk - schedule_.chunks.data())]; }

  std::vector<Enqueued> enqueued_;       // by chunk
  std::vector<const Chunk*> with_host_;  // those that have host memory and are not staged
  std::atomic<size_t> packed_ = 0;       // how many of them are claimed
};

}  // namespace fastshard
