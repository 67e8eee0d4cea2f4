# SPDX-License-Identifier: Apache-2.0
"""The errors of writing an archive, as callers of ``torch.save`` expect them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
from types import TracebackType
from typing import Any, Final

from ..errors import ArchiveError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_OF_TORCH_WRITING = (
    "PytorchStreamWriter",
    "unexpected pos",
    "iostream error",
    "write(): ",
    "open file failed",
)
"""Parts of the texts of torch's errors when it cannot write a file."""
_BY_DESCRIPTOR: Final = re.compile(r"write\(\): fd (\d+) failed with (.+)")
"""In torch's old format, the text that names the descriptor and the reason."""
_NUMBERS: Final = {os.strerror(number): number for number in errno.errorcode}
_OF_WRITES: Final = frozenset(
    (errno.EIO, errno.EFBIG, errno.ENOMEM, errno.EROFS, errno.EPERM, errno.ESTALE, errno.ENXIO, *NO_SPACE)
)
"""Errors of writing to a file that is open."""
_classes: dict[type[OSError], type[ArchiveError]] = {}


def archive_error(number: int, text: str, path: Any, *, published: bool = False) -> ArchiveError:
    """Returns an :class:`ArchiveError` that is also what ``open`` would raise, as ``PermissionError``.

    Depending on format and name of the file, torch raises either class.
    """
    error: ArchiveError = _class_for(type(OSError(number, text)))(number, text, path)
    error.published = published
    return error


def _class_for(kind: type[OSError]) -> Any:
    if issubclass(ArchiveError, kind):
        return ArchiveError
    if kind in _classes:
        return _classes[kind]
    members = {"__module__": ArchiveError.__module__, "__reduce__": _reduced, "__doc__": ArchiveError.__doc__}
    return _classes.setdefault(kind, type(ArchiveError.__name__, (ArchiveError, kind), members))


def _reduced(error: OSError) -> tuple[Any, ...]:
    return _restored, (error.errno, error.strerror, error.filename, vars(error))


def _restored(number: int, text: str, path: Any, attributes: dict[str, Any]) -> ArchiveError:
    error = archive_error(number, text, path)
    vars(error).update(attributes)
    return error


class archive_errors:  # noqa: N801 (used as a function is)
    """Turns failed system calls into :class:`ArchiveError`. Not for code that pickles, whose errors stay as
    they are."""

    __slots__ = ("_path",)

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        found = None if error is None else as_archive_error(self._path, error)
        if found is not None:
            raise found from None


def as_archive_error(path: str, error: BaseException) -> ArchiveError | None:
    """Returns the error of a failed system call as an :class:`ArchiveError`; ``None`` for all others."""
    if not isinstance(error, OSError):
        return None
    published = getattr(error, "published", False)
    number = error.errno if error.errno is not None else errno.EIO
    return archive_error(number, error.strerror or str(error), path, published=published)


def no_space(number: int, path: str, needed: int | None) -> ArchiveError:
    """Returns an error that says why there is no space, and what can be done about it.

    ``needed`` are the bytes of the records, or of the whole file.
    """
    said = [f"at least {needed:,} bytes are needed"] if needed is not None else []
    folder = os.path.dirname(os.path.realpath(path))
    with contextlib.suppress(OSError):
        space = os.statvfs(folder)
        said.append(f"{space.f_bavail * space.f_frsize:,} bytes are free")
    if os.path.lexists(path):
        how = "torch_save(..., in_place=True) writes over it"
        said.append(f"the old file is kept until the new one stands ({how})")
    text = "; ".join([f"{os.strerror(number)}: {', '.join(said[:2])}", *said[2:]])
    return archive_error(number, text, path)


def why_torch_failed(error: Exception, descriptor: int, path: str, skipped: int = 0) -> ArchiveError | None:
    """Returns why torch could not write the file, which torch's own error does not say, or not with the name.

    Returns ``None`` if something else has failed, for instance pickling. ``skipped`` are the bytes that torch
    has left out.
    """
    left = _errno_left()
    if isinstance(error, OSError):
        known = error.filename is None
    else:
        known = isinstance(error, RuntimeError) and any(text in str(error) for text in _OF_TORCH_WRITING)
    if not known:
        return None
    try:
        size = os.fstat(descriptor).st_size
        os.pwrite(descriptor, bytes(1 << 16), size + skipped)
        os.ftruncate(descriptor, size)
    except OSError as again:
        return of_writing(again.errno or errno.EIO, path)
    if isinstance(error, OSError):
        return None
    # It could be written to again: what failed has passed.
    if said := _BY_DESCRIPTOR.search(str(error)):
        if int(said[1]) != descriptor:
            return None
        return of_writing(_NUMBERS.get(said[2], errno.EIO), path)
    return of_writing(left if left in _OF_WRITES else errno.EIO, path)


def of_writing(number: int, path: str) -> ArchiveError:
    return (
        no_space(number, path, None)
        if number in NO_SPACE
        else archive_error(number, os.strerror(number), path)
    )


def _errno_left() -> int:
    """Returns the errno of the last system call of this thread that failed. Torch's streams do not keep it."""
    try:
        location = ctypes.CDLL(None).__errno_location
    except AttributeError:
        return 0
    location.restype = ctypes.POINTER(ctypes.c_int)
    number: int = location()[0]
    return number
