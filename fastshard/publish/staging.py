# SPDX-License-Identifier: Apache-2.0
"""Hidden folders for files that are not visible yet: making them, telling whose they are, removing what was
left.

A hidden folder (:mod:`fastshard.publish.hidden_names` has its names) has mode 0700 and is held by an advisory
lock on itself. Nobody else can open it, so nobody else can hold that lock; what differs on filesystems that machines
share is in :mod:`fastshard.publish.machines`. A folder that another user owns, that has another mode, or that is a link
is never touched. Everything is done by descriptor
(:mod:`fastshard.publish.folder`), so nobody can redirect it by exchanging folders above.
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

from . import machines
from .folder import OPEN_FOLDER, Folder, Named
from .hidden_names import NEW, NOW, hidden_name

_MODES: Final = (0o700, 0o711)
"""Modes of a hidden folder. It has the second one while names of the folder around it lead into it."""
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
        self._aside = False
        _held[fd] = None

    def close(self) -> None:
        _held.pop(self.fd, None)
        super().close()

    def give_away(self) -> int:
        """Returns the descriptor, which the caller closes from now on."""
        _held.pop(self.fd, None)
        fd, self.fd = self.fd, -1
        return fd

    def is_in_place(self) -> bool:
        return self.parent.identity(self.name) == self.identity()

    def move(self, name: str) -> None:
        """Gives it another name, which must be free or that of an empty folder."""
        self.parent.rename(self.name, self.parent, name)
        self.is_called(name)

    def is_called(self, name: str) -> None:
        self.name, self.path = name, self.parent.place(name)

    def _step_aside(self) -> None:
        """Gives the name free, while it leads here, for the next one who wants it."""
        if self.parent.shared and not self._aside:
            if not self.is_in_place():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path)
            self.move(machines.unique_name())
            self._aside = True

    def remove_known(self, names: Collection[str]) -> bool:
        """Removes the folder if it has nothing but small files of these names in ``.new``. Returns whether it
        did.

        If not, :meth:`remove` has to list what there is.
        """
        try:
            self._step_aside()
            for name in names:
                os.unlink(f"{NEW}/{name}", dir_fd=self.fd)
            os.rmdir(NEW, dir_fd=self.fd)
            if self.is_in_place():
                self.parent.rmdir(self.name)
        except OSError:
            return False
        return True

    def remove(self, held: list[int]) -> None:
        """Removes it with everything in it, which another machine may have done. What fails is tried once more."""
        for last in (False, True):
            try:
                self._step_aside()
                self.unlink(NOW)  # no name leads here any more
                self.clear(held)
                if self.is_in_place():
                    self.parent.rmdir(self.name)
                return
            except OSError as error:
                if last and error.errno not in machines.GONE:
                    raise


_held: dict[int, None] = {}
"""Descriptors of hidden folders. A forked process must not hold them after its parent has died."""


def _let_go_in_child() -> None:
    with contextlib.suppress(OSError):
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        for fd in _held:
            os.dup2(nothing, fd, inheritable=False)
        os.close(nothing)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


def turn_name(folder: Folder, slot: int = 0) -> str:
    """Returns the name of the hidden folder of the save that may change names in a folder.

    The name contains the folder's device and inode, so a hidden folder that was moved there from elsewhere
    has another one. Machines that share a filesystem have different numbers for its device.
    """
    device, inode = folder.identity() or (0, 0)
    return hidden_name(f"turn in {inode if folder.shared else (device, inode)}", slot)


class InUseError(Exception):
    """The save that made the hidden folder is still under way."""


def make_hidden(parent: Folder, purpose: str, held: list[int]) -> Hidden:
    """Makes an empty hidden folder for this purpose. Folders that killed saves have left for it are emptied, or
    removed where another machine may do the same."""
    for slot in range(_MOST_SLOTS):
        with contextlib.suppress(InUseError):
            while (found := adopt(parent, hidden_name(purpose, slot), make=True)) is not None:
                if found.fresh:
                    return found
                try:
                    if not parent.shared:
                        found.clear(held)
                        return found
                    found.remove(held)
                except BaseException:
                    found.close()
                    raise
                found.close()
    raise OSError(
        errno.EBUSY, "too many saves are under way, or hidden folders of others are in the way", parent.path
    )


def adopt(parent: Folder, name: str, make: bool = False) -> Hidden | None:
    """Takes over the hidden folder of this name if a killed save of this user has left it, or makes it if it
    is to be made.

    Returns ``None`` if there is none, or it is another user's. Raises ``InUseError``.
    """
    while True:
        fresh = make and _made(parent, name)
        try:
            with Named(name, parent):
                fd = os.open(name, OPEN_FOLDER | os.O_NOFOLLOW, dir_fd=parent.fd)
        except OSError as error:
            if error.errno in machines.GONE:  # meanwhile
                if make:
                    continue
                return None
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
                if not is_ours(os.fstat(fd), parent):
                    hidden.close()
                    return None
                # Without locks only what was just made is known to be unused, or what nobody has touched for long.
                free = _lock(fd, fresh or parent.shared)
                if parent.shared:  # where a lock says nothing of other machines
                    free = fresh or free and machines.claim(hidden)
                if not free:
                    raise InUseError
            if hidden.is_in_place():
                return hidden
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in machines.GONE and not fresh:
                hidden.close()
                continue
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


def is_ours(found: os.stat_result, parent: Folder) -> bool:
    """Returns whether this may be a hidden folder of this user in ``parent``. Where other machines serve a filesystem,
    owners and modes may be what the mount or the server makes of them (NFS with squashed users, SMB, FUSE)."""
    if not stat.S_ISDIR(found.st_mode):
        return False
    if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) & 0o777 in _MODES:
        return True
    return parent.shared and found.st_uid == machines.owner_in(parent)


def _lock(fd: int, otherwise: bool) -> bool:
    """Locks a hidden folder, and returns whether nobody else has; ``otherwise`` where a filesystem has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return otherwise
        raise
    return True


def clear_away(hidden: Hidden, held: list[int]) -> None:
    """Removes the folder. What cannot be removed does no harm, and is removed by the next save."""
    try:
        hidden.remove(held)
    except OSError as error:
        _log.warning(
            "%s: what was left of a save could not be removed: %s", hidden.parent.path, error.strerror
        )
