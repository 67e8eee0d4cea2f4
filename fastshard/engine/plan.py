# SPDX-License-Identifier: Apache-2.0
"""Plans of saves, as named tuples with the same names as in csrc/plan/plan.h. A save hands its plan over
once.

The native module reads the tuples by the names of their fields (csrc/bindings/record.h). So a class may get
new fields anywhere, as long as both sides know them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from .. import _native

HOST = -1
"""Device number of host memory; zero and above are CUDA ordinals."""
FETCHED = -2
"""Device number of tensors whose bytes Python brings, a staging buffer at a time."""

CASTS: Final[Mapping[str, int]] = {
    "F64": 1,
    "F32": 2,
    "F16": 3,
    "BF16": 4,
    "F8_E4M3": 5,
    "F8_E5M2": 6,
    "F8_E4M3_SAT": 7,
}
"""Element types that the engine casts: their codes and numbers (``DType`` in csrc/plan/plan.h).

Nothing is cast to F64. A number that is too large becomes the largest number as F8_E4M3_SAT, and NaN as
F8_E4M3.
"""


class TensorView(NamedTuple):
    """The strided memory of one tensor, which it does not own. Whoever submits it keeps the tensor alive and
    unchanged."""

    data: int
    """Address of the first element; 0 for :data:`FETCHED`."""
    nbytes: int
    """Bytes in the file: cast and packed."""
    device: int
    itemsize: int = 1
    """Bytes of one element, before it is cast."""
    shape: tuple[int, ...] | None = None
    """Number of elements in each dimension; ``None`` if the tensor is contiguous."""
    strides: tuple[int, ...] | None = None
    """Strides in elements, as torch gives them."""
    cast: tuple[int, int] | None = None
    """The types to cast from and to, as numbers of :data:`CASTS`; ``None`` if the bytes are copied as they
    are."""


class WriteItem(NamedTuple):
    """A tensor's place in a file: its bytes, cast and packed, begin at ``file_offset``."""

    source: TensorView
    file_offset: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.source.nbytes


class Place(NamedTuple):
    """Where a range of packed bytes lies in a file: an array of runs of contiguous bytes, in their order. What
    lies between the runs is others'.

    Runs follow each other: the stride of a dimension is at least what the inner dimensions reach across.
    :func:`place_of` makes the place of a part of a tensor.
    """

    nbytes: int
    """Of all runs together."""
    file_offset: int
    """Of the first run."""
    run_nbytes: int
    shape: tuple[int, ...] = ()
    """Number of runs in each dimension, at most eight of them; without any, there is one run."""
    strides: tuple[int, ...] = ()
    """Bytes in the file from one run to the next, in each dimension."""


def place_of(
    shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int], itemsize: int, tensor_offset: int
) -> Place:
    """Returns where a part of a tensor lies in a file.

    ``shape`` is that of the whole tensor, which begins at ``tensor_offset`` of the file, and ``offsets`` and
    ``sizes`` are those of the part. Dimensions that lie one behind the other are merged, so a part of whole
    rows is a single run. Raises ``ValueError`` for a part that does not lie within the tensor.
    """
    if not len(shape) == len(offsets) == len(sizes) or any(
        first < 0 or size < 0 or first + size > whole for whole, first, size in zip(shape, offsets, sizes)
    ):
        raise ValueError(
            f"no part of a tensor of shape {tuple(shape)} lies at {tuple(offsets)} with the sizes {tuple(sizes)}"
        )
    run, stride, offset = itemsize, itemsize, tensor_offset
    dims: list[tuple[int, int]] = []  # sizes and strides that are not part of the run, from inside
    for whole, first, size in zip(reversed(shape), reversed(offsets), reversed(sizes)):
        offset += first * stride
        if not dims and run == stride:
            run *= size
        elif dims and stride == dims[-1][0] * dims[-1][1]:
            dims[-1] = (dims[-1][0] * size, dims[-1][1])
        elif size != 1:
            dims.append((size, stride))
        stride *= whole
    nbytes = run * math.prod(size for size, _ in dims)
    if nbytes == 0:
        return Place(0, tensor_offset, 0)
    dims.reverse()
    return Place(nbytes, offset, run, tuple(size for size, _ in dims), tuple(stride for _, stride in dims))


class Memory(NamedTuple):
    """Memory of exactly the file's size, which is filled instead of a file."""

    address: int
    nbytes: int
    streaming: bool = False
    """Whether the CPU stores past its caches, as is best for memory that is larger than these."""
    locked: _native.PageLock | None = None
    """What keeps it page-locked, if anything does. It must begin at a page. Devices copy straight into it, and
    all their copies are enqueued when the save is submitted."""


class ForeignFile(NamedTuple):
    """A file that somebody else has made and will publish. Others may write other parts of it meanwhile.

    The items are written to their offsets, and synced if the save is durable. The file must exist and be at
    least as large as the plan. It is never cut, renamed or removed. What was written of it stays if the save
    fails.
    """

    path: bytes
    descriptor: int | None = None
    """A descriptor of the file that is open for writing. It stays the caller's, and ``path`` is used for
    messages only."""


class Link(NamedTuple):
    """A second name for a file that exists already. It appears together with the other files of the save.

    The name becomes a hard link, so both share mode and times. If there can be no such link, the file is
    copied, and ``Stats.fallbacks`` says so.
    """

    path: bytes
    existing: bytes


FileTarget = bytes | ForeignFile | Memory | Link
"""What a file's bytes go into. Its type says what happens to that.

``bytes`` are the encoded path of a new file, which appears there, complete, when the save ends, or of a file
that is to be prepared.
"""


class FilePlan(NamedTuple):
    """The plan of one file: ``header``, then the items."""

    target: FileTarget
    header: bytes
    items: Sequence[TensorView | WriteItem] | _native.Layout
    """A view lies right behind the item before it; a :class:`WriteItem` says where it lies. Items may come in
    any order and must not overlap. A native layout stands for the views that it has, in their order."""
    size: int | None = None
    """Size of the file in bytes. Then there may be gaps: bytes that belong to no item and are not written. In
    a new file they are zeros. ``None``: the items fill the file."""
    places: Sequence[Place] | None = None
    """Where header and items lie in a :class:`ForeignFile` of ``size`` bytes. They are laid out one behind the other, as
    if they were all of the file, the offset of a :class:`WriteItem` is one in there, and the places, in their
    order, take as many bytes. ``None``: they lie in the file as they are."""

    @property
    def nbytes(self) -> int:
        """Size of the finished file in bytes."""
        if self.size is not None:
            return self.size
        if isinstance(self.items, Sequence):
            return len(self.header) + sum(item.nbytes for item in self.items)
        return len(self.header) + self.items.nbytes


class SaveOptions(NamedTuple):
    """The options of a save. :meth:`fastshard.engine.engine.Engine.submit` describes them."""

    streams: dict[int, int]
    durable: bool = False
    keep_cached: bool = True
    checksums: bool = False
    amended: bool = False
    """Whether some bytes follow when all others are written."""
    held: bool = False
    """It begins with ``Save.begin()`` only. Its files are made, and their space is reserved, before."""
    tells_read: bool = False
    """``Save.wait()`` returns once when all bytes have been read."""
    forked: bool = False
    """A forked process writes the files, through the page cache. When the save has begun, the tensors may
    change. Where that is not possible, ``NotForked`` is raised, and nothing has happened."""
    gives_way: bool = False
    """Its writers step aside for the threads of the job, until ``Save.take_over()``. So the caller's next steps are
    disturbed less, and the save takes longer where all processors are busy. Not where they would hold locks of a driver,
    of the interpreter or of the process's memory."""
    past_cache: bool = False
    """Large files are written past the page cache on filesystems that are known to do that well."""
    follow_links: bool = False
