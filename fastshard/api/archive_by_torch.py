# SPDX-License-Identifier: Apache-2.0
"""Files that torch writes and not the engine, put in the place of the old ones all at once.

The new file is one of the engine's kind: nameless or hidden in the target's folder until it gets the target's name.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from typing import Any

from .. import _native
from ..errors import ArchiveError
from ..publish.folder import open_folder
from .archive_errors import archive_error, archive_errors, of_writing, why_torch_failed
from .archive_skeleton import named_like


def can_replace(path: str) -> bool:
    """Returns whether a file can be opened by its descriptor. Raises :class:`ArchiveError` if that cannot be
    told."""
    with archive_errors(path):
        try:
            os.stat("/proc/self/fd")
        except FileNotFoundError:
            return False
    return True


def new_file(path: str, keep_cached: bool, at_once: bool = False) -> _native.NewFile:
    """Makes a file that takes the place of ``path`` when it is published.

    ``at_once``: it is published in a moment, so if it replaces a file it has its hidden name from the
    beginning. Raises :class:`ArchiveError`.
    """
    with archive_errors(path):
        return _native.NewFile(os.fsencode(path), keep_cached, at_once)


def replace_by_torch(
    write: Callable[[Any], None], path: str, by_name: bool, durable: bool, keep_cached: bool
) -> None:
    """Lets ``write`` write into a new file, and puts that in the place of ``path``.

    ``by_name``: ``write`` is given a path that it opens itself, as the name goes into what it writes.
    """
    new = new_file(path, keep_cached)
    raw = None
    try:
        descriptor = new.descriptor()
        try:
            if by_name:
                write(named_like(path, descriptor))
            else:
                raw = _Noting(descriptor, "wb", closefd=False)
                with io.BufferedWriter(raw) as file:
                    write(file)
        except Exception as error:
            if raw is not None and error is raw.failed and error.errno is not None:
                failed: ArchiveError | None = of_writing(error.errno, path)
            else:
                failed = why_torch_failed(error, descriptor, path)
            if failed is None:
                raise
            raise failed from error
        with archive_errors(path):
            new.publish(durable)
    finally:
        new.close()


class _Noting(io.FileIO):
    """A file that notes its own errors, which tells them from those of pickling."""

    failed: OSError | None = None

    def write(self, data: Any, /) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            self.failed = error
            raise


def sync_folder(folder: str, path: str) -> None:
    """Returns when what is in the folder is on stable storage, the new file at ``path`` too."""
    try:
        with open_folder(folder or os.curdir) as opened:
            opened.sync()
    except OSError as error:
        text = f"{error.strerror}; the new file is in place, but not known to be on stable storage"
        raise archive_error(error.errno or errno.EIO, text, path, published=True) from None
