// SPDX-License-Identifier: Apache-2.0
#include "plan/places.h"

#include <algorithm>
#include <span>
#include <stdexcept>

namespace fastshard {

uint64_t Place::extent_nbytes() const {
  uint64_t extent = run_nbytes;
  for (uint32_t dim = 0; dim < ndim; ++dim) extent += (shape[dim] - 1) * stride_nbytes[dim];
  return extent;
}

RunCursor::RunCursor(const std::vector<Place>& places, uint64_t first, uint64_t nbytes)
    : place_(places.data()), left_(nbytes) {
  if (left_ == 0) return;
  // The last that begins there or before: of several, those before it are empty.
  place_ += std::ranges::upper_bound(places, first, {}, &Place::packed_offset) - places.begin() - 1;
  enter(first - place_->packed_offset);
  next();
}

void RunCursor::enter(uint64_t byte_of_place) {
  uint64_t number = byte_of_place / place_->run_nbytes;
  in_run_ = byte_of_place % place_->run_nbytes;
  run_begin_ = place_->file_offset;
  for (uint32_t dim = place_->ndim; dim-- > 0;) {
    index_[dim] = number % place_->shape[dim];
    number /= place_->shape[dim];
    run_begin_ += index_[dim] * place_->stride_nbytes[dim];
  }
}

void RunCursor::next() {
  run_ = {here(), 0};
  while (left_ != 0 && here() == run_.end()) {
    const uint64_t nbytes = std::min(left_, place_->run_nbytes - in_run_);
    run_.nbytes += nbytes;
    left_ -= nbytes;
    in_run_ += nbytes;
    if (left_ != 0 && in_run_ == place_->run_nbytes) begin_next_run();
  }
}

void RunCursor::begin_next_run() {
  in_run_ = 0;
  for (uint32_t dim = place_->ndim; dim-- > 0;) {
    run_begin_ += place_->stride_nbytes[dim];
    if (++index_[dim] < place_->shape[dim]) return;
    run_begin_ -= place_->shape[dim] * place_->stride_nbytes[dim];
    index_[dim] = 0;
  }
  do {
    ++place_;
  } while (place_->nbytes == 0);
  enter(0);
}

namespace {

std::string named(size_t index, const std::string& file) { return "place " + std::to_string(index) + " of " + file; }

// Returns whether a * b + c cannot be had.
bool overflows(uint64_t a, uint64_t b, uint64_t c, uint64_t& result) {
  return __builtin_mul_overflow(a, b, &result) || __builtin_add_overflow(result, c, &result);
}

// Runs that follow each other, as those of a part of an array do, leave no doubt about their order.
void check_place(const Place& place, size_t index, uint64_t file_nbytes, const std::string& file) {
  uint64_t nbytes = place.run_nbytes, extent = place.run_nbytes;
  for (uint32_t dim = place.ndim; dim-- > 0;) {
    if (overflows(nbytes, place.shape[dim], 0, nbytes)) nbytes = ~uint64_t{0};
    if (place.shape[dim] == 0) continue;
    if (place.shape[dim] > 1 && place.stride_nbytes[dim] < extent) {
      throw std::invalid_argument("the runs of " + named(index, file) + " overlap or are not in the order of the file");
    }
    if (overflows(place.shape[dim] - 1, place.stride_nbytes[dim], extent, extent)) extent = ~uint64_t{0};
  }
  if (nbytes != place.nbytes) {
    throw std::invalid_argument(named(index, file) + " is declared to have " + std::to_string(place.nbytes) +
                                " bytes, but its runs have " + std::to_string(nbytes));
  }
  if (nbytes == 0) return;
  if (extent > file_nbytes || place.file_offset > file_nbytes - extent) {
    throw std::invalid_argument(named(index, file) + " lies beyond the file's " + std::to_string(file_nbytes) +
                                " bytes: " + std::to_string(extent) + " at " + std::to_string(place.file_offset));
  }
}

// A place, or what its outer dimensions repeat of it.
struct Pattern {
  uint32_t index;  // of the place
  uint64_t begin;
  uint64_t extent;

  uint64_t end() const { return begin + extent; }
};

void sort_by_begin(std::span<Pattern> patterns) { std::ranges::sort(patterns, {}, &Pattern::begin); }

// Returns whether all places have the same outer dimension, and none reaches from one index of it into the next.
bool repeat(const std::vector<Place>& places, std::span<const Pattern> patterns, uint32_t dim) {
  const Place& first = places[patterns.front().index];
  if (dim >= first.ndim) return false;
  uint64_t begin = ~uint64_t{0}, end = 0;
  for (const Pattern& pattern : patterns) {
    const Place& place = places[pattern.index];
    if (dim >= place.ndim || place.shape[dim] != first.shape[dim] ||
        place.stride_nbytes[dim] != first.stride_nbytes[dim]) {
      return false;
    }
    begin = std::min(begin, pattern.begin);
    end = std::max(end, pattern.end() - (place.shape[dim] - 1) * place.stride_nbytes[dim]);
  }
  return end - begin <= first.stride_nbytes[dim];
}

// Returns whether places lie apart that begin within each other, as far as their patterns tell: of parts of the same
// rows, one row stands for all.
bool apart_by_pattern(const std::vector<Place>& places, std::span<Pattern> patterns) {
  for (uint32_t dim = 0; repeat(places, patterns, dim); ++dim) {
    for (Pattern& pattern : patterns) {
      const Place& place = places[pattern.index];
      pattern.extent -= (place.shape[dim] - 1) * place.stride_nbytes[dim];
    }
    sort_by_begin(patterns);
    const auto meet = [](const Pattern& one, const Pattern& next) { return next.begin < one.end(); };
    if (std::ranges::adjacent_find(patterns, meet) == patterns.end()) return true;
  }
  return false;
}

[[noreturn]] void refuse_overlap(uint32_t one, uint32_t other, const std::string& file) {
  throw std::invalid_argument(named(std::max(one, other), file) + " overlaps place " +
                              std::to_string(std::min(one, other)));
}

// Goes through all runs in the order of the file.
void check_runs_apart(const std::vector<Place>& places, std::span<const Pattern> patterns, const std::string& file) {
  struct Next {
    RunCursor runs;
    uint32_t index;
  };
  std::vector<Next> heap;
  heap.reserve(patterns.size());
  for (const Pattern& pattern : patterns) {
    const Place& place = places[pattern.index];
    heap.push_back({RunCursor(places, place.packed_offset, place.nbytes), pattern.index});
  }
  const auto later = [](const Next& one, const Next& other) {
    return one.runs.run().file_offset > other.runs.run().file_offset;
  };
  std::make_heap(heap.begin(), heap.end(), later);
  uint64_t end = 0;
  uint32_t before = 0;
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), later);
    Next& next = heap.back();
    if (next.runs.run().file_offset < end) refuse_overlap(before, next.index, file);
    end = next.runs.run().end();
    before = next.index;
    next.runs.next();
    if (next.runs.done()) {
      heap.pop_back();
    } else {
      std::push_heap(heap.begin(), heap.end(), later);
    }
  }
}

void check_apart(const std::vector<Place>& places, const std::string& file) {
  std::vector<Pattern> all;
  all.reserve(places.size());
  for (uint32_t index = 0; index < places.size(); ++index) {
    if (places[index].nbytes != 0) all.push_back({index, places[index].file_offset, places[index].extent_nbytes()});
  }
  sort_by_begin(all);
  for (std::span<Pattern> left = all; !left.empty();) {
    uint64_t end = left.front().end();
    size_t count = 1;  // that may lie between each other
    for (; count < left.size() && left[count].begin < end; ++count) end = std::max(end, left[count].end());
    const std::span<Pattern> among = left.first(count);
    if (count > 1 && !apart_by_pattern(places, among)) check_runs_apart(places, among, file);
    left = left.subspan(count);
  }
}

}  // namespace

void check(const std::vector<Place>& places, uint64_t nbytes, uint64_t file_nbytes, const std::string& file) {
  uint64_t placed = 0;
  for (uint32_t index = 0; index < places.size(); ++index) {
    check_place(places[index], index, file_nbytes, file);
    if (overflows(1, placed, places[index].nbytes, placed)) placed = ~uint64_t{0};
  }
  if (placed != nbytes) {
    throw std::invalid_argument("the places of " + file + " have " + std::to_string(placed) +
                                " bytes, but its items have " + std::to_string(nbytes));
  }
  check_apart(places, file);
}

}  // namespace fastshard
