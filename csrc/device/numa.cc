// SPDX-License-Identifier: Apache-2.0
#include "device/numa.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cctype>
#include <climits>
#include <cstdlib>
#include <fstream>

namespace fastshard {
namespace {

constexpr int kMaxNodes = 1024;
constexpr int kPreferred = 1;  // MPOL_PREFERRED of linux/mempolicy.h

// $FASTSHARD_SYSFS: another folder, for tests.
std::string sysfs() {
  const char* const chosen = std::getenv("FASTSHARD_SYSFS");
  return chosen == nullptr || *chosen == '\0' ? "/sys" : chosen;
}

// "0" with one node, "0-1", "0,2" and the like with several.
bool several_nodes() {
  std::string online;
  std::ifstream(sysfs() + "/devices/system/node/online") >> online;
  return online.find_first_of("-,") != std::string::npos;
}

}  // namespace

int node_of_pci_device(const std::string& address) {
  if (address.empty() || !several_nodes()) return -1;
  std::string folder;
  for (const char letter : address) folder += static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
  int node = -1;
  std::ifstream(sysfs() + "/bus/pci/devices/" + folder + "/numa_node") >> node;
  return node < kMaxNodes ? node : -1;
}

void prefer_node(std::span<std::byte> memory, int node) {
  if (node < 0) return;
  constexpr int kBits = sizeof(unsigned long) * CHAR_BIT;
  std::array<unsigned long, kMaxNodes / kBits> mask = {};
  mask[static_cast<size_t>(node / kBits)] = 1ul << (node % kBits);
  // Not in libc, and libnuma would be one more dependency.
  syscall(SYS_mbind, memory.data(), memory.size(), kPreferred, mask.data(), kMaxNodes + 1, 0);
}

}  // namespace fastshard
