// SPDX-License-Identifier: Apache-2.0
// Memory next to a device, on machines with more than one memory node. Everywhere else nothing here does anything.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace fastshard {

// The node of a PCI device ("0000:3b:00.0"), or -1: unknown, or the machine has one node only.
int node_of_pci_device(const std::string& address);

// Lets pages of `memory` that are not there yet come from `node`, where there is room. A refusal costs nothing but
// speed, and is ignored; so is -1.
void prefer_node(std::span<std::byte> memory, int node);

}  // namespace fastshard
