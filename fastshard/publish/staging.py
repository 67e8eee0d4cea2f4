# SPDX-License-Identifier: Apache-2.0
"""Hidden folders for what is not visible yet: making them, telling them from those of others, removing what was left.

A hidden folder (:mod:`fastshard.publish.hidden_names` says what it is called) has mode 0700 and is held by an advisory
lock on itself: nobody else can open it, so nobody else can hold that lock. What is not owned by this user, has another
mode, or is a link is never touched. Everything is done by descriptor (:mod:`fastshard.publish.folder`), so nothing outside
can be reached by exchanging what lies above.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
from collections.abc import Collection
from typing import Final

from .folder import OPEN_FOLDER, Folder, Named
from .hidden_names import NEW, NOW, hidden_name

_MODES: Final = (0o700, 0o711)
"""Of a hidden folder; the second one while names of the folder around it lead into it."""
_NO_LOCKS: Final = frozenset((errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL))
_MOST_SLOTS: Final = 200
_log: Final = logging.getLogger("fastshard")


class Hidden(Folder):
    """A hidden folder that this process holds."""

    def __init__(self, parent: Folder, name: str, fd: int, fresh: bool) -> None:
        super().__init__(parent.place(name), fd)
        self.parent = parent
        self.name = name
        self.fresh = fresh
        """Made just now, not what a killed save has left."""
        _held[fd] = None

    def close(self) -> None:
        _held.pop(self.fd, None)
        super().close()

    def give_away(self) -> int:
        """The descriptor, to be closed by somebody else."""
        _held.pop(self.fd, None)
        fd, self.fd = self.fd, -1
        return fd

    def is_in_place(self) -> bool:
        return self.parent.identity(self.name) == self.identity()

    def move(self, name: str) -> None:
        """Gives it another name, which must be free, or that of an empty folder."""
        self.parent.rename(self.name, self.parent, name)
        self.is_called(name)

    def is_called(self, name: str) -> None:
        self.name, self.path = name, self.parent.place(name)

    def remove_known(self, names: Collection[str]) -> bool:
        """Removes it where it holds nothing but small files of these names in ``.new``. Whether it did; if not,
        :meth:`remove` has to look what there is."""
        try:
            for name in names:
                os.unlink(f"{NEW}/{name}", dir_fd=self.fd)
            os.rmdir(NEW, dir_fd=self.fd)
            if self.is_in_place():
                self.parent.rmdir(self.name)
        except OSError:
            return False
        return True

    def remove(self, held: list[int]) -> None:
        """With all that is in it. Whatever fails is tried once more."""
        for last in (False, True):
            try:
                self.unlink(NOW)  # no name leads here any more
                self.clear(held)
                if self.is_in_place():
                    self.parent.rmdir(self.name)
                return
            except OSError:
                if last:
                    raise


_held: dict[int, None] = {}
"""Descriptors of hidden folders. A forked process must not hold them when its parent has died."""


def _let_go_in_child() -> None:
    with contextlib.suppress(OSError):
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        for fd in _held:
            os.dup2(nothing, fd, inheritable=False)
        os.close(nothing)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


def turn_name(folder: Folder, slot: int = 0) -> str:
    """Of the hidden folder of the save that changes names in a folder. The folder is part of it, so that what was moved
    there from elsewhere is not taken for it."""
    return hidden_name(f"turn in {folder.identity()}", slot)


class InUseError(Exception):
    """The save that made the hidden folder is under way."""


def make_hidden(parent: Folder, purpose: str, held: list[int]) -> Hidden:
    """An empty one for this purpose. Those that killed saves have left for it are emptied on the way."""
    for slot in range(_MOST_SLOTS):
        with contextlib.suppress(InUseError):
            found = adopt(parent, hidden_name(purpose, slot), make=True)
            if found is not None:
                if not found.fresh:
                    try:
                        found.clear(held)
                    except BaseException:
                        found.close()
                        raise
                return found
    raise OSError(errno.EBUSY, "too many saves at once, or hidden folders of others", parent.path)


def adopt(parent: Folder, name: str, make: bool = False) -> Hidden | None:
    """The hidden folder of this name, if it is a killed save's of this user, or could be made. ``None``: there is none,
    or it is others'. Raises ``InUseError``."""
    while True:
        fresh = make and _made(parent, name)
        try:
            with Named(name, parent):
                fd = os.open(name, OPEN_FOLDER | os.O_NOFOLLOW, dir_fd=parent.fd)
        except FileNotFoundError:  # gone meanwhile
            if make:
                continue
            return None
        except OSError as error:
            if fresh:
                with contextlib.suppress(OSError):  # the next save will
                    parent.rmdir(name)
            elif error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EACCES) and not _belongs_to_us(
                parent, name
            ):
                return None
            raise
        hidden = Hidden(parent, name, fd, fresh)
        try:
            with Named(hidden.path):
                if not _is_ours(fd):
                    hidden.close()
                    return None
                if not _lock(fd, fresh):
                    raise InUseError
            if hidden.is_in_place():
                return hidden
        except BaseException as error:
            if fresh and not isinstance(error, InUseError):
                # If another save has taken it over meanwhile, it is not empty, or is made anew.
                with contextlib.suppress(OSError):
                    parent.rmdir(name)
            hidden.close()
            raise
        hidden.close()  # whoever held it has removed it


def _made(parent: Folder, name: str) -> bool:
    try:
        parent.mkdir(name, 0o700)
    except FileExistsError:
        return False
    return True


def _belongs_to_us(parent: Folder, name: str) -> bool:
    found = parent.stat(name)
    return found is not None and stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _is_ours(fd: int) -> bool:
    found = os.fstat(fd)
    return found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) & 0o777 in _MODES


def _lock(fd: int, fresh: bool) -> bool:
    """Where a filesystem has no locks, what was not made just now may be in use."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return fresh
        raise
    return True


def clear_away(hidden: Hidden, held: list[int]) -> None:
    """Removes it. What cannot be removed is in nobody's way, and goes with the next save."""
    try:
        hidden.remove(held)
    except OSError as error:
        _log.warning(
            "%s: what was left of a save could not be removed: %s", hidden.parent.path, error.strerror
        )
