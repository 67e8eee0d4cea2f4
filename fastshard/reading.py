# SPDX-License-Identifier: Apache-2.0
"""Bytes of files -> memory that stands: many files at once, no byte copied twice.

``read(2)`` copies from the page cache to where the bytes belong and lets the GIL go. A mapping would be copied from
as well, after a page fault for each page.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, Final, NamedTuple

from safetensors import SafetensorError

from .engine import usable_cpus

_READ_NBYTES: Final = 16 << 20
"""Of one call: enough to cost nothing, little enough for threads to share a file."""
_MAX_BUFFERS: Final = 1024  # IOV_MAX
_MAX_THREADS: Final = 16


class Piece(NamedTuple):
    """Bytes of a file, and where they belong."""

    offset: int
    nbytes: int
    address: int


class _Read(NamedTuple):
    """One call: neighbours in the file."""

    file: BinaryIO
    pieces: list[Piece]


def read_into(files: Iterable[tuple[BinaryIO, list[Piece]]]) -> None:
    """Reads all the pieces of all the files, in parallel.

    Raises ``OSError`` with the file's name, and ``SafetensorError`` for a file that is shorter than expected; some
    memory has been written to then. Nothing writes to it any more when the call has ended.
    """
    reads = [read for file, pieces in files for read in _cut(file, pieces)]
    if not reads:
        return
    with ThreadPoolExecutor(max(1, min(_MAX_THREADS, usable_cpus(), len(reads)))) as pool:
        try:
            for _ in pool.map(_perform, reads):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _cut(file: BinaryIO, pieces: list[Piece]) -> Iterator[_Read]:
    together: list[Piece] = []
    end = room = 0
    for offset, nbytes, address in sorted(pieces):
        while nbytes:
            if offset != end or not room or len(together) == _MAX_BUFFERS:
                if together:
                    yield _Read(file, together)
                together, room = [], _READ_NBYTES
            taken = min(nbytes, room)
            together.append(Piece(offset, taken, address))
            offset, nbytes, address, room = offset + taken, nbytes - taken, address + taken, room - taken
            end = offset
    if together:
        yield _Read(file, together)


def _perform(read: _Read) -> None:
    pieces = read.pieces
    while pieces:
        buffers = [(ctypes.c_char * piece.nbytes).from_address(piece.address) for piece in pieces]
        try:
            done = os.preadv(read.file.fileno(), buffers, pieces[0].offset)
        except OSError as error:
            error.filename = read.file.name
            raise
        if not done:
            raise SafetensorError(f"{read.file.name!r} has become shorter while it was read")
        pieces = list(_left(pieces, done))


def _left(pieces: list[Piece], done: int) -> Iterator[Piece]:
    for offset, nbytes, address in pieces:
        taken = min(done, nbytes)
        done -= taken
        if taken < nbytes:
            yield Piece(offset + taken, nbytes - taken, address + taken)
