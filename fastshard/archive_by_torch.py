# SPDX-License-Identifier: Apache-2.0
"""What ``torch.save`` writes itself, put in the place of the old file all at once.

Torch writes into a nameless file in the target's folder, which then gets the target's name. Where there are no
nameless files, or the name is taken, it has a hidden name first, which is the same at each save through the same
path: the next one removes what a killed one has left.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import stat
import struct
from collections.abc import Callable
from typing import Any, BinaryIO, Final

from .archive_errors import archive_error, archive_errors, why_torch_failed
from .archive_skeleton import named_like

_SLOTS: Final = 16
"""Saves through one path at a time, where there are no nameless files."""
_NO_NAMELESS: Final = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.ENOSYS)
_NOT_CARRIED: Final = ("security.capability", "security.ima", "security.evm", "system.posix_acl_access")
_ACL: Final = "system.posix_acl_access"


def can_replace(path: str) -> bool:
    """Whether a new file can be put there: not by way of a link that leads to none yet, and not without /proc."""
    try:
        os.stat("/proc/self/fd")
        os.lstat(path)
        os.stat(path)
    except FileNotFoundError as error:
        return error.filename == path and not _is_link(path)
    return True


def _is_link(path: str) -> bool:
    try:
        return stat.S_ISLNK(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


class Replacement:
    """A new file that torch writes, and that then takes the place of ``path``. Nothing is left unless it did."""

    def __init__(self, path: str, durable: bool, keep_cached: bool) -> None:
        self._path, self._durable, self._keep_cached = path, durable, keep_cached
        self._folder: int | None = None
        self._staged: _Staged | None = None
        self.nbytes = 0

    def open(self) -> BinaryIO:
        """Raises :class:`ArchiveError`."""
        with archive_errors(self._path):
            directory, name = _place_of(self._path)
            self._folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self._staged = _Staged(self._folder, name)
            return open(self._staged.descriptor, "wb", closefd=False)

    def publish(self) -> None:
        """Raises :class:`ArchiveError`."""
        assert self._staged is not None and self._folder is not None
        descriptor = self._staged.descriptor
        with archive_errors(self._path):
            self.nbytes = os.fstat(descriptor).st_size
            if self._durable or not self._keep_cached:
                os.fsync(descriptor)
            if not self._keep_cached:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            self._staged.publish()
        if self._durable:
            sync_published(self._path, self._folder)

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *_: object) -> None:
        if self._staged is not None:
            self._staged.close()
        if self._folder is not None:
            os.close(self._folder)
        self._staged = self._folder = None


def replace_by_torch(write: Callable[[Any], None], path: str, by_name: bool, durable: bool, keep_cached: bool) -> None:
    """Lets ``write`` write to what it is given, and puts that in the place of ``path``.

    ``by_name``: it opens its target itself, and the name goes into what it writes.
    """
    with Replacement(path, durable, keep_cached) as new:
        with new.open() as file:
            try:
                write(named_like(path, file) if by_name else file)
                file.flush()
            except Exception as error:
                failed = why_torch_failed(error, file.fileno(), path)
                if failed is None:
                    raise
                raise failed from error
        new.publish()


def sync_published(path: str, folder: int | None = None) -> None:
    """Syncs the folder of a new file; its descriptor may be one that only stands for it."""
    try:
        place = "." if folder is not None else os.path.dirname(os.path.realpath(path))
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        text = f"{error.strerror}: the new file is in place, but not known to be on stable storage"
        raise archive_error(error.errno or errno.EIO, text, path, published=True) from None


def _place_of(path: str) -> tuple[str, str]:
    """Folder and name of the file, which a link may lead to: as the kernel follows it."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return os.path.dirname(path) or ".", os.path.basename(path)
    try:
        return os.path.split(os.readlink(f"/proc/self/fd/{descriptor}"))  # type: ignore[return-value]
    finally:
        os.close(descriptor)


class _Staged:
    """The new file until it has its name."""

    def __init__(self, folder: int, name: str) -> None:
        self._folder, self._name = folder, name
        self._hidden: str | None = None
        self._published = False
        try:
            self._replaced = os.stat(name, dir_fd=folder, follow_symlinks=False)
            mode = stat.S_IMODE(self._replaced.st_mode) & 0o666
        except FileNotFoundError:
            self._replaced, mode = None, 0o666
        try:
            flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
            self.descriptor = os.open(".", flags, mode, dir_fd=folder)
        except OSError as error:
            if error.errno not in _NO_NAMELESS:
                raise
            self._make_hidden(mode)
        try:
            self._adopt_attributes()
            self._remove_leftovers()
        except BaseException:
            self.close()
            raise

    def publish(self) -> None:
        """Gives it its name."""
        if self._hidden is None and self._replaced is None:
            with contextlib.suppress(FileExistsError):
                self._link(self._name)
                self._published = True
                return
        if self._hidden is None:
            self._hidden = self._try_names(self._link)
        os.rename(self._hidden, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self._hidden, self._published = None, True

    def close(self) -> None:
        """Removes it, unless it has its name."""
        if self._hidden is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._hidden, dir_fd=self._folder)
            self._hidden = None
        if not self._published:
            with contextlib.suppress(OSError):
                # Torch's own opening of it lives as long as the exception that has ended the save.
                os.ftruncate(self.descriptor, 0)
        os.close(self.descriptor)

    def _link(self, name: str) -> None:
        processes = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.link(
                str(self.descriptor),
                name,
                src_dir_fd=processes,
                dst_dir_fd=self._folder,
                follow_symlinks=True,
            )
        finally:
            os.close(processes)

    def _try_names(self, make: Callable[[str], None]) -> str:
        """The hidden name under which it could be made: one of a few, or any where others have put something there."""
        for hidden in [_hidden_name(self._name, slot) for slot in range(_SLOTS)]:
            if _is_free(hidden, self._folder):
                with contextlib.suppress(FileExistsError):
                    make(hidden)
                    return hidden
        hidden = f".fastshard-{secrets.token_hex(8)}.tmp"
        make(hidden)
        return hidden

    def _make_hidden(self, mode: int) -> None:
        def make(hidden: str) -> None:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self.descriptor = os.open(hidden, flags, mode, dir_fd=self._folder)

        self._hidden = self._try_names(make)
        _lock(self.descriptor)

    def _remove_leftovers(self) -> None:
        """The first name is the one that a killed save may have left; what is more, a later one removes."""
        if self._hidden is None:
            _is_free(_hidden_name(self._name, 0), self._folder)

    def _adopt_attributes(self) -> None:
        """Owner, mode, access list and extended attributes of the file that is replaced."""
        if self._replaced is None:
            return
        ours = os.fstat(self.descriptor)
        if (ours.st_uid, ours.st_gid) != (self._replaced.st_uid, self._replaced.st_gid):
            with contextlib.suppress(PermissionError):
                os.fchown(self.descriptor, self._replaced.st_uid, self._replaced.st_gid)
        old = f"/proc/self/fd/{self._folder}/{self._name}"
        try:
            attributes = {name: os.getxattr(old, name) for name in os.listxattr(old)}
        except OSError:  # a filesystem without, or those of another
            attributes = {}
        for name, value in attributes.items():
            if name not in _NOT_CARRIED:
                with contextlib.suppress(OSError):  # labels that only the system sets
                    os.setxattr(self.descriptor, name, value)
        with contextlib.suppress(OSError):
            if _ACL in attributes:
                os.setxattr(self.descriptor, _ACL, attributes[_ACL])
            else:
                os.removexattr(self.descriptor, _ACL)  # which the folder's default has given it
        os.fchmod(self.descriptor, stat.S_IMODE(self._replaced.st_mode))


def _hidden_name(name: str, slot: int) -> str:
    return f".fastshard-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}-{slot}.tmp"


def _is_free(hidden: str, folder: int) -> bool:
    """Removes what a killed save has left under this name, unless somebody is writing to it, or it is not ours."""
    try:
        descriptor = os.open(hidden, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return True
    except OSError:  # a link, a folder, or another user's
        return False
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or not _lock(descriptor):
            return False
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(hidden, dir_fd=folder, follow_symlinks=False), info):
                os.unlink(hidden, dir_fd=folder)
        return True
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """One that a reader of the file cannot hold, and that belongs to this opening of it."""
    whole = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, whole)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True
