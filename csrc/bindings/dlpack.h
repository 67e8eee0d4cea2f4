// SPDX-License-Identifier: Apache-2.0
// What is used of DLPack 1.x (https://dmlc.github.io/dlpack/latest/c_api.html) to read tensors of other libraries: the
// structs whose layout one major version keeps, and the table of functions that a class of tensors offers.
#pragma once

#include <cstdint>

namespace fastshard::dlpack {

inline constexpr uint32_t kMajorVersion = 1;
// Name of the capsule that has the table.
inline constexpr char kExchangeApi[] = "dlpack_exchange_api";

enum class DeviceType : int32_t { cpu = 1, cuda = 2 };
// A type code of elements.
inline constexpr uint8_t kComplex = 5;

struct Version {
  uint32_t major, minor;
};

struct Device {
  int32_t type;  // a DeviceType, or one that is none of ours
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  Version version;
  const ExchangeApi* previous;  // of a lower major version, or null
  void (*managed_tensor_allocator)();
  void (*managed_tensor_from_py_object_no_sync)();
  void (*managed_tensor_to_py_object_no_sync)();
  // Fills in what the object, which keeps the memory, says at that moment. Returns 0, or -1 with a Python exception.
  // May be null.
  int (*dltensor_from_py_object_no_sync)(void* object, Tensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** stream);
};

}  // namespace fastshard::dlpack
