# SPDX-License-Identifier: Apache-2.0
"""Files of an earlier checkpoint that serve a new one, as nothing in them has changed.

A file serves if it has the new one's header and the bytes of all its tensors. It is cloned where the filesystem can
(the clone shares its blocks until one side is written), or else gets a second name. So each checkpoint is complete
by itself, and any may be deleted. Files that have one content under two names are never written by fastshard: it
replaces files. Whoever else changes one in place changes both.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import stat
import threading
import zlib
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

import torch

from ..engine.pipeline import PathLike, PlannedFile
from ..engine.tensors import Entry
from ..engine.unchanged import Seen, is_in, same_bytes, seen, still_the_same
from ..formats.manifest import FileEntry, read_manifest
from ..formats.naming import MANIFEST_NAME, SUMS_NAME, WEIGHTS_SUFFIX
from ..formats.sha256sums import read_sums
from .hidden_names import final_places

_FICLONE: Final = 0x40049409
_MOST_NOTES: Final = 1024
_running = threading.local()


class Identity(NamedTuple):
    """What tells that a file is the same, and that nobody has written to it."""

    device: int
    inode: int
    nbytes: int
    mtime: int
    ctime: int
    names: int

    def is_still(self, now: Identity) -> bool:
        """Returns whether nobody has written to the file. Its change time moves with its number of names, too."""
        return self[:4] == now[:4] and (self.ctime == now.ctime or self.names != now.names)


def _identity(found: os.stat_result) -> Identity:
    return Identity(
        found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_nlink
    )


class _Note(NamedTuple):
    """What this process knows of a file that it has saved."""

    identity: Identity
    head: bytes
    tensors: Mapping[str, Seen]


_notes: collections.OrderedDict[tuple[int, int], _Note] = collections.OrderedDict()
"""By device and inode, the newest last."""


def _note(note: _Note) -> None:
    key = note.identity[:2]
    _notes[key] = note
    _notes.move_to_end(key)
    while len(_notes) > _MOST_NOTES:
        with contextlib.suppress(KeyError):  # another thread was faster
            _notes.popitem(last=False)


def check_base(base: object) -> None:
    """Raises ``TypeError`` for what is not the path of a base."""
    if base is not None and not isinstance(os.fspath(base), str):  # type: ignore[call-overload]
        raise TypeError(f"base must be a str or a path, not {type(base).__name__}")


class Base:
    """An earlier checkpoint, or one file, and what of it has served a save. It belongs to one thread.

    ``frozen`` are the addresses of memory of frozen parameters: see :mod:`fastshard.engine.unchanged`. A path where
    nothing is has no files that could serve.
    """

    def __init__(self, path: PathLike, dtype: torch.dtype | None, durable: bool) -> None:
        self.path = os.fspath(path)
        self.frozen: frozenset[int] = frozenset()
        self.files = 0
        """Files that are linked or cloned."""
        self.nbytes = 0
        """Bytes of these."""
        self.refused: list[str] = []
        """Why files are written although they have not changed, for ``Stats.fallbacks``."""
        self.known: dict[str, FileEntry] = {}
        """What the base's manifest says of the files that serve, by their new paths."""
        self.known_sums: dict[str, str] = {}
        """Their SHA-256, as the base's ``SHA256SUMS`` says."""
        self._dtype = dtype
        self._durable = durable
        self._found: dict[int, list[str]] | None = None
        self._pending: dict[str, tuple[bytes, Mapping[str, Seen]]] = {}
        self._said: Mapping[str, FileEntry] | None = None
        self._sums: Mapping[str, str] = {}
        self._records: list[str] = []

    def serve(self, planned: PlannedFile, target: PathLike) -> bool:
        """Makes ``target``, which is hidden, a link or a clone of the base's file that is what is planned. Returns
        whether there was one.

        Otherwise the file is to be written.
        """
        path = os.fspath(target)
        tensors = self._seen(planned)
        nbytes = planned.file.nbytes
        for candidate in self._candidates(nbytes):
            try:
                with _opened(candidate) as fd:
                    served = self._made(fd, planned, tensors, path)
            except OSError as error:  # it cannot be read, or is gone: as if there was none
                self._refuse(f"reading files of {self.path!r} refused: {error.strerror}")
                continue
            if not served:
                continue
            self.files += 1
            self.nbytes += nbytes
            self._carry_over(candidate, path, planned)
            self._pending[path] = planned.file.header, tensors
            return True
        if tensors:
            self._pending[path] = planned.file.header, tensors
        return False

    def note(self, _: object = None) -> None:
        """Notes the files of a save, which are complete, and hidden. It is a step of the save."""
        for path, (head, tensors) in self._pending.items():
            with contextlib.suppress(OSError):
                _note(_Note(_identity(os.stat(path)), head, tensors))

    def noted(self, _: object = None) -> None:
        """Brings the notes up to date when the files stand at their final places, which changes their times."""
        for path in map(final_places, self._pending):
            with contextlib.suppress(OSError):
                now = _identity(os.stat(path))
                note = _notes.get(now[:2])
                if note is not None and note.identity[:4] == now[:4]:
                    _note(note._replace(identity=now))

    def _seen(self, planned: PlannedFile) -> dict[str, Seen]:
        if not self.frozen:
            return {}
        found = {e.name: seen(e) for e in planned.layout.entries if is_in(self.frozen, e.tensor)}
        return {name: one for name, one in found.items() if one is not None}

    def _candidates(self, nbytes: int) -> list[str]:
        if self._found is None:
            self._found = {}
            for path in _weights(self.path):
                with contextlib.suppress(OSError):
                    found = os.stat(path)
                    if stat.S_ISREG(found.st_mode):
                        self._found.setdefault(found.st_size, []).append(path)
        return self._found.get(nbytes, [])

    def _made(self, fd: int, planned: PlannedFile, tensors: Mapping[str, Seen], path: str) -> bool:
        """Makes the file at ``path`` if the open one is what is planned. Returns whether it did."""
        head, found = planned.file.header, _identity(os.fstat(fd))
        if found.nbytes != planned.file.nbytes or os.pread(fd, len(head), 0) != head:
            return False
        # First, as nothing needs to be compared where it is refused, and whoever deletes the base comes too late.
        if not _clone(fd, path):
            try:
                # With a folder's descriptor, as Python follows symbolic links only then.
                os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)
            except OSError as error:
                self._refuse(f"linking files of {self.path!r} refused: {error.strerror}")
                return False
        served = False
        try:
            before = _identity(os.fstat(fd))
            served = (
                self._is_the_same(fd, found, planned, tensors)
                and _identity(os.fstat(fd)) == before
                and found[:4] == before[:4]
                and os.stat(path).st_size == found.nbytes
            )
            if served and self._durable:
                with _opened(path) as made:
                    os.fsync(made)
        finally:
            if not served:
                os.unlink(path)
        return served

    def _refuse(self, text: str) -> None:
        if text not in self.refused:
            self.refused.append(text)

    def _is_the_same(
        self, fd: int, identity: Identity, planned: PlannedFile, tensors: Mapping[str, Seen]
    ) -> bool:
        """Returns whether an open file has the bytes of the tensors that are planned."""
        note = _notes.get(identity[:2])
        head = planned.file.header
        known = note.tensors if note and note.head == head and note.identity.is_still(identity) else {}
        believed: list[tuple[Seen, Seen]] = []
        compared: list[tuple[int, Entry]] = []
        placed = _placed(planned)
        for offset, entry in placed:
            if entry.name in known and entry.name in tensors:
                believed.append((known[entry.name], tensors[entry.name]))
            else:
                compared.append((offset, entry))
        # What torch counts as a change may have left the bytes as they were.
        return same_bytes(fd, compared if still_the_same(believed) else placed, self._dtype)

    def _carry_over(self, candidate: str, path: str, planned: PlannedFile) -> None:
        """Takes over what the base's records say of a file, as its bytes are not read again for them."""
        folder = self.path if os.path.isdir(self.path) else os.path.dirname(self.path) or os.curdir
        if self._said is None:
            self._said = {}
            with contextlib.suppress(OSError, ValueError):
                self._said = read_manifest(os.path.join(folder, MANIFEST_NAME)).files
                self._records = [MANIFEST_NAME]
                self._sums = read_sums(os.path.join(folder, SUMS_NAME))
                self._records.append(SUMS_NAME)
        name = os.path.relpath(candidate, folder)
        entry = self._said.get(name)
        if entry is None or entry.tensors is None or entry.crc32 != zlib.crc32(planned.file.header):
            return
        with contextlib.suppress(OSError):
            # A record that is older than the file may be about what was there before.
            written = os.stat(candidate).st_mtime_ns
            if any(os.stat(os.path.join(folder, record)).st_mtime_ns < written for record in self._records):
                return
        self.known[path] = entry
        if name in self._sums:
            self.known_sums[path] = self._sums[name]


def _placed(planned: PlannedFile) -> list[tuple[int, Entry]]:
    offset, found = len(planned.file.header), list[tuple[int, Entry]]()
    for entry in planned.layout.entries:
        found.append((offset, entry))
        offset += entry.view.nbytes
    return found


def _weights(path: str) -> Iterator[str]:
    """Yields the paths of files of weights: that of the file itself, or those in a folder and in the folders in it."""
    if not os.path.isdir(path):
        yield path
        return
    for folder, inner, names in os.walk(path):
        inner[:] = [name for name in inner if not name.startswith(".")]
        yield from (os.path.join(folder, name) for name in sorted(names) if name.endswith(WEIGHTS_SUFFIX))


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


def _clone(fd: int, path: str) -> bool:
    """Makes a file that shares the blocks of another one. Returns whether the filesystem can do that."""
    try:
        made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError:
        return False  # whatever it is, it is the save's, too
    try:
        fcntl.ioctl(made, _FICLONE, fd)
        return True
    except OSError:
        os.unlink(path)
        return False
    finally:
        os.close(made)


@contextlib.contextmanager
def based_on(path: str | None) -> Iterator[None]:
    """In the block, checkpoints that this thread saves for other libraries have this base."""
    outer = current_base()
    _running.base = path
    try:
        yield
    finally:
        _running.base = outer


def current_base() -> str | None:
    """Returns the base of what this thread saves for other libraries."""
    return getattr(_running, "base", None)
