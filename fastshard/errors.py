# SPDX-License-Identifier: Apache-2.0
"""The exceptions that failed writes raise."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TypeVar

from safetensors import SafetensorError


class SaveError(SafetensorError, OSError):
    """A file could not be written.

    This is both what safetensors raises and what ``open`` raises. ``errno`` and ``filename`` are set, so a
    full disk (``errno.ENOSPC``) can be told from a missing directory. The target is as it was before the
    save, unless ``published`` is true.
    """

    published: bool = False
    """Whether the new file stands under its name although the call has failed. Then a step after the rename
    has failed, for instance the sync of its folder, and the file is not known to be on stable storage."""

    def __str__(self) -> str:
        if self.errno is None:
            return super().__str__()
        place = f': "{os.fsdecode(self.filename)}"' if self.filename is not None else ""
        return f"Error while serializing: I/O error: {self.strerror} (os error {self.errno}){place}"


class ArchiveError(SaveError, RuntimeError):
    """A file of ``torch.save`` could not be written. It is a ``RuntimeError``, too, which ``torch.save``
    raises then."""


_Kind = TypeVar("_Kind", bound=SaveError)


def rewritten(error: OSError, kind: type[_Kind], filename: str | bytes | None = None) -> _Kind:
    """Returns an error as one of another class, with its ``published`` and its notes.

    ``filename`` is the name that the caller gave, if the error has another one.
    """
    if error.errno is None:  # made of a text only
        made = kind(*error.args)
    else:
        made = kind(error.errno, error.strerror, error.filename if filename is None else filename)
    made.published = getattr(error, "published", False)
    notes = getattr(error, "__notes__", None)  # Python 3.11
    if notes:
        made.__dict__["__notes__"] = list(notes)
    return made


@contextlib.contextmanager
def save_errors() -> Iterator[None]:
    """Raises failed system calls of the native module as :class:`SaveError`."""
    try:
        yield
    except OSError as error:
        raise rewritten(error, SaveError) from None
