# SPDX-License-Identifier: Apache-2.0
"""Whether a file can be replaced by a new one, or has to be written over where it is.

``torch.save`` opens a file and writes over it. A new file that takes its name is better, as it is there at once or not
at all, but it is another file: who holds the old one open, or knows it by another name, sees nothing of it. Links are
followed by the kernel alone, which knows whose links may be followed.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import os
import time
from typing import Final

from .. import _native

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

_LET_GO_SECONDS: Final = 2.0
_made: Final[collections.deque[tuple[int, int]]] = collections.deque(maxlen=256)
"""Device and inode of the newest files of the engine."""


def why_in_place(path: str) -> str | None:
    """Why the file has to be written over; ``None``: it can be replaced, or (``FileNotFoundError``) is not there.

    Raises ``OSError`` where the file can neither be looked at nor be opened for writing, as opening it does.
    """
    why, held = _native.look_at_file(os.fsencode(path))
    return _why_held(path) if held else why


def _why_held(path: str) -> str | None:
    """Whether this process would go on to read and write the old file, once the engine has let go of it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY, 0o666)
    try:
        info = os.fstat(descriptor)
        reason = _why_open(descriptor, info)
        made = (info.st_dev, info.st_ino)
        if reason is None or made not in _made:
            return reason
        end = time.monotonic() + _LET_GO_SECONDS
        while reason is not None and time.monotonic() < end:
            time.sleep(0.002)
            reason = _why_open(descriptor, info)
        with contextlib.suppress(ValueError):
            _made.remove(made)
        return reason
    finally:
        os.close(descriptor)


def _why_open(descriptor: int, info: os.stat_result) -> str | None:
    """Whether this process has it open by another descriptor.

    Not where it has mapped it: a mapped file that is cut kills who reads it.
    """
    holders = _native.holders_of(descriptor)
    if holders is None:  # no /proc here
        return None
    found, certain = holders
    if not certain:
        return "a file that this process may hold open"
    made = (info.st_dev, info.st_ino) in _made
    if all(made and _is_nameless(other) for other in found):  # the engine's own
        return None
    return None if _is_mapped(descriptor, info) else "a file that this process holds open"


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


def _is_mapped(descriptor: int, info: os.stat_result) -> bool:
    inode, place = str(info.st_ino).encode(), os.readlink(f"/proc/self/fd/{descriptor}".encode())
    place = place.replace(b"\n", b"\\012")
    with open("/proc/self/maps", "rb") as maps:
        for line in maps:
            fields = line.rstrip(b"\n").split(None, 5)
            if len(fields) == 6 and fields[4] == inode and fields[5] == place:
                return True
    return False
