# SPDX-License-Identifier: Apache-2.0
"""The exceptions that failed writes raise."""

from __future__ import annotations

import os

from safetensors import SafetensorError


class SaveError(SafetensorError, OSError):
    """A file could not be written.

    Both what safetensors raises and what ``open`` raises: ``errno`` and ``filename`` are set, so a full disk
    (``errno.ENOSPC``) can be told from a missing directory. The target is as it was before the save.
    """

    def __str__(self) -> str:
        if self.errno is None:
            return super().__str__()
        place = f': "{os.fsdecode(self.filename)}"' if self.filename is not None else ""
        return f"Error while serializing: I/O error: {self.strerror} (os error {self.errno}){place}"


class ArchiveError(SaveError, RuntimeError):
    """The same of an archive: ``torch.save`` raises ``RuntimeError`` where a file cannot be written."""
