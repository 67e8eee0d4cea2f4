// SPDX-License-Identifier: Apache-2.0
#include "plan/places.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <queue>
#include <span>
#include <stdexcept>
#include <utility>

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
      throw std::invalid_argument("the runs of " + named(index, file) + " overlap or are in another order than there");
    }
    if (overflows(place.shape[dim] - 1, place.stride_nbytes[dim], extent, extent)) extent = ~uint64_t{0};
  }
  if (nbytes != place.nbytes) {
    throw std::invalid_argument(named(index, file) + " is said to have " + std::to_string(place.nbytes) +
                                " bytes, and its runs have " + std::to_string(nbytes));
  }
  if (nbytes == 0) return;
  if (extent > file_nbytes || place.file_offset > file_nbytes - extent) {
    throw std::invalid_argument(named(index, file) + " lies beyond the file's " + std::to_string(file_nbytes) +
                                " bytes: " + std::to_string(extent) + " at " + std::to_string(place.file_offset));
  }
}

// A place of which only the inner dimensions are left: all of its outer ones repeat these.
struct Pattern {
  uint32_t index;  // of the place
  uint64_t begin;
  uint64_t extent;
};

// Places whose extents overlap, which may lie between each other.
class Cluster {
 public:
  Cluster(const std::vector<Place>& places, std::vector<Pattern> patterns)
      : places_(places), patterns_(std::move(patterns)) {}

  // The indices of two places that share a byte.
  std::optional<std::pair<uint32_t, uint32_t>> overlap() {
    // As parts of the same rows do, for which one row stands.
    for (uint32_t dim = 0; repeats(dim); ++dim) {
      for (Pattern& pattern : patterns_) {
        const Place& place = places_[pattern.index];
        pattern.extent -= (place.shape[dim] - 1) * place.stride_nbytes[dim];
      }
      if (apart()) return std::nullopt;
    }
    return merged();
  }

 private:
  // Whether all places have the same outer dimension, and what lies in it is not longer than its stride.
  bool repeats(uint32_t dim) const {
    const Place& first = places_[patterns_.front().index];
    if (dim >= first.ndim) return false;
    uint64_t begin = ~uint64_t{0}, end = 0;
    for (const Pattern& pattern : patterns_) {
      const Place& place = places_[pattern.index];
      if (dim >= place.ndim || place.shape[dim] != first.shape[dim] ||
          place.stride_nbytes[dim] != first.stride_nbytes[dim]) {
        return false;
      }
      begin = std::min(begin, pattern.begin);
      end = std::max(end, pattern.begin + pattern.extent - (place.shape[dim] - 1) * place.stride_nbytes[dim]);
    }
    return end - begin <= first.stride_nbytes[dim];
  }

  // Whether no pattern begins within another.
  bool apart() {
    std::ranges::sort(patterns_, {}, &Pattern::begin);
    const auto within = [](const Pattern& one, const Pattern& next) { return next.begin < one.begin + one.extent; };
    return std::ranges::adjacent_find(patterns_, within) == patterns_.end();
  }

  // Goes through all runs, in the order of the file.
  std::optional<std::pair<uint32_t, uint32_t>> merged() const {
    using Next = std::pair<RunCursor, uint32_t>;
    const auto later = [](const Next& one, const Next& other) {
      return one.first.run().file_offset > other.first.run().file_offset;
    };
    std::priority_queue<Next, std::vector<Next>, decltype(later)> runs(later);
    for (const Pattern& pattern : patterns_) {
      const Place& place = places_[pattern.index];
      runs.emplace(RunCursor(places_, place.packed_offset, place.nbytes), pattern.index);
    }
    uint64_t end = 0;
    uint32_t before = 0;
    while (!runs.empty()) {
      auto [cursor, index] = runs.top();
      runs.pop();
      if (cursor.run().file_offset < end) return std::pair(before, index);
      end = cursor.run().end();
      before = index;
      cursor.next();
      if (!cursor.done()) runs.emplace(cursor, index);
    }
    return std::nullopt;
  }

  const std::vector<Place>& places_;
  std::vector<Pattern> patterns_;
};

void check_apart(const std::vector<Place>& places, const std::string& file) {
  std::vector<uint32_t> order(places.size());
  std::iota(order.begin(), order.end(), uint32_t{0});
  std::erase_if(order, [&](uint32_t index) { return places[index].nbytes == 0; });
  const auto begin_of = [&](uint32_t index) { return places[index].file_offset; };
  if (!std::ranges::is_sorted(order, {}, begin_of)) std::ranges::stable_sort(order, {}, begin_of);
  for (size_t first = 0; first < order.size();) {
    std::vector<Pattern> patterns;
    uint64_t end = 0;
    for (; first < order.size() && (patterns.empty() || begin_of(order[first]) < end); ++first) {
      const Place& place = places[order[first]];
      patterns.push_back({order[first], place.file_offset, place.extent_nbytes()});
      end = std::max(end, place.file_offset + patterns.back().extent);
    }
    if (patterns.size() == 1) continue;
    if (const auto found = Cluster(places, std::move(patterns)).overlap()) {
      throw std::invalid_argument(named(std::max(found->first, found->second), file) + " has bytes of place " +
                                  std::to_string(std::min(found->first, found->second)));
    }
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
    throw std::invalid_argument("the places of " + file + " have " + std::to_string(placed) + " bytes, and its items " +
                                std::to_string(nbytes));
  }
  check_apart(places, file);
}

}  // namespace fastshard
