# SPDX-License-Identifier: Apache-2.0
"""What a new file or folder takes over from the one that it replaces: owner, mode, access lists, extended
attributes.

This is for what Python puts in place. ``csrc/file/attributes.cc`` does it for the files that the engine
publishes, also in a hidden folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from .folder import Folder, Named


def inherit(old: os.stat_result, folder: Folder, name: str, new: os.stat_result) -> bool:
    """Gives the new file ``name`` the mode of the file that it replaces, and its owner where that is allowed.

    Returns whether it had both already.
    """
    mode = stat.S_IMODE(old.st_mode)
    with Named(folder.place(name)):
        if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
            with contextlib.suppress(PermissionError):
                os.chown(name, old.st_uid, old.st_gid, dir_fd=folder.fd, follow_symlinks=False)
        elif stat.S_IMODE(new.st_mode) == mode:
            return True
        os.chmod(name, mode, dir_fd=folder.fd)
    return False


def copy_all(source: Folder, target: Folder) -> None:
    """Gives a folder the owner, the mode and the extended attributes of another one, including access control
    lists.

    Raises ``PermissionError`` where that is not allowed.
    """
    with Named(source.path):
        old, new = os.fstat(source.fd), os.fstat(target.fd)
        if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
            os.fchown(target.fd, old.st_uid, old.st_gid)
        wanted, found = _extended(source.fd), _extended(target.fd)
        for name in found.keys() - wanted.keys():
            os.removexattr(target.fd, name)
        for name, value in wanted.items():
            if found.get(name) != value:
                os.setxattr(target.fd, name, value)
        os.fchmod(target.fd, stat.S_IMODE(old.st_mode))


def _extended(fd: int) -> dict[str, bytes]:
    try:
        return {name: os.getxattr(fd, name) for name in os.listxattr(fd)}
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return {}
        raise


def let_pass(top: Folder, path: str = "") -> None:
    """Lets everybody pass through a folder, or one in it, to names that they know."""
    with Named(path, top):
        found = os.stat(path, dir_fd=top.fd, follow_symlinks=False) if path else os.fstat(top.fd)
        mode = stat.S_IMODE(found.st_mode)
        if mode & 0o111 != 0o111:
            os.chmod(path or ".", mode | 0o111, dir_fd=top.fd)
