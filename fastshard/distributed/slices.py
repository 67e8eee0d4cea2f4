# SPDX-License-Identifier: Apache-2.0
"""Reads boxes of stored tensors (rows, columns, any part that is a range in each dimension) into tensors that exist.

No byte is read that is not wanted, but for gaps that cost less than another call, which are at most a fifth of what
is wanted. Bytes go straight to where they belong; what has to be cast, turned, or copied to a device goes by way of
staging buffers of a fixed size.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO, Final, NamedTuple

import torch
from safetensors import SafetensorError

from ..engine.options import usable_cpus
from ..engine.reading import Piece, Read, cut, perform_all, shared_out
from ..engine.tensors import on_current_streams
from ..formats.torch_items import contiguous_strides
from .stored import Stored

_MOST_THREADS: Final = 16
_STAGING_NBYTES: Final = 64 << 20
"""Of all staging buffers together."""
_BUFFER_NBYTES: Final = 4 << 20
_CALL_NBYTES: Final = 8 << 20
"""Bytes that one call reads: enough that its cost does not matter, few enough to stop soon."""
_PIECE_NBYTES: Final = 256 << 10
"""Shorter ranges are read together with their neighbours."""
_STREAMED_NBYTES: Final = 32 << 20
"""So many bytes are stored past the processor's caches."""
_GAP_SHARE: Final = 5
"""A gap is read if what is wanted around it is so many times as long, in all."""
_GAP_NBYTES: Final = 32 << 10
"""The longest gap that is read: longer ones cost more than a call."""
_LEAST_RUN: Final = 16
"""Shorter runs, in memory that is strided otherwise than the file, are turned by torch."""


class Box(NamedTuple):
    """A part of a stored tensor, and the tensor of the same shape that it is read into."""

    stored: Stored
    offsets: Sequence[int]
    sizes: Sequence[int]
    destination: torch.Tensor
    """On any device and strided in any way. If its dtype is another one the values are cast as ``copy_`` does."""


class Figures(NamedTuple):
    """What a call has read."""

    wanted_nbytes: int = 0
    """Bytes of the boxes, as they are stored."""
    read_nbytes: int = 0
    """Bytes that were copied out of files, with the gaps between."""
    staged_nbytes: int = 0
    """Those of them that went by way of staging buffers."""
    calls: int = 0
    """Ranges and groups of runs that were read, each by one call unless it was interrupted."""


class _Runs(NamedTuple):
    """A box as an array of runs: each is contiguous, in the file and in memory."""

    offset: int
    """Of the first run in the file."""
    nbytes: int
    """Of each run."""
    counts: tuple[int, ...]
    """Of runs in each dimension; none if there is one run."""
    in_file: tuple[int, ...]
    """Bytes between the beginnings of neighbours."""
    in_memory: tuple[int, ...]


def read_boxes(
    boxes: Iterable[Box],
    *,
    staging: int = _STAGING_NBYTES,
    told: Callable[[int], object] | None = None,
) -> Figures:
    """Reads all boxes, in parallel.

    Boxes that are read into the same memory are there in any order. ``staging`` limits the bytes of all staging buffers
    together. ``told`` is called, by any thread, with the number of bytes whenever some have been read.

    Raises ``ValueError`` for a box that does not lie in its tensor or does not fit its destination, before anything
    is read; ``OSError`` and ``SafetensorError``, naming the file, as
    :func:`fastshard.engine.reading.read_into`. Some memory has been written to then. When the call has ended nothing
    writes to the memory any more.
    """
    job = _Job(min(_MOST_THREADS, usable_cpus()), staging)
    for box in boxes:
        _check(box)
        job.add(box)
    return job.perform(told or _not_told)


def _not_told(nbytes: int) -> None:
    pass


def _check(box: Box) -> None:
    shape, sizes = box.stored.shape, tuple(box.sizes)
    fits = len(shape) == len(sizes) == len(box.offsets) and all(
        min(offset, size) >= 0 and offset + size <= whole
        for offset, size, whole in zip(box.offsets, sizes, shape)
    )
    if not fits:
        raise ValueError(
            f"a box of {list(sizes)} at {list(box.offsets)} does not lie in a tensor of shape {list(shape)} "
            f"of {box.stored.file.name!r}"
        )
    if tuple(box.destination.shape) != sizes:
        raise ValueError(f"a box of {list(sizes)} cannot fill a tensor of {list(box.destination.shape)}")


class _Job:
    """All that one call reads, sorted by the way that it takes."""

    def __init__(self, threads: int, staging: int) -> None:
        self.threads = threads
        self.buffer_nbytes = max(1 << 12, min(_BUFFER_NBYTES, staging // threads))
        self.wanted = self.staged = 0
        self.pieces: dict[BinaryIO, list[Piece]] = {}
        """What is contiguous and short."""
        self.tasks: dict[BinaryIO, list[_Direct | _Staged]] = {}
        """What is not, in the order of the boxes."""

    def add(self, box: Box) -> None:
        stored, target = box.stored, box.destination.detach()
        nbytes = math.prod(box.sizes) * stored.dtype.itemsize
        self.wanted += nbytes
        if nbytes == 0:
            return
        if not _as_stored(target, stored.dtype):
            return self._add_staged(box, target)
        runs = _runs_of(box, target.stride())
        if not runs.counts and nbytes < _PIECE_NBYTES:
            self.pieces.setdefault(stored.file, []).append(Piece(runs.offset, nbytes, target.data_ptr()))
        elif runs.nbytes < _LEAST_RUN and runs.nbytes < _runs_of(box).nbytes:
            self._add_staged(box, target)
        else:
            parts = _parts_of(box, target, _CALL_NBYTES)
            tasks = [_Direct(_runs_of(part, target.stride()), part.destination) for part in parts]
            self.tasks.setdefault(stored.file, []).extend(tasks)

    def _add_staged(self, box: Box, target: torch.Tensor) -> None:
        parts = _parts_of(box, target, self.buffer_nbytes)
        tasks = [_Staged(_runs_of(part), part.destination, box.stored.dtype) for part in parts]
        self.tasks.setdefault(box.stored.file, []).extend(tasks)
        self.staged += math.prod(box.sizes) * box.stored.dtype.itemsize

    def perform(self, told: Callable[[int], object]) -> Figures:
        readers: list[Sequence[Callable[[], object]]] = []
        files = [*dict.fromkeys([*self.pieces, *self.tasks])]
        each = -(-self.threads // max(1, len(files)))
        reading = _Reading(self, told)
        pieces_read = calls = 0
        for file in files:
            reads = [*cut(file, _with_gaps(self.pieces.get(file, []), reading.gap))]
            pieces_read += sum(piece.nbytes for read in reads for piece in read.pieces)
            calls += len(reads)
            readers += shared_out([functools.partial(reading.perform_read, read) for read in reads], each)
            tasks = sorted(self.tasks.get(file, []), key=_place)
            readers += shared_out([functools.partial(reading.perform, file, task) for task in tasks], each)
        perform_all(sorted(readers, key=len, reverse=True), self.threads)
        return Figures(
            self.wanted, pieces_read + sum(reading.nbytes), self.staged, calls + sum(reading.calls)
        )


class _Direct(NamedTuple):
    """Runs that go straight to where they belong."""

    runs: _Runs
    target: torch.Tensor


class _Staged(NamedTuple):
    """Runs that are packed into a staging buffer, from which torch copies."""

    runs: _Runs
    target: torch.Tensor
    dtype: torch.dtype
    """As it is stored."""


class _Reading:
    """What the threads of a call share: staging buffers, streams and counts."""

    def __init__(self, job: _Job, told: Callable[[int], object]) -> None:
        self._told = told
        targets = [task.target for tasks in job.tasks.values() for task in tasks if isinstance(task, _Staged)]
        devices = {target.device for target in targets}
        self._pinned = any(device.type == "cuda" for device in devices)
        self._on_stream = on_current_streams(devices)
        self._nbytes = job.buffer_nbytes
        self._streaming = job.wanted >= _STREAMED_NBYTES
        self._buffers: list[torch.Tensor] = []
        self._skipped = ctypes.create_string_buffer(_GAP_NBYTES)
        self.gap = ctypes.addressof(self._skipped)
        """Where gaps are read, for nobody."""
        self.nbytes: list[int] = []
        """Read by each task."""
        self.calls: list[int] = []

    def perform_read(self, read: Read) -> None:
        read.perform()
        self._told(sum(piece.nbytes for piece in read.pieces if piece.address != self.gap))

    def perform(self, file: BinaryIO, task: _Direct | _Staged) -> None:
        if isinstance(task, _Direct):
            return self._read(file, task.runs, task.target.data_ptr(), self._streaming)
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = torch.empty(self._nbytes, dtype=torch.uint8, device="cpu", pin_memory=self._pinned)
        self._read(file, task.runs, buffer.data_ptr(), False)
        packed = buffer[: task.target.numel() * task.dtype.itemsize].view(task.dtype)
        with self._on_stream(task.target.device):
            # It returns when the bytes have left the buffer.
            task.target.copy_(packed.view(task.target.shape))
        self._buffers.append(buffer)

    def _read(self, file: BinaryIO, runs: _Runs, address: int, streaming: bool) -> None:
        from .. import _native

        found = _native.read_runs(file.fileno(), os.fsencode(file.name), *runs, address, streaming)
        if found is None:
            raise SafetensorError(f"{file.name!r} has become shorter while it was read")
        self.nbytes.append(found[0])
        self.calls.append(found[1])
        self._told(runs.nbytes * math.prod(runs.counts))


def _as_stored(target: torch.Tensor, dtype: torch.dtype) -> bool:
    """Returns whether the bytes in a file are those of this tensor in memory, but for its strides."""
    lazy = target.is_conj() or target.is_neg()
    return target.is_cpu and target.dtype is dtype and not lazy


def _place(task: _Direct | _Staged) -> int:
    return task.runs.offset


def _parts_of(box: Box, target: torch.Tensor, most_nbytes: int) -> Iterator[Box]:
    """Yields parts of a box that together are all of it, of so many bytes at most, in the order of the file."""
    for inside, sizes in _parts(tuple(box.sizes), max(1, most_nbytes // box.stored.dtype.itemsize)):
        part = target[tuple(slice(first, first + size) for first, size in zip(inside, sizes))]
        offsets = [outer + inner for outer, inner in zip(box.offsets, inside)]
        yield Box(box.stored, offsets, sizes, part)


def _parts(sizes: tuple[int, ...], most: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yields offsets and sizes of parts of at most so many elements."""
    if math.prod(sizes) <= most:
        yield (0,) * len(sizes), sizes
        return
    rows = most // math.prod(sizes[1:])
    if rows:
        for first in range(0, sizes[0], rows):
            yield (first, *(0,) * (len(sizes) - 1)), (min(rows, sizes[0] - first), *sizes[1:])
        return
    for row in range(sizes[0]):
        for inside, part in _parts(sizes[1:], most):
            yield (row, *inside), (1, *part)


def _runs_of(box: Box, strides: Sequence[int] | None = None) -> _Runs:
    """Returns the runs of a box in memory with these strides, in elements; ``None``: packed."""
    nbytes = box.stored.dtype.itemsize
    in_file = [nbytes * stride for stride in contiguous_strides(box.stored.shape)]
    if strides is None:
        strides = contiguous_strides(tuple(box.sizes))
    in_memory = [nbytes * stride for stride in strides]
    offset = box.stored.offset + sum(first * step for first, step in zip(box.offsets, in_file))
    dims: list[tuple[int, int, int]] = []  # the innermost one first, as far as they are not one run
    for count, far, near in reversed([*zip(box.sizes, in_file, in_memory)]):
        if count == 1:
            continue
        if not dims and far == near == nbytes:
            nbytes *= count
        elif dims and far == dims[-1][0] * dims[-1][1] and near == dims[-1][0] * dims[-1][2]:
            dims[-1] = dims[-1][0] * count, dims[-1][1], dims[-1][2]
        else:
            dims.append((count, far, near))
    dims.reverse()
    counts, far_apart, near_by = (tuple(dim[part] for dim in dims) for part in range(3))
    return _Runs(offset, nbytes, counts, far_apart, near_by)


def _with_gaps(pieces: list[Piece], gap_address: int) -> Iterator[Piece]:
    """Yields the pieces in the order of the file, and the gaps between them that are worth reading."""
    wanted = spent = end = 0
    for piece in sorted(pieces):
        gap = piece.offset - end
        if wanted and 0 < gap <= _GAP_NBYTES and _GAP_SHARE * (spent + gap) <= wanted:
            yield Piece(end, gap, gap_address)
            spent += gap
        wanted += piece.nbytes
        end = max(end, piece.offset + piece.nbytes)
        yield piece
