// SPDX-License-Identifier: Apache-2.0
#include "save/engine.h"

#include <algorithm>
#include <stdexcept>

#include "file/shared_pages.h"
#include "save/source_pages.h"

namespace fastshard {
namespace {

// A slot with its scratch: two huge pages. Copies of this size have most of a link's rate, and the 32 of a usual budget
// are enough for each of many writers to have one copied while it writes another.
constexpr uint64_t kMaxStagingBlockNbytes = 4 << 20;
constexpr uint64_t kMinBudget = 1 << 20;
constexpr uint64_t kPage = 4096;

uint64_t slot_nbytes(const Options& options) {
  if (options.memory_budget < kMinBudget) throw std::invalid_argument("memory_budget must be at least 1 MiB");
  const uint64_t block = std::min(kMaxStagingBlockNbytes, std::max(options.memory_budget / 8, kMinBudget / 2));
  return (block - kScratchNbytes) / kPage * kPage;
}

// Saves that take less time than waking a writer up, and waiting for it.
constexpr uint64_t kSmallSaveNbytes = 256 << 10;

bool is_small(const Save& save, const Intent& intent) {
  return save.nbytes() <= kSmallSaveNbytes && save.on_host() && !intent.durable && intent.keep_cached &&
         !intent.amended;
}

// Whether its writers hold nothing that others wait for: locks of drivers, of the interpreter, of the process's memory.
bool can_be_written_aside(const SavePlan& plan, WritePath path) {
  if (path == WritePath::mapped || path == WritePath::registered) return false;
  return std::ranges::all_of(plan.files, [](const FilePlan& file) {
    const bool on_host = std::ranges::all_of(file.items, [](const WriteItem& i) { return i.source.device == kHost; });
    return on_host && memory_of(file.target) == nullptr && !file.placed && !reads_files(file);
  });
}

size_t checked_threads(const Options& options) {
  if (options.threads == 0) throw std::invalid_argument("threads must be at least 1");
  return options.threads;
}

}  // namespace

Engine::Engine(const Options& options)
    : options_(options),
      ring_(slot_nbytes(options), options.memory_budget / (slot_nbytes(options) + kScratchNbytes)),
      workers_(checked_threads(options)),
      relief_workers_(options.threads),
      background_workers_(options.threads, true) {
  watch_forks();
}

std::shared_ptr<Save> Engine::submit(std::shared_ptr<const SavePlan> plan, const std::map<int, uintptr_t>& streams,
                                     Intent intent, std::function<std::vector<std::string>()> commit) {
  check(*plan);
  const bool aside = intent.gives_way && can_be_written_aside(*plan, options_.write_path);
  WorkerPool& workers = aside ? background_workers_ : workers_;
  WorkerPool& relief = aside ? relief_workers_ : workers_;
  Resources resources{ring_,  workers,           relief,           write_behind_, lone_threads_,
                      *host_, devices_of(*plan), io_uring_refused_};
  intent.wanted = options_.write_path;
  auto save = std::make_shared<Save>(std::move(plan), streams, intent, std::move(commit), std::move(resources));
  if (!intent.held) save->start(is_small(*save, intent));
  return save;
}

std::shared_ptr<Standing> Engine::stand(const SavePlan& plan, size_t generations) {
  check(plan);
  std::vector<Device*> devices;
  for (const auto& [ordinal, device] : devices_of(plan)) devices.push_back(device);
  const FilePlan& file = plan.files.at(0);
  const auto* target = std::get_if<NewFile>(&file.target);
  if (target == nullptr) throw std::invalid_argument("only new files can be prepared");
  return std::make_shared<Standing>(target->path, file.nbytes, generations, std::move(devices), workers_);
}

std::map<int, Device*> Engine::devices_of(const SavePlan& plan) {
  std::map<int, Device*> devices;
  for (const FilePlan& file : plan.files) {
    for (const WriteItem& item : file.items) {
      const int ordinal = item.source.device;
      if (ordinal >= 0 && !devices.contains(ordinal)) devices[ordinal] = &device(ordinal);
    }
  }
  return devices;
}

void Engine::warm_up(int ordinal) {
  Device& wanted = device(ordinal);
  wanted.warm_up();
  ring_.warm_up(wanted);
}

std::unique_ptr<PageLock> Engine::page_lock(int ordinal, std::span<std::byte> pages) {
  const auto begin = reinterpret_cast<uintptr_t>(pages.data());
  if (pages.empty() || begin == 0 || begin % kPage != 0 || pages.size() % kPage != 0) {
    throw std::invalid_argument("only whole pages can be page-locked");
  }
  return std::make_unique<PageLock>(device(ordinal), pages);
}

Device& Engine::device(int ordinal) {
  {
    const std::lock_guard lock(mutex_);
    const auto known = devices_.find(ordinal);
    if (known != devices_.end()) return *known->second;
  }
  auto made = make_cuda_device(ordinal, options_.device_scratch);  // not under the lock: the driver may take its time
  const std::lock_guard lock(mutex_);
  return *devices_.try_emplace(ordinal, std::move(made)).first->second;
}

}  // namespace fastshard
