// SPDX-License-Identifier: Apache-2.0
// The engine, which starts saves and owns what they share: staging buffers, writer threads, devices.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <span>

#include "device/page_lock.h"
#include "file/direct_io.h"
#include "file/standing.h"
#include "save/save.h"

namespace fastshard {

struct Options {
  uint64_t memory_budget = 128 << 20;  // bytes of staging memory, all saves of the engine together
  size_t threads = 1;                  // writers
  WritePath write_path = WritePath::automatic;
  uint64_t device_scratch = 64 << 20;  // bytes of each device's own memory, to pack in
  bool io_uring = true;                // for direct writes, where the kernel allows it
};

// Thread-safe. Saves run on the engine's threads; the destructor waits for them.
class Engine {
 public:
  // Throws std::invalid_argument for a budget below 1 MiB or no threads.
  explicit Engine(const Options& options);

  // Starts a save and returns while it runs. Its write path is that of the engine's options. Throws what stops it
  // before the first copy.
  std::shared_ptr<Save> submit(std::shared_ptr<const SavePlan> plan, const std::map<int, uintptr_t>& streams,
                               Intent intent, std::function<std::vector<std::string>()> commit = {});
  // Makes the standing target of a prepared save, a plan of one file. The engine must outlive its use.
  std::shared_ptr<Standing> stand(const SavePlan& plan, size_t generations);

  // Returns a CUDA device, which is opened by the first call and kept.
  Device& device(int ordinal);
  // Makes ready what saves from this device share and would make one by one: kernels, device scratch, and the staging
  // memory, page-locked. What is ready already is left alone.
  void warm_up(int ordinal);
  // Page-locks memory for the devices, whole pages that somebody else maps. The lock may outlive the engine.
  std::unique_ptr<PageLock> page_lock(int ordinal, std::span<std::byte> pages);

 private:
  std::map<int, Device*> devices_of(const SavePlan& plan);

  const Options options_;
  const int io_uring_refused_ = options_.io_uring ? io_uring_refusal() : EPERM;
  const std::unique_ptr<Device> host_ = make_host_device();
  std::mutex mutex_;
  std::map<int, std::unique_ptr<Device>> devices_;
  // Torn down from the last to the first: the workers finish before what they use goes.
  Ring ring_;
  WriteBehind write_behind_;
  WorkerPool workers_;
  WorkerPool relief_workers_;      // where the background workers leave off
  WorkerPool background_workers_;  // they step aside for the job
  LoneThreads lone_threads_;
};

}  // namespace fastshard
