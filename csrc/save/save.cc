// SPDX-License-Identifier: Apache-2.0
#include "save/save.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "file/publish.h"

namespace fastshard {
namespace {

// The write itself tells at once whether there is room for so little.
constexpr uint64_t kUnasked = 256 << 10;

}  // namespace

Save::Save(std::shared_ptr<const SavePlan> plan, const std::map<int, uintptr_t>& streams, const Intent& intent,
           std::function<std::vector<std::string>()> commit, Resources resources)
    : plan_(std::move(plan)),
      intent_(intent),
      commit_(std::move(commit)),
      resources_(std::move(resources)),
      fetches_([this] {
        // Under the lock, so that it cannot fall between the waiter's look and its sleep.
        const std::lock_guard lock(mutex_);
        changed_.notify_all();
      }) {
  for (const auto& [ordinal, device] : resources_.devices) {
    const auto stream = streams.find(ordinal);
    streams_.emplace(ordinal, device->open(stream == streams.end() ? 0 : stream->second));
  }
  for (const FilePlan& file : plan_->files) nbytes_ += file.written_nbytes();
  intent_.nbytes = nbytes_;
  intent_.sent_behind = intent_.durable || !page_cache_takes(nbytes_);
  intent_.from_device = !resources_.devices.empty();
  fetches_bytes_ = std::ranges::any_of(plan_->files, [](const FilePlan& file) {
    return std::ranges::any_of(file.items, [](const WriteItem& item) { return item.source.device == kFetched; });
  });
  bounded_ = too_many_to_keep_open(plan_->files.size());
  if (intent_.forked) {
    forked_ = std::make_unique<ForkedSave>(*plan_, !bounded_, intent_.checksums, progress_);
    intent_.wanted = WritePath::buffered;
  }
  std::vector<TemporaryFile*> made;
  for (uint32_t index = 0; index < plan_->files.size(); ++index) {
    OpenTarget target = open_target(plan_->files[index], intent_);
    if (target.placed != nullptr) placed_files_.push_back(target.placed);
    if (target.made != nullptr) made.push_back(target.made);
    files_.push_back(std::move(target.file));
    copies_.push_back(std::move(target.copy));
    const FilePlan& file = copies_.back() != nullptr ? copies_.back()->plan : plan_->files[index];
    if (copies_.back() != nullptr) nbytes_ += file.nbytes;
    if (forked_ != nullptr) {
      writers_.push_back(forked_->add(file, files_.back()));
      const bool past_cache = !files_.back()->keep_cached() || intent.wanted > WritePath::buffered;
      if (past_cache) progress_.fallbacks.add("written through the page cache, as a forked process does it");
      continue;
    }
    writers_.push_back(
        make_writer(file, files_.back(), resources_, streams_, fetches_.stream(index), intent_.checksums, progress_));
    if (bounded_ && files_.back() != nullptr) files_.back()->suspend();
  }
  if (nbytes_ > kUnasked) require_space(made);
}

Save::~Save() = default;

void Save::start(bool here) {
  if (begun_.exchange(true)) return;
  if (writers_.empty()) return finish();
  if (!resources_.devices.empty()) attempt([&] { enqueue(); });
  // The largest first: the last writer to finish then has the least left.
  std::vector<size_t> order(writers_.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::ranges::stable_sort(order, std::greater(), [&](size_t index) { return plan_->files[index].nbytes; });
  std::vector<size_t> most_shares;  // before a writer may be gone
  most_shares.reserve(writers_.size());
  for (const auto& writer : writers_) most_shares.push_back(writer->writers());
  open_shares_ = std::vector<std::atomic<size_t>>(writers_.size());
  begun_shares_ = std::vector<std::atomic<bool>>(writers_.size());
  for (auto& shares : open_shares_) shares = 1;
  unfinished_files_ = writers_.size();
  if (forked_ != nullptr) return begin_forked(std::move(order));
  const bool alone = here;
  WorkerPool& workers = share_out();
  for (const size_t index : order) {
    if (!here) {
      try {
        workers.post(task(&Save::write_certain_share, index));
        continue;
      } catch (const std::system_error& error) {
        // No thread: this one, unless it is the one that has to serve what it would wait for.
        if (fetches())
          fail(std::make_exception_ptr(IoError(error.code().value(), plan_->files[index].path(), "thread")));
      } catch (...) {
        fail(std::current_exception());
      }
      here = true;
    }
    write_certain_share(index);  // of a save that has failed: only counted
  }
  if (alone) return;
  for (const size_t index : order) {
    for (size_t more = most_shares[index]; more > 1; --more) offer_share(index);
  }
}

std::function<void()> Save::task(void (Save::*step)(size_t), size_t index) {
  return [self = shared_from_this(), step, index] { (*self.*step)(index); };
}

// From now on the save can be taken over. Returns who begins with it. What workers that step aside need of others is
// there before they do.
WorkerPool& Save::share_out() {
  if (resources_.workers.aside()) {
    resources_.relief.require_thread();
    if (intent_.sent_behind) resources_.write_behind.require_thread();
  }
  const std::lock_guard lock(mutex_);
  shared_out_ = true;
  return taken_over_ ? resources_.relief : resources_.workers;
}

// Under the lock: once the save has ended, the engine may go, and its threads with it.
bool Save::take_over() {
  const std::lock_guard lock(mutex_);
  if (taken_over_ || ending_ || !resources_.workers.aside()) return false;
  taken_over_ = true;
  if (!shared_out_) return true;
  bool any = false;
  for (size_t index = 0; index < writers_.size(); ++index) {
    if (open_shares_[index] == 0) continue;
    try {
      resources_.relief.post(task(&Save::relieve_share, index));
      any = true;
    } catch (const std::exception&) {
      // No thread, or no memory for the task: those at work do it all.
    }
  }
  if (any) resources_.workers.hasten();
  return any;
}

void Save::begin_forked(std::vector<size_t> order) {
  const auto written = [self = shared_from_this()](size_t index) {
    try {
      self->resources_.workers.post(self->task(&Save::write_share, index));
    } catch (const std::exception&) {
      self->write_share(index);  // no thread to be had
    }
  };
  try {
    forked_->begin(std::move(order), resources_.lone_threads, resources_.write_behind, written);
  } catch (...) {
    begun_ = false;
    throw;
  }
  say_read();
}

// A further thread for a file, when one has nothing else to do.
void Save::offer_share(size_t index) noexcept {
  try {
    resources_.workers.offer(task(&Save::take_share, index));
  } catch (const std::exception&) {
    // No memory for the task: those at work do it all.
  }
}

// Nothing happens once the file's other shares have ended: then all of it is written.
void Save::take_share(size_t index) {
  size_t open = open_shares_[index];
  do {
    if (open == 0) return;
  } while (!open_shares_[index].compare_exchange_weak(open, open + 1));
  write_share(index);
}

void Save::write_certain_share(size_t index) {
  if (!begun_shares_[index].exchange(true)) write_share(index);
}

void Save::relieve_share(size_t index) { begun_shares_[index].exchange(true) ? take_share(index) : write_share(index); }

// The last writer of a file syncs it; the last file's publishes them all.
void Save::write_share(size_t index) {
  const std::shared_ptr<OutputFile>& file = files_[index];
  std::optional<OutputFile::Awake> awake;
  const auto wake = [&] {
    if (bounded_ && file != nullptr && !awake) awake.emplace(*file);
  };
  if (!stepped_aside()) writers_[index]->relieve();
  attempt([&] {
    wake();
    writers_[index]->write_chunks();
  });
  if (!progress_.stop && !resources_.workers.aside() && !writers_[index]->exhausted() && progress_.may_map())
    offer_share(index);
  // Before another writer can come to the end of the save, and of the file.
  if (writers_[index]->writers() > 1) awake.reset();
  if (--open_shares_[index] != 0) return;
  if (!stepped_aside()) return end_file(index, awake);
  awake.reset();
  try {
    resources_.relief.post(task(&Save::end_file, index));
  } catch (const std::exception&) {
    end_file(index);  // no thread to be had
  }
}

void Save::end_file(size_t index) {
  std::optional<OutputFile::Awake> awake;
  end_file(index, awake);
}

// Not by a thread that has stepped aside: it takes locks of folders and of the disk's journal.
void Save::end_file(size_t index, std::optional<OutputFile::Awake>& awake) {
  const std::shared_ptr<OutputFile>& file = files_[index];
  attempt([&] {
    if (file == nullptr) return;
    if (!writers_[index]->exhausted()) throw std::logic_error("a file's writers have left before its end");
    if (bounded_ && !awake) awake.emplace(*file);
    const Timer timer(progress_.sync_ns);
    file->end_writing();
    if (!stored_together(*file)) store(index);
  });
  awake.reset();
  if (--unfinished_files_ != 0) return;
  say_read();
  if (!await_amendment()) finish();
}

// Sees to it that what was written of a file is where it has to be before anything is published. An error of writeback
// that was asked for in the background is this file's, too, and fsync() may not repeat it.
void Save::store(size_t index) {
  OutputFile& file = *files_[index];
  if (must_sync()) {
    resources_.write_behind.settle(&file);
    file.sync();
  } else if (foreign(index)) {
    file.check_stored();  // whoever publishes it cannot ask
  }
}

// Direct writes are on the disk already, all but sizes and extents: synced one by one while others write, each would
// wait for these to pause. What is to be amended is synced afterwards.
bool Save::stored_together(const OutputFile& file) const {
  return intent_.amended || (file.write_path() == WritePath::direct && !bounded_);
}

void Save::say_read() {
  const std::lock_guard lock(mutex_);
  if (std::exchange(read_, true) || !intent_.tells_read) return;
  tell_read_ = true;
  changed_.notify_all();
}

void Save::take_checksums() {
  if (!intent_.checksums || !checksums_.empty()) return;
  for (const auto& writer : writers_) checksums_.push_back(writer->checksums());
}

// False when it is too late to fail.
bool Save::fail(std::exception_ptr error) {
  bool abandoned;  // no thread works on it that would come to its end
  {
    const std::lock_guard lock(mutex_);
    if (ending_) return false;
    if (!error_) error_ = std::move(error);
    abandoned = amending_ != Amending::no;
    amending_ = Amending::no;
  }
  progress_.stop = true;
  fetches_.abort();
  if (forked_ != nullptr) forked_->stop();
  if (abandoned || !begun_.exchange(true)) finish();
  return true;
}

bool Save::cancel() { return fail(std::make_exception_ptr(Cancelled())); }

// Never throws, whatever memory is refused: somebody waits for it.
void Save::finish() {
  DeviceUse use;
  std::exception_ptr error;
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
    error = error_;
  }
  if (!error) {
    try {
      const Timer timer(progress_.sync_ns);
      for (size_t index = 0; index < files_.size(); ++index) {
        if (files_[index] == nullptr || !stored_together(*files_[index])) continue;
        const OutputFile::Awake awake(*files_[index]);
        store(index);
      }
      publish(placed_files_, intent_.durable);
      if (commit_) use.fallbacks = commit_();
    } catch (...) {
      error = std::current_exception();
    }
  }
  for (const auto& file : files_) {
    if (file != nullptr) resources_.write_behind.forget(file.get());
  }
  for (PlacedFile* file : placed_files_) file->discard();
  if (error) error = with_what_stays(std::move(error));
  describe_end(use);
  // Nobody packs any more; and copies that nobody has waited for end before their streams go.
  progress_.unpacked = 0;
  progress_.unpacked.notify_all();
  writers_.clear();
  early_scratch_ = {};
  streams_.clear();
  commit_ = nullptr;  // and what it holds
  // Whoever waits may count on the files being closed: a nameless one holds its space until then.
  std::vector<std::shared_ptr<OutputFile>> closing;
  std::vector<std::unique_ptr<LinkCopy>> copied;
  {
    const std::lock_guard lock(mutex_);
    closing.swap(files_);
    copied.swap(copies_);
    placed_files_.clear();
    marks_.clear();
    if (error) checksums_.clear();
  }
  closing.clear();
  const std::lock_guard lock(mutex_);
  error_ = error;
  final_.seconds = std::chrono::duration<double>(Clock::now() - started_).count();
  finished_ = true;
  changed_.notify_all();
}

bool Save::wait(double seconds) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, std::chrono::duration<double>(seconds),
                    [&] { return finished_ || tell_read_ || amending_ == Amending::due || !fetches_.empty(); });
  tell_read_ = false;
  if (finished_ && error_) std::rethrow_exception(error_);
  return finished_;
}

void Save::settle() {
  take_over();
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return finished_; });
}

std::vector<std::vector<uint32_t>> Save::checksums() const {
  const std::lock_guard lock(mutex_);
  return checksums_;
}

bool Save::read() const {
  const std::lock_guard lock(mutex_);
  return read_ || finished_;
}

bool Save::finished() const {
  const std::lock_guard lock(mutex_);
  return finished_;
}

}  // namespace fastshard
