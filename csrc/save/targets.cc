// SPDX-License-Identifier: Apache-2.0
#include "save/targets.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <cerrno>
#include <string>
#include <utility>

#include "file/linked.h"

namespace fastshard {
namespace {

uint64_t size_of(const OutputFile& file) {
  struct stat info;
  if (fstat(file.descriptor(), &info) != 0) throw IoError(errno, file.path(), "fstat");
  return static_cast<uint64_t>(info.st_size);
}

OpenTarget open_new(const std::string& path, const FilePlan& plan, const Intent& intent) {
  Intent intended = intent;
  intended.gaps = plan.gaps;
  auto made = std::make_shared<TemporaryFile>(path, plan.nbytes, intended);
  TemporaryFile* const file = made.get();
  return {.file = std::move(made), .placed = file, .made = file};
}

Descriptor duplicate(const ForeignFile& target) {
  Descriptor copy(fcntl(target.descriptor, F_DUPFD_CLOEXEC, 0));
  if (!copy) throw IoError(errno, target.path, "dup");
  const int flags = fcntl(copy.get(), F_GETFL);
  if (flags < 0) throw IoError(errno, target.path, "fcntl");
  if ((flags & O_ACCMODE) == O_RDONLY) throw IoError(EBADF, target.path, "open", "it is not open for writing");
  return copy;
}

OpenTarget open_foreign(const ForeignFile& target, const FilePlan& plan, const Intent& intent) {
  const uint64_t nbytes = plan.written_nbytes();
  auto file = target.descriptor < 0 ? std::make_shared<OutputFile>(target.path, nbytes, intent)
                                    : std::make_shared<OutputFile>(duplicate(target), target.path, nbytes, intent);
  if (const uint64_t size = size_of(*file); size < plan.file_nbytes()) {
    throw IoError(EINVAL, target.path, "open",
                  "the file has " + std::to_string(size) + " bytes, the plan needs " +
                      std::to_string(plan.file_nbytes()) + ": its creator must give it its size first");
  }
  if (plan.placed) file->share_pages();
  return {.file = std::move(file)};
}

std::unique_ptr<LinkCopy> copy_of(const LinkedFile& linked, const Link& target) {
  auto copy = std::make_unique<LinkCopy>();
  const uint64_t nbytes = size_of(linked);
  copy->plan.target = NewFile{target.path};
  copy->plan.nbytes = nbytes;
  if (nbytes == 0) return copy;
  copy->source = std::make_unique<SourceFile>(linked.descriptor(), nbytes, target.existing);
  const std::byte* const bytes = copy->source->engine_address(copy->source->bytes().data());
  copy->plan.items.push_back({TensorView{.data = bytes, .run_nbytes = nbytes}, 0, copy->source.get()});
  return copy;
}

OpenTarget open_link(const Link& target, const Intent& intent) {
  auto linked = std::make_shared<LinkedFile>(target.path, target.existing, intent);
  const int refused = linked->refusal();
  if (refused == 0) {
    LinkedFile* const file = linked.get();
    return {.file = std::move(linked), .placed = file};
  }
  std::unique_ptr<LinkCopy> copy = copy_of(*linked, target);
  OpenTarget opened = open_new(target.path, copy->plan, intent);
  opened.file->note_fallback("link", refused);
  opened.copy = std::move(copy);
  return opened;
}

}  // namespace

OpenTarget open_target(const FilePlan& plan, const Intent& intent) {
  if (const auto* target = std::get_if<NewFile>(&plan.target)) return open_new(target->path, plan, intent);
  if (const auto* target = std::get_if<ForeignFile>(&plan.target)) return open_foreign(*target, plan, intent);
  if (const auto* target = std::get_if<Link>(&plan.target)) return open_link(*target, intent);
  return {};
}

}  // namespace fastshard
