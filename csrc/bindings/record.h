// SPDX-License-Identifier: Apache-2.0
// NamedTuples of fastshard/engine/plan.py, whose fields are read by name. The position of a name in the tuple is looked
// up once, so reading a field costs as much as reading a position.
#pragma once

#include "bindings/python.h"

namespace fastshard {

// The position of a field in the tuples of its class.
enum class Field : Py_ssize_t {};

// A class of NamedTuples. For each one a class derives from this, with a Field for each name.
class RecordType {
 public:
  explicit RecordType(const char* name);
  RecordType(const RecordType&) = delete;
  RecordType& operator=(const RecordType&) = delete;

  const char* name() const { return name_; }
  bool holds(py::handle object) const {
    return PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(class_.ptr()));
  }

 protected:
  // Throws ImportError if the class has no such field.
  Field field(const char* name);
  // Throws ImportError if the class has a field that was not asked for.
  void require_all_known() const;

 private:
  const char* const name_;
  const py::object class_;
  const py::tuple fields_;
  size_t known_ = 0;
};

// A tuple of that class, which outlives it. Throws TypeError for any other object.
class Record {
 public:
  Record(const RecordType& type, py::handle object) : tuple_(object.ptr()) {
    if (!type.holds(object)) refuse(type, object);
  }
  py::handle operator[](Field field) const { return PyTuple_GET_ITEM(tuple_, static_cast<Py_ssize_t>(field)); }

 private:
  [[noreturn]] static void refuse(const RecordType& type, py::handle object);

  PyObject* const tuple_;
};

}  // namespace fastshard
