// SPDX-License-Identifier: Apache-2.0
#include "bindings/plans.h"

#include <algorithm>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings/layouts.h"
#include "bindings/page_lock.h"
#include "bindings/record.h"
#include "file/source_file.h"
#include "plan/schedule.h"

namespace fastshard {
namespace {

struct TensorViewType : RecordType {
  TensorViewType() : RecordType("TensorView") { require_all_known(); }
  const Field data = field("data"), nbytes = field("nbytes"), device = field("device"), itemsize = field("itemsize"),
              shape = field("shape"), strides = field("strides"), cast = field("cast");
};

struct WriteItemType : RecordType {
  WriteItemType() : RecordType("WriteItem") { require_all_known(); }
  const Field source = field("source"), file_offset = field("file_offset");
};

struct MemoryType : RecordType {
  MemoryType() : RecordType("Memory") { require_all_known(); }
  const Field address = field("address"), nbytes = field("nbytes"), streaming = field("streaming"),
              locked = field("locked");
};

struct ForeignFileType : RecordType {
  ForeignFileType() : RecordType("ForeignFile") { require_all_known(); }
  const Field path = field("path"), descriptor = field("descriptor");
};

struct LinkType : RecordType {
  LinkType() : RecordType("Link") { require_all_known(); }
  const Field path = field("path"), existing = field("existing");
};

struct PlaceType : RecordType {
  PlaceType() : RecordType("Place") { require_all_known(); }
  const Field nbytes = field("nbytes"), file_offset = field("file_offset"), run_nbytes = field("run_nbytes"),
              shape = field("shape"), strides = field("strides");
};

struct FilePlanType : RecordType {
  FilePlanType() : RecordType("FilePlan") { require_all_known(); }
  const Field target = field("target"), header = field("header"), items = field("items"), size = field("size"),
              places = field("places");
};

struct SaveOptionsType : RecordType {
  SaveOptionsType() : RecordType("SaveOptions") { require_all_known(); }
  const Field streams = field("streams"), durable = field("durable"), keep_cached = field("keep_cached"),
              checksums = field("checksums"), amended = field("amended"), held = field("held"),
              tells_read = field("tells_read"), forked = field("forked"), gives_way = field("gives_way"),
              past_cache = field("past_cache"), follow_links = field("follow_links");
};

struct Types {
  const TensorViewType tensor_view;
  const WriteItemType write_item;
  const MemoryType memory;
  const ForeignFileType foreign_file;
  const LinkType link;
  const PlaceType place;
  const FilePlanType file_plan;
  const SaveOptionsType save_options;
};

// Made when the module is imported, never destroyed: saves may be submitted while the interpreter ends.
const Types* types = nullptr;

// A pair of the numbers of CASTS.
std::pair<DType, DType> cast_from(py::handle object) {
  if (object.is_none()) return {DType::raw, DType::raw};
  const auto [from, to] = object.cast<std::pair<uint8_t, uint8_t>>();
  if (std::max(from, to) > static_cast<uint8_t>(DType::f8_e4m3_sat) || to == static_cast<uint8_t>(DType::raw)) {
    throw std::invalid_argument("unsupported cast");
  }
  return {static_cast<DType>(from), static_cast<DType>(to)};
}

TensorView view_from(py::handle object) {
  const TensorViewType& type = types->tensor_view;
  const Record record(type, object);
  const auto [from, to] = cast_from(record[type.cast]);
  const auto* data = reinterpret_cast<const std::byte*>(record[type.data].cast<uintptr_t>());
  const auto nbytes = record[type.nbytes].cast<uint64_t>();
  const int device = record[type.device].cast<int>();
  if (record[type.shape].is_none()) {
    TensorView view{.data = data, .device = device, .run_nbytes = nbytes, .from = from, .to = to};
    if (view.cast()) view.run_nbytes = nbytes / itemsize(to) * itemsize(from);
    return view;
  }
  TensorView view =
      make_view(data, device, record[type.itemsize].cast<uint64_t>(), record[type.shape].cast<std::vector<int64_t>>(),
                record[type.strides].cast<std::vector<int64_t>>());
  view.from = from;
  view.to = to;
  if (view.packed_nbytes() != nbytes) throw std::invalid_argument("nbytes does not match the shape");
  return view;
}

// The mapped file that host memory lies in, or null.
const SourceFile* mapped_at(int device, const std::byte* data) {
  return device == kHost ? SourceFile::at(data) : nullptr;
}

// A WriteItem, or a TensorView that lies behind the item before it, which ends at `end`.
WriteItem item_from(py::handle object, uint64_t end) {
  WriteItem item{.source = {}, .file_offset = end};
  if (types->write_item.holds(object)) {
    const Record record(types->write_item, object);
    item.source = view_from(record[types->write_item.source]);
    item.file_offset = record[types->write_item.file_offset].cast<uint64_t>();
  } else {
    item.source = view_from(object);
  }
  item.mapped = mapped_at(item.source.device, item.source.data);
  return item;
}

// A path, of a field that must not be text.
std::string path_from(py::handle object) { return object.cast<py::bytes>(); }

Memory memory_from(py::handle object, uint64_t nbytes) {
  const MemoryType& type = types->memory;
  const Record record(type, object);
  if (record[type.nbytes].cast<uint64_t>() != nbytes) {
    throw std::invalid_argument("the memory target does not have the plan's size");
  }
  Memory memory{.bytes = reinterpret_cast<std::byte*>(record[type.address].cast<uintptr_t>()),
                .streaming = record[type.streaming].cast<bool>()};
  if (const py::handle locked = record[type.locked]; !locked.is_none()) {
    const auto& lock = locked.cast<const PageLockHandle&>().lock;
    if (lock == nullptr) throw std::invalid_argument("the page lock of the memory target has been released");
    const std::span<std::byte> pages = lock->pages();
    const auto begin = static_cast<uint64_t>(memory.bytes - pages.data());
    if (memory.bytes < pages.data() || begin > pages.size() || nbytes > pages.size() - begin) {
      throw std::invalid_argument("the memory target lies outside of what is page-locked");
    }
    memory.locked_begin = pages.data();
    memory.locked_part_nbytes = lock->part_nbytes();
  }
  return memory;
}

ForeignFile foreign_file_from(py::handle object) {
  const ForeignFileType& type = types->foreign_file;
  const Record record(type, object);
  const py::handle descriptor = record[type.descriptor];
  if (descriptor.is_none()) return {.path = path_from(record[type.path])};
  const int number = descriptor.cast<int>();
  if (number < 0) throw std::invalid_argument("a file descriptor cannot be negative");
  return {.path = path_from(record[type.path]), .descriptor = number};
}

Link link_from(py::handle object) {
  const LinkType& type = types->link;
  const Record record(type, object);
  return {.path = path_from(record[type.path]), .existing = path_from(record[type.existing])};
}

FileTarget target_from(py::handle object, uint64_t nbytes) {
  if (py::isinstance<py::bytes>(object)) return NewFile{path_from(object)};
  if (types->memory.holds(object)) return memory_from(object, nbytes);
  if (types->foreign_file.holds(object)) return foreign_file_from(object);
  if (types->link.holds(object)) return link_from(object);
  throw py::type_error(std::string("a file's target is a path (bytes), ForeignFile, Memory or Link, not a ") +
                       Py_TYPE(object.ptr())->tp_name);
}

void add_items(FilePlan& file, const TensorView& header, const py::list& items) {
  file.items.reserve(items.size() + 1);
  file.items.push_back({header, 0});
  uint64_t end = file.nbytes;  // of the last item
  for (const py::handle item : items) {
    file.items.push_back(item_from(item, end));
    end = file.items.back().file_offset + file.items.back().source.packed_nbytes();
    file.nbytes = std::max(file.nbytes, end);
  }
}

void add_items(FilePlan& file, const TensorView& header, const Layout& layout) {
  file.items.reserve(layout.tensors().size() + 1);
  file.items.push_back({header, 0});
  for (const LaidTensor& tensor : layout.tensors()) {
    file.items.push_back({layout.view(tensor), file.nbytes, mapped_at(tensor.device, tensor.data)});
    file.nbytes += tensor.nbytes;
  }
}

// A number of bytes or of runs.
uint64_t count_from(py::handle object) {
  const auto number = object.cast<int64_t>();
  if (number < 0) throw std::invalid_argument("the numbers of a place cannot be negative");
  return static_cast<uint64_t>(number);
}

Place place_from(py::handle object) {
  const PlaceType& type = types->place;
  const Record record(type, object);
  Place place{.nbytes = count_from(record[type.nbytes]),
              .file_offset = count_from(record[type.file_offset]),
              .run_nbytes = count_from(record[type.run_nbytes])};
  const auto shape = record[type.shape].cast<py::tuple>(), strides = record[type.strides].cast<py::tuple>();
  if (shape.size() != strides.size())
    throw std::invalid_argument("shape and strides of a place must have the same length");
  if (shape.size() > kMaxPlaceDims) throw std::invalid_argument("a place has too many strided dimensions");
  place.ndim = static_cast<uint32_t>(shape.size());
  for (uint32_t dim = 0; dim < place.ndim; ++dim) {
    place.shape[dim] = count_from(shape[dim]);
    place.stride_nbytes[dim] = count_from(strides[dim]);
  }
  return place;
}

// The items, which were given without gaps, fill the places.
void place(FilePlan& file, py::handle places) {
  if (!std::holds_alternative<ForeignFile>(file.target)) {
    throw std::invalid_argument("only a file that somebody else publishes can have places: " + file.path());
  }
  if (!file.gaps) throw std::invalid_argument("a plan with places must give the size of the file: " + file.path());
  file.placed = true;
  file.placed_in_nbytes = std::exchange(file.nbytes, 0);
  file.gaps = false;
  for (const WriteItem& item : file.items) {
    file.nbytes = std::max(file.nbytes, item.file_offset + item.source.packed_nbytes());
  }
  const auto given = places.cast<py::sequence>();
  file.places.reserve(given.size());
  uint64_t end = 0;
  for (const py::handle one : given) {
    file.places.push_back(place_from(one));
    file.places.back().packed_offset = std::exchange(end, end + file.places.back().nbytes);
  }
}

FilePlan file_from(py::handle object) {
  const FilePlanType& type = types->file_plan;
  const Record record(type, object);
  FilePlan file;
  const auto header = record[type.header].cast<std::string_view>();
  const TensorView head{.data = reinterpret_cast<const std::byte*>(header.data()), .run_nbytes = header.size()};
  file.nbytes = header.size();
  if (py::isinstance<LayoutHandle>(record[type.items])) {
    add_items(file, head, record[type.items].cast<const LayoutHandle&>().layout);
  } else {
    add_items(file, head, record[type.items].cast<py::list>());
  }
  if (const py::handle size = record[type.size]; !size.is_none()) {
    file.gaps = true;
    file.nbytes = size.cast<uint64_t>();
  }
  file.target = target_from(record[type.target], file.nbytes);
  if (const py::handle places = record[type.places]; !places.is_none()) place(file, places);
  return file;
}

// (chunks, ops) of each file, for the tests of the schedule.
py::list schedule_of(const py::list& files, uint64_t slot_nbytes, uint64_t packed_nbytes, uint64_t in_place_nbytes,
                     uint32_t max_ops, bool in_place, uint64_t block_nbytes, uint64_t boundary_nbytes,
                     uint64_t begin_nbytes) {
  const std::shared_ptr<const SavePlan> plan = plan_from(files);
  check(*plan);
  const ScheduleLimits limits{slot_nbytes, packed_nbytes, in_place_nbytes, max_ops,
                              in_place,    block_nbytes,  boundary_nbytes, begin_nbytes};
  py::list result;
  for (const FilePlan& file : plan->files) {
    const FileSchedule schedule = make_schedule(file, limits);
    py::list chunks;
    for (const Chunk& chunk : schedule.chunks) {
      constexpr const char* kRoutes[] = {"in_place", "packed", "device"};
      py::list ops;
      for (const CopyOp& op : schedule.ops_of(chunk)) {
        ops.append(py::make_tuple(op.item, op.chunk_offset, op.first_byte, op.nbytes));
      }
      chunks.append(py::make_tuple(chunk.file_offset, chunk.nbytes, kRoutes[static_cast<int>(chunk.route)], ops));
    }
    result.append(chunks);
  }
  return result;
}

}  // namespace

std::shared_ptr<SavePlan> plan_from(const py::list& files) {
  auto plan = std::make_shared<SavePlan>();
  plan->files.reserve(files.size());
  for (const py::handle file : files) plan->files.push_back(file_from(file));
  return plan;
}

SaveOptions options_from(py::handle object) {
  const SaveOptionsType& type = types->save_options;
  const Record record(type, object);
  return {.streams = record[type.streams].cast<std::map<int, uintptr_t>>(),
          .intent = {.durable = record[type.durable].cast<bool>(),
                     .keep_cached = record[type.keep_cached].cast<bool>(),
                     .checksums = record[type.checksums].cast<bool>(),
                     .amended = record[type.amended].cast<bool>(),
                     .held = record[type.held].cast<bool>(),
                     .tells_read = record[type.tells_read].cast<bool>(),
                     .forked = record[type.forked].cast<bool>(),
                     .gives_way = record[type.gives_way].cast<bool>(),
                     .past_cache = record[type.past_cache].cast<bool>(),
                     .follow_links = record[type.follow_links].cast<bool>()}};
}

WritePath write_path_from(const std::string& name) {
  for (const WritePath path :
       {WritePath::automatic, WritePath::buffered, WritePath::direct, WritePath::mapped, WritePath::registered}) {
    if (name == name_of(path)) return path;
  }
  throw std::invalid_argument("write_path must be 'auto', 'buffered', 'direct', 'mapped' or 'registered', not '" +
                              name + "'");
}

void bind_plans(py::module_& module) {
  if (types == nullptr) types = new Types;
  module.def("schedule", &schedule_of, "files"_a, "slot_nbytes"_a, "packed_nbytes"_a, "in_place_nbytes"_a, "max_ops"_a,
             "in_place"_a, "block_nbytes"_a = 1, "boundary_nbytes"_a = 0, "begin_nbytes"_a = 0);
}

}  // namespace fastshard
