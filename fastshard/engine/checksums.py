# SPDX-License-Identifier: Apache-2.0
"""CRC-32 and SHA-256 of what lies in files, read once and in parallel, in little memory.

The CRC-32 of a file is taken by as many threads as there are, as those of its parts can be put together; its
SHA-256 by one. Blocks stay in the processor's cache between the read and the sum, in memory that each thread uses again.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final, cast

from .engine import usable_cpus
from .reading import perform_all

_STEP_NBYTES: Final = 64 << 20
"""Bytes between two moments at which all threads can stop."""
_STRETCH_NBYTES: Final = 256 << 20
"""Bytes that one thread reads with a descriptor of its own, so that the kernel reads ahead for it."""
_BLOCK_NBYTES: Final = 2 << 20
"""The kernel copies larger blocks faster, and they stay in the processor's cache until they have been looked at."""
_DIRECT_BLOCK_NBYTES: Final = 4 << 20
"""A disk is not busy while a block is looked at."""
_MAX_THREADS: Final = 16
_DIRECT_THREADS: Final = 4
"""The least number of threads that read past the page cache, so that the disk has something to do meanwhile."""

Passed = Callable[[int], object]


class EndsEarly(ValueError):
    """A file has become shorter than it was."""


@dataclass
class Sums:
    """What is to be known of a file's bytes, and what was found."""

    path: str
    nbytes: int
    ranges: Sequence[tuple[int, int]] = ()
    """Offset and size of ranges in the order of their offsets. None of them overlap."""
    sha256: bool = False
    """Whether that of the whole file is wanted."""
    file: BinaryIO | None = None
    """The file, if it is open already."""
    crc32s: list[int] = field(default_factory=list)
    """The CRC-32 of each range."""
    sha256_found: str = ""
    error: OSError | ValueError | None = None
    """Why nothing was found."""

    @property
    def work(self) -> int:
        """Bytes that have to be read."""
        return sum(nbytes for _, nbytes in self.ranges) + self.sha256 * self.nbytes


def take(wanted: Iterable[Sums], *, direct: bool = False, passed: Passed | None = None) -> None:
    """Takes all the sums, and notes them, or why they could not be taken, in ``wanted``.

    ``direct``: past the page cache, from the disk itself, where the filesystem can do that. ``passed`` is told of
    bytes that have been read, by any thread, one at a time.
    """
    wanted = list(wanted)
    how = _How(direct, passed)
    parts = [list(_stretches(sums, how)) for sums in wanted]
    readers: list[_Stretch | _Whole] = [stretch for those in parts for stretch in those]
    readers += [_Whole(sums, how) for sums in wanted if sums.sha256]
    threads = min(_MAX_THREADS, usable_cpus())
    threads = max(threads, _DIRECT_THREADS) if direct else threads
    # SHA-256 takes longer, and cannot be divided.
    readers.sort(key=lambda reader: (isinstance(reader, _Whole), reader.nbytes), reverse=True)
    try:
        perform_all([list(reader.steps()) for reader in readers], threads)
    finally:
        for reader in readers:
            reader.close()
    for sums, those in zip(wanted, parts):
        if sums.error is None:
            sums.crc32s = _joined(sums, those)


class _How:
    def __init__(self, direct: bool, passed: Passed | None) -> None:
        self.direct = direct
        self._passed = passed
        self._lock = threading.RLock()
        self._of_thread = threading.local()

    def block(self) -> mmap.mmap:
        """Returns the calling thread's memory for what it reads: aligned, as reading past the page cache needs it."""
        found: mmap.mmap | None = getattr(self._of_thread, "block", None)
        if found is None:
            found = mmap.mmap(-1, _DIRECT_BLOCK_NBYTES if self.direct else _BLOCK_NBYTES)
            self._of_thread.block = found
        return found

    def tell(self, nbytes: int) -> None:
        if self._passed is not None:
            with self._lock:
                self._passed(nbytes)


class _Reader:
    """Reads a part of a file with a descriptor of its own, in steps. After an error the others do nothing."""

    def __init__(self, sums: Sums, how: _How) -> None:
        self.sums = sums
        self.how = how
        self.nbytes = 0
        self._file: BinaryIO | None = None
        self._direct = False

    def _step(self, work: Callable[[Any], None], part: Any, last: bool) -> None:
        if self.sums.error is None:
            try:
                if self._file is None:
                    self._file, self._direct = _opened(self.sums, self.how.direct)
                try:
                    work(part)
                except OSError as error:
                    if not self._direct or error.errno != errno.EINVAL:
                        raise
                    self.close()  # it was promised only when the file was opened
                    self._file, self._direct = _opened(self.sums, False)
                    work(part)
            except (OSError, ValueError) as error:
                self.sums.error = error
        if last:
            self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _steps(self, work: Callable[[Any], None], parts: Sequence[Any]) -> Iterator[Callable[[], None]]:
        for number, part in enumerate(parts, 1):
            yield functools.partial(self._step, work, part, number == len(parts))

    def _cut(self) -> EndsEarly:
        return EndsEarly(f"{self.sums.path!r} has become shorter while it was read")


Part = tuple[int, list[tuple[int, int]]]
"""Offset, and number and size of the ranges, or parts of ranges, that follow one another from there."""


class _Stretch(_Reader):
    """Ranges of a file, whose CRC-32 one thread takes."""

    def __init__(self, sums: Sums, how: _How, parts: list[Part]) -> None:
        super().__init__(sums, how)
        self.parts = parts
        self.nbytes = sum(nbytes for _, pieces in parts for _, nbytes in pieces)
        self.found: list[list[int]] = []

    def steps(self) -> Iterator[Callable[[], None]]:
        return self._steps(self._take, self.parts)

    def _take(self, part: Part) -> None:
        from .. import _native

        assert self._file is not None
        offset, pieces = part
        sizes = [nbytes for _, nbytes in pieces]
        path = os.fsencode(self.sums.path)
        block = self.how.block()
        found = _native.crc32_of_ranges(self._file.fileno(), path, offset, sizes, self._direct, block)
        if found is None:
            raise self._cut()
        self.found.append(found)
        self.how.tell(sum(sizes))


class _Whole(_Reader):
    """A file whose SHA-256 one thread takes."""

    def __init__(self, sums: Sums, how: _How) -> None:
        super().__init__(sums, how)
        self.nbytes = sums.nbytes
        self._hash = hashlib.sha256(usedforsecurity=False)

    def steps(self) -> Iterator[Callable[[], None]]:
        return self._steps(self._take, range(0, max(1, self.nbytes), _STEP_NBYTES))

    def _take(self, offset: int) -> None:
        assert self._file is not None
        end = min(self.nbytes, offset + _STEP_NBYTES)
        with memoryview(self.how.block()) as buffer:
            while offset < end:
                done = os.preadv(self._file.fileno(), [buffer], offset)
                if not done:
                    raise self._cut()
                done = min(done, end - offset)
                self._hash.update(buffer[:done])
                offset += done
                self.how.tell(done)
        if end == self.nbytes:
            self.sums.sha256_found = self._hash.hexdigest()


def _opened(sums: Sums, direct: bool) -> tuple[BinaryIO, bool]:
    """Opens a file anew, and says whether what is read goes past the page cache.

    Raises ``OSError``, and ``ValueError`` for what is no regular file.
    """
    path = sums.path if sums.file is None else f"/proc/self/fd/{sums.file.fileno()}"
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    file, is_direct = None, False
    if direct:
        with contextlib.suppress(
            OSError
        ):  # the filesystem has no such thing; what else is wrong is seen next
            file, is_direct = _file_of(os.open(path, flags | os.O_DIRECT)), True
    if file is None:
        try:
            fd = os.open(path, flags)
        except FileNotFoundError:
            if sums.file is None:
                raise
            fd = os.dup(sums.file.fileno())  # no /proc here
        file = _file_of(fd)
        if direct:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{sums.path!r} is not a regular file")
    return file, is_direct


def _file_of(fd: int) -> BinaryIO:
    return cast(BinaryIO, open(fd, "rb", buffering=0))


def _stretches(sums: Sums, how: _How) -> Iterator[_Stretch]:
    """Divides the ranges of a file among threads."""
    parts: list[Part] = []
    nbytes = 0
    for part in _parts(sums.ranges):
        taken = sum(size for _, size in part[1])
        if parts and nbytes + taken > _STRETCH_NBYTES:
            yield _Stretch(sums, how, parts)
            parts, nbytes = [], 0
        parts.append(part)
        nbytes += taken
    if parts:
        yield _Stretch(sums, how, parts)


def _parts(ranges: Iterable[tuple[int, int]]) -> Iterator[Part]:
    """Divides ranges into calls: what follows one another, up to a number of bytes."""
    begin, end, pieces = 0, -1, list[tuple[int, int]]()
    for number, (offset, nbytes) in enumerate(ranges):
        while True:
            if pieces and (offset != end or end - begin >= _STEP_NBYTES):
                yield begin, pieces
                pieces = []
            if not pieces:
                begin = end = offset
            taken = min(nbytes, _STEP_NBYTES - (end - begin))
            pieces.append((number, taken))
            offset, nbytes, end = offset + taken, nbytes - taken, end + taken
            if not nbytes:
                break
    if pieces:
        yield begin, pieces


def _joined(sums: Sums, stretches: Iterable[_Stretch]) -> list[int]:
    from .. import _native

    values = [0] * len(sums.ranges)
    for stretch in stretches:
        for (_, pieces), found in zip(stretch.parts, stretch.found, strict=True):
            for (number, nbytes), crc32 in zip(pieces, found, strict=True):
                before = values[number]
                values[number] = _native.crc32_joined(before, crc32, nbytes) if before else crc32
    return values
