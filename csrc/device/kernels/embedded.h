// SPDX-License-Identifier: Apache-2.0
// The compiled kernels (a fatbin: SASS of the common architectures and PTX), inside this library.
#pragma once

namespace fastshard {

// Null when the build found no nvcc.
const void* embedded_kernels();

}  // namespace fastshard
