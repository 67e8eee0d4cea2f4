// SPDX-License-Identifier: Apache-2.0
#include "save/writer.h"

#include <utility>

#include "save/direct_writer.h"
#include "save/memory_writer.h"
#include "save/page_cache_writer.h"
#include "save/placed_writer.h"

namespace fastshard {

std::unique_ptr<FileWriter> make_writer(const FilePlan& plan, std::shared_ptr<OutputFile> file,
                                        const Resources& resources, const CopyStreams& streams,
                                        std::unique_ptr<CopyStream> fetched, bool checksums, Progress& progress) {
  WriterParts parts{plan, resources, streams, std::move(fetched), checksums, progress};
  if (file == nullptr) return make_memory_writer(std::move(parts));
  if (plan.placed) return make_placed_writer(std::move(parts), std::move(file));
  switch (file->write_path()) {
    case WritePath::direct:
      return make_direct_writer(std::move(parts), std::move(file));
    case WritePath::mapped:
      return make_mapped_writer(std::move(parts), std::move(file));
    case WritePath::registered:
      return make_registered_writer(std::move(parts), std::move(file));
    default:
      return make_page_cache_writer(std::move(parts), std::move(file));
  }
}

}  // namespace fastshard
