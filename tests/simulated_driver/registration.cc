// SPDX-License-Identifier: Apache-2.0
// Page-locked host memory, and what the kernel lets nobody page-lock.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <sstream>

#include "call.h"

namespace simulated {
namespace {

// One line of /proc/self/maps.
struct Mapped {
  uintptr_t begin = 0, end = 0;
  std::string permissions, device, path;

  bool writable() const { return permissions[1] == 'w'; }
  bool shared() const { return permissions[3] == 's'; }
};

std::vector<Mapped> mapped_memory(uintptr_t begin, uintptr_t end) {
  std::vector<Mapped> found;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    Mapped mapped;
    char dash;
    std::string offset, inode;
    std::istringstream words(line);
    words >> std::hex >> mapped.begin >> dash >> mapped.end >> mapped.permissions >> offset >> mapped.device >> inode;
    std::getline(words >> std::ws, mapped.path);
    if (mapped.begin < end && begin < mapped.end) found.push_back(std::move(mapped));
  }
  return found;
}

// Filesystems are named by "major:minor", as in /proc/self/mountinfo, there in decimal.
bool in_memory(const Mapped& mapped) {
  unsigned major = 0, minor = 0;
  if (std::sscanf(mapped.device.c_str(), "%x:%x", &major, &minor) != 2) return false;
  const std::string wanted = std::to_string(major) + ":" + std::to_string(minor);
  std::ifstream mounts("/proc/self/mountinfo");
  for (std::string line; std::getline(mounts, line);) {
    std::istringstream words(line.substr(0, line.find(" - ")));
    std::string id, parent, device;
    words >> id >> parent >> device;
    if (device != wanted) continue;
    const std::string type = line.substr(line.find(" - ") + 3);
    return type.starts_with("tmpfs ") || type.starts_with("ramfs ") || type.starts_with("hugetlbfs ") ||
           type.starts_with("devtmpfs ");
  }
  // The kernel's own, which is mounted nowhere: shared memory without a name, memfd_create(), shmget().
  return major == 0;
}

// What Linux answers to a driver that pins pages for good (FOLL_LONGTERM): they must be writable, and no disk's, whose
// filesystem would never again know when they change. Private mappings of files get pages of their own.
bool may_be_pinned(uintptr_t begin, size_t nbytes, bool read_only) {
  if (state().settings.disk_pinning != 0) return true;
  return std::ranges::all_of(mapped_memory(begin, begin + nbytes), [&](const Mapped& mapped) {
    if (!mapped.writable()) return read_only;
    return !mapped.shared() || read_only || in_memory(mapped);
  });
}

}  // namespace

void remove_registration(std::unique_lock<std::mutex>& lock, std::shared_ptr<Range> range) {
  state().registrations.erase(range->begin);
  state().count(kRegistrations, -1);
  state().count(kRegisteredBytes, -static_cast<int64_t>(range->nbytes));
  retire(lock, *range, "host memory unregistered");
}

bool registered_for(const Context* context, const std::shared_ptr<Range>& range) {
  return range != nullptr && (range->portable || range->context == context);
}

}  // namespace simulated

using namespace simulated;

CUresult cuMemHostRegister(void* pointer, size_t nbytes, unsigned flags) {
  return entry("cuMemHostRegister", Needs::kContext, [&](Call& call) {
    const auto begin = reinterpret_cast<uintptr_t>(pointer);
    const size_t page = whole_pages(1);
    require(begin != 0 && nbytes != 0 && begin % page == 0 && begin < kHostAlias);
    require(flags < 16);
    require(!overlaps(state().allocations, begin, nbytes));
    require(!overlaps(state().registrations, begin, nbytes), CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
    std::vector<unsigned char> resident(whole_pages(nbytes) / page);
    require(mincore(pointer, nbytes, resident.data()) == 0);  // fails where nothing is mapped
    State& s = state();
    const Settings& settings = s.settings;
    const auto limit = static_cast<uint64_t>(settings.registration_nbytes);
    require(limit == 0 || nbytes <= limit, CUDA_ERROR_OUT_OF_MEMORY);
    require(settings.registrations == 0 || s.live[kRegistrations] < settings.registrations, CUDA_ERROR_OUT_OF_MEMORY);
    require(may_be_pinned(begin, nbytes, (flags & CU_MEMHOSTREGISTER_READ_ONLY) != 0));
    call.synchronize_implicitly();
    auto range = std::make_shared<Range>(Range{call.context, begin, nbytes, static_cast<std::byte*>(pointer)});
    range->portable = (flags & CU_MEMHOSTREGISTER_PORTABLE) != 0;
    s.registered.push_back(nbytes);
    s.count(kRegistrations, 1);
    s.count(kRegisteredBytes, static_cast<int64_t>(nbytes));
    s.registrations.emplace(begin, std::move(range));
  });
}

CUresult cuMemHostUnregister(void* pointer) {
  return entry("cuMemHostUnregister", Needs::kRelease, [&](Call& call) {
    const auto found = state().registrations.find(reinterpret_cast<uintptr_t>(pointer));
    if (found == state().registrations.end()) {
      reject(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "cuMemHostUnregister of memory that is not registered");
    }
    const auto range = found->second;
    call.synchronize_implicitly();
    remove_registration(call.lock, range);
  });
}

CUresult cuMemHostGetDevicePointer(CUdeviceptr* address, void* pointer, unsigned flags) {
  return entry("cuMemHostGetDevicePointer", Needs::kContext, [&](Call& call) {
    const auto host = reinterpret_cast<uintptr_t>(pointer);
    const auto range = find_range(state().registrations, host, 1);
    require(flags == 0 && registered_for(call.context, range));
    require(range->begin == host || state().settings.interior_pointers != 0);
    *address = host + kHostAlias;
  });
}
