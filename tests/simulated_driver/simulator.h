// SPDX-License-Identifier: Apache-2.0
// The machine behind the entry points: devices, memory, streams executed by worker threads, injected failures.
//
// One lock guards everything. It is given up only where time passes: while a worker sleeps or moves bytes,
// and while a caller waits. State lives on the heap for good, and workers are detached: a process may exit
// with work pending.
#pragma once

#pragma GCC visibility push(default)  // what cuda.h declares and these files define is exported
#include <cuda.h>
#pragma GCC visibility pop

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <vector>

namespace simulated {

inline constexpr int kDevices = 2;
inline constexpr int64_t kDeviceNbytes = int64_t{8} << 30;  // unless a test says otherwise
inline constexpr unsigned kMaxPitch = 0x7fffffff;
// What a destination holds until its copy has happened, and fresh device memory until it is written.
inline constexpr int kPoison = 0xDB;
// Device address of registered host memory = its host address + this. No program has memory up there, so
// neither address passes for the other.
inline constexpr uintptr_t kHostAlias = uintptr_t{1} << 54;

// Of streams: the range of an H100. A lower number goes first.
inline constexpr int kGreatestPriority = -5;
inline constexpr int kLeastPriority = 0;

// Device memory is handed out in pieces of this size. Small allocations share pieces; a module has one.
inline constexpr size_t kGranule = size_t{2} << 20;
inline constexpr size_t kSharesGranules = size_t{1} << 20;  // and anything smaller

struct Stream;

// One copy to the host in the queue of its device's copy engine.
struct CopyOut {
  const Stream* stream;
  size_t nbytes;
  bool issued = false;  // it is in the queue: only copies are before it
};

// The kernels of another program, back to back, each on all multiprocessors.
struct Job {
  int priority;
  uint64_t ended = 0;  // kernels
};

// A kernel that has come to the front of its stream, and for which there are no multiprocessors.
struct WaitingKernel {
  int priority;
  bool admitted = false;
};

// The primary context of one device.
struct Context {
  int device = 0;
  int retained = 0;
  CUresult error = CUDA_SUCCESS;  // of work that failed after its call had returned; ends the context
  std::shared_ptr<Stream> legacy_stream;
  std::chrono::steady_clock::time_point link_busy_until;  // copies to the host share one link

  std::unique_ptr<Job> job;  // null while the device is idle
  std::vector<WaitingKernel*> waiting;
  std::deque<std::shared_ptr<CopyOut>> copies_out;  // in the order in which the copy engine takes them
  size_t enqueued_out = 0;                          // bytes of copies to the host that are not complete
  size_t peak_enqueued_out = 0;
  uint64_t begun = 0;
  std::set<uint64_t> running;  // operations that have begun, numbered in that order

  CUcontext handle() { return reinterpret_cast<CUcontext>(this); }
};

// Memory that enqueued work refers to: an allocation of a device, or registered host memory.
struct Range {
  Context* context;
  uintptr_t begin;  // the address programs use
  size_t nbytes;
  std::byte* bytes;  // the address the simulator uses
  bool portable = false;
  bool live = true;
  int pending = 0;  // operations that were enqueued and are not complete
  int running = 0;  // operations that move its bytes now

  std::byte* at(uintptr_t address) const { return bytes + (address - begin); }
  bool contains(uintptr_t address, size_t count) const {
    return address >= begin && count <= nbytes && address - begin <= nbytes - count;
  }
};
using Ranges = std::map<uintptr_t, std::shared_ptr<Range>>;

// The range that holds all of [address, address + count), or null.
std::shared_ptr<Range> find_range(const Ranges& ranges, uintptr_t address, size_t count);
// The first of the device allocations that hold all of it side by side, or null.
std::shared_ptr<Range> find_pieces(uintptr_t address, size_t count);
bool overlaps(const Ranges& ranges, uintptr_t address, size_t count);

struct Completion {
  bool done = false;
};

// One element of a stream's queue. Without `run` it only keeps order: an event, or the wait for one.
struct Operation {
  std::function<CUresult()> run{};  // called without the lock, when the worker gets to it
  std::vector<std::shared_ptr<Range>> uses{};
  std::shared_ptr<Completion> after{};   // waited for before anything else
  std::shared_ptr<Completion> signal{};  // set when all is done, also after a failure
  CUresult failure = CUDA_SUCCESS;       // what it fails with instead of running
  std::chrono::microseconds sleep{};     // a kernel that computes for so long
  bool kernel = false;                   // needs multiprocessors
  std::shared_ptr<CopyOut> copy_out{};   // null unless it is one
};

// A graph that is being captured from a stream.
struct Capture {
  CUstreamCaptureMode mode;
  const void* thread;    // that began it
  const Stream* origin;  // others join it by waiting for an event of it
  bool invalidated = false;
  bool ended = false;
};

struct Stream {
  Context* context;
  uint64_t serial;  // the seed of its delays
  int priority = 0;
  bool blocking = false;  // ordered with the legacy stream
  std::deque<Operation> queue;
  uint64_t enqueued = 0;
  uint64_t completed = 0;
  bool held_up = false;              // by something in front of the queue that is not a copy to the host
  size_t most_ahead = 0;             // bytes of other streams that were before one of its copies to the host
  std::shared_ptr<Capture> capture;  // or null
  bool destroyed = false;            // its worker ends when the queue is empty

  bool idle() const { return completed == enqueued; }
};

struct Event {
  Context* context;
  std::shared_ptr<Completion> latest;  // null until recorded
  std::shared_ptr<Capture> capture;    // in which it was recorded last, or null
};

struct Module {
  Context* context;
};

// A function's calls, and which of the next ones fail.
struct FunctionState {
  struct Failure {
    int countdown;  // 0: every call
    CUresult result;
    bool asynchronous;
  };
  uint64_t calls = 0;
  std::vector<Failure> failures;
};

enum Kind {
  kStreams,
  kEvents,
  kModules,
  kRegistrations,
  kAllocations,
  kContexts,
  kRegisteredBytes,
  kAllocatedBytes,
  kRequestedBytes,
  kKindCount
};

// What tests choose; tests/simcuda.py says what each means.
struct Settings {
  int64_t implicit_sync = 1;
  int64_t copy_fifo = 1;
  int64_t disk_pinning = 0;
  int64_t interior_pointers = 1;
  int64_t registration_nbytes = 0;
  int64_t registrations = 0;
  int64_t device_nbytes = kDeviceNbytes;
};
struct SettingName {
  const char* name;
  int64_t Settings::* setting;
};
inline constexpr SettingName kSettings[] = {
    {"implicit_sync", &Settings::implicit_sync},
    {"copy_fifo", &Settings::copy_fifo},
    {"disk_pinning", &Settings::disk_pinning},
    {"interior_pointers", &Settings::interior_pointers},
    {"registration_nbytes", &Settings::registration_nbytes},
    {"registrations", &Settings::registrations},
    {"device_nbytes", &Settings::device_nbytes},
};

struct State {
  std::mutex mutex;
  std::condition_variable changed;  // something completed, was enqueued, or a setting changed

  Context contexts[kDevices];
  std::map<uintptr_t, std::shared_ptr<Stream>> streams;
  std::map<uintptr_t, std::shared_ptr<Event>> events;
  std::map<uintptr_t, std::shared_ptr<Module>> modules;
  Ranges registrations;
  Ranges allocations;
  uintptr_t next_handle = 0x51000000;  // never used twice: a stale handle is always noticed
  uint64_t next_serial = 0;
  uint64_t in_flight = 0;
  std::map<int, int64_t> streams_made;  // by priority, since the last reset
  std::map<int, int64_t> launches;      // by priority of their stream, likewise
  std::vector<size_t> registered;       // the size of each registration since then
  bool synchronizing = false;           // a call waits for the device and lets no other call pass
  int64_t delayed_us = 0;               // all delays since the last reset, added up

  int64_t live[kKindCount] = {};
  int64_t peak[kKindCount] = {};
  std::map<std::string, FunctionState, std::less<>> functions;
  std::vector<std::string> violations;

  Settings settings;
  bool paused = false;
  uint64_t min_delay_us;
  uint64_t max_delay_us;
  uint64_t seed;
  double bandwidth;  // of device to host, bytes per second; 0: no limit

  State() { restore_settings(); }
  void restore_settings();
  void count(Kind kind, int64_t change);
  uintptr_t new_handle() { return next_handle += 16; }
};

State& state();

// Notes what a correct program never does.
void note_violation(std::string what);
[[noreturn]] void reject(CUresult result, std::string what);

// The caller holds the lock of what follows, unless it says otherwise.
std::shared_ptr<Stream> start_stream(Context* context, unsigned flags = 0, int priority = 0);
// Stream 0. Other streams have no implicit order with it, which is stricter than the driver.
std::shared_ptr<Stream> legacy_stream(Context* context);
void enqueue(const std::shared_ptr<Stream>& stream, Operation operation);

// Waits until no operation moves bytes of `range`; later ones fail. Counts a violation if there are any.
void retire(std::unique_lock<std::mutex>& lock, Range& range, const char* what);

// Units of a device, in engines.cc.

// What only waits for other copies goes to the copy engine.
void issue_copies(Stream& stream);
void wait_for_copy_engine(std::unique_lock<std::mutex>& lock, Context& context, const CopyOut& copy);
void leave_copy_engine(Context& context, const CopyOut& copy);
void wait_for_multiprocessors(std::unique_lock<std::mutex>& lock, const Stream& stream);
// The running kernel of the job ends, and the next begins. Between them come the waiting kernels of higher priority.
void step_job(Context& context);
void end_job(Context& context);
// Until everything is complete that runs now, the job's kernel included.
void wait_for_running_work(std::unique_lock<std::mutex>& lock, Context& context);
// Until everything is complete that is enqueued now.
void wait_for_enqueued_work(std::unique_lock<std::mutex>& lock, Context& context);

// Takes the time that `nbytes` to the host need at the set bandwidth. Called without the lock, by a worker.
void occupy_link(Context* context, size_t nbytes);

// What the library offers; names without version suffix, as cuGetProcAddress wants them.
struct EntryPoint {
  const char* name;
  void* address;
};
std::span<const EntryPoint> entry_points();

}  // namespace simulated
