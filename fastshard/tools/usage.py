# SPDX-License-Identifier: Apache-2.0
"""What checkpoints really occupy, where files of several of them are hard links or share blocks (reflinks).

A file that has several names counts once, and so does each block that the filesystem has in several files (which
``FIEMAP`` tells, on XFS, btrfs and others).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, NamedTuple

from .run_folder import CHECKPOINT_PREFIX, named_checkpoints

OTHERS: Final = "(other files)"
_BLOCK_NBYTES: Final = 512
_FIEMAP: Final = 0xC020660B
_REQUEST: Final = struct.Struct("=QQIIII")
_EXTENT: Final = struct.Struct("=QQQ16xI12x")
_MOST_EXTENTS: Final = 512
_LAST: Final = 0x1
_NOT_PLACED: Final = 0x2 | 0x4 | 0x200
"""Unknown, delayed, inline: no place of its own yet, so it is shared with nobody."""
_SHARED: Final = 0x2000

Identity = tuple[int, int]
_Holders = dict[Identity, int]


@dataclass
class Usage:
    """What a checkpoint occupies."""

    name: str
    path: str
    files: int = 0
    nbytes: int = 0
    """The sizes of its files together."""
    occupied: int = 0
    """Bytes of all blocks that it uses, alone or with others."""
    frees: int = 0
    """Bytes that would be free if it were deleted, and nothing else."""


@dataclass
class UsageOfAll:
    """What checkpoints occupy together."""

    checkpoints: list[Usage] = field(default_factory=list)
    nbytes: int = 0
    """The sizes of all files together, as if nothing were shared."""
    occupied: int = 0
    """Bytes of all blocks, each counted once."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Inode:
    """A file or a folder, under however many names."""

    path: str
    nbytes: int
    names: int
    """How many names it has, in the folders that are looked at and elsewhere."""
    seen: int = 0
    owners: set[int] = field(default_factory=set)
    """Numbers of the checkpoints that it is in."""

    @property
    def elsewhere(self) -> bool:
        """Whether it has names that were not seen."""
        return self.seen < self.names


class Extent(NamedTuple):
    """Blocks that the filesystem says are shared."""

    begin: int
    nbytes: int


def usage_of(paths: Iterable[str | os.PathLike[str]], *, prefix: str = CHECKPOINT_PREFIX) -> UsageOfAll:
    """Finds out what the checkpoints of runs occupy, together and each alone.

    Args:
        paths: Folders of runs, which have checkpoints in them, and other folders and files, which count as one each.
        prefix: What the names of checkpoints have before the number.

    Raises ``OSError``.
    """
    found = UsageOfAll()
    inodes: dict[Identity, _Inode] = {}
    for given in paths:
        path = os.fspath(given)
        os.lstat(path)
        for usage, tops in _units(path, prefix):
            number = len(found.checkpoints)
            found.checkpoints.append(usage)
            for top in tops:
                for name, status in _walk(top):
                    _note(inodes, name, status, number, usage)
    shared: dict[int, dict[Identity, list[Extent]]] = {}
    for identity, inode in inodes.items():
        extents = _shared_extents(inode.path) if inode.nbytes else []
        if extents:
            shared.setdefault(identity[0], {})[identity] = extents
        own = max(0, inode.nbytes - sum(extent.nbytes for extent in extents))
        _count(found, own, inode.owners, inode.elsewhere)
    for files in shared.values():
        for nbytes, holders in _segments(files):
            held = [inodes[identity] for identity in holders]
            # Blocks that are shared, but with no other file here, are shared with one elsewhere.
            elsewhere = sum(holders.values()) < 2 or any(inode.elsewhere for inode in held)
            _count(found, nbytes, set().union(*(inode.owners for inode in held)), elsewhere)
    found.nbytes = sum(usage.nbytes for usage in found.checkpoints)
    return found


def _units(path: str, prefix: str) -> Iterator[tuple[Usage, list[str]]]:
    """Yields what counts as one, and the files and folders that belong to it."""
    checkpoints = named_checkpoints(path, prefix) if os.path.isdir(path) else []
    for checkpoint in checkpoints:
        yield Usage(checkpoint.name, checkpoint.path), [checkpoint.path]
    if not checkpoints:
        yield Usage(path, path), [path]
        return
    names = {checkpoint.name for checkpoint in checkpoints}
    others = [os.path.join(path, name) for name in sorted(os.listdir(path)) if name not in names]
    if others:
        yield Usage(OTHERS, path), others


def _walk(path: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yields a file, or a folder and all that is in it. What vanishes meanwhile is passed over."""
    ahead = [path]
    while ahead:
        path = ahead.pop()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = os.lstat(path)
            yield path, status
            if stat.S_ISDIR(status.st_mode):
                ahead += (os.path.join(path, name) for name in os.listdir(path))


def _note(
    inodes: dict[Identity, _Inode], path: str, status: os.stat_result, number: int, usage: Usage
) -> None:
    is_folder = stat.S_ISDIR(status.st_mode)
    if not is_folder:
        usage.files += 1
        usage.nbytes += status.st_size
    identity = status.st_dev, status.st_ino
    inode = inodes.get(identity)
    if inode is None:
        names = 1 if is_folder else status.st_nlink
        inode = inodes[identity] = _Inode(path, status.st_blocks * _BLOCK_NBYTES, names)
    inode.seen += 1
    inode.owners.add(number)


def _count(found: UsageOfAll, nbytes: int, owners: set[int], elsewhere: bool) -> None:
    found.occupied += nbytes
    for number in owners:
        found.checkpoints[number].occupied += nbytes
        if len(owners) == 1 and not elsewhere:
            found.checkpoints[number].frees += nbytes


def _segments(files: Mapping[Identity, list[Extent]]) -> Iterator[tuple[int, _Holders]]:
    """Cuts the shared extents of a filesystem where any of them begins or ends. Yields the size of each segment, and
    how many times each file has it."""
    edges = sorted(
        (at, identity, change)
        for identity, extents in files.items()
        for extent in extents
        for at, change in ((extent.begin, 1), (extent.begin + extent.nbytes, -1))
    )
    holders: _Holders = {}
    reached = 0
    for at, identity, change in edges:
        if holders and at > reached:
            yield at - reached, dict(holders)
        reached = at
        holders[identity] = holders.get(identity, 0) + change
        if not holders[identity]:
            del holders[identity]


def _shared_extents(path: str) -> list[Extent]:
    """Returns which blocks of a file are shared with other files; none where the filesystem does not tell."""
    try:
        # Neither a link's target nor a pipe's other end is of interest.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        return list(_shared_in(fd)) if stat.S_ISREG(os.fstat(fd).st_mode) else []
    except OSError:  # no FIEMAP here
        return []
    finally:
        os.close(fd)


def _shared_in(fd: int) -> Iterator[Extent]:
    begin = 0
    while True:
        buffer = bytearray(_REQUEST.size + _MOST_EXTENTS * _EXTENT.size)
        _REQUEST.pack_into(buffer, 0, begin, 2**64 - 1 - begin, 0, 0, _MOST_EXTENTS, 0)
        fcntl.ioctl(fd, _FIEMAP, buffer)
        count = _REQUEST.unpack_from(buffer)[3]
        for number in range(count):
            at = _REQUEST.size + number * _EXTENT.size
            logical, physical, nbytes, flags = _EXTENT.unpack_from(buffer, at)
            if flags & _SHARED and not flags & _NOT_PLACED:
                yield Extent(physical, nbytes)
            begin = logical + nbytes
            if flags & _LAST:
                return
        if not count:
            return
