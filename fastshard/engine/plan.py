# SPDX-License-Identifier: Apache-2.0
"""What is to be written, as named tuples: the same nouns as csrc/plan/plan.h, handed over once a save.

The native module reads them by the names of their fields (csrc/bindings/record.h), so a class may get new fields anywhere,
as long as both sides know them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

HOST = -1
"""Device number of host memory; zero and above are CUDA ordinals."""
FETCHED = -2
"""Device number of tensors whose bytes Python brings, a slot at a time."""

CASTS: Final[Mapping[str, int]] = {
    "F64": 1,
    "F32": 2,
    "F16": 3,
    "BF16": 4,
    "F8_E4M3": 5,
    "F8_E5M2": 6,
    "F8_E4M3_SAT": 7,
}
"""Element types that the engine casts: their codes, and their numbers (``DType`` in csrc/plan/plan.h). Nothing is
cast to F64. As F8_E4M3_SAT what is too large becomes the largest number, as F8_E4M3 NaN."""


class TensorView(NamedTuple):
    """Non-owning strided memory of one tensor. Whoever submits it keeps the tensor alive and unchanged."""

    data: int
    """Address of the first element; 0 for :data:`FETCHED`."""
    nbytes: int
    """Size when cast and packed."""
    device: int
    itemsize: int = 1
    """Bytes of one element, before it is cast."""
    shape: tuple[int, ...] | None = None
    """``None``: contiguous."""
    strides: tuple[int, ...] | None = None
    """In elements, as torch gives them."""
    cast: tuple[int, int] | None = None
    """From and to: numbers of :data:`CASTS`; ``None``: the bytes as they are."""


class WriteItem(NamedTuple):
    """A tensor's place in a file: its bytes, cast and packed, begin at ``file_offset``."""

    source: TensorView
    file_offset: int

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return self.source.nbytes


class Memory(NamedTuple):
    """Memory of exactly the file's size, which takes the place of a file."""

    address: int
    nbytes: int


class ForeignFile(NamedTuple):
    """A file that somebody else has made and will publish, of which others may write other parts meanwhile.

    The items are written to their offsets, and synced if the save is durable. The file must be there, and as large as
    the plan. It is never cut, renamed or removed; what was written of it stays when the save fails.
    """

    path: bytes
    descriptor: int | None = None
    """Of the file, open for writing; it stays the caller's, and ``path`` is then only for messages."""


class Link(NamedTuple):
    """No bytes, but a second name for a file that has them, together with the other files of a save.

    The name becomes a hard link, so both share mode and times; the file is copied where there can be no such link, and
    ``Stats.fallbacks`` says so.
    """

    path: bytes
    existing: bytes


FileTarget = bytes | ForeignFile | Memory | Link
"""What a file's bytes go into; its type says what happens to that. ``bytes``: the encoded path of a new file, which appears
there, complete, when the save ends, or of one that is to be prepared."""


class FilePlan(NamedTuple):
    """One output: ``header``, then the items."""

    target: FileTarget
    header: bytes
    items: Sequence[TensorView | WriteItem]
    """A view lies right behind the item before it; a :class:`WriteItem` says where. In any order, without overlaps."""
    size: int | None = None
    """Of the file, in which there may then be gaps: bytes that belong to no item and are not written, which in a new file
    are zeros. ``None``: the items fill the file."""

    @property
    def nbytes(self) -> int:
        """Size of the finished file in bytes."""
        if self.size is not None:
            return self.size
        return len(self.header) + sum(item.nbytes for item in self.items)


class SaveOptions(NamedTuple):
    """What is asked of a save besides its files. :meth:`fastshard.engine.engine.Engine.submit` describes them."""

    streams: dict[int, int]
    durable: bool = False
    keep_cached: bool = True
    checksums: bool = False
    amended: bool = False
    """Bytes follow when all others are written."""
    follow_links: bool = False
