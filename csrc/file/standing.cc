// SPDX-License-Identifier: Apache-2.0
#include "file/standing.h"

#include <sys/stat.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <stdexcept>

#include "device/numa.h"
#include "file/publish.h"

namespace fastshard {
namespace {

// What one thread populates at a time.
constexpr uint64_t kPopulateNbytes = 64 << 20;

}  // namespace

struct Standing::Generation {
  Generation(const std::string& path, uint64_t nbytes) : file(path, nbytes, Intent{.wanted = WritePath::mapped}) {}

  TemporaryFile file;
  std::unique_ptr<Mapping> mapping;
  PageLocking locking = {};  // of the mapping; goes before it
};

Standing::Standing(std::string path, uint64_t nbytes, size_t generations, std::vector<Device*> devices,
                   WorkerPool& workers)
    : path_(std::move(path)), nbytes_(nbytes), devices_(std::move(devices)), workers_(workers) {
  if (generations < 2) throw std::invalid_argument("generations must be at least 2: one is read, one is written");
  while (generations_.size() < generations) generations_.push_back(make());
  std::vector<TemporaryFile*> files;
  files.reserve(generations);
  for (const auto& generation : generations_) files.push_back(&generation->file);
  require_space(files);
  for (const auto& generation : generations_) populate(*generation);
}

Standing::~Standing() = default;

std::unique_ptr<Standing::Generation> Standing::make() { return std::make_unique<Generation>(path_, nbytes_); }

// Maps the file whole and makes all of its pages, next to the device where there is a choice, by all workers: the
// kernel clears them.
void Standing::populate(Generation& generation) {
  generation.mapping = std::make_unique<Mapping>(generation.file.map());
  if (!devices_.empty()) prefer_node(generation.mapping->pages(), devices_.front()->numa_node());
  const std::span<std::byte> bytes = generation.mapping->bytes();
  const uint64_t windows = (bytes.size() + kPopulateNbytes - 1) / kPopulateNbytes;
  std::mutex mutex;
  std::exception_ptr error;
  workers_.run_all(windows, [&](size_t window) {
    try {
      const uint64_t first = window * kPopulateNbytes;
      fastshard::populate(bytes.subspan(first, std::min(kPopulateNbytes, bytes.size() - first)), path_);
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
  // Kernels refuse to pin a disk's page cache for a device; from there its bytes take two hops.
  if (generation.file.has_writeback()) return;
  for (Device* device : devices_) {
    generation.locking = device->page_lock(generation.mapping->pages());
    if (generation.locking.registration != nullptr) return;  // it serves all devices
  }
  if (!devices_.empty())
    fallbacks_.insert("page-locking the file refused by the driver: " + generation.locking.refusal);
}

size_t Standing::next() {
  auto& generation = generations_[next_];
  if (generation == nullptr || !generation->file.intact()) {
    generation.reset();  // its space first
    generation = make();
    TemporaryFile* const file = &generation->file;
    require_space({&file, 1});
    populate(*generation);
  }
  return next_;
}

StandingMapping Standing::target(size_t generation) const {
  const Generation& chosen = *generations_[generation];
  const Registration* const locked = chosen.locking.registration.get();
  std::byte* const bytes = chosen.mapping->bytes().data();
  return {.path = path_,
          .memory = {.bytes = bytes,
                     .streaming = true,
                     .locked_begin = locked != nullptr ? bytes : nullptr,
                     .locked_part_nbytes = locked != nullptr ? locked->part_nbytes() : 0},
          .populate = chosen.file.has_writeback()};
}

std::span<const std::byte> Standing::newest() const {
  struct stat info;
  if (published_ == nullptr || fstat(published_->file.descriptor(), &info) != 0) return {};
  if (static_cast<uint64_t>(info.st_size) < nbytes_) return {};
  return published_->mapping->bytes().first(nbytes_);
}

std::vector<std::string> Standing::publish(size_t generation, bool durable) {
  Generation& filled = *generations_[generation];
  if (durable) filled.file.sync();
  std::exception_ptr late;
  try {
    swap_into_place(filled.file, published_ != nullptr ? &published_->file : nullptr, durable);
  } catch (const IoError& error) {
    if (!error.published()) throw;
    late = std::current_exception();
  }
  published_ = &filled;
  next_ = (generation + 1) % generations_.size();
  fallbacks_.insert(filled.file.fallbacks().begin(), filled.file.fallbacks().end());
  if (late) std::rethrow_exception(late);
  return {fallbacks_.begin(), fallbacks_.end()};
}

}  // namespace fastshard
