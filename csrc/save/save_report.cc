// SPDX-License-Identifier: Apache-2.0
// What is told of a save: its figures, and what a failed one has left of files that are not its own.
#include <algorithm>
#include <iterator>
#include <set>

#include "save/save.h"

namespace fastshard {

// The error, which says of files that somebody else has made that they are not as they were.
std::exception_ptr Save::with_what_stays(std::exception_ptr error) const try {
  std::string names;
  for (size_t index = 0; index < plan_->files.size(); ++index) {
    if (foreign(index)) names += (names.empty() ? "" : ", ") + plan_->files[index].path();
  }
  if (names.empty()) return error;
  const std::string what = "; what had been written to " + names + " before the error remains in place";
  try {
    std::rethrow_exception(error);
  } catch (const IoError& failed) {
    const std::string detail = failed.detail().empty() ? what.substr(2) : failed.detail() + what;
    return std::make_exception_ptr(IoError(failed.code().value(), failed.path(), "save", detail, failed.published()));
  } catch (const CudaError& failed) {
    return std::make_exception_ptr(CudaError(failed.what() + what));
  } catch (const Cancelled& failed) {
    return std::make_exception_ptr(Cancelled(failed.what() + what));
  } catch (...) {
    return error;
  }
} catch (const std::exception&) {
  return error;  // no memory for it
}

// Figures, of which some are missing where there is no memory for them: the files stand.
void Save::describe_end(const DeviceUse& committed) {
  try {
    DeviceUse use = committed;
    for (const auto& [ordinal, stream] : streams_) stream->add_use(use);
    const std::lock_guard lock(mutex_);
    take_checksums();
    describe_files(final_);
    final_.device_scratch_nbytes = use.scratch_nbytes;
    std::ranges::copy_if(use.fallbacks, std::back_inserter(final_.fallbacks), [&](const std::string& text) {
      return std::ranges::find(final_.fallbacks, text) == final_.fallbacks.end();  // two devices say the same
    });
  } catch (const std::exception&) {
    // As said above.
  }
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
  stats.files = plan_->files.size();
  stats.nbytes = nbytes_;
  stats.copy_seconds = 1e-9 * static_cast<double>(progress_.copy_ns);
  stats.write_seconds = 1e-9 * static_cast<double>(progress_.write_ns);
  stats.sync_seconds = 1e-9 * static_cast<double>(progress_.sync_ns);
  stats.staging = progress_.staged_pinned     ? "pinned"
                  : progress_.staged_pageable ? "pageable"
                  : progress_.copied_in_place ? "in place"
                                              : "none";
  stats.staging_nbytes = progress_.peak_staged_nbytes;
  stats.mapped_nbytes = progress_.mapped_nbytes;
  stats.written_runs = progress_.written_runs;
  return stats;
}

const char* Save::route_of(size_t index) const {
  const FileTarget& target = plan_->files[index].target;
  if (std::holds_alternative<StandingMapping>(target)) return "standing";
  if (std::holds_alternative<Memory>(target)) return "memory";
  if (std::holds_alternative<Link>(target) && copies_[index] == nullptr) return "link";
  return name_of(files_[index]->write_path());
}

void Save::describe_files(Stats& stats) const {
  std::set<std::string> paths, fallbacks = progress_.fallbacks.all();
  for (size_t index = 0; index < files_.size(); ++index) {
    const OutputFile* file = files_[index].get();
    paths.insert(route_of(index));
    if (file != nullptr) fallbacks.insert(file->fallbacks().begin(), file->fallbacks().end());
  }
  if (progress_.mapping_refused != 0) {
    fallbacks.insert("writing by several threads refused: " +
                     std::generic_category().message(progress_.mapping_refused));
  }
  const int aside_refused = resources_.workers.aside_refused();
  stats.priority = !resources_.workers.aside() ? "normal" : aside_refused == 0 ? "idle" : "nice";
  if (aside_refused != 0) {
    fallbacks.insert("SCHED_IDLE refused, so writers run at a low nice priority: " +
                     std::generic_category().message(aside_refused));
  }
  if (progress_.source_shared) {
    fallbacks.insert(
        "written by one thread: more threads would have made the kernel copy memory that is shared with a forked "
        "process");
  }
  if (progress_.io_uring_refused != 0) {
    fallbacks.insert("io_uring refused: " + std::generic_category().message(progress_.io_uring_refused));
  }
  for (const std::string& path : paths) stats.write_path += (stats.write_path.empty() ? "" : "+") + path;
  stats.fallbacks.assign(fallbacks.begin(), fallbacks.end());
}

}  // namespace fastshard
