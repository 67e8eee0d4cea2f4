// SPDX-License-Identifier: Apache-2.0
// Bytes that only Python can bring: from accelerators without a native device, and of tensors that are loaded on
// demand. Writers post requests for pieces of at most a slot, and the thread that serves the save answers them. So such
// a save needs no more memory than the staging slots, either.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "device/device.h"
#include "plan/error.h"

namespace fastshard {

// A request to put the packed bytes [first_byte, first_byte + nbytes) of `item` of `file` at `out`.
struct FetchRequest {
  uint64_t id;
  uint32_t file;
  uint32_t item;
  uint64_t first_byte;
  uint64_t nbytes;
  std::byte* out;
};

// Thread-safe.
class FetchQueue {
 public:
  // `posted` is called, without a lock held, when there is something to serve.
  explicit FetchQueue(std::function<void()> posted) : posted_(std::move(posted)) {}

  // For the serving thread: the next request, and its completion.
  std::optional<FetchRequest> take() {
    const std::lock_guard lock(mutex_);
    if (waiting_.empty()) return std::nullopt;
    taken_.push_back({waiting_.front(), std::this_thread::get_id()});
    waiting_.pop_front();
    return taken_.back().request;
  }
  void complete(uint64_t id) {
    {
      const std::lock_guard lock(mutex_);
      std::erase_if(taken_, [&](const Taken& taken) { return taken.request.id == id; });
    }
    settled_.notify_all();
  }
  bool empty() const {
    const std::lock_guard lock(mutex_);
    return waiting_.empty();
  }

  // Withdraws requests that nobody has taken. Those that were taken are waited for, as somebody may be writing to their
  // slots.
  void abort() {
    {
      const std::lock_guard lock(mutex_);
      aborted_ = true;
      waiting_.clear();
    }
    settled_.notify_all();
  }
  // Also withdraws requests that were taken, by the calling thread or by anybody.
  void disown(bool anybodys) {
    {
      const std::lock_guard lock(mutex_);
      const auto self = std::this_thread::get_id();
      std::erase_if(taken_, [&](const Taken& taken) { return anybodys || taken.by == self; });
    }
    settled_.notify_all();
  }

  std::unique_ptr<CopyStream> stream(uint32_t file) { return std::make_unique<Stream>(*this, file); }

 private:
  class Stream;

  struct Taken {
    FetchRequest request;
    std::thread::id by;
  };

  class FetchTicket final : public Ticket {
   public:
    FetchTicket(FetchQueue& queue, uint64_t first, uint64_t last) : queue_(queue), first_(first), last_(last) {}
    void wait() override {
      std::unique_lock lock(queue_.mutex_);
      const auto ours = [&](const FetchRequest& request) { return request.id >= first_ && request.id < last_; };
      queue_.settled_.wait(lock, [&] {
        return std::ranges::none_of(queue_.waiting_, ours) &&
               std::ranges::none_of(queue_.taken_, ours, [](const Taken& taken) { return taken.request; });
      });
      if (queue_.aborted_) throw Cancelled();
    }

   private:
    FetchQueue& queue_;
    uint64_t first_, last_;
  };

  class Stream final : public CopyStream {
   public:
    Stream(FetchQueue& queue, uint32_t file) : queue_(queue), file_(file) {}
    std::unique_ptr<Ticket> pack(std::span<const CopyOp> ops, Staging& staging) override {
      std::unique_ptr<Ticket> ticket;
      {
        uint64_t first, last;
        const std::lock_guard lock(queue_.mutex_);
        if (queue_.aborted_) throw Cancelled();
        const size_t before = queue_.waiting_.size();
        first = last = queue_.next_id_;
        try {
          for (const CopyOp& op : ops) {
            queue_.waiting_.push_back(
                {last++, file_, op.item, op.first_byte, op.nbytes, staging.bytes.data() + op.chunk_offset});
          }
          ticket = std::make_unique<FetchTicket>(queue_, first, last);
        } catch (...) {
          queue_.waiting_.resize(before);  // nobody may write to a slot that has been given away
          throw;
        }
        queue_.next_id_ = last;
      }
      queue_.posted_();
      return ticket;
    }

   private:
    FetchQueue& queue_;
    uint32_t file_;
  };

  const std::function<void()> posted_;
  mutable std::mutex mutex_;
  std::condition_variable settled_;
  std::deque<FetchRequest> waiting_;
  std::vector<Taken> taken_;
  uint64_t next_id_ = 0;
  bool aborted_ = false;
};

}  // namespace fastshard
