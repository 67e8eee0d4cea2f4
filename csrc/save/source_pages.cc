// SPDX-License-Identifier: Apache-2.0
#include "save/source_pages.h"

#include <algorithm>

#include "device/pack.h"

namespace fastshard {
namespace {

// A range is read whole when it is at most so many times what is wanted of it, and so much.
constexpr uint64_t kSparse = 4;
constexpr uint64_t kGapNbytes = 64 << 10;

}  // namespace

bool reads_files(const FilePlan& plan) {
  return std::ranges::any_of(plan.items, [](const WriteItem& item) { return item.mapped != nullptr; });
}

SourcePages::SourcePages(const FilePlan& plan, const FileSchedule& schedule)
    : plan_(plan), schedule_(schedule), any_(reads_files(plan)) {}

void SourcePages::ask_for(const Chunk& chunk) const {
  for (const Range& range : ranges_of(chunk)) {
    if (range.dense) range.file->ask_for(range.bytes);
  }
}

SourcePages::Held::Held(const SourcePages& pages, const Chunk& chunk) : ranges_(pages.ranges_of(chunk)) {
  for (const Range& range : ranges_) {
    // Of what is not read whole the end tells at least whether the file has been cut.
    range.file->bring_in(range.dense ? range.bytes : range.bytes.last(1));
  }
}

SourcePages::Held::~Held() {
  for (const Range& range : ranges_) {
    if (range.last_use) range.file->drop(range.bytes);
  }
}

// What the chunk's ops read of files; neighbours count as one.
std::vector<SourcePages::Range> SourcePages::ranges_of(const Chunk& chunk) const {
  std::vector<Range> ranges;
  if (!any_) return ranges;
  for (const CopyOp& op : schedule_.ops_of(chunk)) {
    const SourceFile* const file = plan_.items[op.item].mapped;
    if (file == nullptr || !file->is_engine_address(op.source->data)) continue;
    if (!in_memory_order(*op.source)) {  // every chunk of it reads all over the tensor
      const bool last = op.first_byte + op.nbytes == op.source->packed_nbytes();
      ranges.push_back({file, source_extent(*op.source), false, last});
      continue;
    }
    const std::span<const std::byte> bytes = source_extent(*op.source, op.first_byte, op.nbytes);
    const bool dense = bytes.size() <= kSparse * op.nbytes + kGapNbytes;
    if (dense && !ranges.empty()) {
      Range& before = ranges.back();
      const std::byte* const begin = before.bytes.data();
      if (before.file == file && before.dense && bytes.data() >= begin &&
          bytes.data() <= begin + before.bytes.size() + kGapNbytes) {
        const auto nbytes = static_cast<size_t>(bytes.data() - begin) + bytes.size();
        before.bytes = {begin, std::max(before.bytes.size(), nbytes)};
        continue;
      }
    }
    ranges.push_back({file, bytes, dense, true});
  }
  return ranges;
}

}  // namespace fastshard
