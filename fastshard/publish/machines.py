# SPDX-License-Identifier: Apache-2.0
"""Hidden folders on filesystems that several machines share.

Whether a hidden folder is in use is told by a lock on it. Most shared filesystems (NFS, FUSE) have no locks on
folders, so the kernel keeps such a lock to itself, and no other machine sees it. There a hidden folder counts as in use
until nothing has changed in it for an hour, as do the engine's temporary files (csrc/file/hidden_names.cc).

Some of these filesystems go by paths, and for a while by what they remember of them. A descriptor of a folder whose
name another machine has given to another folder may lead to that one. So a name is never given up with something of
ours behind it: a hidden folder gets a name that nobody else will ever have before it is removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from typing import Final

from .folder import Folder, Named
from .hidden_names import PREFIX, hidden_name

GONE: Final = frozenset((errno.ENOENT, errno.ESTALE))
"""Errors of what another machine has removed."""
UNTOUCHED_SECONDS: Final = 3600.0
_CLAIM: Final = "~left-"
"""The last one of the names in a hidden folder, so that it goes last when the folder is cleared."""

_owners: Final = dict[tuple[int, int], int]()
"""By device and user."""


def claim(hidden: Folder) -> bool:
    """Returns whether a hidden folder is what a killed save has left. Then it is for this process to remove it, and it
    counts as in use for another hour. Raises ``OSError``, of :data:`GONE` if it has just been removed elsewhere."""
    claims = [name for name, _ in hidden.entries() if name.startswith(_CLAIM)]
    if time.time() - _last_change(hidden) < UNTOUCHED_SECONDS:
        return False
    own = _CLAIM + secrets.token_hex(8)
    if claims:  # of one who was killed, too
        hidden.rename(claims[0], hidden, own)  # which only one can
        return True
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        os.close(os.open(f"{_CLAIM}first", flags, 0o600, dir_fd=hidden.fd))
    except FileExistsError:
        return False
    return True


def unique_name() -> str:
    """Returns a name for a hidden folder that no other one ever has."""
    return hidden_name(f"removal {secrets.token_hex(16)}")


def owner_in(folder: Folder) -> int:
    """Returns the user whom the filesystem of a folder makes the owner of what this process makes."""
    key = folder.status().st_dev, os.geteuid()
    if key not in _owners:
        name = f"{PREFIX}{secrets.token_hex(8)}.tmp"
        with Named(folder.path):
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder.fd)
            try:
                _owners[key] = os.fstat(fd).st_uid
            finally:
                os.close(fd)
                folder.unlink(name)
    return _owners[key]


def _last_change(hidden: Folder) -> float:
    """Returns when something was last written or made in a hidden folder, in seconds since the epoch."""
    files, folders = hidden.tree()
    newest = hidden.status().st_mtime
    for name in (*files, *folders):
        with contextlib.suppress(FileNotFoundError):
            newest = max(newest, os.stat(name, dir_fd=hidden.fd, follow_symlinks=False).st_mtime)
    return newest
