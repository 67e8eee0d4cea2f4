# SPDX-License-Identifier: Apache-2.0
"""Reads bytes of many files at once into memory that exists already, without copying any byte twice.

``read(2)`` copies from the page cache to where the bytes belong, and releases the GIL. Reading from a mapping
would copy the bytes as well, and take a page fault for each page.
"""

from __future__ import annotations

import _thread
import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO, Final, NamedTuple, TypeVar

from safetensors import SafetensorError

from .engine import usable_cpus

_READ_NBYTES: Final = 16 << 20
"""Bytes of one system call: enough that its cost does not matter, few enough to stop soon."""
_MAX_BUFFERS: Final = 1024  # IOV_MAX
_MAX_THREADS: Final = 16
_POLL_SECONDS: Final = 0.1
T = TypeVar("T")


class Piece(NamedTuple):
    """A range of a file, and the address where its bytes belong."""

    offset: int
    nbytes: int
    address: int


class Read(NamedTuple):
    """One system call, for pieces that are neighbours in the file."""

    file: BinaryIO
    pieces: list[Piece]

    def perform(self) -> None:
        pieces = self.pieces
        while pieces:
            buffers = [(ctypes.c_char * piece.nbytes).from_address(piece.address) for piece in pieces]
            try:
                done = os.preadv(self.file.fileno(), buffers, pieces[0].offset)
            except OSError as error:
                error.filename = self.file.name
                raise
            if not done:
                raise SafetensorError(f"{self.file.name!r} has become shorter while it was read")
            pieces = list(_left(pieces, done))


def read_into(files: Iterable[tuple[BinaryIO, list[Piece]]]) -> None:
    """Reads all the pieces of all the files, in parallel.

    A file is read by one thread where there are enough files: two threads that read one file in turn take 1.2
    to 1.3 times as long, as the kernel reads ahead for neither.

    Raises ``OSError`` with the file's name, and ``SafetensorError`` for a file that is shorter than expected;
    some memory has been written to then. When the call has ended nothing writes to the memory any more.
    """
    threads = min(_MAX_THREADS, usable_cpus())
    wanted = [(file, pieces) for file, pieces in files if pieces]
    # One reader for each file, which the kernel reads ahead of; more only where there are fewer files than threads.
    readers: list[Sequence[Callable[[], object]]] = [
        reads
        for file, pieces in wanted
        for reads in shared_out([read.perform for read in cut(file, pieces)], -(-threads // len(wanted)))
    ]
    perform_all(sorted(readers, key=len, reverse=True), threads)


def perform_all(readers: Sequence[Sequence[Callable[[], object]]], threads: int) -> None:
    """Performs all reads, by the calling thread and as many others as can be started and are needed.

    The first error is raised when no other read is under way. Where memory is short, a thread may end before its first
    line of Python, and nobody is told. So only those threads are waited for that have taken a read.
    """
    left, changed = deque(readers), threading.Semaphore(0)
    errors: list[BaseException] = []
    begun: list[None] = []  # by other threads, as many as have ended in the end; lists grow in one step
    ended: list[None] = []

    def take() -> Sequence[Callable[[], object]] | None:
        try:
            return None if errors else left.popleft()
        except IndexError:
            return None

    def perform(reads: Sequence[Callable[[], object]]) -> None:
        for read in reads:
            if errors:
                return
            read()

    def work() -> None:
        begun.append(None)  # before it takes anything
        try:
            while reads := take():
                perform(reads)
        except BaseException as error:
            errors.append(error)
        finally:
            ended.append(None)
            changed.release()

    try:
        for _ in range(min(threads, len(readers)) - 1):
            try:
                _thread.start_new_thread(work, ())
            except (RuntimeError, MemoryError, OSError):
                break  # with those there are
        while reads := take():
            perform(reads)
    except BaseException as error:
        errors.append(error)
    left.clear()  # late ones find nothing
    while len(ended) < len(begun):
        try:
            changed.acquire(timeout=_POLL_SECONDS)
        except BaseException as error:  # Ctrl-C: not before the memory is left alone
            errors.append(error)
    if errors:
        raise errors[0]


def shared_out(reads: Sequence[T], readers: int) -> list[Sequence[T]]:
    """Divides the reads into stretches of about equal length."""
    each = max(1, -(-len(reads) // readers))
    return [reads[i : i + each] for i in range(0, len(reads), each)]


def cut(file: BinaryIO, pieces: Iterable[Piece]) -> Iterator[Read]:
    """Divides pieces of a file into system calls."""
    together: list[Piece] = []
    end = room = 0
    for offset, nbytes, address in sorted(pieces):
        while nbytes:
            if offset != end or not room or len(together) == _MAX_BUFFERS:
                if together:
                    yield Read(file, together)
                together, room = [], _READ_NBYTES
            taken = min(nbytes, room)
            together.append(Piece(offset, taken, address))
            offset, nbytes, address, room = offset + taken, nbytes - taken, address + taken, room - taken
            end = offset
    if together:
        yield Read(file, together)


def _left(pieces: list[Piece], done: int) -> Iterator[Piece]:
    for offset, nbytes, address in pieces:
        taken = min(done, nbytes)
        done -= taken
        if taken < nbytes:
            yield Piece(offset + taken, nbytes - taken, address + taken)
