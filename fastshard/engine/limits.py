# SPDX-License-Identifier: Apache-2.0
"""How much memory this process may still use, which limits files on a filesystem in memory.

Such a file counts against the memory limit of the control groups (cgroups) of the process, which a container
sets, for instance. Beyond the limit no call fails: the kernel kills a process. So a save compares what it
needs with the limits before it changes anything.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Final, NamedTuple

from ..errors import SaveError
from .plan import FilePlan

LEAST_NBYTES: Final = 16 << 20
"""The limits are not read for smaller saves, for which that would take too long."""

_IN_MEMORY: Final = frozenset({"tmpfs", "ramfs"})
_UNLIMITED: Final = 1 << 60
"""Version 1 of cgroups reports the largest number of pages where there is no limit."""


class Room(NamedTuple):
    """What a control group lets its processes use in addition."""

    nbytes: int
    limit: int
    group: str
    """The folder in which the kernel describes the group."""


def require_room(files: Sequence[FilePlan], copies: int = 1) -> None:
    """Checks that files on filesystems in memory do not exceed what the process may use.

    ``copies`` is the number of copies of each file. Raises ``SaveError`` with ``errno.ENOMEM``.
    """
    there = [file for file in files if isinstance(file.target, bytes)]
    if copies * sum(file.nbytes for file in there) < LEAST_NBYTES:
        return
    there = [file for file in there if _may_be_in_memory(_folder(file))]
    if copies * sum(file.nbytes for file in there) < LEAST_NBYTES:
        return
    kinds = {folder: _type_of(folder) for folder in {_folder(file) for file in there}}
    there = [file for file in there if kinds[_folder(file)] in _IN_MEMORY]
    needed = copies * sum(file.nbytes for file in there)
    if needed < LEAST_NBYTES:
        return
    room = memory_room()
    if room is not None and needed > room.nbytes:
        raise SaveError(
            errno.ENOMEM,
            f"{os.strerror(errno.ENOMEM)}: {_in_mib(needed)} are needed in memory, where the file is to lie, and the"
            f" memory limit of {_in_mib(room.limit)} of {room.group} leaves {_in_mib(max(0, room.nbytes))}",
            os.fsdecode(_path(there[0])),
        )


def _path(file: FilePlan) -> bytes:
    assert isinstance(file.target, bytes)
    return file.target


def _folder(file: FilePlan) -> bytes:
    return os.path.dirname(_path(file)) or b"."


def _in_mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):,.0f} MiB"


def _may_be_in_memory(folder: bytes) -> bool:
    """Returns whether the folder is on no block device. If it cannot be examined, the save itself reports
    that."""
    try:
        return os.major(os.stat(folder).st_dev) == 0
    except OSError:
        return False


def _type_of(folder: bytes) -> str:
    """Returns the type of the folder's filesystem, as the kernel calls it."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for mount in _mounts("/"):
        if mount.device == number:
            return mount.type
    return ""


class _Mount(NamedTuple):
    device: str
    root: str
    """The folder of the filesystem that is mounted."""
    point: str
    type: str
    options: frozenset[str]
    """Options of the filesystem. Those of a version 1 hierarchy name its controllers."""


def _mounts(root: str) -> Iterator[_Mount]:
    with open(os.path.join(root, "proc/self/mountinfo"), errors="surrogateescape") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            fields, described = before.split(" "), after.split()
            if len(fields) > 4 and len(described) > 2:
                yield _Mount(
                    fields[2],
                    _plain(fields[3]),
                    _plain(fields[4]),
                    described[0],
                    frozenset(described[2].split(",")),
                )


def _plain(name: str) -> str:
    """Decodes a path of a mount table, in which blanks are octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), name)


def memory_room(root: str = "/") -> Room | None:
    """Returns the smallest amount that the control groups of this process leave it; ``None`` if there is no
    limit, or none that can be read.

    ``root`` is where ``/proc`` and the mounted groups are looked for.
    """
    rooms = []
    with contextlib.suppress(OSError, ValueError):
        groups = dict(_own_groups(root))
        for mount in _mounts(root):
            if mount.type == "cgroup2" and "" in groups:
                rooms += [_room_v2(group, root) for group in _walk(mount, groups[""], root)]
            elif mount.type == "cgroup" and "memory" in mount.options and "memory" in groups:
                rooms += [_room_v1(group, root) for group in _walk(mount, groups["memory"], root)]
    return min((room for room in rooms if room is not None), default=None)


def free_memory(root: str = "/") -> int:
    """Returns how many bytes this process can take without anything being moved to swap space, as far as the
    kernel and the control groups tell; a very large number if they tell nothing."""
    available = _figures(os.path.join(root, "proc"), "meminfo").get("MemAvailable:")
    room = memory_room(root)
    return min(
        _UNLIMITED if available is None else available << 10,
        _UNLIMITED if room is None else max(0, room.nbytes),
    )


def _own_groups(root: str) -> Iterator[tuple[str, str]]:
    """Returns the path of this process's group for each controller; ``""`` stands for the one hierarchy of
    version 2."""
    with open(os.path.join(root, "proc/self/cgroup"), errors="surrogateescape") as file:
        for line in file:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            for controller in controllers.split(","):
                yield controller, path


def _walk(mount: _Mount, path: str, root: str) -> Iterator[str]:
    """Yields the folders of the group and of all groups above it, as far as they are mounted here."""
    point = os.path.join(root, mount.point.lstrip("/"))
    inside = PurePosixPath(path)
    below = inside.relative_to(mount.root) if inside.is_relative_to(mount.root) else PurePosixPath()
    if ".." in below.parts or not os.path.isdir(os.path.join(point, below)):
        below = PurePosixPath()  # seen from another namespace: what is mounted is the group
    for group in (below, *below.parents) if below.parts else (below,):
        yield os.path.join(point, group) if group.parts else point


def _room_v2(group: str, root: str) -> Room | None:
    limit, used = _number(group, "memory.max"), _number(group, "memory.current")
    if limit is None or used is None:
        return None
    stat = _figures(group, "memory.stat")
    free = limit - used + _reclaimable(stat, "")
    return Room(
        free + _swap(_number(group, "memory.swap.max"), _number(group, "memory.swap.current"), root),
        limit,
        group,
    )


def _room_v1(group: str, root: str) -> Room | None:
    limit, used = _number(group, "memory.limit_in_bytes"), _number(group, "memory.usage_in_bytes")
    if limit is None or used is None:
        return None
    free = limit - used + _reclaimable(_figures(group, "memory.stat"), "total_")
    both, both_used = (
        _number(group, "memory.memsw.limit_in_bytes"),
        _number(group, "memory.memsw.usage_in_bytes"),
    )
    swap_limit = both - limit if both is not None else None
    swap_used = both_used - used if both_used is not None else None
    return Room(free + _swap(swap_limit, swap_used, root), limit, group)


def _reclaimable(stat: dict[str, int], prefix: str) -> int:
    """Returns the bytes of cached files, which the kernel reclaims before it kills. Files in memory are not
    among them."""
    names = (f"{prefix}inactive_file", f"{prefix}active_file", "slab_reclaimable")
    return sum(stat.get(name, 0) for name in names)


def _swap(limit: int | None, used: int | None, root: str) -> int:
    """Returns the bytes that can be moved to swap space."""
    meminfo = _figures(os.path.join(root, "proc"), "meminfo")
    free = meminfo.get("SwapFree:", 0) << 10
    return free if limit is None else max(0, min(free, limit - (used or 0)))


def _number(group: str, name: str) -> int | None:
    """Reads a number. ``None`` if there is no limit, or no such file, as in the topmost group."""
    try:
        with open(os.path.join(group, name)) as file:
            value = int(file.read())
    except (OSError, ValueError):  # "max"
        return None
    return value if value < _UNLIMITED else None


def _figures(group: str, name: str) -> dict[str, int]:
    """Reads a table of names and numbers; it is empty if the file cannot be read."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError), open(os.path.join(group, name)) as file:
        for key, value, *_ in (line.split() for line in file):
            found[key] = int(value)
    return found
