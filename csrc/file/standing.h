// SPDX-License-Identifier: Apache-2.0
// The target of a prepared save: generations of one file that stay open, mapped, populated and page-locked, to
// be filled again and again. The one that was filled is published; the next save fills another.
#pragma once

#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "device/device.h"
#include "file/threads.h"
#include "plan/plan.h"

namespace fastshard {

// Not thread-safe: one save at a time.
class Standing {
 public:
  // Makes `generations` files of `nbytes` beside `path`, at least two. All of them are reserved before the first is
  // populated; a full filesystem is IoError(ENOSPC). Nothing stands under `path` before publish(). On a filesystem in
  // memory the files are page-locked for `devices`, if these accept it.
  Standing(std::string path, uint64_t nbytes, size_t generations, std::vector<Device*> devices, WorkerPool& workers);
  // The newest generation stays as an ordinary file; the others go.
  ~Standing();

  size_t generations() const { return generations_.size(); }
  // The generation to fill next, which is never the published one. It is made anew when somebody has removed or
  // replaced its file meanwhile.
  size_t next();
  StandingMapping target(size_t generation) const;
  // The bytes that were published last. Empty if there are none, or if somebody has cut that file since.
  std::span<const std::byte> newest() const;
  // Puts a filled generation in place of whatever stands under the path, and returns what the filesystem or the driver
  // has refused until now. When it throws an IoError, the path is as it was, unless the error says that the new file
  // stands.
  std::vector<std::string> publish(size_t generation, bool durable);

 private:
  struct Generation;

  std::unique_ptr<Generation> make();
  void populate(Generation& generation);

  const std::string path_;
  const uint64_t nbytes_;
  const std::vector<Device*> devices_;
  WorkerPool& workers_;
  std::vector<std::unique_ptr<Generation>> generations_;
  size_t next_ = 0;
  Generation* published_ = nullptr;
  std::set<std::string> fallbacks_;
};

}  // namespace fastshard
