# SPDX-License-Identifier: Apache-2.0
"""Folders that are open: what is done in one is done by its descriptor, whatever happens to the names above
it.

Something is missing only if the kernel says ``ENOENT`` or ``ENOTDIR``; any other failure of a system call is
an error. Errors name the final place of the file that they are about.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from types import TracebackType
from typing import Final, TypeAlias

from .. import _native
from .hidden_names import final_places

OPEN_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
SMALL_NBYTES: Final = 1 << 20
"""For files that are no larger together, no thread is started: a thread that closes the small ones of all saves does it."""
MOST_HELD: Final = 256

Identity = tuple[int, int]
Scan: TypeAlias = "os._ScandirIterator[str]"


class Named:
    """Lets errors of the block name this path, or this name in a folder, by its final place."""

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
    """An open directory. Everything is done by its descriptor, whatever happens to the names above it."""

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
        """Opens a folder in this one; a symbolic link is an error."""
        with Named(name, self):
            return Folder(self.place(name), os.open(name, OPEN_FOLDER | os.O_NOFOLLOW, dir_fd=self.fd))

    def entries(self) -> list[tuple[str, bool]]:
        """Returns the names in the folder, sorted, and whether each is a folder."""
        with Named(self.path), self.scan() as found:
            return sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in found)

    def scan(self) -> Scan:
        """Returns an iterator over the folder's entries, from the first one on.

        The descriptor keeps the position of whoever has listed it before. If that could not be reset, the
        list would be empty.
        """
        with Named(self.path):
            os.lseek(self.fd, 0, os.SEEK_SET)
            return os.scandir(self.fd)

    def stat(self, name: str) -> os.stat_result | None:
        """Returns the status of what has the name, without following a link; ``None`` if nothing has."""
        try:
            with Named(name, self):
                return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def status(self) -> os.stat_result:
        """Returns the status of the folder itself."""
        with Named(self.path):
            return os.fstat(self.fd)

    def identity(self, name: str = "") -> Identity | None:
        """Returns what tells the folder, or what has the name in it, from all others."""
        if not name and self._identity is not None:
            return self._identity  # an open folder keeps it
        found = self.stat(name) if name else self.status()
        identity = None if found is None else (found.st_dev, found.st_ino)
        if not name:
            self._identity = identity
        return identity

    @functools.cached_property
    def shared(self) -> bool:
        """Whether other machines may use the filesystem at the same time: whether it is not known to be this one's."""
        with Named(self.path):
            return not _native.on_one_machine(self.fd)

    def read(self, name: str, most: int) -> bytes:
        """Returns the first bytes of a file; a symbolic link is an error."""
        with Named(name, self):
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.fd)
            try:
                return os.read(fd, most)
            finally:
                os.close(fd)

    def readlink(self, name: str) -> str | None:
        """Returns the target of a symbolic link; ``None`` if it is none."""
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
        """Returns a descriptor of what a rename is about to replace, so the rename does not free it.

        Freeing means waiting for a busy disk, even for a symbolic link if its text has a block of its own (on ext4
        from 60 bytes on). Only on disks of this machine, as other filesystems keep a name for an open file.
        """
        identity = self.identity()
        with contextlib.suppress(OSError):
            if identity is not None and os.major(identity[0]):
                return [self._hold(name)]
        return []

    def _hold(self, name: str) -> int:
        return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)

    def mkdir(self, name: str, mode: int = 0o777) -> None:
        with Named(name, self):
            os.mkdir(name, mode, dir_fd=self.fd)

    def mkdirs(self, name: str) -> None:
        """Makes a folder and the folders above it; they may exist."""
        parts = name.split("/") if name else []
        for count in range(len(parts)):
            with contextlib.suppress(FileExistsError):
                self.mkdir("/".join(parts[: count + 1]))

    def rmdir(self, name: str) -> None:
        with Named(name, self):
            os.rmdir(name, dir_fd=self.fd)

    def unlink(self, name: str) -> None:
        """Removes a file, which may be missing."""
        with Named(name, self), contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)

    def rename(self, name: str, to: Folder, new: str) -> None:
        """Renames a file. Errors name the new place."""
        with Named(new, to):
            os.rename(name, new, src_dir_fd=self.fd, dst_dir_fd=to.fd)

    def link(self, name: str, to: Folder, new: str) -> None:
        """Makes a hard link to a file, or to a symbolic link itself."""
        with Named(name, self):
            os.link(name, new, src_dir_fd=self.fd, dst_dir_fd=to.fd, follow_symlinks=False)

    def symlink(self, text: str, name: str) -> None:
        with Named(name, self):
            os.symlink(text, name, dir_fd=self.fd)

    def chmod(self, mode: int) -> None:
        with Named(self.path):
            os.fchmod(self.fd, mode)

    def sync(self, name: str = "") -> None:
        """Returns when the contents of the folder, or of a file in it, are on stable storage."""
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
        """Returns the paths of all files and of all folders in it, relative to it."""
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
        """Removes everything in it.

        Descriptors of what has lost its last name are added to ``held``, as freeing it takes time.
        """
        for name, is_folder in self.entries():
            if is_folder:
                inner = self.open(name)
                try:
                    inner.clear(held)
                    self.rmdir(name)
                finally:
                    held.append(inner.fd)
            else:
                # Other machines' filesystems would keep a name for it.
                if len(held) < MOST_HELD and not self.shared:
                    with contextlib.suppress(OSError):  # then it is freed at once
                        held.append(self._hold(name))
                self.unlink(name)


def open_folder(path: str) -> Folder:
    with Named(path):
        return Folder(path, os.open(path, OPEN_FOLDER))
