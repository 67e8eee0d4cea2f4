// SPDX-License-Identifier: Apache-2.0
#include "bindings/layouts.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "bindings/exchange.h"

namespace fastshard {

const Kind* Kinds::find(uint32_t dtype) const {
  const auto found = std::ranges::find(dtypes, dtype);
  return found == dtypes.end() ? nullptr : &kinds[static_cast<size_t>(found - dtypes.begin())];
}

namespace {

// Names and tensors of a dict, held, as it may be changed while torch is asked.
struct Given {
  explicit Given(size_t size) : names(size), tensors(size) {}

  size_t size() const { return count; }
  PyObject* name(size_t index) const { return PyList_GET_ITEM(names.ptr(), static_cast<Py_ssize_t>(index)); }
  PyObject* tensor(size_t index) const { return PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(index)); }

  py::list names, tensors;
  size_t count = 0;
};

bool readable(py::handle dict) { return PyDict_CheckExact(dict.ptr()) || PyODict_CheckExact(dict.ptr()); }

// Returns why Python has to look at the dict, or null.
const char* read(const Exchange& exchange, py::handle dict, Given& given) {
  Py_ssize_t at = 0;
  for (PyObject *name, *tensor; PyDict_Next(dict.ptr(), &at, &name, &tensor) != 0; ++given.count) {
    if (!PyUnicode_CheckExact(name)) return "a name that is not a plain str";
    if (!exchange.plain(tensor)) return "an object that is not a plain tensor";
    if (given.count == given.names.size()) return "a dict that changes while it is read";
    const auto place = static_cast<Py_ssize_t>(given.count);
    PyList_SET_ITEM(given.names.ptr(), place, Py_NewRef(name));
    PyList_SET_ITEM(given.tensors.ptr(), place, Py_NewRef(tensor));
  }
  return given.count == given.names.size() ? nullptr : "a dict that changes while it is read";
}

// Asks the CPU for memory that will be read soon: a tensor's, its implementation's (the object holds its address in one
// of its first words) and a name's. Without that, most of the time is spent waiting for one after the other. It is a
// hint, so nothing goes wrong where the words mean something else.
void ask_for(const Given& given, size_t index) {
  constexpr size_t kAhead = 6, kLine = 64, kLines = 4;
  if (index + 2 * kAhead < given.size()) {
    const auto* const name = reinterpret_cast<const char*>(given.name(index + 2 * kAhead));
    __builtin_prefetch(name);
    __builtin_prefetch(name + kLine);
    __builtin_prefetch(given.tensor(index + 2 * kAhead));
  }
  if (index + kAhead >= given.size()) return;
  const PyObject* const tensor = given.tensor(index + kAhead);
  const char* words[2];
  if (static_cast<size_t>(Py_TYPE(tensor)->tp_basicsize) < sizeof *tensor + sizeof words) return;
  std::memcpy(static_cast<void*>(words), tensor + 1, sizeof words);
  for (const char* word : words) {
    constexpr uintptr_t kLeastAddress = 4096;  // what is none is looked up in vain, which takes long
    if (reinterpret_cast<uintptr_t>(word) < kLeastAddress) continue;
    for (size_t line = 0; line < kLines; ++line) __builtin_prefetch(word + line * kLine);
  }
}

// The number of a device in a plan, or kFetched.
int32_t device_of(const Described& described) {
  switch (static_cast<dlpack::DeviceType>(described.tensor.device.type)) {
    case dlpack::DeviceType::cpu:
      return kHost;
    case dlpack::DeviceType::cuda:
      return described.tensor.device.id;
    default:
      return kFetched;
  }
}

// Lays out tensors that are to be saved as they are, or cast to one dtype.
class Planner {
 public:
  // Each of `kinds` is (dtype, itemsize, itemsize in the file, rank, code, packed, from, to).
  Planner(std::shared_ptr<const Exchange> exchange, const py::list& kinds, std::string reserved)
      : exchange_(std::move(exchange)), reserved_(std::move(reserved)) {
    auto known = std::make_shared<Kinds>();
    for (const py::handle row : kinds) {
      const auto [dtype, itemsize, file_itemsize, rank, code, packed, from, to] =
          row.cast<std::tuple<uint32_t, uint64_t, uint64_t, uint32_t, std::string, uint64_t, uint8_t, uint8_t>>();
      known->dtypes.push_back(dtype);
      known->kinds.push_back({.itemsize = itemsize,
                              .file_itemsize = file_itemsize,
                              .rank = rank,
                              .code = code,
                              .packed = packed,
                              .from = static_cast<DType>(from),
                              .to = static_cast<DType>(to)});
    }
    kinds_ = std::move(known);
  }

  // Returns the layout and the tensors as they were given, or a text: why Python has to look at them.
  py::object lay_out(const py::object& dict, bool strided) const {
    if (!readable(dict)) return py::str("a mapping that is not a plain dict");
    Given given(static_cast<size_t>(PyDict_GET_SIZE(dict.ptr())));
    if (const char* why = read(*exchange_, dict, given); why != nullptr) return py::str(why);
    auto handle = std::make_unique<LayoutHandle>(LayoutHandle{kinds_, given.names, {}});
    if (const char* why = fill(handle->layout, given, strided); why != nullptr) return py::str(why);
    if (!handle->layout.finish()) return py::str("tensors that may share memory");
    return py::make_tuple(py::cast(std::move(handle)), given.tensors);
  }

  // Returns where the tensors lie and how, in their order, as bytes to be compared; None if Python has to look.
  py::object places(const py::object& dict) const {
    if (!readable(dict)) return py::none();
    Given given(static_cast<size_t>(PyDict_GET_SIZE(dict.ptr())));
    if (read(*exchange_, dict, given) != nullptr) return py::none();
    std::string rows;
    for (size_t index = 0; index < given.size(); ++index) {
      ask_for(given, index);
      Described described;
      if (exchange_->describe(given.tensor(index), described) != nullptr) return py::none();
      const auto add = [&](const auto* what, size_t count) {
        rows.append(reinterpret_cast<const char*>(what), count * sizeof *what);
      };
      const uint64_t fixed[] = {reinterpret_cast<uintptr_t>(described.data()), described.dtype(),
                                static_cast<uint32_t>(described.tensor.device.type),
                                static_cast<uint32_t>(described.tensor.device.id), described.shape().size()};
      add(fixed, std::size(fixed));
      add(described.shape().data(), described.shape().size());
      add(described.strides().data(), described.strides().size());
    }
    return py::bytes(rows);
  }

 private:
  const char* fill(Layout& layout, const Given& given, bool strided) const {
    layout.reserve(given.size());
    for (size_t index = 0; index < given.size(); ++index) {
      ask_for(given, index);
      Described described;
      if (const char* why = exchange_->describe(given.tensor(index), described); why != nullptr) return why;
      const Kind* const kind = kinds_->find(described.dtype());
      if (kind == nullptr) return "a dtype that is left to Python";
      const int32_t device = device_of(described);
      if (device == kFetched) return "a device that only torch reads";
      if (kind->packed > 1 && described.tensor.ndim == 0) return "a dtype that is left to Python";
      if (!is_contiguous(described.shape(), described.strides()) && (!strided || described.tensor.ndim > kMaxDims)) {
        return "a tensor that is not contiguous";
      }
      Py_ssize_t length = 0;
      const char* const name = PyUnicode_AsUTF8AndSize(given.name(index), &length);
      if (name == nullptr) {
        PyErr_Clear();
        return "a name that is not valid Unicode";
      }
      const std::string_view text(name, static_cast<size_t>(length));
      if (text == reserved_) return "a name that is reserved";
      if (!layout.add(text, *kind, {described.data(), device, described.shape(), described.strides()})) {
        return "a tensor without memory";
      }
    }
    return nullptr;
  }

  const std::shared_ptr<const Exchange> exchange_;
  const std::string reserved_;
  std::shared_ptr<const Kinds> kinds_;
};

py::tuple tuple_of(std::span<const int64_t> numbers, uint64_t last_times = 1) {
  py::tuple made(numbers.size());
  for (size_t index = 0; index < numbers.size(); ++index) {
    const uint64_t times = index + 1 == numbers.size() ? last_times : 1;
    made[index] = static_cast<uint64_t>(numbers[index]) * times;
  }
  return made;
}

// The fields of a TensorView of fastshard/engine/plan.py.
py::tuple view_of(const Layout& layout, const LaidTensor& tensor) {
  const Kind& kind = *tensor.kind;
  py::object shape = py::none(), strides = py::none(), cast = py::none();
  if (!tensor.contiguous) {
    shape = tuple_of(layout.shape(tensor));
    strides = tuple_of(layout.strides(tensor));
  }
  if (kind.to != DType::raw) cast = py::make_tuple(static_cast<int>(kind.from), static_cast<int>(kind.to));
  const uint64_t itemsize = tensor.contiguous ? 1 : kind.itemsize;
  return py::make_tuple(reinterpret_cast<uintptr_t>(tensor.data), tensor.nbytes, tensor.device, itemsize, shape,
                        strides, cast);
}

// The place of a tensor among those that were given, and the fields of its Entry and TensorView
// (fastshard/engine/tensors.py), but for the tensor itself.
py::tuple entry(const LayoutHandle& handle, size_t index) {
  const Layout& layout = handle.layout;
  if (index >= layout.tensors().size()) throw py::index_error();
  const LaidTensor& tensor = layout.tensors()[index];
  const Kind& kind = *tensor.kind;
  return py::make_tuple(tensor.given, kind.rank, handle.names[tensor.given], kind.code,
                        tuple_of(layout.shape(tensor), kind.packed), view_of(layout, tensor));
}

// In the order of the file.
py::list views_of(const LayoutHandle& handle) {
  const auto tensors = handle.layout.tensors();
  py::list views(tensors.size());
  for (size_t index = 0; index < tensors.size(); ++index) views[index] = view_of(handle.layout, tensors[index]);
  return views;
}

py::list names_of(const LayoutHandle& handle) {
  const auto tensors = handle.layout.tensors();
  py::list names(tensors.size());
  for (size_t index = 0; index < tensors.size(); ++index) names[index] = handle.names[tensors[index].given];
  return names;
}

// None if it would be longer than `most` and the length before it.
py::object header_of(const LayoutHandle& handle, std::string_view metadata, uint64_t most) {
  const auto bound = static_cast<Py_ssize_t>(handle.layout.header_bound(metadata));
  PyObject* bytes = PyBytes_FromStringAndSize(nullptr, bound);
  if (bytes == nullptr) throw py::error_already_set();
  const size_t nbytes = handle.layout.write_header(metadata, PyBytes_AS_STRING(bytes));
  if (_PyBytes_Resize(&bytes, static_cast<Py_ssize_t>(nbytes)) != 0) throw py::error_already_set();
  auto header = py::reinterpret_steal<py::object>(bytes);
  return nbytes - sizeof(uint64_t) > most ? py::none() : std::move(header);
}

std::set<int> devices_of(const LayoutHandle& handle) {
  std::set<int> devices;
  for (const LaidTensor& tensor : handle.layout.tensors()) {
    if (devices.empty() || tensor.device != *devices.begin()) devices.insert(tensor.device);
  }
  return devices;
}

}  // namespace

void bind_layouts(py::module_& module) {
  py::class_<Exchange, std::shared_ptr<Exchange>>(module, "Exchange")
      .def(py::init<const py::object&, const py::tuple&, py::object, py::object>(), "capsule"_a, "classes"_a,
           "is_neg"_a, "is_conj"_a)
      .def("ask_for_dtype", &Exchange::ask_for_dtype, "number"_a, "dtype"_a)
      // What it says of one tensor, for the probe: (dtype, address, device type, device, shape, strides).
      .def(
          "describe",
          [](const Exchange& exchange, const py::object& tensor) -> py::object {
            if (!exchange.plain(tensor)) throw py::type_error("not a plain tensor");
            Described found;
            if (const char* why = exchange.describe(tensor, found); why != nullptr) return py::str(why);
            return py::make_tuple(found.dtype(), reinterpret_cast<uintptr_t>(found.data()), device_of(found),
                                  tuple_of(found.shape()), tuple_of(found.strides()));
          },
          "tensor"_a);
  py::class_<Planner>(module, "Planner")
      .def(py::init<std::shared_ptr<Exchange>, const py::list&, std::string>(), "exchange"_a, "kinds"_a, "reserved"_a)
      .def("lay_out", &Planner::lay_out, "tensors"_a, "strided"_a)
      .def("places", &Planner::places, "tensors"_a);
  py::class_<LayoutHandle>(module, "Layout")
      .def("__len__", [](const LayoutHandle& handle) { return handle.layout.tensors().size(); })
      .def("entry", &entry, "index"_a)
      .def("views", &views_of)
      .def("devices", &devices_of)
      .def("names", &names_of)
      .def_property_readonly("nbytes", [](const LayoutHandle& handle) { return handle.layout.nbytes(); })
      .def("header", &header_of, "metadata"_a, "most"_a);
}

}  // namespace fastshard
