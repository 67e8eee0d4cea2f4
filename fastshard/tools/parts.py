# SPDX-License-Identifier: Apache-2.0
"""Parts of tensors: what ranks hold of a tensor in a mapped file, and how it is put together from their
files."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import torch

from ..engine.mapped import MappedFile
from ..engine.plan import HOST, TensorView
from ..formats.hf_index import Checkpoint
from ..formats.safetensors import StoredTensor
from .tp_plan import Split, slices

_LONG_RUN_NBYTES: Final = 256 << 10
_FEW_RUNS: Final = 64
_BLOCK_NBYTES: Final = 1 << 20
_MAX_PARTS: Final = 1024
"""The most ranges of memory that one system call takes (IOV_MAX)."""


class Sources:
    """The files of a checkpoint. Each is mapped when it is first needed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._home = checkpoint.home()
        self._bytes: dict[str, torch.Tensor] = {}

    def address(self, name: str) -> int:
        """Returns the address where a tensor's bytes are mapped."""
        filename, tensor = self._home[name]
        return self._mapped(filename).data_ptr() + self._begin(filename, tensor)

    def place(self, name: str) -> tuple[str, int]:
        """Returns the path of a tensor's file, and its offset there."""
        filename, tensor = self._home[name]
        return self._checkpoint.files[filename].path, self._begin(filename, tensor)

    def nbytes(self, name: str) -> int:
        tensor = self._home[name][1]
        return tensor.end - tensor.begin

    def of(self, names: Iterable[str]) -> list[torch.Tensor]:
        """Returns what must be kept alive while these tensors are read."""
        return [self._mapped(filename) for filename in {self._home[name][0] for name in names}]

    def _begin(self, filename: str, tensor: StoredTensor) -> int:
        return self._checkpoint.files[filename].header.nbytes + tensor.begin

    def _mapped(self, filename: str) -> torch.Tensor:
        found = self._bytes.get(filename)
        if found is None:
            file = self._checkpoint.files[filename]
            mapped = MappedFile(file.path)
            nbytes = file.header.nbytes + max((t.end for t in file.header.tensors), default=0)
            if mapped.nbytes != nbytes:
                raise ValueError(f"{file.path!r} was changed meanwhile")
            found = self._bytes[filename] = mapped.view(torch.uint8, (nbytes,))
        return found


class Part(NamedTuple):
    """What each rank holds of a tensor."""

    tensor: StoredTensor
    split: Split | None
    intervals: list[list[tuple[int, int]]]
    """For each rank, the intervals that it holds of the dimension that is split; none if none is split."""
    row_nbytes: int
    """Bytes from one index of the dimensions before the split one to the next."""
    runs: list[int]
    """Bytes of each interval."""

    @staticmethod
    def of(tensor: StoredTensor, split: Split | None, ranks: int) -> Part:
        if split is None:
            return Part(tensor, None, [], 0, [])
        intervals = slices(tensor.name, tensor.shape, split, ranks)
        lengths = [end - begin for begin, end in intervals[0]]
        row, *runs = _nbytes(tensor, split.dim, (tensor.shape[split.dim], *lengths))
        return Part(tensor, split, intervals, row, runs)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.tensor.shape)
        if self.split is not None:
            shape[self.split.dim] = sum(end - begin for begin, end in self.intervals[0])
        return tuple(shape)

    @property
    def nbytes(self) -> int:
        nbytes = self.tensor.end - self.tensor.begin
        return nbytes if self.split is None else nbytes // len(self.intervals)

    @property
    def entry(self) -> tuple[str, str, tuple[int, ...], int]:
        return self.tensor.name, self.tensor.code, self.shape, self.nbytes

    def views(self, address: int, rank: int) -> list[TensorView]:
        """Returns the views that lie one behind the other in the rank's file, of a tensor that is mapped at
        ``address``."""
        if self.split is None or self.nbytes == 0:
            return [TensorView(address, self.nbytes, HOST)]
        outer = math.prod(self.tensor.shape[: self.split.dim])
        groups = self.split.groups
        if self.split.sizes:
            return self._views_of_groups(address, rank, outer)
        run = self.runs[0]
        address += rank * run
        if outer == groups == 1:
            return [TensorView(address, self.nbytes, HOST)]
        strides = (self.row_nbytes, self.row_nbytes // groups, 1)
        return [TensorView(address, self.nbytes, HOST, 1, (outer, groups, run), strides)]

    def _views_of_groups(self, address: int, rank: int, rows: int) -> list[TensorView]:
        """Returns each run as a view of its own, as groups of different sizes have no common stride."""
        ranks = len(self.intervals)
        begins = itertools.accumulate((run * ranks for run in self.runs), initial=0)
        runs = [(begin + rank * run, run) for begin, run in zip(begins, self.runs) if run]
        return [
            TensorView(address + row * self.row_nbytes + begin, run, HOST)
            for row in range(rows)
            for begin, run in runs
        ]

    def described(self, rank: int) -> dict[str, object]:
        """Returns how the part is described in a rank's manifest."""
        shape = list(self.tensor.shape)
        if self.split is None:
            return {"shape": shape, "dim": None}
        return {"shape": shape, "dim": self.split.dim, "intervals": self.intervals[rank]}


def _nbytes(tensor: StoredTensor, dim: int, lengths: Sequence[int]) -> list[int]:
    """Returns the bytes of so many indices of a dimension and all dimensions behind it."""
    numel = math.prod(tensor.shape)
    found = []
    for length in lengths:
        elements = math.prod((length, *tensor.shape[dim + 1 :]))
        nbytes, rest = divmod(elements * (tensor.end - tensor.begin), max(1, numel))
        if rest:
            raise ValueError(
                f"{tensor.name}: {elements} elements of {tensor.code} do not end at a byte: it cannot be split"
            )
        found.append(nbytes)
    return found


class Whole(NamedTuple):
    """A tensor that is to be put together."""

    tensor: StoredTensor
    dim: int
    intervals: list[tuple[int, int, int, int]] | None
    """Ascending (begin, end, rank, begin in the rank's part); ``None`` if every rank holds the whole tensor."""

    def items(self, sources: list[Sources]) -> list[TensorView | Interleaved]:
        """Returns the views that lie one behind the other in the file."""
        name, nbytes = self.tensor.name, self.tensor.end - self.tensor.begin
        if self.intervals is None or nbytes == 0:
            return [TensorView(sources[0].address(name), nbytes, HOST)]
        runs: list[_Run] = []
        at = 0
        for begin, end, rank, local in self.intervals:
            start, length = _nbytes(self.tensor, self.dim, (local, end - begin))
            runs.append(_Run(rank, at, start, length))
            at += length
        rows = math.prod(self.tensor.shape[: self.dim])
        local_rows = [sum(run.nbytes for run in runs if run.rank == rank) for rank in range(len(sources))]
        whole = Interleaved(nbytes, at, runs, local_rows, [source.place(name) for source in sources])
        if rows * len(runs) > _FEW_RUNS and min(run.nbytes for run in runs) < _LONG_RUN_NBYTES:
            return [whole]
        addresses = [source.address(name) for source in sources]
        return [
            TensorView(addresses[run.rank] + row * local_rows[run.rank] + run.begin, run.nbytes, HOST)
            for row in range(rows)
            for run in runs
        ]


class _Run(NamedTuple):
    """Consecutive bytes of one row of a tensor."""

    rank: int
    at: int
    """Offset in the row of the whole tensor."""
    begin: int
    """Offset in the rank's row."""
    nbytes: int


class Interleaved(NamedTuple):
    """A tensor whose rows lie in short runs in the files of all ranks.

    Many runs are read by one call, which puts each in its place. A description of every run would be larger
    than the tensor.
    """

    nbytes: int
    row_nbytes: int
    runs: list[_Run]
    local_rows: list[int]
    """Bytes of a row in each rank's file."""
    places: list[tuple[str, int]]
    """Path of each rank's file, and the tensor's offset there."""

    def fetch(self, first: int, nbytes: int, address: int) -> None:
        """Reads bytes ``[first, first + nbytes)`` of the tensor into memory.

        Raises ``OSError``, and ``ValueError`` for a file that has been cut.
        """
        memory = memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")
        with contextlib.ExitStack() as stack:
            files = []
            for path, _ in self.places:
                files.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                stack.callback(os.close, files[-1])
            row, inside = divmod(first, self.row_nbytes)
            head = min(nbytes, -first % self.row_nbytes)
            rows = (nbytes - head) // self.row_nbytes
            done = head + rows * self.row_nbytes
            self._piece(files, row, inside, memory[:head])
            self._rows(files, row + (inside > 0), rows, memory[head:done])
            self._piece(files, row + (inside > 0) + rows, 0, memory[done:])

    def _rows(self, files: list[int], row: int, rows: int, memory: memoryview) -> None:
        """Reads whole rows. Those of a rank are one stretch of its file, which the call scatters."""
        for rank, local in enumerate(self.local_rows):
            runs = [run for run in self.runs if run.rank == rank]
            at_once = max(1, _MAX_PARTS // max(1, len(runs)))
            for begin in range(0, rows, at_once):
                end = min(rows, begin + at_once)
                parts = [
                    memory[start + run.at : start + run.at + run.nbytes]
                    for start in range(begin * self.row_nbytes, end * self.row_nbytes, self.row_nbytes)
                    for run in runs
                ]
                self._read(files, rank, (row + begin) * local, parts, (end - begin) * local)

    def _piece(self, files: list[int], row: int, begin: int, memory: memoryview) -> None:
        end = begin + len(memory)
        for run in self.runs:
            first, last = max(begin, run.at), min(end, run.at + run.nbytes)
            if first < last:
                offset = row * self.local_rows[run.rank] + run.begin + first - run.at
                self._read(files, run.rank, offset, [memory[first - begin : last - begin]], last - first)

    def _read(self, files: list[int], rank: int, offset: int, parts: list[memoryview], nbytes: int) -> None:
        path, begin = self.places[rank]
        done = 0
        while done < nbytes:
            count = os.preadv(files[rank], parts, begin + offset + done)
            if count == 0:
                raise ValueError(f"{path!r} has been cut")
            done += count
            while parts and count >= len(parts[0]):
                count -= len(parts.pop(0))
            if parts:
                parts[0] = parts[0][count:]


def check_equal(name: str, sources: list[Sources]) -> None:
    """Raises ``ValueError`` unless all ranks hold the same bytes."""
    places = [source.place(name) for source in sources]
    nbytes = sources[0].nbytes(name)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(path, "rb", buffering=0)) for path, _ in places]
        for done in range(0, nbytes, _BLOCK_NBYTES):
            count = min(_BLOCK_NBYTES, nbytes - done)
            blocks = [os.pread(file.fileno(), count, begin + done) for file, (_, begin) in zip(files, places)]
            for (path, _), block in zip(places, blocks):
                if block != blocks[0]:
                    raise ValueError(
                        f"{path!r}: tensor {name!r} differs from rank 0's, though every rank holds all of it"
                    )
