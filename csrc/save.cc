// SPDX-License-Identifier: Apache-2.0
#include "save.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <set>

#include "pack.h"

namespace fastshard {
namespace {

// Staged chunks one writer keeps under way: enough for the copy engine never to wait for the disk.
constexpr size_t kMaxInFlight = 4;
// Windows of memory targets and mapped files: few calls, and shares small enough for all writers.
constexpr uint64_t kWindowNbytes = 16 << 20;

// Adds the time it lives to a counter of nanoseconds.
class Timer {
 public:
  explicit Timer(std::atomic<int64_t>& total) : total_(total) {}
  ~Timer() {
    const auto spent = std::chrono::steady_clock::now() - started_;
    total_ += std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count();
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

 private:
  std::atomic<int64_t>& total_;
  const std::chrono::steady_clock::time_point started_ = std::chrono::steady_clock::now();
};

}  // namespace

// A file of the plan on its way. Page-cache files have one writer (a second one only fights for the inode's
// lock); mapped files and memory are shared by all.
struct Save::FileJob {
  const FilePlan& plan;
  std::shared_ptr<OutputFile> file;  // null: the target is memory
  FileSchedule schedule;
  std::unique_ptr<CopyStream> fetch_stream;
  size_t writers = 1;
  std::atomic<size_t> next_chunk = 0;
  std::atomic<size_t> active_writers = 0;

  bool buffered() const { return file != nullptr && file->write_path() == WritePath::buffered; }
  const Chunk* claim() {
    const size_t index = next_chunk++;
    return index < schedule.chunks.size() ? &schedule.chunks[index] : nullptr;
  }
};

// A chunk being copied into its slot. The destructor waits for the copies: only then may the slot go.
struct Save::InFlight {
  InFlight(Save& save, const Chunk& what, Slot where) : owner(save), chunk(what), slot(std::move(where)) {
    const uint64_t now = owner.staged_nbytes_ += chunk.nbytes;
    uint64_t peak = owner.peak_staged_nbytes_;
    while (now > peak && !owner.peak_staged_nbytes_.compare_exchange_weak(peak, now)) {
    }
  }
  ~InFlight() {
    for (const auto& ticket : tickets) {
      try {
        ticket->wait();
      } catch (...) {
        // Already known, or about to be thrown for the chunk that failed first.
      }
    }
    owner.staged_nbytes_ -= chunk.nbytes;
  }
  InFlight(const InFlight&) = delete;
  InFlight& operator=(const InFlight&) = delete;

  void wait() {
    const Timer timer(owner.copy_ns_);
    for (const auto& ticket : tickets) ticket->wait();
    tickets.clear();
  }

  Save& owner;
  const Chunk& chunk;
  Slot slot;
  std::vector<std::unique_ptr<Ticket>> tickets;
};

Save::Save(SavePlan plan, const std::map<int, uintptr_t>& streams, WritePath write_path, bool durable,
           Resources resources)
    : plan_(std::move(plan)),
      durable_(durable),
      resources_(std::move(resources)),
      host_stream_(resources_.host.open(0)),
      fetches_([this] {
        // Under the lock, so that it cannot fall between the waiter's look and its sleep.
        const std::lock_guard lock(mutex_);
        changed_.notify_all();
      }) {
  for (const auto& [ordinal, device] : resources_.devices) {
    const auto stream = streams.find(ordinal);
    streams_.emplace(ordinal, device->open(stream == streams.end() ? 0 : stream->second));
  }
  for (uint32_t index = 0; index < plan_.files.size(); ++index) {
    const FilePlan& file = plan_.files[index];
    auto job = std::make_unique<FileJob>(file);
    if (file.memory == nullptr) job->file = std::make_shared<OutputFile>(file.path, file.nbytes, write_path);
    ScheduleLimits limits;
    limits.slot_nbytes = resources_.ring.slot_nbytes();
    if (!job->buffered()) {
      limits.in_place = false;
      limits.packed_nbytes = kWindowNbytes;
      job->writers = resources_.workers.threads();
    }
    job->schedule = make_schedule(file, limits);
    job->writers = std::clamp<size_t>(job->schedule.chunks.size(), 1, job->writers);
    job->fetch_stream = fetches_.stream(index);
    nbytes_ += file.nbytes;
    jobs_.push_back(std::move(job));
  }
  require_space(files());
}

Save::~Save() = default;

void Save::start() {
  unfinished_files_ = jobs_.size();
  if (jobs_.empty()) return finish();
  // The largest first: the last writer to finish then has the least left.
  std::vector<FileJob*> order;
  for (const auto& job : jobs_) order.push_back(job.get());
  std::ranges::stable_sort(order, std::greater(), [](const FileJob* job) { return job->plan.nbytes; });
  for (FileJob* job : order) job->active_writers = job->writers;
  for (FileJob* job : order) {
    for (size_t writer = 0; writer < job->writers; ++writer) {
      resources_.workers.post([self = shared_from_this(), job] { self->run(*job); });
    }
  }
}

// One writer's share of one file. The last writer of a file syncs it; the last file's publishes them all.
void Save::run(FileJob& job) {
  const auto attempt = [&](auto step) {
    if (stop_) return;
    try {
      step();
    } catch (...) {
      fail(std::current_exception());
    }
  };
  attempt([&] { write_chunks(job); });
  if (--job.active_writers != 0) return;
  attempt([&] {
    if (!durable_ || job.file == nullptr) return;
    const Timer timer(sync_ns_);
    job.file->sync();
  });
  if (--unfinished_files_ == 0) finish();
}

// For each chunk: take a slot, ask each device that owns a part to pack into it, wait for the oldest, write
// it at its offset and let the slot go. A writer blocks for a slot only while it holds none, so one slot is
// enough to finish.
void Save::write_chunks(FileJob& job) {
  const Ring::Share share(resources_.ring);
  std::deque<std::unique_ptr<InFlight>> in_flight;
  const Chunk* next = job.claim();
  while (next != nullptr || !in_flight.empty()) {
    if (stop_) throw Cancelled();
    if (next != nullptr && write_unstaged(job, *next)) {
      next = job.claim();
      continue;
    }
    if (next != nullptr && in_flight.size() < std::min(kMaxInFlight, share.slots())) {
      const int node = node_of(job, *next);
      std::optional<Slot> slot = in_flight.empty() ? resources_.ring.acquire(node) : resources_.ring.try_acquire(node);
      if (slot) {
        auto staged = stage(job, *next, std::move(*slot));
        if (staged->tickets.empty()) {
          write_staged(job, *staged);  // packed by this thread, and still in its cache
        } else {
          in_flight.push_back(std::move(staged));
        }
        next = job.claim();
        continue;
      }
    }
    write_staged(job, *in_flight.front());
    in_flight.pop_front();
  }
}

// Of the first device that packs into the chunk's slot.
int Save::node_of(FileJob& job, const Chunk& chunk) const {
  if (chunk.route != Route::device) return -1;
  for (const CopyOp& op : job.schedule.ops_of(chunk)) {
    const auto device = resources_.devices.find(op.source->device);
    if (device != resources_.devices.end()) return device->second->numa_node();
  }
  return -1;
}

// Chunks that need no slot: written from where they lie, or packed straight into a target that is memory.
bool Save::write_unstaged(FileJob& job, const Chunk& chunk) {
  if (chunk.route == Route::in_place) {
    write_in_place(job, chunk);
    return true;
  }
  if (chunk.route == Route::packed && !job.buffered()) {
    pack_into_target(job, chunk);
    return true;
  }
  return false;
}

// Host memory in long runs: the kernel reads it from where it lies.
void Save::write_in_place(FileJob& job, const Chunk& chunk) {
  std::vector<iovec> parts;
  parts.reserve(chunk.op_count);
  for (const CopyOp& op : job.schedule.ops_of(chunk)) {
    for (uint64_t done = 0; done < op.nbytes;) {
      const uint64_t at = op.first_byte + done;
      const uint64_t run_left =
          op.source->contiguous() ? op.nbytes - done : op.source->run_nbytes - at % op.source->run_nbytes;
      const uint64_t nbytes = std::min(op.nbytes - done, run_left);
      parts.push_back({const_cast<std::byte*>(packed_address(*op.source, at)), nbytes});
      done += nbytes;
    }
  }
  put(job, chunk, parts);
}

void Save::pack_into_target(FileJob& job, const Chunk& chunk) {
  const auto pack = [&](std::span<std::byte> bytes) {
    const Timer timer(copy_ns_);
    Staging target{bytes, {}};
    host_stream_->pack(job.schedule.ops_of(chunk), target);
  };
  if (job.file == nullptr) {
    pack({job.plan.memory + chunk.file_offset, chunk.nbytes});
  } else {
    const Window window = [&] {
      const Timer timer(write_ns_);
      return job.file->window(chunk.file_offset, chunk.nbytes);
    }();
    pack(window.bytes());
  }
  wrote(job, chunk);
}

std::unique_ptr<Save::InFlight> Save::stage(FileJob& job, const Chunk& chunk, Slot slot) {
  auto staged = std::make_unique<InFlight>(*this, chunk, std::move(slot));
  if (chunk.route == Route::device && !streams_.empty()) staged->slot.pin(*resources_.devices.begin()->second);
  (staged->slot.pinned() ? staged_pinned_ : staged_pageable_) = true;
  const Timer timer(copy_ns_);
  Staging staging{staged->slot.bytes(), staged->slot.scratch()};
  // Ops of one device are handed over together: many small ones then cost one launch.
  std::vector<CopyOp> ops(job.schedule.ops_of(chunk).begin(), job.schedule.ops_of(chunk).end());
  std::ranges::stable_sort(ops, {}, [](const CopyOp& op) { return op.source->device; });
  for (auto first = ops.begin(); first != ops.end();) {
    const int device = first->source->device;
    const auto last = std::find_if(first, ops.end(), [&](const CopyOp& op) { return op.source->device != device; });
    if (auto ticket = stream_for(job, device).pack({first, last}, staging)) {
      staged->tickets.push_back(std::move(ticket));
    }
    first = last;
  }
  return staged;
}

void Save::write_staged(FileJob& job, InFlight& staged) {
  staged.wait();
  const Chunk& chunk = staged.chunk;
  const std::span<std::byte> bytes = staged.slot.bytes().first(chunk.nbytes);
  if (job.buffered()) {
    iovec part{bytes.data(), bytes.size()};
    return put(job, chunk, {&part, 1});
  }
  {
    const Timer timer(write_ns_);
    if (job.file == nullptr) {
      std::memcpy(job.plan.memory + chunk.file_offset, bytes.data(), bytes.size());
    } else {
      const Window window = job.file->window(chunk.file_offset, chunk.nbytes);
      std::memcpy(window.bytes().data(), bytes.data(), bytes.size());
    }
  }
  wrote(job, chunk);
}

void Save::put(FileJob& job, const Chunk& chunk, std::span<iovec> parts) {
  {
    const Timer timer(write_ns_);
    job.file->write(parts, chunk.file_offset);
  }
  wrote(job, chunk);
}

void Save::wrote(FileJob& job, const Chunk& chunk) {
  nbytes_written_.fetch_add(chunk.nbytes, std::memory_order_relaxed);
  if (job.file != nullptr && job.file->has_writeback()) {
    resources_.write_behind.post(job.file, chunk.file_offset, chunk.nbytes);
  }
}

CopyStream& Save::stream_for(FileJob& job, int device) {
  if (device == kHost) return *host_stream_;
  if (device == kFetched) return *job.fetch_stream;
  return *streams_.at(device);
}

void Save::fail(std::exception_ptr error) {
  {
    const std::lock_guard lock(mutex_);
    if (ending_) return;
    if (!error_) error_ = std::move(error);
  }
  stop_ = true;
  fetches_.abort();
}

void Save::cancel() { fail(std::make_exception_ptr(Cancelled())); }

void Save::finish() {
  std::exception_ptr error;
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
    error = error_;
  }
  if (!error) {
    try {
      const Timer timer(sync_ns_);
      publish(files(), durable_);
    } catch (...) {
      error = std::current_exception();
    }
  }
  for (OutputFile* file : files()) {
    resources_.write_behind.forget(file);
    file->discard();
  }
  DeviceUse use;
  for (const auto& [ordinal, stream] : streams_) stream->add_use(use);
  streams_.clear();
  // Whoever waits may count on the files being closed: a nameless one holds its space until then.
  std::vector<std::shared_ptr<OutputFile>> closing;
  {
    const std::lock_guard lock(mutex_);
    describe_files(final_);
    final_.device_scratch_nbytes = use.scratch_nbytes;
    final_.fallbacks.insert(final_.fallbacks.end(), use.fallbacks.begin(), use.fallbacks.end());
    for (const auto& job : jobs_) closing.push_back(std::move(job->file));
  }
  closing.clear();
  const std::lock_guard lock(mutex_);
  if (!error_) error_ = error;
  final_.seconds = std::chrono::duration<double>(Clock::now() - started_).count();
  finished_ = true;
  changed_.notify_all();
}

std::vector<OutputFile*> Save::files() const {
  std::vector<OutputFile*> files;
  for (const auto& job : jobs_) {
    if (job->file != nullptr) files.push_back(job->file.get());
  }
  return files;
}

bool Save::wait(double seconds) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return finished_ || !fetches_.empty(); });
  if (finished_ && error_) std::rethrow_exception(error_);
  return finished_;
}

void Save::settle() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return finished_; });
}

bool Save::finished() const {
  const std::lock_guard lock(mutex_);
  return finished_;
}

Stats Save::stats() const {
  Stats stats;
  {
    const std::lock_guard lock(mutex_);
    if (finished_) {
      stats = final_;
    } else {
      describe_files(stats);
      stats.seconds = std::chrono::duration<double>(Clock::now() - started_).count();
    }
  }
  stats.files = plan_.files.size();
  stats.nbytes = nbytes_;
  stats.copy_seconds = 1e-9 * static_cast<double>(copy_ns_);
  stats.write_seconds = 1e-9 * static_cast<double>(write_ns_);
  stats.sync_seconds = 1e-9 * static_cast<double>(sync_ns_);
  stats.staging = staged_pinned_ ? "pinned" : staged_pageable_ ? "pageable" : "none";
  stats.staging_nbytes = peak_staged_nbytes_;
  return stats;
}

void Save::describe_files(Stats& stats) const {
  std::set<std::string> paths, fallbacks;
  for (const auto& job : jobs_) {
    paths.insert(job->plan.memory != nullptr ? "memory" : job->file != nullptr ? name_of(job->file->write_path()) : "");
    if (job->file != nullptr) fallbacks.insert(job->file->fallbacks().begin(), job->file->fallbacks().end());
  }
  paths.erase("");
  for (const std::string& path : paths) stats.write_path += (stats.write_path.empty() ? "" : "+") + path;
  stats.fallbacks.assign(fallbacks.begin(), fallbacks.end());
}

}  // namespace fastshard
