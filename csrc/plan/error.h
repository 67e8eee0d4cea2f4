// SPDX-License-Identifier: Apache-2.0
// The errors that the native module throws. They know neither Python nor CUDA; csrc/bindings/errors.cc translates them.
#pragma once

#include <cerrno>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

namespace fastshard {

// A system call on `path`, which is the name that the caller gave, failed with `errno_value`. Becomes
// OSError(errno, strerror, path) in Python; `detail`, where there is one, follows the strerror. `published`: the new
// file stands under its name all the same, and the error came after that.
class IoError : public std::system_error {
 public:
  IoError(int errno_value, std::string path, const std::string& action, std::string detail = {}, bool published = false)
      : std::system_error(errno_value, std::generic_category(), action),
        path_(std::move(path)),
        detail_(std::move(detail)),
        published_(published) {}
  const std::string& path() const noexcept { return path_; }
  const std::string& detail() const noexcept { return detail_; }
  bool published() const noexcept { return published_; }

 private:
  std::string path_;
  std::string detail_;
  bool published_;
};

// A CUDA driver call failed, or no usable driver was found. Becomes RuntimeError.
class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// No process could be forked that has everything a save reads. Nothing was begun: the caller may copy it instead.
class NotForked : public std::runtime_error {
 public:
  // `items`, by file, are those that a forked process would not have, where that is the reason.
  explicit NotForked(const std::string& what, std::vector<std::vector<uint32_t>> items = {})
      : std::runtime_error(what), items_(std::move(items)) {}
  const std::vector<std::vector<uint32_t>>& items() const noexcept { return items_; }

 private:
  std::vector<std::vector<uint32_t>> items_;
};

// The caller has cancelled the save. Users never see it, as the caller has the reason already.
class Cancelled : public std::runtime_error {
 public:
  explicit Cancelled(const std::string& what = "save cancelled") : std::runtime_error(what) {}
};

}  // namespace fastshard
