// SPDX-License-Identifier: Apache-2.0
#include "save/forked.h"

#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <new>
#include <system_error>
#include <utility>

#include "device/pack.h"
#include "file/huge_pages.h"
#include "file/shared_pages.h"
#include "plan/error.h"

namespace fastshard {
namespace {

using State = ForkedTotals::State;

// A process that is killed tells nobody: so often one looks.
constexpr int64_t kLookNs = 20'000'000;

// A page table of as much memory is copied in 5 to 8 ms, if its pages are small.
constexpr size_t kSlowToFork = 256 << 20;

constexpr size_t kAlignment = alignof(std::max_align_t);
size_t aligned(size_t nbytes) { return (nbytes + kAlignment - 1) / kAlignment * kAlignment; }

std::span<const std::byte> memory_read(const WriteItem& item) {
  return item.source.packed_nbytes() == 0 ? std::span<const std::byte>() : source_extent(item.source);
}

// Where memory runs out, the copy goes before the job that was copied.
void offer_to_oom_killer(pid_t process) noexcept {
  std::array<char, 64> path;
  std::snprintf(path.data(), path.size(), "/proc/%d/oom_score_adj", static_cast<int>(process));
  const Descriptor file(open(path.data(), O_WRONLY | O_CLOEXEC));
  if (file) static_cast<void>(!write(file.get(), "1000", 4));
}

std::string described(const siginfo_t& end) {
  const std::string process = "the forked process that wrote the file ";
  if (end.si_code != CLD_KILLED && end.si_code != CLD_DUMPED) return process + "ended before the file was complete";
  const std::string killed = process + "was killed by signal " + std::to_string(end.si_status);
  return end.si_status == SIGKILL ? killed + ", as the kernel does when memory runs out" : killed;
}

}  // namespace

std::vector<std::vector<uint32_t>> not_forkable(const SavePlan& plan) {
  const SharedMappings shared;
  std::vector<std::vector<uint32_t>> found(plan.files.size());
  for (size_t file = 0; file < plan.files.size(); ++file) {
    const std::vector<WriteItem>& items = plan.files[file].items;
    for (uint32_t item = 0; item < items.size(); ++item) {
      if (items[item].source.packed_nbytes() == 0) continue;
      if (items[item].source.device != kHost || shared.touched_by(memory_read(items[item]))) {
        found[file].push_back(item);
      }
    }
  }
  return found;
}

// What a file's writer still has to say, once its bytes are written.
class ForkedSave::Writer final : public FileWriter {
 public:
  Writer(ForkedSave& save, size_t index) : save_(save), index_(index) {}
  ~Writer() override { save_.files_[index_].output.reset(); }
  size_t writers() const override { return 1; }
  void write_chunks() override { save_.throw_failure(index_); }
  bool exhausted() const override { return true; }
  std::vector<uint32_t> checksums() const override {
    const File& file = save_.files_[index_];
    std::vector<uint32_t> values;
    if (save_.work_.checksums.empty()) return values;
    for (const Crc32& checksum : save_.work_.checksums.subspan(file.first_item, file.plan->items.size())) {
      values.push_back(checksum.value());
    }
    return values;
  }

 private:
  ForkedSave& save_;
  const size_t index_;
};

ForkedSave::ForkedSave(const SavePlan& plan, bool files_stay_open, bool checksums, Progress& progress)
    : wants_checksums_(checksums), progress_(progress) {
  if (!files_stay_open) throw NotForked("the process cannot keep so many files open at once");
  for (const FilePlan& file : plan.files) {
    if (memory_of(file.target) != nullptr) throw NotForked("a forked process cannot fill its parent's memory");
    if (file.placed) throw NotForked("a forked process cannot write into places between other writers' bytes");
  }
  std::vector<std::vector<uint32_t>> items = not_forkable(plan);
  if (std::ranges::any_of(items, [](const auto& of_file) { return !of_file.empty(); })) {
    throw NotForked("some tensors lie in memory that a forked process has no copy of", std::move(items));
  }
}

ForkedSave::~ForkedSave() = default;

std::unique_ptr<FileWriter> ForkedSave::add(const FilePlan& plan, std::shared_ptr<OutputFile> file) {
  files_.push_back({&plan, std::move(file), make_schedule(plan, ScheduleLimits{}), items_});
  items_ += static_cast<uint32_t>(plan.items.size());
  return std::make_unique<Writer>(*this, files_.size() - 1);
}

// All that the process will need: it has to do without an allocator.
void ForkedSave::prepare(const std::vector<size_t>& order) {
  work_ = {};
  work_.parent = getpid();
  work_.page_nbytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  uint64_t packed_nbytes = 0;
  place_.resize(files_.size());
  for (size_t place = 0; place < order.size(); ++place) {
    const File& file = files_[order[place]];
    place_[order[place]] = place;
    work_.files.push_back({file.output->descriptor(), &file.schedule, file.first_item});
    for (const Chunk& chunk : file.schedule.chunks) {
      if (chunk.route == Route::packed) packed_nbytes = std::max(packed_nbytes, chunk.nbytes);
    }
  }
  if (packed_nbytes != 0) {
    packed_ = std::make_unique_for_overwrite<std::byte[]>(packed_nbytes);
    work_.packed = {packed_.get(), packed_nbytes};
    progress_.peak_staged_nbytes = packed_nbytes;
    progress_.staged_pageable = true;
  }
  work_.parts.resize(IOV_MAX);
  divide_memory();

  const size_t checksums = wants_checksums_ ? items_ : 0;
  shared_.emplace(aligned(sizeof(ForkedTotals)) + aligned(items_) + checksums * sizeof(Crc32));
  std::byte* next = shared_->data();
  work_.totals = new (next) ForkedTotals;
  next += aligned(sizeof(ForkedTotals));
  work_.lacking = {next, items_};
  next += aligned(items_);
  work_.checksums = {reinterpret_cast<Crc32*>(next), checksums};
  crc32_remainder({});  // what it finds out when it is first called, it finds out under a lock
  if (!wants_checksums_) return;
  for (const File& file : files_) {
    for (const WriteItem& item : file.plan->items) {
      new (next) Crc32(item.source.packed_nbytes());
      next += sizeof(Crc32);
    }
  }
}

// Items whose memory overlaps have one extent, which can be given back when the last of them is written.
void ForkedSave::divide_memory() {
  work_.memory.reserve(items_);
  for (const File& file : files_) {
    for (const WriteItem& item : file.plan->items) work_.memory.push_back(memory_read(item));
  }
  std::vector<uint32_t> by_address;
  for (uint32_t item = 0; item < items_; ++item) {
    if (!work_.memory[item].empty()) by_address.push_back(item);
  }
  std::ranges::sort(by_address, std::less(), [&](uint32_t item) { return work_.memory[item].data(); });
  work_.extent_of.resize(items_);
  for (const uint32_t item : by_address) {
    const auto begin = reinterpret_cast<uintptr_t>(work_.memory[item].data());
    const uintptr_t end = begin + work_.memory[item].size();
    if (work_.extents.empty() || begin >= work_.extents.back().end) {
      const uintptr_t first = (begin + work_.page_nbytes - 1) / work_.page_nbytes * work_.page_nbytes;
      work_.extents.push_back({.begin = begin, .end = end, .items = 0, .dropped = first, .one_item = true});
    }
    ForkedExtent& extent = work_.extents.back();
    extent.end = std::max(extent.end, end);
    extent.one_item = extent.items++ == 0;
    work_.extent_of[item] = static_cast<uint32_t>(work_.extents.size() - 1);
  }
}

void ForkedSave::begin(std::vector<size_t> order, LoneThreads& threads, WriteBehind& write_behind,
                       std::function<void(size_t)> written) {
  prepare(order);
  outcome_ = Outcome::pending;
  const auto tell = [this](Outcome outcome) {
    const std::lock_guard lock(mutex_);
    outcome_ = outcome;
    changed_.notify_all();
  };
  auto task = [this, tell, order = std::move(order), &threads, &write_behind, written = std::move(written)]() mutable {
    if (!fork()) {
      written = nullptr;  // and what it holds: whoever waits may drop the rest
      return tell(Outcome::refused);
    }
    tell(Outcome::begun);
    const std::vector<std::span<const std::byte>> memory = large_memory();
    follow(order, write_behind, written);
    written = nullptr;
    // The next fork then has less to copy. Nothing of this save is needed for that, as it may be gone by now.
    if (memory.empty() || !can_collapse()) return;
    give_way();
    collapse(memory, threads.closing());
  };
  try {
    // The kernel ends the process with the thread that has made it, so that one has to last.
    threads.start("fastshard-fork", std::move(task));
  } catch (const std::system_error& error) {
    throw NotForked("thread refused: " + error.code().message());
  }
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return outcome_ != Outcome::pending; });
  if (outcome_ == Outcome::refused) std::rethrow_exception(refusal_);
}

// The tensors' memory, where it is so much that copying its page table takes long.
std::vector<std::span<const std::byte>> ForkedSave::large_memory() const {
  std::vector<std::span<const std::byte>> memory;
  size_t nbytes = 0;
  for (const ForkedExtent& extent : work_.extents) {
    memory.emplace_back(reinterpret_cast<const std::byte*>(extent.begin), extent.end - extent.begin);
    nbytes += memory.back().size();
  }
  if (nbytes < kSlowToFork) memory.clear();
  return memory;
}

void ForkedSave::refuse(const std::string& what, std::vector<std::vector<uint32_t>> items) {
  refusal_ = std::make_exception_ptr(NotForked(what, std::move(items)));
}

// Returns whether there is a process that writes, or that was stopped.
bool ForkedSave::fork() {
  note_fork();
  const auto began = std::chrono::steady_clock::now();
  const long process = fork_writer(work_);
  fork_ns_ = std::chrono::nanoseconds(std::chrono::steady_clock::now() - began).count();
  if (process < 0) {
    refuse("clone refused: " + std::generic_category().message(static_cast<int>(-process)));
    return false;
  }
  {
    const std::lock_guard lock(mutex_);
    process_ = static_cast<pid_t>(process);
    if (stopped_) kill(process_, SIGKILL);
  }
  offer_to_oom_killer(static_cast<pid_t>(process));
  for (;;) {
    const uint32_t seen = work_.totals->turn;
    const State state = work_.totals->state;
    if (state == State::lacking) break;
    if (state != State::beginning) return true;
    if (ended(false)) break;
    await_turn(*work_.totals, seen, kLookNs);
  }
  ended(true);
  const std::lock_guard lock(mutex_);
  if (stopped_) return true;
  if (work_.totals->state != State::lacking) {
    refuse(death_);
    return false;
  }
  std::vector<std::vector<uint32_t>> items(files_.size());
  for (size_t index = 0; index < files_.size(); ++index) {
    for (uint32_t item = 0; item < files_[index].plan->items.size(); ++item) {
      if (work_.lacking[files_[index].first_item + item] != std::byte{0}) items[index].push_back(item);
    }
  }
  refuse("some tensors lie in memory that a forked process does not have", std::move(items));
  return false;
}

void ForkedSave::follow(const std::vector<size_t>& order, WriteBehind& write_behind,
                        const std::function<void(size_t)>& written) {
  const ForkedTotals& totals = *work_.totals;
  size_t told = 0;
  for (bool gone = false; !gone;) {
    const uint32_t seen = totals.turn;
    const State state = totals.state;
    gone = ended(state == State::done || state == State::failed);
    progress_.nbytes_written = totals.nbytes_written.load();
    write_back(order, write_behind);
    if (gone) {
      progress_.copy_ns += totals.copy_ns;
      progress_.write_ns += totals.write_ns;
    }
    // The last one not before the process has gone: then everything can end.
    while (told < order.size() && (gone || (told + 1 < order.size() && told < totals.files))) written(order[told++]);
    if (!gone) await_turn(totals, seen, kLookNs);
  }
}

// Does for what was written since the last call what other writers do at once.
void ForkedSave::write_back(const std::vector<size_t>& order, WriteBehind& write_behind) {
  for (const size_t chunks = work_.totals->chunks; seen_chunks_ < chunks && !progress_.stop; ++seen_chunks_) {
    while (seen_chunk_ == files_[order[seen_file_]].schedule.chunks.size()) {
      ++seen_file_;
      seen_chunk_ = 0;
    }
    const File& file = files_[order[seen_file_]];
    const Chunk& chunk = file.schedule.chunks[seen_chunk_++];
    try {
      if (!file.output->keep_cached()) {
        file.output->evict_behind(chunk.file_offset, chunk.nbytes);
      } else if (file.output->sent_behind()) {
        write_behind.post(file.output, chunk.file_offset, chunk.nbytes);
      }
    } catch (const std::exception&) {
      const std::lock_guard lock(mutex_);
      error_ = std::current_exception();
      return stop_now();
    }
  }
}

void ForkedSave::stop() noexcept {
  const std::lock_guard lock(mutex_);
  stop_now();
}

// Under the lock, as it must not be another process's number by now.
void ForkedSave::stop_now() noexcept {
  stopped_ = true;
  if (process_ == 0) return;
  work_.totals->stop = true;
  kill(process_, SIGKILL);
  end_turn(*work_.totals);
}

// Returns whether the process has ended, and sees to it that nothing is left of it. Waits for that with `certainly`.
bool ForkedSave::ended(bool certainly) {
  const pid_t number = process();
  siginfo_t end;
  // __WALL: such a process is not waited for otherwise.
  while (certainly && number != 0 && waitid(P_PID, static_cast<id_t>(number), &end, WEXITED | WNOWAIT | __WALL) != 0 &&
         errno == EINTR) {
  }
  const std::lock_guard lock(mutex_);
  if (process_ == 0) return true;
  end = {};
  const int result = waitid(P_PID, static_cast<id_t>(process_), &end, WEXITED | WNOHANG | __WALL);
  if (result == 0 && end.si_pid == 0) return false;
  process_ = 0;  // also if somebody else has waited for it
  death_ = described(end);
  return true;
}

pid_t ForkedSave::process() const {
  const std::lock_guard lock(mutex_);
  return process_;
}

uint64_t ForkedSave::nbytes_dropped() const { return shared_ ? work_.totals->nbytes_dropped.load() : 0; }

// Throws what has kept the file, or one before it, from being written.
void ForkedSave::throw_failure(size_t index) const {
  const ForkedTotals& totals = *work_.totals;
  if (place_[index] < totals.files) return;
  const std::lock_guard lock(mutex_);
  if (error_) std::rethrow_exception(error_);
  const auto failed = std::ranges::find(place_, size_t{totals.files}) - place_.begin();
  const OutputFile& file = *files_[static_cast<size_t>(failed)].output;
  if (totals.state == State::failed) file.fail("write", totals.error);
  throw IoError(ECHILD, file.path(), "fork", death_);
}

}  // namespace fastshard
