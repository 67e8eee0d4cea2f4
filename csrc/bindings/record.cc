// SPDX-License-Identifier: Apache-2.0
#include "bindings/record.h"

#include <string>

namespace fastshard {
namespace {

[[noreturn]] void misfit(const char* type, const std::string& what) {
  throw py::import_error(
      std::string("fastshard's native module and fastshard/engine/plan.py are of different versions: ") + type + " " +
      what);
}

}  // namespace

RecordType::RecordType(const char* name)
    : name_(name), class_(py::module_::import("fastshard.engine.plan").attr(name)), fields_(class_.attr("_fields")) {}

Field RecordType::field(const char* name) {
  for (size_t position = 0; position < fields_.size(); ++position) {
    if (fields_[position].cast<std::string_view>() != name) continue;
    ++known_;
    return static_cast<Field>(position);
  }
  misfit(name_, std::string("has no field ") + name);
}

void RecordType::require_all_known() const {
  if (known_ != fields_.size()) misfit(name_, "has a field that the native module does not know");
}

void Record::refuse(const RecordType& type, py::handle object) {
  throw py::type_error(std::string("expected a ") + type.name() + ", not a " + Py_TYPE(object.ptr())->tp_name);
}

}  // namespace fastshard
