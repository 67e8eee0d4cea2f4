# SPDX-License-Identifier: Apache-2.0
"""Tensors whose parts are boxes in several files, and how they are put together.

A box whose elements lie one behind the other in the whole tensor, as rows do, is a view of its mapped file. Others,
as columns, are read and put into their places a staging buffer at a time.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import torch

from ..distributed.boxes import first_overlap
from ..engine.mapped import MappedFile
from ..engine.plan import CASTS, HOST, TensorView
from ..engine.tensors import cast_number
from ..formats.torch_items import contiguous_strides, extent

Numbers = tuple[int, ...]

_MAX_DIMS: Final = 8
"""The most dimensions of a view with strides."""
_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""What elements of a size are copied as: torch does not copy every dtype."""


class Box(NamedTuple):
    """A part of a tensor in a file."""

    offsets: Numbers
    """Where it begins in the tensor."""
    sizes: Numbers
    path: str
    begin: int
    """Offset of its first element in the file."""
    strides: Numbers | None = None
    """In elements; ``None``: they lie one behind the other."""

    @property
    def ends(self) -> Numbers:
        return tuple(offset + size for offset, size in zip(self.offsets, self.sizes))


class Target(NamedTuple):
    """What a tensor is written as."""

    source: torch.dtype
    dtype: torch.dtype
    """The same, unless it is cast."""
    code: str
    """The source's, in a header."""

    @property
    def is_cast(self) -> bool:
        return self.source is not self.dtype

    @property
    def by_engine(self) -> bool:
        """Whether the engine can write it, or only torch."""
        return not self.is_cast or self.code in CASTS


class Mapped:
    """Mapped files, each as long as somebody needs it."""

    def __init__(self) -> None:
        self._bytes: dict[str, torch.Tensor] = {}

    def address(self, box: Box) -> int:
        if box.path not in self._bytes:
            file = MappedFile(box.path)
            self._bytes[box.path] = file.view(torch.uint8, (file.nbytes,))
        return self._bytes[box.path].data_ptr() + box.begin

    def of(self, boxes: Iterable[Box]) -> list[torch.Tensor]:
        """Returns what must be kept alive while these boxes are read."""
        paths = {box.path for box in boxes}
        return [memory for path, memory in self._bytes.items() if path in paths]


def complete(shape: Numbers, boxes: Sequence[Box]) -> list[Box]:
    """Returns the boxes that make up a tensor, in order; what is there twice is taken once.

    Raises ``ValueError`` unless every element is in exactly one of them.
    """
    found = sorted({(box.offsets, box.sizes): box for box in reversed(boxes) if 0 not in box.sizes}.values())
    for box in found:
        if any(end > size for end, size in zip(box.ends, shape)):
            raise ValueError(f"a part of {list(box.sizes)} at {list(box.offsets)} leaves {list(shape)}")
    # Elements are counted, and of boxes only those are compared that can overlap.
    missing = math.prod(shape) - sum(math.prod(box.sizes) for box in found)
    overlapping = first_overlap([(box.offsets, box.sizes) for box in found])
    if overlapping is not None:
        one, other = found[overlapping[0]], found[overlapping[1]]
        raise ValueError(f"the parts at {list(one.offsets)} and {list(other.offsets)} overlap")
    if missing:
        raise ValueError(f"{missing} of its {math.prod(shape)} elements are not in any file")
    return found


def items(shape: Numbers, boxes: list[Box], target: Target, files: Mapped) -> Iterator[TensorView | Gathered]:
    """Returns what lies one behind the other in the file of a tensor that is made up of these boxes."""
    for band in _bands(shape, boxes):
        box = band[0]
        if len(band) == 1 and target.by_engine and (box.strides is None or len(shape) <= _MAX_DIMS):
            yield _view(box, target, files.address(box))
        else:
            offsets = (box.offsets[0], *(0 for _ in shape[1:])) if shape else ()
            sizes = (box.sizes[0], *shape[1:]) if len(band) < len(boxes) else shape
            offsets = offsets if len(band) < len(boxes) else (0,) * len(shape)
            yield Gathered(offsets, sizes, band, target)


def _bands(shape: Numbers, boxes: list[Box]) -> list[list[Box]]:
    """Returns the boxes in groups that follow each other along the first dimension; all in one if they do not."""
    if not shape:
        return [[box] for box in boxes]
    bands = [list(group) for _, group in itertools.groupby(boxes, lambda box: (box.offsets[0], box.sizes[0]))]
    ends = [0, *(band[0].ends[0] for band in bands)]
    return bands if [band[0].offsets[0] for band in bands] == ends[:-1] else [boxes]


def _view(box: Box, target: Target, address: int) -> TensorView:
    cast = (CASTS[target.code], cast_number(target.dtype)) if target.is_cast else None
    nbytes = math.prod(box.sizes) * target.dtype.itemsize
    shape = None if box.strides is None else box.sizes
    return TensorView(address, nbytes, HOST, target.source.itemsize, shape, box.strides, cast)


class Gathered(NamedTuple):
    """Consecutive rows of a tensor, which are put together from boxes when they are written."""

    offsets: Numbers
    sizes: Numbers
    boxes: list[Box]
    target: Target

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * self.target.dtype.itemsize

    def fetch(self, first: int, nbytes: int, address: int) -> None:
        """Raises ``OSError``, and ``ValueError`` for a file that has been cut."""
        itemsize = self.target.dtype.itemsize
        memory = (ctypes.c_char * nbytes).from_address(address)
        out = torch.frombuffer(
            memory, dtype=self.target.dtype if self.target.is_cast else _INTEGERS[itemsize]
        )
        done = 0
        for begin, sizes in _pieces(self.sizes, first // itemsize, (first + nbytes) // itemsize):
            count = math.prod(sizes)
            at = tuple(map(sum, zip(begin, self.offsets)))
            for box in self.boxes:
                self._copy(box, at, sizes, out[done : done + count].view(sizes))
            done += count

    def _copy(self, box: Box, at: Numbers, sizes: Numbers, out: torch.Tensor) -> None:
        """Copies what a box has of a piece of the tensor."""
        begins = tuple(map(max, at, box.offsets))
        ends = tuple(min(begin + size, end) for begin, size, end in zip(at, sizes, box.ends))
        lengths = tuple(end - begin for begin, end in zip(begins, ends))
        if min(lengths, default=1) <= 0:
            return
        strides = contiguous_strides(box.sizes) if box.strides is None else box.strides
        skipped = sum((begin - offset) * s for begin, offset, s in zip(begins, box.offsets, strides))
        itemsize = self.target.source.itemsize
        offset, count = box.begin + skipped * itemsize, extent(lengths, strides)
        integers = _INTEGERS[itemsize]
        if box.strides is None:
            found = torch.frombuffer(_read(box.path, offset, count * itemsize), dtype=integers)
        else:  # its elements may lie anywhere
            found = MappedFile(box.path).view(torch.uint8, (count * itemsize,), offset)
            found = found.view(integers) if offset % itemsize == 0 else found.clone().view(integers)
        source = found.as_strided(lengths, strides)
        place = tuple(slice(begin - a, end - a) for begin, end, a in zip(begins, ends, at))
        if self.target.is_cast:
            source = source.view(self.target.source)
        out[place].copy_(source)


def _pieces(shape: Numbers, first: int, last: int) -> Iterator[tuple[Numbers, Numbers]]:
    """Returns elements ``[first, last)`` of a tensor as boxes: offsets and sizes."""
    if first >= last:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    begin, end = -(-first // row), last // row
    if begin > end:  # within one row
        yield from _within(end, shape, first - end * row, last - end * row)
        return
    if first % row:
        yield from _within(begin - 1, shape, first - (begin - 1) * row, row)
    if begin < end:
        zeros = (0,) * (len(shape) - 1)
        yield (begin, *zeros), (end - begin, *shape[1:])
    if last % row:
        yield from _within(end, shape, 0, last - end * row)


def _within(index: int, shape: Numbers, first: int, last: int) -> Iterator[tuple[Numbers, Numbers]]:
    for offsets, sizes in _pieces(shape[1:], first, last):
        yield (index, *offsets), (1, *sizes)


def _read(path: str, offset: int, nbytes: int) -> bytearray:
    data = bytearray(nbytes)
    view = memoryview(data)
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        done = 0
        while done < nbytes:
            count = os.preadv(file, [view[done:]], offset + done)
            if count == 0:
                raise ValueError(f"{path!r} has been cut")
            done += count
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(file)
    return data
