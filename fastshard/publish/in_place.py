# SPDX-License-Identifier: Apache-2.0
"""Decides whether a file can be replaced by a new one, or has to be written over where it is.

``torch.save`` opens a file and writes over it. A new file that takes its name is better, as it appears
complete or not at all. But it is another file: whoever has the old one open, or knows it by another name,
sees nothing of it. Symbolic links are followed by the kernel only, which knows whose links may be followed.
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
"""Errors of making and renaming a new file that can occur although the existing file can be written to."""

_LET_GO_SECONDS: Final = 2.0
_made: Final[collections.deque[tuple[int, int]]] = collections.deque(maxlen=256)
"""Device and inode of the newest files that the engine has made."""


def why_in_place(path: str) -> str | None:
    """Returns why the file has to be written over; ``None`` if it can be replaced.

    Raises ``FileNotFoundError`` if there is none, and the ``OSError`` of opening it if it can neither be
    examined nor opened for writing.
    """
    why, held = _native.look_at_file(os.fsencode(path))
    return _why_held(path) if held else why


def _why_held(path: str) -> str | None:
    """Returns why the file counts as held by this process; ``None`` if it does not.

    A file that the engine has made may be open for another moment, which is waited for.
    """
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
    """Returns why the file counts as open through another descriptor of this process; ``None`` if it does
    not.

    A file that it has mapped does not count: if that were written over, it would be cut, which kills whoever
    reads the mapping.
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
    """Returns whether the file had no name when it was opened."""
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_TMPFILE == os.O_TMPFILE
    except OSError as error:
        if error.errno == errno.EBADF:  # closed in the meantime
            return True
        raise


def note_made(path: str, _: object = None) -> None:
    """Remembers that the engine has made this file. It may have it open for a moment, while bytes are on
    their way to the disk. It may be a step of a save."""
    with contextlib.suppress(OSError):  # others may have moved it already
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
