// SPDX-License-Identifier: Apache-2.0
#include "file/huge_pages.h"

#include <sys/mman.h>

#include <cstdint>
#include <fstream>
#include <string>

#include "file/shared_pages.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1
#endif

namespace fastshard {
namespace {

constexpr uintptr_t kHugePageNbytes = 2 << 20;

}  // namespace

bool can_collapse() {
  // The kernel does as it is asked to whatever this file says, but an administrator has had a reason.
  std::ifstream setting("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string text;
  if (!std::getline(setting, text) || text.find("[never]") != std::string::npos) return false;
  return madvise(nullptr, 0, MADV_COLLAPSE) == 0;
}

void collapse(std::span<const std::span<const std::byte>> memory, const std::atomic<bool>& stop) {
  const PageMap pages;
  for (const std::span<const std::byte> part : memory) {
    const auto begin = reinterpret_cast<uintptr_t>(part.data());
    uintptr_t block = (begin + kHugePageNbytes - 1) / kHugePageNbytes * kHugePageNbytes;
    for (; block + kHugePageNbytes <= begin + part.size() && !stop; block += kHugePageNbytes) {
      // Else it would take memory that was not taken before.
      if (!pages.all_ours(block, kHugePageNbytes)) continue;
      madvise(reinterpret_cast<void*>(block), kHugePageNbytes, MADV_COLLAPSE);  // or it stays as it is
    }
  }
}

}  // namespace fastshard
