// SPDX-License-Identifier: Apache-2.0
// Descriptors that are closed on a thread of their own. When the last descriptor of a file without a name is closed,
// the kernel frees the file, which can take as long as the disk is busy.
#pragma once

#include <memory>
#include <vector>

namespace fastshard {

// Descriptors being closed. When no thread can be started or there is no memory, the caller closes them at once. A
// forked child closes its copies and has nothing to wait for. Thread-safe, except for start().
class Closing {
 public:
  struct State;

  // Takes the descriptors over. Called once.
  void start(const std::vector<int>& descriptors) noexcept;

  bool done() const;
  // True when all of them are closed, false after `seconds`.
  bool wait(double seconds) const;

 private:
  std::shared_ptr<State> state_;  // null: nothing is left to be closed
};

// Closes the last descriptor of a file on a thread, which stays for a while to close the next ones. When many wait
// already, or no thread can be started, the caller closes it at once.
void close_soon(int descriptor) noexcept;

// Waits while files given to close_soon() still take much room: of saves in a row, one leaves its old files to be freed
// beside the next.
void wait_for_room() noexcept;

// Waits until all descriptors given to close_soon() or to a Closing are closed. Returns whether there were any.
bool wait_for_closing() noexcept;

}  // namespace fastshard
