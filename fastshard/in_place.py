# SPDX-License-Identifier: Apache-2.0
"""Whether a file can be replaced by a new one, or has to be written over where it is.

``torch.save`` opens a file and writes over it. A new file that takes its name is better, as it is there at once or not
at all, but it is another file: who holds the old one open, or knows it by another name, sees nothing of it. Links are
followed by the kernel alone, which knows whose links may be followed.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import stat
import sys
import time
from typing import Final

LATE: Final = frozenset(
    (
        errno.EACCES,
        errno.EBUSY,
        errno.EINVAL,
        errno.ENOSYS,
        errno.EOPNOTSUPP,
        errno.EPERM,
        errno.EROFS,
        errno.EXDEV,
    )
)
"""Errors of making a new file and renaming it where the file that is there can be written to nevertheless."""

_EMPTY_PATH: Final = 0x1000
"""The descriptor itself."""
_ATTRIBUTES: Final = (8, 56)
"""Offsets in the answer of statx: attributes of the file, and those that the filesystem knows."""
_MOUNT_ROOT: Final = 0x2000

_LET_GO_SECONDS: Final = 2.0
_made: Final[collections.deque[tuple[int, int]]] = collections.deque(maxlen=256)
"""Device and inode of the newest files of the engine."""


def why_in_place(path: str) -> str | None:
    """Why the file has to be written over; ``None``: it can be replaced, or (``FileNotFoundError``) is not there.

    Raises ``OSError`` where the file can neither be looked at nor be opened for writing, as opening it does.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(mode):
        return "a device or a pipe"
    # With O_CREAT, as torch opens it: the kernel then refuses other users' files in sticky folders (protected_regular).
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY, 0o666)
    try:
        return _why(descriptor, path)
    finally:
        os.close(descriptor)


def _why(descriptor: int, path: str) -> str | None:
    info = os.fstat(descriptor)
    if info.st_nlink > 1:
        return "a file with several names (hard links)"
    user = os.geteuid()
    if user and not (info.st_uid == user and info.st_gid in (os.getegid(), *os.getgroups())):
        return "another user's or group's file"
    place = path
    if not _is(info, path):
        if _by_process(path):
            return "a path that leads through /proc"
        try:
            place = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:  # no /proc here
            place = os.path.realpath(path)
        if not _is(info, place):
            return "a file that is not found by its name"
    if not _may_be_renamed_to(info, os.path.dirname(place) or "."):
        return "a folder that may not be written to"
    if _is_mount(descriptor, place):
        return "a file that is a mount point"
    return _why_open_by_others(descriptor, info, place)


def _is(info: os.stat_result, place: str) -> bool:
    """Whether it is what stands there, a link not followed."""
    try:
        return os.path.samestat(os.lstat(place), info)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _may_be_renamed_to(info: os.stat_result, folder: str) -> bool:
    user = os.geteuid()
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        return False
    if user in (0, info.st_uid):
        return True
    held = os.stat(folder)
    return not held.st_mode & stat.S_ISVTX or held.st_uid == user


def _why_open(descriptor: int, info: os.stat_result, place: str) -> str | None:
    """Whether this process would go on to read and write the old file: by another descriptor.

    Not where it has mapped it: a mapped file that is cut kills who reads it.
    """
    from . import _native

    holders = _native.holders_of(descriptor)
    if holders is None:  # no /proc here
        return None
    found, certain = holders
    if not certain:
        return "a file that this process may hold open"
    made = (info.st_dev, info.st_ino) in _made
    if all(made and _is_nameless(other) for other in found):  # the engine's own
        return None
    return None if _is_mapped(info, place) else "a file that this process holds open"


def _is_nameless(descriptor: int) -> bool:
    """Whether the file had no name when it was opened."""
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_TMPFILE == os.O_TMPFILE
    except OSError as error:
        if error.errno == errno.EBADF:  # closed in the meantime
            return True
        raise


def note_made(path: str) -> None:
    """The engine has made this file, and may have it open for a moment: what was written is on its way to the disk."""
    info = os.stat(path)
    _made.append((info.st_dev, info.st_ino))


def _why_open_by_others(descriptor: int, info: os.stat_result, place: str) -> str | None:
    """The same, once the engine has let go of it."""
    made = (info.st_dev, info.st_ino)
    reason = _why_open(descriptor, info, place)
    if reason is None or made not in _made:
        return reason
    end = time.monotonic() + _LET_GO_SECONDS
    while reason is not None and time.monotonic() < end:
        time.sleep(0.002)
        reason = _why_open(descriptor, info, place)
    with contextlib.suppress(ValueError):
        _made.remove(made)
    return reason


def _is_mapped(info: os.stat_result, place: str) -> bool:
    inode, at = str(info.st_ino).encode(), os.fsencode(place).replace(b"\n", b"\\012")
    with open("/proc/self/maps", "rb") as maps:
        for line in maps:
            fields = line.rstrip(b"\n").split(None, 5)
            if len(fields) == 6 and fields[4] == inode and fields[5] == at:
                return True
    return False


def _is_mount(descriptor: int, place: str) -> bool:
    """Whether the file itself is mounted there: a name that cannot be taken."""
    try:
        if _libc().statx(descriptor, b"", _EMPTY_PATH, 0, found := ctypes.create_string_buffer(256)) == 0:
            attributes, known = (int.from_bytes(found.raw[at : at + 8], sys.byteorder) for at in _ATTRIBUTES)
            if known & _MOUNT_ROOT:  # since Linux 5.8
                return bool(attributes & _MOUNT_ROOT)
    except AttributeError:
        pass
    folder = os.open(os.path.dirname(place) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _mount(descriptor) != _mount(folder)
    finally:
        os.close(folder)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _mount(descriptor: int) -> bytes:
    try:
        with open(f"/proc/self/fdinfo/{descriptor}", "rb", buffering=0) as file:
            return next((line for line in file.read(4096).splitlines() if line.startswith(b"mnt_id:")), b"")
    except FileNotFoundError:  # no /proc here
        return b""


def _by_process(path: str) -> bool:
    """Whether a name in there is a process's descriptor: it leads to the file whatever becomes of its name."""
    for _ in range(40):
        if os.path.abspath(path).startswith(("/proc/", "/dev/fd/")):
            return True
        try:
            path = os.path.join(os.path.dirname(path), os.readlink(path))
        except OSError as error:
            if error.errno == errno.EINVAL:  # no link
                return False
            raise
    return False
