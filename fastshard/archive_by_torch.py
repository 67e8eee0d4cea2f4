# SPDX-License-Identifier: Apache-2.0
"""Files that the engine does not write, put in the place of the old ones all at once: what ``torch.save`` writes
itself, and what is so small that the engine's threads would only wake up for it.

It is written into a nameless file in the target's folder, which then gets the target's name. Where there are no
nameless files, or the name is taken, it has one of the target's hidden names first: the next save through the same
path removes what a killed one has left there, as it does for the engine's files.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from typing import Any, Final

from .archive_errors import archive_error, archive_errors, of_writing, why_torch_failed
from .archive_skeleton import named_like
from .errors import ArchiveError

_NO_NAMELESS: Final = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.ENOSYS)
_DESCRIPTORS: Final = "/proc/self/fd"


def can_replace(path: str) -> bool:
    """Whether a file can be opened by its descriptor. Raises :class:`ArchiveError` where that cannot be told."""
    with archive_errors(path):
        try:
            os.stat(_DESCRIPTORS)
        except FileNotFoundError:
            return False
    return True


def replace_by_torch(
    write: Callable[[Any], None], path: str, by_name: bool, durable: bool, keep_cached: bool
) -> None:
    """Lets ``write`` write to what it is given, and puts that in the place of ``path``.

    ``by_name``: it is given a path that it opens itself, as the name goes into what it writes.
    """
    with _staged(path) as staged:
        raw = None
        try:
            if by_name:
                write(named_like(path, staged.descriptor))
            else:
                raw = _Noting(staged.descriptor, "wb", closefd=False)
                with io.BufferedWriter(raw) as file:
                    write(file)
        except Exception as error:
            if raw is not None and error is raw.failed and error.errno is not None:
                failed = of_writing(error.errno, path)
            else:
                failed = why_torch_failed(error, staged.descriptor, path)
            if failed is None:
                raise
            raise failed from error
        _publish(staged, path, durable, keep_cached)


class _Noting(io.FileIO):
    """Tells its own errors from those of pickling."""

    failed: OSError | None = None

    def write(self, data: Any, /) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self.failed = error
            raise


def replace_by_bytes(data: bytes, path: str, durable: bool, keep_cached: bool) -> None:
    """Puts a file of these bytes in the place of ``path``. Raises :class:`ArchiveError`."""
    with _staged(path) as staged:
        with archive_errors(path):
            left = memoryview(data)
            while left:
                left = left[os.write(staged.descriptor, left) :]
        _publish(staged, path, durable, keep_cached)


@contextlib.contextmanager
def _staged(path: str) -> Iterator[_Staged]:
    with archive_errors(path):
        staged = _Staged(path)
    try:
        yield staged
    except BaseException:
        with contextlib.suppress(OSError):
            staged.close()
        raise
    try:
        staged.close()
    except OSError as error:  # some filesystems tell only now that they could not store it
        raise _in_place(error, path) from None


def _publish(staged: _Staged, path: str, durable: bool, keep_cached: bool) -> None:
    with archive_errors(path):
        if durable or not keep_cached:
            os.fsync(staged.descriptor)
        if not keep_cached:
            os.posix_fadvise(staged.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        staged.publish()
    if durable:
        sync_folder(os.path.dirname(staged.target), path)


def sync_folder(folder: bytes, path: str) -> None:
    """What is in there is on stable storage, the new file at ``path`` too."""
    try:
        descriptor = os.open(folder or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _in_place(error, path) from None


def _in_place(error: OSError, path: str) -> ArchiveError:
    text = f"{error.strerror}; the new file is in place, but not known to be on stable storage"
    return archive_error(error.errno or errno.EIO, text, path, published=True)


class _Staged:
    """The new file until it has its name."""

    def __init__(self, path: str) -> None:
        from . import _native

        self.target = _native.find_target(os.fsencode(path), True)
        self._folder = os.path.dirname(self.target) or b"."
        self._hidden: bytes | None = None
        self._published = False
        try:
            self._mode: int | None = stat.S_IMODE(os.lstat(self.target).st_mode)
        except FileNotFoundError:
            self._mode = None
        _native.remove_leftovers(self.target)
        mode = 0o666 if self._mode is None else self._mode & 0o666
        try:
            self.descriptor = os.open(self._folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode)
        except OSError as error:
            if error.errno not in _NO_NAMELESS:
                raise
            self._hidden = self._take_name(lambda hidden: self._create(hidden, mode))
        try:
            _native.mark_in_use(self.descriptor)
            if self._mode is not None:
                _native.adopt_attributes(self.descriptor, self.target)
        except BaseException:
            with contextlib.suppress(OSError):
                self.close()
            raise

    def publish(self) -> None:
        """Gives it its name."""
        if self._hidden is None and self._mode is None:
            with contextlib.suppress(FileExistsError):
                self._link(self.target)
                self._published = True
                return
        if self._hidden is None:
            self._hidden = self._take_name(self._link)
        os.rename(self._hidden, self.target)
        self._hidden, self._published = None, True

    def close(self) -> None:
        """Removes it, unless it has its name."""
        try:
            if self._hidden is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._hidden)
                self._hidden = None
            if not self._published:
                with contextlib.suppress(OSError):
                    # Torch's own opening of it lives as long as the exception that has ended the save.
                    os.ftruncate(self.descriptor, 0)
        finally:
            os.close(self.descriptor)

    def _take_name(self, make: Callable[[bytes], None]) -> bytes:
        """One of the target's hidden names, or any where others have put something there."""
        from . import _native

        for hidden in _native.temporary_names(self.target):
            with contextlib.suppress(FileExistsError):
                make(hidden)
                return hidden
        hidden = self._folder + f"/.fastshard-{secrets.token_hex(8)}.tmp".encode()
        make(hidden)
        return hidden

    def _create(self, hidden: bytes, mode: int) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self.descriptor = os.open(hidden, flags, mode)

    def _link(self, name: bytes) -> None:
        place = f"{_DESCRIPTORS}/{self.descriptor}".encode()
        # Only where it is given a folder's descriptor, which an absolute path needs not, Python has the link followed.
        os.link(place, name, src_dir_fd=self.descriptor, follow_symlinks=True)
