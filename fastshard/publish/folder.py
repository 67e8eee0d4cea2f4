# SPDX-License-Identifier: Apache-2.0
"""Folders by descriptor: what is done in one is done in that one, whatever happens to the names above it.

Absence is what the kernel calls so (``ENOENT``, ``ENOTDIR``); any other failure of a system call is an error. Errors name
the final place of the file that they are about.
"""

from __future__ import annotations

import contextlib
import errno
import os
from types import TracebackType
from typing import Final, TypeAlias

from .hidden_names import final_places

OPEN_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
SMALL_NBYTES: Final = 1 << 20
"""What takes so little room is freed by the thread that saves: to start another one takes longer."""
_MOST_HELD: Final = 256

Identity = tuple[int, int]
Scan: TypeAlias = "os._ScandirIterator[str]"


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
            return Folder(self.place(name), os.open(name, OPEN_FOLDER | os.O_NOFOLLOW, dir_fd=self.fd))

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
        return Folder(path, os.open(path, OPEN_FOLDER))
