// SPDX-License-Identifier: Apache-2.0
// Divides the files of a plan into chunks, whose bytes are copied and written together. It is a pure function: no
// thread, device or file is used.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "plan/plan.h"

namespace fastshard {

// A gather: the (cast and) packed bytes [first_byte, first_byte + nbytes) of `source` go to `chunk_offset` of the
// chunk.
struct CopyOp {
  const TensorView* source;
  uint32_t item;  // index in FilePlan::items
  uint32_t chunk_offset;
  uint64_t first_byte;
  uint64_t nbytes;
};

enum class Route : uint8_t {
  in_place,  // host memory in long runs: written from where it lies, without staging
  packed,    // host memory, gathered or cast by the CPU
  device,    // through a staging slot; some of it comes from a device
};

// A range of one file that is written by one call.
struct Chunk {
  uint64_t file_offset;
  uint64_t nbytes;
  uint32_t first_op;
  uint32_t op_count;
  Route route;
};

// The chunks of one file in order. They cover the items exactly: none reaches into a gap.
struct FileSchedule {
  std::vector<CopyOp> ops;
  std::vector<Chunk> chunks;

  std::span<const CopyOp> ops_of(const Chunk& chunk) const {
    return std::span(ops).subspan(chunk.first_op, chunk.op_count);
  }
};

struct ScheduleLimits {
  uint64_t slot_nbytes = 16 << 20;      // a chunk with device memory in it
  uint64_t packed_nbytes = 1 << 20;     // a chunk packed by the CPU: stays in its L2 cache until it is written
  uint64_t in_place_nbytes = 16 << 20;  // a chunk written from its own memory
  uint32_t max_ops = 1024;              // ops (staged) or runs (in place: IOV_MAX) in a chunk
  bool in_place = true;                 // false: pack everything, straight into the target (which is memory)
  // For direct I/O: every chunk but the last ends on a multiple of this, a power of two. A chunk may exceed `max_ops`
  // to reach the next block boundary, and host and device memory share chunks. Needs in_place == false.
  uint64_t block_nbytes = 1;
  // No chunk reaches across a boundary: so many bytes lie between two of them, and the file begins so many behind the
  // first. Both are multiples of kChunkAlignment. 0: there is none.
  uint64_t boundary_nbytes = 0;
  uint64_t begin_nbytes = 0;
};

// Runs of at least this many bytes are written by pwritev from where they lie; shorter ones are packed first.
inline constexpr uint64_t kInPlaceRunNbytes = 4096;
// Chunks end on multiples of this where they can. So they are whole pages of the page cache, and no element is divided.
inline constexpr uint64_t kChunkAlignment = 4096;

// `file` must outlive the schedule: ops point into it.
FileSchedule make_schedule(const FilePlan& file, const ScheduleLimits& limits);

}  // namespace fastshard
