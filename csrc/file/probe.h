// SPDX-License-Identifier: Apache-2.0
// What a directory's filesystem can do, found out by doing it.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace fastshard {

// Each ability tried with a temporary file in `directory`: (ability, "yes" or why not). For `fastshard env`.
std::vector<std::pair<std::string, std::string>> probe(const std::string& directory);

}  // namespace fastshard
