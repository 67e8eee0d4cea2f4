// SPDX-License-Identifier: Apache-2.0
#include "plan/layout.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cstring>
#include <limits>

namespace fastshard {
namespace {

constexpr uint64_t kMaxNbytes = std::numeric_limits<int64_t>::max();
// Parts of the header's JSON.
constexpr std::string_view kDtype = R"(":{"dtype":")", kShape = R"(","shape":[)", kOffsets = R"(],"data_offsets":[)",
                           kEnd = "]}";
constexpr size_t kMaxDigits = 20;  // of a number, in the header

uint64_t word_at(std::string_view text, size_t at) {
  uint64_t word;
  std::memcpy(&word, text.data() + at, sizeof word);
  return word;
}

// The bytes of a name from `depth` on, of which the first is the most significant one.
uint64_t key_at(std::string_view name, size_t depth) {
  uint64_t key = 0;
  if (name.size() > depth) std::memcpy(&key, name.data() + depth, std::min(sizeof key, name.size() - depth));
  return std::endian::native == std::endian::little ? __builtin_bswap64(key) : key;
}

// Returns how many of the bytes before `most` two names have in common, of which the first `depth` are known to be.
size_t common_prefix(std::string_view one, std::string_view other, size_t depth, size_t most) {
  const size_t end = std::min({one.size(), other.size(), most});
  while (depth + sizeof(uint64_t) <= end && word_at(one, depth) == word_at(other, depth)) depth += sizeof(uint64_t);
  while (depth < end && one[depth] == other[depth]) ++depth;
  return depth;
}

bool must_be_escaped(char byte) { return static_cast<unsigned char>(byte) < 0x20 || byte == '"' || byte == '\\'; }

// What may stand behind a backslash in place of a byte.
char short_escape(char byte) {
  constexpr std::string_view kKnown = "\"\\\b\f\n\r\t", kLetters = "\"\\bfnrt";
  const size_t at = kKnown.find(byte);
  return at == std::string_view::npos ? 0 : kLetters[at];
}

// Whether one of eight bytes must be escaped, or perhaps one: a byte that is not ASCII counts, too.
bool may_be_escaped(uint64_t word) {
  constexpr uint64_t kOnes = ~uint64_t{0} / 255, kHighest = kOnes * 0x80;
  const auto has = [&](char byte) {
    const uint64_t zero_there = word ^ (kOnes * static_cast<unsigned char>(byte));
    return (zero_there - kOnes) & ~zero_there;
  };
  return (((word - kOnes * 0x20) | has('"') | has('\\') | word) & kHighest) != 0;
}

// Bytes of a text when it is escaped.
size_t escaped_size(std::string_view text) {
  constexpr size_t kLonger = 5;  // \u0000
  size_t escapes = 0, at = 0;
  for (; at + sizeof(uint64_t) <= text.size(); at += sizeof(uint64_t)) {
    if (!may_be_escaped(word_at(text, at))) continue;
    escapes += static_cast<size_t>(std::ranges::count_if(text.substr(at, sizeof(uint64_t)), must_be_escaped));
  }
  escapes += static_cast<size_t>(std::ranges::count_if(text.substr(at), must_be_escaped));
  return text.size() + kLonger * escapes;
}

// Writes to memory that is large enough.
class Writer {
 public:
  explicit Writer(char* out) : at_(out) {}
  char* at() const { return at_; }
  void byte(char what) { *at_++ = what; }
  void text(std::string_view what) {
    std::memcpy(at_, what.data(), what.size());
    at_ += what.size();
  }
  void number(uint64_t what) { at_ = std::to_chars(at_, at_ + kMaxDigits, what).ptr; }
  // As serde_json and Python's json write a text, without the quotes: non-ASCII as it is.
  void escaped(std::string_view what) {
    if (escaped_size(what) == what.size()) return text(what);
    while (!what.empty()) {
      const auto plain = static_cast<size_t>(std::ranges::find_if(what, must_be_escaped) - what.begin());
      text(what.substr(0, plain));
      if (plain == what.size()) return;
      escape(what[plain]);
      what.remove_prefix(plain + 1);
    }
  }

 private:
  void escape(char what) {
    constexpr char kHex[] = "0123456789abcdef";
    byte('\\');
    if (const char letter = short_escape(what); letter != 0) return byte(letter);
    text("u00");
    byte(kHex[what >> 4]);
    byte(kHex[what & 15]);
  }

  char* at_;
};

}  // namespace

bool is_contiguous(std::span<const int64_t> shape, std::span<const int64_t> strides) {
  if (std::ranges::find(shape, 0) != shape.end()) return true;
  int64_t expected = 1;
  for (size_t dim = shape.size(); dim-- > 0;) {
    if (shape[dim] == 1) continue;
    if (strides[dim] != expected) return false;
    expected *= shape[dim];
  }
  return true;
}

void Layout::reserve(size_t count) {
  tensors_.reserve(count);
  keyed_.reserve(count);
  dims_.reserve(2 * count);
}

bool Layout::add(std::string_view name, const Kind& kind, const Source& source) {
  uint64_t elements = 1, nbytes = 0, source_nbytes = 0, total = 0;
  for (const int64_t size : source.shape) {
    if (size < 0 || __builtin_mul_overflow(elements, static_cast<uint64_t>(size), &elements)) return false;
  }
  if (__builtin_mul_overflow(elements, kind.file_itemsize, &nbytes) ||
      __builtin_mul_overflow(elements, kind.itemsize, &source_nbytes) ||
      __builtin_add_overflow(nbytes_, nbytes, &total) || total > kMaxNbytes) {
    return false;
  }
  constexpr size_t kMost = std::numeric_limits<uint32_t>::max();
  if (name.size() > kMost || dims_.size() > kMost || tensors_.size() > kMost) return false;
  if (source.shape.size() > std::numeric_limits<uint16_t>::max()) return false;
  if (source.data == nullptr && nbytes != 0) return false;
  const LaidTensor tensor{.name_data = name.data(),
                          .data = source.data,
                          .nbytes = nbytes,
                          .kind = &kind,
                          .name_size = static_cast<uint32_t>(name.size()),
                          .device = source.device,
                          .given = static_cast<uint32_t>(tensors_.size()),
                          .dims = static_cast<uint32_t>(dims_.size()),
                          .ndim = static_cast<uint16_t>(source.shape.size()),
                          .contiguous = is_contiguous(source.shape, source.strides)};
  dims_.insert(dims_.end(), source.shape.begin(), source.shape.end());
  uint64_t extent = source_nbytes;
  if (!tensor.contiguous) {
    dims_.insert(dims_.end(), source.strides.begin(), source.strides.end());
    uint64_t last = 0;  // element, counted from the first one
    for (size_t dim = 0; dim < source.shape.size(); ++dim) {
      last += static_cast<uint64_t>(source.shape[dim] - 1) * static_cast<uint64_t>(source.strides[dim]);
    }
    extent = (last + 1) * kind.itemsize;
  }
  const auto begin = reinterpret_cast<uintptr_t>(source.data);
  keyed_.push_back({begin, begin + extent});
  tensors_.push_back(tensor);
  nbytes_ = total;
  constexpr size_t kFixed = kDtype.size() + kShape.size() + kOffsets.size() + kEnd.size() + 3 + 2 * kMaxDigits;
  header_bound_ += kFixed + escaped_size(name) + kind.code.size() + source.shape.size() * (kMaxDigits + 1);
  return true;
}

bool Layout::finish() {
  if (overlapping()) return false;
  sort();
  return true;
}

bool Layout::overlapping() {
  const auto by_address = [](const Keyed& one, const Keyed& other) {
    return one.key != other.key ? one.key < other.key : one.of < other.of;
  };
  if (!std::ranges::is_sorted(keyed_, by_address)) std::ranges::sort(keyed_, by_address);
  const auto met = [](const Keyed& one, const Keyed& next) { return next.key < one.of; };
  return std::ranges::adjacent_find(keyed_, met) != keyed_.end();
}

void Layout::sort() {
  for (size_t index = 0; index < keyed_.size(); ++index) keyed_[index] = {tensors_[index].kind->rank, index};
  if (!std::ranges::is_sorted(keyed_, {}, &Keyed::key)) std::ranges::sort(keyed_, {}, &Keyed::key);
  for (size_t begin = 0, end; begin < keyed_.size(); begin = end) {
    for (end = begin + 1; end < keyed_.size() && keyed_[end].key == keyed_[begin].key;) ++end;
    constexpr int kLevels = 32;  // of recursion
    sort_by_name(std::span(keyed_).subspan(begin, end - begin), 0, kLevels);
  }
  // One cycle after the other of what changes places.
  for (size_t first = 0; first < keyed_.size(); ++first) {
    const LaidTensor moved = tensors_[first];
    size_t at = first;
    for (size_t from; (from = keyed_[at].of) != at; at = from) {
      tensors_[at] = from == first ? moved : tensors_[from];
      keyed_[at].of = at;
      if (from == first) break;
    }
  }
  keyed_ = {};
}

// Sorts names of which the first `depth` bytes are the same. Those of a model have long beginnings in common, which are
// compared once and not again in each step of a sort.
void Layout::sort_by_name(std::span<Keyed> part, size_t depth, int levels) {
  const auto name = [&](const Keyed& keyed) { return tensors_[keyed.of].name(); };
  if (part.size() < 2) return;
  size_t common = name(part[0]).size();
  for (const Keyed& keyed : part.subspan(1)) {
    if (common == depth) break;
    common = common_prefix(name(part[0]), name(keyed), depth, common);
  }
  for (Keyed& keyed : part) keyed.key = key_at(name(keyed), common);
  if (!std::ranges::is_sorted(part, {}, &Keyed::key)) std::ranges::sort(part, {}, &Keyed::key);
  const size_t reached = common + sizeof(uint64_t);
  for (size_t begin = 0, end; begin < part.size(); begin = end) {
    for (end = begin + 1; end < part.size() && part[end].key == part[begin].key;) ++end;
    const std::span<Keyed> same = part.subspan(begin, end - begin);
    if (same.size() < 2) continue;
    // A name that ends here has zeros for the bytes that it lacks, and another may have the zeros themselves.
    if (levels == 0 || std::ranges::any_of(same, [&](const Keyed& keyed) { return name(keyed).size() < reached; })) {
      std::ranges::sort(same, {}, name);
    } else {
      sort_by_name(same, reached, levels - 1);
    }
  }
}

std::span<const int64_t> Layout::shape(const LaidTensor& tensor) const {
  return std::span(dims_).subspan(tensor.dims, tensor.ndim);
}

std::span<const int64_t> Layout::strides(const LaidTensor& tensor) const {
  if (tensor.contiguous) return {};
  return std::span(dims_).subspan(size_t{tensor.dims} + tensor.ndim, tensor.ndim);
}

TensorView Layout::view(const LaidTensor& tensor) const {
  const Kind& kind = *tensor.kind;
  TensorView view;
  if (tensor.contiguous) {
    view.data = tensor.data;
    view.device = tensor.device;
    view.run_nbytes = tensor.nbytes / kind.file_itemsize * kind.itemsize;
  } else {
    const auto sizes = shape(tensor), steps = strides(tensor);
    view = make_view(tensor.data, tensor.device, kind.itemsize, {sizes.begin(), sizes.end()},
                     {steps.begin(), steps.end()});
  }
  view.from = kind.from;
  view.to = kind.to;
  return view;
}

size_t Layout::write_header(std::string_view metadata, char* out) const {
  Writer json(out + sizeof(uint64_t));
  json.byte('{');
  json.text(metadata);
  bool first = metadata.empty();
  uint64_t begin = 0;
  for (const LaidTensor& tensor : tensors_) {
    json.text(first ? "\"" : ",\"");
    first = false;
    json.escaped(tensor.name());
    json.text(kDtype);
    json.text(tensor.kind->code);
    json.text(kShape);
    const auto sizes = shape(tensor);
    for (size_t dim = 0; dim < sizes.size(); ++dim) {
      if (dim != 0) json.byte(',');
      json.number(static_cast<uint64_t>(sizes[dim]) * (dim + 1 == sizes.size() ? tensor.kind->packed : 1));
    }
    json.text(kOffsets);
    json.number(begin);
    json.byte(',');
    begin += tensor.nbytes;
    json.number(begin);
    json.text(kEnd);
  }
  json.byte('}');
  while ((json.at() - out) % 8 != 0) json.byte(' ');
  const auto nbytes = static_cast<size_t>(json.at() - out);
  const uint64_t length = nbytes - sizeof(uint64_t);
  for (size_t byte = 0; byte < sizeof length; ++byte) out[byte] = static_cast<char>(length >> (8 * byte));
  return nbytes;
}

}  // namespace fastshard
