// SPDX-License-Identifier: Apache-2.0
#include "engine.h"

#include <algorithm>
#include <stdexcept>

namespace fastshard {
namespace {

// Large slots cost nothing in throughput and fewer calls; eight of them keep several files busy.
constexpr uint64_t kMaxBlockNbytes = 16 << 20;
constexpr uint64_t kMinBudget = 1 << 20;
constexpr uint64_t kPage = 4096;

uint64_t slot_nbytes(const Options& options) {
  if (options.memory_budget < kMinBudget) throw std::invalid_argument("memory_budget must be at least 1 MiB");
  const uint64_t block = std::min(kMaxBlockNbytes, std::max(options.memory_budget / 8, kMinBudget / 2));
  return (block - kScratchNbytes) / kPage * kPage;
}

size_t checked_threads(const Options& options) {
  if (options.threads == 0) throw std::invalid_argument("threads must be at least 1");
  return options.threads;
}

}  // namespace

Engine::Engine(const Options& options)
    : options_(options),
      ring_(slot_nbytes(options), options.memory_budget / (slot_nbytes(options) + kScratchNbytes)),
      workers_(checked_threads(options)) {}

std::shared_ptr<Save> Engine::submit(SavePlan plan, const std::map<int, uintptr_t>& streams, bool durable,
                                     bool keep_cached) {
  check(plan);
  Resources resources{ring_, workers_, write_behind_, *host_, {}, io_uring_refused_};
  for (const FilePlan& file : plan.files) {
    for (const WriteItem& item : file.items) {
      const int ordinal = item.source.device;
      if (ordinal >= 0 && !resources.devices.contains(ordinal)) resources.devices[ordinal] = &device(ordinal);
    }
  }
  const Intent intent{.wanted = options_.write_path, .durable = durable, .keep_cached = keep_cached};
  auto save = std::make_shared<Save>(std::move(plan), streams, intent, std::move(resources));
  save->start();
  return save;
}

Device& Engine::device(int ordinal) {
  {
    const std::lock_guard lock(mutex_);
    const auto known = devices_.find(ordinal);
    if (known != devices_.end()) return *known->second;
  }
  auto made = make_cuda_device(ordinal);  // not under the lock: the driver may take its time
  const std::lock_guard lock(mutex_);
  return *devices_.try_emplace(ordinal, std::move(made)).first->second;
}

}  // namespace fastshard
