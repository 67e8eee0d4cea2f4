# SPDX-License-Identifier: Apache-2.0
"""Digests of a folder's files that are known from ``SHA256SUMS``, so that nobody has to read the files again.

A digest is only as good as the knowledge that its file is still the one that was read. Whoever changes a file
changes its size or its times, which are compared with those of ``SHA256SUMS``: that is written last.
"""

from __future__ import annotations

import hashlib
import os
import stat
from typing import Final, NamedTuple

from .manifest import read_manifest
from .naming import MANIFEST_NAME, SUMS_NAME
from .sha256sums import read_sums

_PUBLICATION_NS: Final = 1_000_000_000
"""How long the files of a folder may take to get their names, which counts as a change of their status."""


class Known(NamedTuple):
    """A file whose digest is known."""

    sha256: str
    nbytes: int


def known_digest(path: str | os.PathLike[str]) -> str | None:
    """Returns the SHA-256 of a file if the ``SHA256SUMS`` beside it has it and nothing was changed since; else
    ``None``.

    A file that was put there later counts as changed even if it has kept an older time, as ``cp -p`` does.
    """
    folder, name = os.path.split(os.path.abspath(path))
    try:
        sums = os.stat(os.path.join(folder, SUMS_NAME))
        digest = read_sums(os.path.join(folder, SUMS_NAME)).get(name)
        if digest is None:
            return None
        info = os.stat(path)
        if (
            _misfit(info, sums, _sizes(folder).get(name))
            or info.st_ctime_ns > sums.st_ctime_ns + _PUBLICATION_NS
        ):
            return None
    except (OSError, ValueError):
        return None
    return digest


def known_digests(folder: str | os.PathLike[str]) -> dict[str, Known]:
    """Returns the files that the ``SHA256SUMS`` of a folder names, by their names, and itself, which is read.

    Raises ``OSError`` if there is no such file or one that it names is missing, and ``ValueError`` if it cannot be
    read, or if a file was changed later.
    """
    path = os.path.join(folder, SUMS_NAME)
    with open(path, "rb") as file:
        itself = hashlib.sha256(file.read()).hexdigest()
        sums = os.fstat(file.fileno())
    digests, sizes = read_sums(path), _sizes(folder)
    known = {}
    for name, digest in digests.items():
        if os.path.isabs(name) or ".." in name.split("/"):
            raise ValueError(f"{path!r} names a file that is not in its folder: {name!r}")
        info = os.stat(os.path.join(folder, name))
        if misfit := _misfit(info, sums, sizes.get(name)):
            raise ValueError(f"{os.path.join(folder, name)!r} {misfit}")
        known[name] = Known(digest, info.st_size)
    known[SUMS_NAME] = Known(itself, sums.st_size)
    return dict(sorted(known.items(), key=lambda item: item[0].split("/")))


def _misfit(info: os.stat_result, sums: os.stat_result, nbytes: int | None) -> str | None:
    """Returns what is against a file's being the one that was summed."""
    if not stat.S_ISREG(info.st_mode):
        return "is not a regular file"
    if nbytes is not None and info.st_size != nbytes:
        return f"has {info.st_size} bytes, and {nbytes} according to {MANIFEST_NAME}"
    if info.st_mtime_ns > sums.st_mtime_ns:
        return f"was changed after {SUMS_NAME} was written"
    return None


def _sizes(folder: str | os.PathLike[str]) -> dict[str, int]:
    try:
        files = read_manifest(os.path.join(folder, MANIFEST_NAME)).files
    except FileNotFoundError:
        return {}
    return {name: entry.nbytes for name, entry in files.items()}
