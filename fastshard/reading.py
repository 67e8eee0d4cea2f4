# SPDX-License-Identifier: Apache-2.0
"""Bytes of files -> memory that stands: many files at once, no byte copied twice.

``read(2)`` copies from the page cache to where the bytes belong and lets the GIL go. A mapping would be copied from
as well, after a page fault for each page.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, Final, NamedTuple

from safetensors import SafetensorError

from .engine import usable_cpus

_READ_NBYTES: Final = 16 << 20
"""Of one call: enough to cost nothing, little enough to stop soon."""
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
    threads = min(_MAX_THREADS, usable_cpus())
    wanted = [(file, pieces) for file, pieces in files if pieces]
    # One reader for each file, which the kernel reads ahead of; more only where there are fewer files than threads.
    readers = [
        reads
        for file, pieces in wanted
        for reads in _shared_out([*_cut(file, pieces)], -(-threads // len(wanted)))
    ]
    stop = threading.Event()

    def perform(reads: list[_Read]) -> None:
        try:
            for read in reads:
                if stop.is_set():
                    return
                _perform(read)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(threads) as pool:
        try:
            for _ in pool.map(perform, sorted(readers, key=len, reverse=True)):
                pass
        finally:
            stop.set()


def _shared_out(reads: list[_Read], readers: int) -> list[list[_Read]]:
    """In stretches of about the same length."""
    each = -(-len(reads) // readers)
    return [reads[i : i + each] for i in range(0, len(reads), each)]


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
