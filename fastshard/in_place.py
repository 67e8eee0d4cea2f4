# SPDX-License-Identifier: Apache-2.0
"""Whether a file can be replaced by a new one, or has to be written over where it is.

``torch.save`` opens a file and writes over it. A new file that takes its name is better, as it is there at once or not
at all, but it is another file: who holds the old one open, or knows it by another name, sees nothing of it. Links are
followed by the kernel alone, which knows whose links may be followed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
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


def why_in_place(path: str) -> str | None:
    """Why the file has to be written over; ``None``: it can be replaced, or is not there yet.

    Raises ``OSError`` where the file can neither be looked at nor be opened for writing, as opening it does.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return None
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
    if _by_process(path):
        return "a path that leads through /proc"
    try:
        place = os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:
        return None
    directory, name = os.path.split(place)
    try:
        folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return "a file that is not found by its name"
    try:
        return _why_in(folder, name, descriptor, info) or _why_open(descriptor, info, place)
    finally:
        os.close(folder)


def _why_in(folder: int, name: str, descriptor: int, info: os.stat_result) -> str | None:
    """What is against a rename in its folder."""
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        found = None
    if found is None or not os.path.samestat(found, info):
        return "a file that is not found by its name"
    if not os.access(".", os.W_OK | os.X_OK, dir_fd=folder, effective_ids=True):
        return "a folder that may not be written to"
    held = os.fstat(folder)
    if held.st_mode & stat.S_ISVTX and os.geteuid() not in (0, info.st_uid, held.st_uid):
        return "a folder that may not be written to"
    return "a file that is a mount point" if _is_mount(descriptor, folder) else None


def _why_open(descriptor: int, info: os.stat_result, place: str) -> str | None:
    """Whether this process would go on to read and write the old file: by another descriptor.

    Not where it has mapped it: a mapped file that is cut kills who reads it.
    """
    device, inode = info.st_dev, info.st_ino
    for name in os.listdir("/proc/self/fd"):
        try:
            found = os.fstat(int(name))
        except OSError as error:
            if error.errno != errno.EBADF:  # it cannot be told
                return "a file that this process may hold open"
            continue  # closed in the meantime
        if found.st_ino == inode and found.st_dev == device and int(name) != descriptor:
            return None if _is_mapped(info, place) else "a file that this process holds open"
    return None


def _is_mapped(info: os.stat_result, place: str) -> bool:
    inode, at = str(info.st_ino).encode(), os.fsencode(place).replace(b"\n", b"\\012")
    with open("/proc/self/maps", "rb") as maps:
        for line in maps:
            fields = line.rstrip(b"\n").split(None, 5)
            if len(fields) == 6 and fields[4] == inode and fields[5] == at:
                return True
    return False


def _is_mount(descriptor: int, folder: int) -> bool:
    """Whether the file itself is mounted there: a name that cannot be taken."""
    try:
        if ctypes.CDLL(None).statx(descriptor, b"", _EMPTY_PATH, 0, found := ctypes.create_string_buffer(256)) == 0:
            attributes, known = (int.from_bytes(found[at : at + 8], sys.byteorder) for at in _ATTRIBUTES)
            if known & _MOUNT_ROOT:  # since Linux 5.8
                return bool(attributes & _MOUNT_ROOT)
    except AttributeError:
        pass
    return _mount(descriptor) != _mount(folder)


def _mount(descriptor: int) -> bytes:
    with open(f"/proc/self/fdinfo/{descriptor}", "rb", buffering=0) as file:
        return next((line for line in file.read(4096).splitlines() if line.startswith(b"mnt_id:")), b"")


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
