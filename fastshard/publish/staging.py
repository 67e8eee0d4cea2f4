# SPDX-License-Identifier: Apache-2.0
"""Hidden folders for what is not visible yet: making them, telling them from those of others, removing what was left.

They are called ``.fastshard-<16 hex digits>.staging``. The digits follow from the user and from what the folder is for,
so that the next save through the same path meets what a killed one has left. Such a folder has mode 0700 and is held
by an advisory lock on itself: nobody else can open it, so nobody else can hold that lock. What is not owned by this
user, has another mode, or is a link is never touched, and everything is done by descriptor: nothing outside can be
reached by exchanging what lies above. Absence is what the kernel calls so (``ENOENT``, ``ENOTDIR``); any other failure
of a system call is an error.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import logging
import os
import re
import stat
from collections.abc import Collection
from types import TracebackType
from typing import Final, TypeAlias

STAGING: Final = re.compile(r"\.fastshard-[0-9a-f]{16}\.staging")
NEW: Final = ".new"
OLD: Final = ".old"
NOW: Final = ".now"
_STAGED: Final = re.compile(rf"/{STAGING.pattern}(/\.(new|old|now)(?=/|$|\W))?")
_MODES: Final = (0o700, 0o711)
"""Of a hidden folder; the second one while names of the folder around it lead into it."""
_OPEN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NO_LOCKS: Final = frozenset((errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL))
_MOST_SLOTS: Final = 200
_log: Final = logging.getLogger("fastshard")
_MOST_HELD: Final = 256
SMALL_NBYTES: Final = 1 << 20
"""What takes so little room is freed by the thread that saves: to start another one takes longer."""

Identity = tuple[int, int]
Scan: TypeAlias = "os._ScandirIterator[str]"


def final_places(text: str) -> str:
    """A path or a message, with the final places of staged files."""
    return _STAGED.sub("", text)


class Named:
    """Errors of the block are about this path, or this name in a folder; they say its final place."""

    __slots__ = ("folder", "name")

    def __init__(self, name: str, folder: Folder | None = None) -> None:
        self.name = name
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError):
            error.filename = final_places(self.name if self.folder is None else self.folder.place(self.name))
            del error.filename2


class Folder:
    """An open directory. What is done in it is done by its descriptor, whatever happens to the names above."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd
        self._identity: Identity | None = None

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):  # it is closed all the same, and nothing was written by it
                os.close(fd)

    def place(self, name: str) -> str:
        return os.path.join(self.path, name) if name else self.path

    def open(self, name: str) -> Folder:
        """A folder in it, which is no link."""
        with Named(name, self):
            return Folder(self.place(name), os.open(name, _OPEN | os.O_NOFOLLOW, dir_fd=self.fd))

    def entries(self) -> list[tuple[str, bool]]:
        """Names, sorted, and whether they are folders."""
        with Named(self.path), self.scan() as found:
            return sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in found)

    def scan(self) -> Scan:
        """Its entries, from the first one on: the descriptor keeps the position of whoever has listed it before, and
        where that could not be taken back then, the list would be empty."""
        with Named(self.path):
            os.lseek(self.fd, 0, os.SEEK_SET)
            return os.scandir(self.fd)

    def stat(self, name: str) -> os.stat_result | None:
        """Of what has the name, a link too; ``None`` if nothing has."""
        try:
            with Named(name, self):
                return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def status(self) -> os.stat_result:
        """Of the folder itself."""
        with Named(self.path):
            return os.fstat(self.fd)

    def identity(self, name: str = "") -> Identity | None:
        """What tells it, or what has the name in it, from all others."""
        if not name and self._identity is not None:
            return self._identity  # an open folder keeps it
        found = self.stat(name) if name else self.status()
        identity = None if found is None else (found.st_dev, found.st_ino)
        if not name:
            self._identity = identity
        return identity

    def read(self, name: str, most: int) -> bytes:
        """The first bytes of a file, which is no link."""
        with Named(name, self):
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.fd)
            try:
                return os.read(fd, most)
            finally:
                os.close(fd)

    def readlink(self, name: str) -> str | None:
        """What a link says; ``None`` if it is none."""
        try:
            with Named(name, self):
                return os.readlink(name, dir_fd=self.fd)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno == errno.EINVAL:
                return None
            raise

    def held(self, name: str) -> list[int]:
        """A descriptor of what a rename is about to replace, so that it is not freed by that: it may have to be written
        back first. On disks of this machine only, as others keep a name for what is open."""
        identity = self.identity()
        with contextlib.suppress(OSError):
            if identity is not None and os.major(identity[0]):
                return [os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)]
        return []

    def mkdir(self, name: str, mode: int = 0o777) -> None:
        with Named(name, self):
            os.mkdir(name, mode, dir_fd=self.fd)

    def mkdirs(self, name: str) -> None:
        """With those above it; they may be there."""
        parts = name.split("/") if name else []
        for count in range(len(parts)):
            with contextlib.suppress(FileExistsError):
                self.mkdir("/".join(parts[: count + 1]))

    def rmdir(self, name: str) -> None:
        with Named(name, self):
            os.rmdir(name, dir_fd=self.fd)

    def unlink(self, name: str) -> None:
        """It may be gone."""
        with Named(name, self), contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)

    def rename(self, name: str, to: Folder, new: str) -> None:
        """Errors name the new place."""
        with Named(new, to):
            os.rename(name, new, src_dir_fd=self.fd, dst_dir_fd=to.fd)

    def link(self, name: str, to: Folder, new: str) -> None:
        """A hard link to it, of a symbolic link too."""
        with Named(name, self):
            os.link(name, new, src_dir_fd=self.fd, dst_dir_fd=to.fd, follow_symlinks=False)

    def symlink(self, text: str, name: str) -> None:
        with Named(name, self):
            os.symlink(text, name, dir_fd=self.fd)

    def chmod(self, mode: int) -> None:
        with Named(self.path):
            os.fchmod(self.fd, mode)

    def sync(self, name: str = "") -> None:
        """What it, or the file in it, holds is on stable storage."""
        with Named(name, self):
            if not name:
                os.fsync(self.fd)
                return
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def tree(self, top: str = "") -> tuple[list[str], list[str]]:
        """Paths of all files and of all folders in it, relative to it."""
        files, folders = [], []
        for name, is_folder in self.entries():
            path = f"{top}/{name}" if top else name
            if is_folder:
                folders.append(path)
                with self.open(name) as inner:
                    more_files, more_folders = inner.tree(path)
                files += more_files
                folders += more_folders
            else:
                files.append(path)
        return files, folders

    def clear(self, held: list[int]) -> None:
        """Removes everything in it. ``held`` gets descriptors of folders and large files that have lost their last name:
        to free these takes time."""
        for name, is_folder in self.entries():
            if is_folder:
                inner = self.open(name)
                try:
                    inner.clear(held)
                    self.rmdir(name)
                finally:
                    held.append(inner.fd)
            else:
                if len(held) < _MOST_HELD:
                    with contextlib.suppress(OSError):  # then it is freed at once
                        if os.lstat(name, dir_fd=self.fd).st_blocks * 512 > SMALL_NBYTES:
                            flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
                            held.append(os.open(name, flags, dir_fd=self.fd))
                self.unlink(name)


def open_folder(path: str) -> Folder:
    with Named(path):
        return Folder(path, os.open(path, _OPEN))


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


def hidden_name(purpose: str, slot: int = 0) -> str:
    return f".fastshard-{_digits(os.geteuid(), purpose)}{slot:02x}.staging"


def turn_name(folder: Folder, slot: int = 0) -> str:
    """Of the hidden folder of the save that changes names in a folder. The folder is part of it, so that what was moved
    there from elsewhere is not taken for it."""
    return hidden_name(f"turn in {folder.identity()}", slot)


@functools.lru_cache(maxsize=256)
def _digits(user: int, purpose: str) -> str:
    return hashlib.blake2b(f"{user} {purpose}".encode(errors="surrogateescape"), digest_size=7).hexdigest()


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
                fd = os.open(name, _OPEN | os.O_NOFOLLOW, dir_fd=parent.fd)
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
