# SPDX-License-Identifier: Apache-2.0
"""Makes the record of the files that a save writes, and takes files out of the manifest that are written otherwise."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import threading
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from ..engine.checksums import Passed, Sums, take
from ..formats.hf_index import read_stored
from ..formats.manifest import FileEntry, TensorEntry, read_manifest
from ..formats.naming import MANIFEST_NAME, RECORDS, SUMS_NAME, WEIGHTS_SUFFIX
from ..formats.sha256sums import read_sums
from .directory import Replacement
from .record import Record

if TYPE_CHECKING:
    from ..engine.pipeline import PlannedFile

Wanted = bool | str
"""What is to be made: nothing, the manifest, or with ``"sha256"`` also ``SHA256SUMS``."""
_SHA256: Final = "sha256"
_TICK: Final = 100_000_000
"""Nanoseconds by which clocks of filesystems may be behind."""
_PLAIN: Final = re.compile(r"[\w. -]+", re.ASCII)
"""Names that stand in both files as they are."""
_log: Final = logging.getLogger("fastshard")


class _OfThisThread(threading.local):
    written: list[str] | None = None


_this_thread = _OfThisThread()


def check_wanted(manifest: object) -> None:
    """Raises ``ValueError`` for anything but ``True``, ``False`` and ``"sha256"``."""
    if not isinstance(manifest, bool) and manifest != _SHA256:
        raise ValueError(f"manifest must be True, False or {_SHA256!r}, not {manifest!r}")


class Outline:
    """A planned file, as it is known before its bytes have passed. It keeps no tensor alive."""

    def __init__(self, planned: PlannedFile) -> None:
        self._head = planned.file.header
        self._names, self._sizes = planned.layout.names, planned.layout.sizes

    def fits(self, crc32s: Mapping[str, int]) -> bool:
        """Returns whether these are of its tensors, and of all of them."""
        return len(crc32s) == len(self._names)

    def entry(self, crc32s: Mapping[str, int] | None = None) -> FileEntry:
        """Returns what a manifest says of the file. ``crc32s`` are those of its tensors, if they were taken."""
        offset, tensors = len(self._head), {}
        for name, nbytes in zip(self._names, self._sizes):
            tensors[name] = TensorEntry(offset, nbytes, None if crc32s is None else crc32s[name])
            offset += nbytes
        return FileEntry(offset, None if crc32s is None else zlib.crc32(self._head), tensors)


def record_of(
    folder: str,
    manifest: Wanted,
    known: Mapping[str, FileEntry],
    known_sums: Mapping[str, str] | None = None,
    *,
    names: Iterable[str] | None = None,
    keep_cached: bool = True,
    passed: Passed | None = None,
) -> Record:
    """Returns the record of these files in a folder, or of all in it and in the folders in it.

    What is known of a file is not read again. With ``keep_cached=False``, nothing of what is read stays in the page
    cache. ``passed`` is told of bytes that were read.
    """
    entries: dict[str, FileEntry] = {}
    sums: dict[str, str] = {}
    wanted: dict[str, _Read] = {}
    for name in _files_in(folder) if names is None else names:
        if name in known:
            entries[name] = known[name]
        hashed = manifest == _SHA256
        if hashed and known_sums and name in known_sums:
            sums[name] = known_sums[name]
            hashed = False
        if hashed or name not in known:
            wanted[name] = _sums(os.path.join(folder, name), name not in known, hashed)
    take(wanted.values(), direct=not keep_cached, passed=passed)
    for name, found in wanted.items():
        if found.error is not None:
            raise found.error
        if found.sha256:
            sums[name] = found.sha256_found
        if found.ranges:
            entries[name] = _entry(found)
    return Record(entries, sums)


def recorder(manifest: Wanted, keep_cached: bool) -> Callable[[str], Record] | None:
    """Returns a function that returns the record of all files in a folder; ``None`` if none is wanted.

    Raises as :func:`check_wanted`.
    """
    check_wanted(manifest)
    return (lambda folder: record_of(folder, manifest, {}, keep_cached=keep_cached)) if manifest else None


class _Read(Sums):
    """Sums of a file, with the names of the tensors that its ranges are."""

    names: Sequence[str] | None = None


def _sums(path: str, unknown: bool, sha256: bool) -> _Read:
    nbytes = os.stat(path).st_size
    if not unknown:
        return _Read(path, nbytes, sha256=sha256)
    if path.endswith(WEIGHTS_SUFFIX):
        try:
            stored = read_stored(path)
        except ValueError:
            pass  # then it is a file like any other
        else:
            begin = stored.header.nbytes
            tensors = stored.header.tensors
            ranges = [(0, begin), *((begin + t.begin, t.end - t.begin) for t in tensors)]
            found = _Read(path, nbytes, ranges, sha256)
            found.names = [tensor.name for tensor in tensors]
            return found
    return _Read(path, nbytes, [(0, nbytes)], sha256)


def _entry(found: _Read) -> FileEntry:
    first, *others = found.crc32s
    if found.names is None:
        return FileEntry(found.nbytes, first)
    ranges = zip(found.names, found.ranges[1:], others, strict=True)
    return FileEntry(found.nbytes, first, {n: TensorEntry(*where, crc32) for n, where, crc32 in ranges})


def _files_in(folder: str, within: bool = True) -> list[str]:
    """Returns the paths of the regular files in a folder and ``within`` the folders in it, without what is hidden and
    without records."""
    found: list[str] = []
    ahead = [""]
    while ahead:
        inner = ahead.pop()
        for entry in os.scandir(os.path.join(folder, inner)):
            path = f"{inner}/{entry.name}" if inner else entry.name
            if entry.name.startswith(".fastshard-") or path in RECORDS:
                continue
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode) and within:
                ahead.append(path)
            elif stat.S_ISREG(mode):
                found.append(path)
    return sorted(found)


@contextlib.contextmanager
def noted() -> Iterator[list[str]]:
    """A block in which the files are noted, by their full paths, that this thread writes without a manifest."""
    before = _this_thread.written
    written = _this_thread.written = []
    try:
        yield written
    finally:
        _this_thread.written = before


def forget(paths: Iterable[str | os.PathLike[str]], *, durable: bool = False) -> None:
    """Takes files out of manifest and digests of their folders, as they are going to be written without a manifest."""
    folders: dict[str, set[str]] = {}
    for path in paths:
        if _this_thread.written is not None:
            _this_thread.written.append(os.path.abspath(os.fsdecode(path)))
        folder, name = os.path.split(os.fsdecode(path))
        folders.setdefault(folder or os.curdir, set()).add(name)
    for folder, names in folders.items():
        # There is none, mostly, which is to cost a microsecond.
        if os.access(os.path.join(folder, MANIFEST_NAME), os.F_OK) and _names_any(folder, names):
            try:
                _say(folder, Record({}, {}, frozenset(names)), durable)
            except OSError as error:  # it is the new file that counts
                _log.warning("%s still names what is being replaced: %s", folder, error)


def _names_any(folder: str, names: Iterable[str]) -> bool:
    """Returns whether manifest or digests of a folder may have one of these names."""
    for record in RECORDS:
        try:
            with open(os.path.join(folder, record), "rb") as file:
                text = file.read()
        except OSError:
            if record == MANIFEST_NAME:
                return False  # there is none, or it cannot be read and says nothing
            continue
        if any(not _PLAIN.fullmatch(name) or name.encode() in text for name in names):
            return True
    return False


def add(path: str, manifest: Wanted, *, durable: bool = False, keep_cached: bool = True) -> None:
    """Adds a file that stands to manifest and digests of its folder."""
    folder, name = os.path.split(path)
    folder = folder or os.curdir
    _say(folder, record_of(folder, manifest, {}, names=[name], keep_cached=keep_cached), durable)


def complete(
    folder: str,
    manifest: Wanted,
    *,
    since: int = 0,
    within: bool = True,
    only: Collection[str] | None = None,
) -> None:
    """Adds what others have written into a folder, and ``within`` the folders in it, to its manifest and digests.

    ``since``: in nanoseconds since the epoch, when that began; older files are left as they are described. Files of
    tensors that the manifest has described since they were written are not read again. ``only``: the full paths of the
    files that are looked at, if not all.
    """
    try:
        told = os.stat(os.path.join(folder, MANIFEST_NAME)).st_mtime_ns
        files = read_manifest(os.path.join(folder, MANIFEST_NAME)).files
        sums = read_sums(os.path.join(folder, SUMS_NAME)) if manifest == _SHA256 else {}
    except (OSError, ValueError):
        told, files, sums = 0, {}, {}
    known: dict[str, FileEntry] = {}
    names = []
    for name in _files_in(folder, within):
        if only is not None and os.path.abspath(os.path.join(folder, name)) not in only:
            continue
        info = _status(folder, name)
        if info is not None and info.st_ctime_ns >= since - _TICK:
            names.append(name)
            entry = files.get(name)
            is_told = entry is not None and entry.tensors is not None and info.st_mtime_ns <= told
            if entry is not None and is_told and entry.nbytes == info.st_size:
                known[name] = entry
    said = {*files, *sums} - {*RECORDS} if only is None else ()
    gone = frozenset(name for name in said if _status(folder, name) is None)
    if names or gone:
        known_sums = {name: sums[name] for name in known if name in sums}
        found = record_of(folder, manifest, known, known_sums, names=names)
        _say(folder, found._replace(without=gone), False)


def _status(folder: str, name: str) -> os.stat_result | None:
    try:
        return os.stat(os.path.join(folder, name))
    except FileNotFoundError:  # others go on
        return None


def _say(folder: str, record: Record, durable: bool) -> None:
    """Brings a record into the manifest of a folder."""
    change = Replacement(folder, durable=durable)
    with change:
        change.record = record
        change.publish()
