// SPDX-License-Identifier: Apache-2.0
// The pieces of host memory that a chunk consists of.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "device/pack.h"
#include "plan/schedule.h"

namespace fastshard {

// Visits the pieces of host memory that an op which is not cast is made of: their first byte among the packed ones, and
// where they lie.
template <typename Visit>
void for_each_run(const CopyOp& op, Visit visit) {
  for (uint64_t done = 0; done < op.nbytes;) {
    const uint64_t first = op.first_byte + done;
    const uint64_t run_left =
        op.source->contiguous() ? op.nbytes - done : op.source->run_nbytes - first % op.source->run_nbytes;
    const uint64_t nbytes = std::min(op.nbytes - done, run_left);
    visit(first, std::span(packed_address(*op.source, first), nbytes));
    done += nbytes;
  }
}

}  // namespace fastshard
