// SPDX-License-Identifier: Apache-2.0
// Descriptors that are closed on a thread of their own: with the last one the kernel frees what has lost its name,
// which can take as long as the disk is busy.
#pragma once

#include <memory>
#include <vector>

namespace fastshard {

// Descriptors being closed. Where no thread or no memory is to be had, they are closed at once by the caller. A forked
// child closes its copies and has nothing to wait for. Thread-safe, but for start().
class Closing {
 public:
  struct State;

  // Takes the descriptors over; once.
  void start(const std::vector<int>& descriptors) noexcept;

  bool done() const;
  // True when all of them are closed, false after `seconds`.
  bool wait(double seconds) const;

 private:
  std::shared_ptr<State> state_;  // null: nothing is left to be closed
};

// For a descriptor that is the last one of a small file: closed by a thread that stays for a while, for the next one.
// Where many wait already, or no thread is to be had, it is closed at once.
void close_soon(int descriptor) noexcept;

// Waits until all of these are closed. Whether there was anything to wait for.
bool wait_for_closing() noexcept;

}  // namespace fastshard
