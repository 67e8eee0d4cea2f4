// SPDX-License-Identifier: Apache-2.0
#include "plan/schedule.h"

#include <algorithm>
#include <stdexcept>

namespace fastshard {
namespace {

// Small host tensors between device tensors ride in the staging slot: a write of their own costs more.
constexpr uint64_t kRideAlongNbytes = 64 << 10;

class Builder {
 public:
  Builder(FileSchedule& out, const ScheduleLimits& limits) : out_(out), limits_(limits) {}

  void add(const WriteItem& added, uint32_t item) {
    const TensorView& source = added.source;
    const uint64_t nbytes = source.packed_nbytes();
    if (nbytes == 0) return;
    if (added.file_offset != end_) close();  // behind a gap
    end_ = added.file_offset;
    for (uint64_t done = 0; done < nbytes;) {
      const Route route = route_of(source, nbytes - done);
      if (open_ && !can_take(route)) close();
      if (!open_) open(route);
      const uint64_t take = room_for(source, done, nbytes - done);
      if (take == 0) {
        close();
        continue;
      }
      Chunk& chunk = out_.chunks.back();
      out_.ops.push_back({&source, item, static_cast<uint32_t>(chunk.nbytes), done, take});
      chunk.op_count += 1;
      chunk.nbytes += take;
      end_ += take;
      if (route == Route::device) chunk.route = Route::device;
      pieces_ += chunk.route == Route::in_place ? runs_touched(source, done, take) : 1;
      done += take;
    }
  }

 private:
  Route route_of(const TensorView& source, uint64_t nbytes) const {
    if (source.device != kHost) return Route::device;
    if (!limits_.in_place) return Route::packed;
    if (source.cast()) return Route::packed;
    const bool long_runs = source.contiguous() || source.run_nbytes >= kInPlaceRunNbytes;
    if (!long_runs) return Route::packed;
    const bool rides = open_ && out_.chunks.back().route != Route::in_place && nbytes < kRideAlongNbytes &&
                       pieces_ < limits_.max_ops && nbytes <= capacity_ - out_.chunks.back().nbytes;
    return rides ? Route::packed : Route::in_place;
  }

  bool can_take(Route route) {
    const Chunk& chunk = out_.chunks.back();
    if (pieces_ >= limits_.max_ops) capacity_ = std::min(capacity_, round_up(chunk.nbytes, limits_.block_nbytes));
    if (chunk.nbytes >= capacity_) return false;
    if (limits_.block_nbytes > 1) return true;
    // Device bytes want a slot of their own, but take host bytes along.
    return route == chunk.route || (route == Route::packed && chunk.route == Route::device);
  }

  void open(Route route) {
    const bool in_slot = limits_.in_place || limits_.block_nbytes > 1;  // else packed straight into memory
    const uint64_t limit = route == Route::in_place ? limits_.in_place_nbytes
                           : route == Route::device ? limits_.slot_nbytes
                           : in_slot                ? std::min(limits_.packed_nbytes, limits_.slot_nbytes)
                                                    : limits_.packed_nbytes;
    const uint64_t alignment = std::max(kChunkAlignment, limits_.block_nbytes);
    const uint64_t end = (end_ + limit) / alignment * alignment;
    capacity_ = end > end_ ? end - end_ : limit;
    if (limits_.boundary_nbytes != 0) {
      capacity_ =
          std::min(capacity_, limits_.boundary_nbytes - (limits_.begin_nbytes + end_) % limits_.boundary_nbytes);
    }
    out_.chunks.push_back({end_, 0, static_cast<uint32_t>(out_.ops.size()), 0, route});
    pieces_ = 0;
    open_ = true;
  }

  void close() { open_ = false; }

  // Runs are counted in place only, where nothing is cast.
  uint64_t room_for(const TensorView& source, uint64_t first, uint64_t nbytes) const {
    const Chunk& chunk = out_.chunks.back();
    uint64_t take = std::min(nbytes, capacity_ - chunk.nbytes);
    if (chunk.route == Route::in_place && !source.contiguous()) {
      const uint64_t runs_left = limits_.max_ops - pieces_;
      const uint64_t to_run_end = source.run_nbytes - first % source.run_nbytes;
      take = std::min(take, to_run_end + (runs_left - 1) * source.run_nbytes);
    }
    return take;
  }

  static uint64_t round_up(uint64_t nbytes, uint64_t unit) { return (nbytes + unit - 1) / unit * unit; }

  static uint32_t runs_touched(const TensorView& source, uint64_t first, uint64_t nbytes) {
    return static_cast<uint32_t>((first + nbytes - 1) / source.run_nbytes - first / source.run_nbytes + 1);
  }

  FileSchedule& out_;
  const ScheduleLimits& limits_;
  bool open_ = false;
  uint64_t end_ = 0;  // in the file, of what was added
  uint64_t capacity_ = 0;
  uint32_t pieces_ = 0;
};

}  // namespace

FileSchedule make_schedule(const FilePlan& file, const ScheduleLimits& limits) {
  if (limits.slot_nbytes == 0 || limits.packed_nbytes == 0 || limits.in_place_nbytes == 0 || limits.max_ops == 0) {
    throw std::invalid_argument("the limits of a chunk must be positive");
  }
  if (limits.block_nbytes > 1 && (limits.in_place || limits.packed_nbytes < limits.slot_nbytes ||
                                  limits.slot_nbytes < std::max(kChunkAlignment, limits.block_nbytes))) {
    throw std::invalid_argument("chunks of whole blocks must be staged, and a slot must hold at least one block");
  }
  const uint64_t unit = std::max(kChunkAlignment, limits.block_nbytes);
  if (limits.boundary_nbytes % unit != 0 || (limits.boundary_nbytes != 0 && limits.begin_nbytes % unit != 0)) {
    throw std::invalid_argument("boundaries between chunks must be multiples of the page and the block size");
  }
  if (limits.block_nbytes > 1 && file.gaps)
    throw std::invalid_argument("a file with gaps cannot be written in whole blocks");
  FileSchedule schedule;
  schedule.ops.reserve(file.items.size());
  Builder builder(schedule, limits);
  for (const uint32_t item : in_file_order(file)) builder.add(file.items[item], item);
  return schedule;
}

}  // namespace fastshard
