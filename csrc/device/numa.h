// SPDX-License-Identifier: Apache-2.0
// Memory next to a device, on machines with several memory nodes. On other machines the functions do nothing.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace fastshard {

// Returns the node of a PCI device ("0000:3b:00.0"); -1 if it is not known, or the machine has only one.
int node_of_pci_device(const std::string& address);

// Asks the kernel to take pages of `memory` that do not exist yet from `node`, if it has any free. A refusal costs only
// speed and is ignored. Nothing happens for -1.
void prefer_node(std::span<std::byte> memory, int node);

}  // namespace fastshard
