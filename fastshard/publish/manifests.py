# SPDX-License-Identifier: Apache-2.0
"""Makes the manifest of the files that a save writes."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine.pipeline import PlannedFile
from ..formats.manifest import FileEntry, TensorEntry


def file_entry(
    planned: PlannedFile, head_crc32: int | None = None, checksums: Sequence[int] = ()
) -> FileEntry:
    """Returns what a manifest says of a planned file.

    ``head_crc32`` and ``checksums`` are the CRC-32 of its header and those of its tensors, in file order, if they
    were taken.
    """
    offset, tensors = len(planned.file.header), {}
    for number, entry in enumerate(planned.layout.entries):
        crc32 = checksums[number] if checksums else None
        tensors[entry.name] = TensorEntry(offset, entry.view.nbytes, crc32)
        offset += entry.view.nbytes
    return FileEntry(offset, head_crc32, tensors)
