// SPDX-License-Identifier: Apache-2.0
// What Python writes into files that are otherwise complete: an archive's checksums, a header's.
#include <algorithm>
#include <exception>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "save/save.h"

namespace fastshard {

// Whether the save is not to be finished yet: Python has its say first, or whoever cancels.
bool Save::await_amendment() {
  if (!intent_.amended) return false;
  {
    const std::lock_guard lock(mutex_);
    if (error_) return false;
    try {
      take_checksums();
    } catch (...) {
      error_ = std::current_exception();
      return false;
    }
    amending_ = Amending::due;
    changed_.notify_all();  // under the lock: a waiter that sees it may drop the save
  }
  return true;
}

bool Save::take_amendment() {
  const std::lock_guard lock(mutex_);
  if (amending_ != Amending::due) return false;
  amending_ = Amending::taken;
  return true;
}

void Save::amend(std::vector<Amendment> amendments) {
  for (const Amendment& amendment : amendments) {
    const uint64_t nbytes = amendment.file < plan_->files.size() ? plan_->files[amendment.file].file_nbytes() : 0;
    if (amendment.bytes.size() > nbytes || amendment.offset > nbytes - amendment.bytes.size()) {
      throw std::invalid_argument("an amendment lies outside of its file");
    }
  }
  // Before the save is this call's to end: without memory it stays the caller's, who cancels it.
  const auto shared = std::make_shared<std::vector<Amendment>>(std::move(amendments));
  {
    const std::lock_guard lock(mutex_);
    if (amending_ != Amending::taken) return;
    amending_ = Amending::no;
  }
  const auto end = [self = shared_from_this(), shared] {
    self->attempt([&] {
      for (const Amendment& amendment : *shared) self->write(amendment);
    });
    self->finish();
  };
  try {
    resources_.relief.post(end);
  } catch (const std::exception&) {
    end();  // no thread to be had
  }
}

void Save::write(const Amendment& amendment) {
  if (amendment.bytes.empty()) return;
  const Timer timer(progress_.write_ns);
  const Memory* const memory = memory_of(plan_->files[amendment.file].target);
  if (memory != nullptr) {
    std::ranges::copy(std::as_bytes(std::span(amendment.bytes)), memory->bytes + amendment.offset);
  } else {
    iovec part{const_cast<char*>(amendment.bytes.data()), amendment.bytes.size()};
    const OutputFile::Awake awake(*files_[amendment.file]);
    files_[amendment.file]->write({&part, 1}, amendment.offset);
  }
}

}  // namespace fastshard
