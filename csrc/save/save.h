// SPDX-License-Identifier: Apache-2.0
// A save under way: its files, their writers, and its end.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "device/fetch.h"
#include "save/forked.h"
#include "save/targets.h"
#include "save/writer.h"

namespace fastshard {

struct Stats {
  uint64_t files = 0;
  uint64_t nbytes = 0;                 // that it writes: of the finished files, without what is linked or others write
  double seconds = 0;                  // from submit to finish
  double copy_seconds = 0;             // thread-seconds spent packing or waiting for device copies
  double write_seconds = 0;            // thread-seconds in pwrite (direct: waiting for writes; mapped: populating)
  double sync_seconds = 0;             // thread-seconds in fsync
  std::string write_path;              // name_of(WritePath), "standing", "memory" or "link"; joined by "+"
  std::string priority;                // of the writers: "normal", "idle" (SCHED_IDLE) or "nice", where that is refused
  std::string staging;                 // "none", "in place" (devices copied into the target), "pageable", "pinned"
  uint64_t staging_nbytes = 0;         // peak of staged bytes held at once
  uint64_t mapped_nbytes = 0;          // stored into the file through mappings, beside the thread that writes it
  uint64_t written_runs = 0;           // of files with places
  uint64_t device_scratch_nbytes = 0;  // device memory that was packed in
  std::vector<std::string> fallbacks;
};

// Bytes that are known only when all others are in place, for instance checksums of these, and where they belong.
struct Amendment {
  uint32_t file;
  uint64_t offset;
  std::string bytes;
};

// Thread-safe. Tensors must stay alive and unchanged until the save is finished.
class Save : public std::enable_shared_from_this<Save> {
 public:
  // Orders the copies behind the caller's `streams` (by CUDA ordinal), makes every file and reserves its space. After
  // an exception nothing is left behind. `commit`, if given, runs when every byte is in its place: it publishes targets
  // that are memory, and returns fallbacks.
  Save(std::shared_ptr<const SavePlan> plan, const std::map<int, uintptr_t>& streams, const Intent& intent,
       std::function<std::vector<std::string>()> commit, Resources resources);
  ~Save();

  // Gives the work to the writers, unless that has been done or the save was cancelled. The calling thread does the
  // work for which no thread can be started, and all of it with `here`. With Intent::forked it returns when all bytes
  // may be changed; where it throws NotForked, nothing has happened.
  void start(bool here);

  // Returns true when the save is finished, and false after `seconds`, when fetch() has a request or an amendment is
  // due, and once when read() has become true, if Intent::tells_read. Throws what the save has failed with.
  bool wait(double seconds);
  bool finished() const;
  // Returns whether all bytes have been read, so that what they were read from may change.
  bool read() const;
  // Blocks until the save is finished, however it ends.
  void settle();
  // Somebody waits for a save whose workers step aside: others write what is left. Returns whether there was any, the
  // first time.
  bool take_over();
  // Stops the save when the chunks under way are done. Returns false if it is too late, as all chunks are written.
  bool cancel();
  // What is enqueued later on `stream`, of a device that the save reads from, waits there until the devices have been
  // read. Returns without waiting for them, but only when host memory has been packed, as streams do not hold up the
  // changes of that. Returns why it cannot be done if so: the host then has to wait. Throws CudaError.
  std::optional<std::string> hold_stream(int ordinal, uintptr_t stream);
  // Returns the ordinals of the devices that the save reads from.
  std::vector<int> devices() const;
  // Says that bytes which this thread, or anybody, has taken with fetch() will not be brought any more.
  void disown_fetches(bool anybodys) { fetches_.disown(anybodys); }

  std::optional<FetchRequest> fetch() { return fetches_.take(); }
  void fetched(uint64_t id) { fetches_.complete(id); }

  // With Intent::amended, returns true once, when every chunk is written and checksums() are known. The save then waits
  // for amend() or cancel(), without a thread.
  bool take_amendment();
  // Gives the bytes that are written over others before the files are synced and published. Nothing happens if the save
  // has been stopped. Throws std::invalid_argument for bytes outside of a file.
  void amend(std::vector<Amendment> amendments);

  // Returns whether only Python can bring some of the bytes.
  bool fetches() const { return fetches_bytes_; }
  // Returns whether all bytes lie in host memory.
  bool on_host() const { return resources_.devices.empty() && !fetches_bytes_; }
  uint64_t nbytes() const { return nbytes_; }
  // Null unless a forked process writes it.
  const ForkedSave* forked() const { return forked_.get(); }
  uint64_t nbytes_written() const { return progress_.nbytes_written.load(std::memory_order_relaxed); }
  Stats stats() const;
  // Returns the CRC-32 of each file's items, if they were asked for, when the save is finished or to be amended.
  std::vector<std::vector<uint32_t>> checksums() const;

 private:
  using Clock = std::chrono::steady_clock;

  void enqueue();
  WorkerPool& share_out();
  std::function<void()> task(void (Save::*step)(size_t), size_t index);
  void write_certain_share(size_t index);
  void relieve_share(size_t index);
  void write_share(size_t index);
  void end_file(size_t index);
  void end_file(size_t index, std::optional<OutputFile::Awake>& awake);
  void begin_forked(std::vector<size_t> order);
  void offer_share(size_t index) noexcept;
  void take_share(size_t index);
  void say_read();
  bool await_amendment();
  void write(const Amendment& amendment);
  void take_checksums();
  bool stored_together(const OutputFile& file) const;
  void store(size_t index);
  bool foreign(size_t index) const { return std::holds_alternative<ForeignFile>(plan_->files[index].target); }
  const char* route_of(size_t index) const;
  std::exception_ptr with_what_stays(std::exception_ptr error) const;
  bool must_sync() const { return intent_.durable || !intent_.keep_cached; }
  template <typename Step>
  void attempt(const Step& step);
  void describe_files(Stats& stats) const;
  void describe_end(const DeviceUse& use);
  bool fail(std::exception_ptr error);
  void finish();

  const std::shared_ptr<const SavePlan> plan_;
  Intent intent_;
  std::function<std::vector<std::string>()> commit_;
  const Resources resources_;
  uint64_t nbytes_ = 0;
  bool fetches_bytes_ = false;
  const Clock::time_point started_ = Clock::now();
  CopyStreams streams_;
  FetchQueue fetches_;
  Progress progress_;
  // By index in the plan; null where the target is memory.
  std::vector<std::shared_ptr<OutputFile>> files_;
  std::vector<PlacedFile*> placed_files_;          // those that get their names from this save
  std::vector<std::unique_ptr<LinkCopy>> copies_;  // by index in the plan; null but for a link that was refused
  bool bounded_ = false;                           // files are open only while they are worked on
  EarlyScratch early_scratch_;
  std::unique_ptr<ForkedSave> forked_;  // null unless Intent::forked
  std::vector<std::unique_ptr<FileWriter>> writers_;
  std::vector<std::atomic<size_t>> open_shares_;  // of each file, that which is certain to be written included
  std::vector<std::atomic<bool>> begun_shares_;   // of each file, that which is certain
  std::atomic<size_t> unfinished_files_ = 0;
  std::atomic<bool> begun_ = false;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::exception_ptr error_;
  bool read_ = false, tell_read_ = false;
  bool shared_out_ = false, taken_over_ = false;
  std::map<int, std::shared_ptr<const Mark>> marks_;  // by ordinal, if all copies out of devices are enqueued
  std::string not_enqueued_ = "the save has not begun, or it has failed";  // else why not
  enum class Amending { no, due, taken } amending_ = Amending::no;
  bool ending_ = false;  // all chunks are through: too late to fail or cancel
  bool finished_ = false;
  std::vector<std::vector<uint32_t>> checksums_;
  Stats final_;  // what cannot be told any more once the files are closed
};

// Not by a std::function: a writer must not need memory to begin or to end.
template <typename Step>
void Save::attempt(const Step& step) {
  if (progress_.stop) return;
  try {
    step();
  } catch (...) {
    fail(std::current_exception());
  }
}

}  // namespace fastshard
