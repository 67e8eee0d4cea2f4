// SPDX-License-Identifier: Apache-2.0
// Finds out by trying what a directory's filesystem can do.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace fastshard {

// Tries each ability with a temporary file in `directory`. Returns each with "yes" or the reason why not, for
// `fastshard env`.
std::vector<std::pair<std::string, std::string>> probe(const std::string& directory);

}  // namespace fastshard
