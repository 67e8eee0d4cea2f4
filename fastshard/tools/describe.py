# SPDX-License-Identifier: Apache-2.0
"""Manifest and ``SHA256SUMS`` for a folder that was saved without them: what it holds now is what it is to hold."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Final

from ..api.checked import Problem
from ..formats.hf_index import StoredFile, read_stored
from ..formats.manifest import Manifest, read_manifest
from ..formats.naming import MANIFEST_NAME, RECORDS, SUMS_NAME, WEIGHTS_SUFFIX
from ..formats.sha256sums import read_sums
from ..publish.directory import Replacement
from ..publish.manifests import record_of
from .structure import of_indices
from .verify import bar, entries_of

_RUN: Final = "checkpoint-"


def write_manifest(
    path: str | os.PathLike[str], *, sha256: bool = False, force: bool = False, progress: bool | None = None
) -> Manifest:
    """Writes ``fastshard.manifest.json`` into a folder, which tells for :func:`verify` what is in its files, and those of
    the folders in it, now.

    Args:
        sha256: also write ``SHA256SUMS``, for ``sha256sum -c``. Both appear in the same moment.
        force: replace those that are there.
        progress: show a tqdm bar; ``None``: if the environment variable ``FASTSHARD_PROGRESS`` says so.

    Raises:
        FileExistsError: there is a manifest, or a list of digests, and ``force`` is not set.
        ValueError: a file is damaged, contradicts the index, or was changed meanwhile; or there are several checkpoints.
        OSError: a file cannot be read or written.
    """
    folder = os.fspath(path)
    names = _names_in(folder)
    there = [name for name in RECORDS if os.path.lexists(os.path.join(folder, name))]
    if there and not force:
        raise FileExistsError(
            f"{os.path.join(folder, there[0])!r} is there already; force=True (--force) replaces it"
        )
    before = {name: os.stat(os.path.join(folder, name)) for name in names}
    stored = {n: read_stored(os.path.join(folder, n)) for n in names if n.endswith(WEIGHTS_SUFFIX)}
    _compare_with_indices(folder, names, stored)
    with bar(sum(info.st_size for info in before.values()) * (1 + sha256), progress, "Describing") as passed:
        record = record_of(folder, "sha256" if sha256 else True, {}, names=names, passed=passed)
    for name, info in before.items():
        if not _is_still(os.path.join(folder, name), info):
            raise ValueError(f"{os.path.join(folder, name)!r} was changed while it was read")
    with Replacement(folder) as change:
        change.record = record._replace(without=frozenset(_named_before(folder) - record.files.keys()))
        change.publish()
    return Manifest(files=dict(sorted(record.files.items())))


def _is_still(path: str, before: os.stat_result) -> bool:
    now = os.stat(path)
    return (now.st_ino, now.st_size, now.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)


def _named_before(folder: str) -> set[str]:
    """Returns the names in manifest and digests that are there, as far as these can be read."""
    names = set[str]()
    with contextlib.suppress(OSError, ValueError):
        names |= read_manifest(os.path.join(folder, MANIFEST_NAME)).files.keys()
    with contextlib.suppress(OSError, ValueError):
        names |= read_sums(os.path.join(folder, SUMS_NAME)).keys()
    return names


def _names_in(folder: str) -> list[str]:
    """Returns the names of the files in a folder and in those in it, relative to it."""
    found, ahead = [], [""]
    while ahead:
        inner = ahead.pop()
        files, folders = entries_of(os.path.join(folder, inner) if inner else folder)
        if not inner and any(name.startswith(_RUN) for name in folders):
            raise ValueError(f"{folder!r} holds several checkpoints: give each of them a manifest of its own")
        found += [f"{inner}/{name}" if inner else name for name in files]
        ahead += [f"{inner}/{name}" if inner else name for name in folders]
    left = sorted({*found} - {*RECORDS})
    if not left:
        raise ValueError(f"{folder!r} holds no files")
    return left


def _compare_with_indices(folder: str, names: list[str], stored: Mapping[str, StoredFile]) -> None:
    for inner in sorted({os.path.dirname(name) for name in names}):
        here = [os.path.basename(name) for name in names if os.path.dirname(name) == inner]
        indices = of_indices(os.path.join(folder, inner) if inner else folder, here)
        headers = {name: stored.get(f"{inner}/{name}" if inner else name) for name in here}
        lost = [
            Problem("missing", os.path.join(folder, inner, name), f"is missing, and {index} names it")
            for index, named in indices.named.items()
            for name in sorted(named.keys() - {*here})
        ]
        for problem in (*indices.problems, *lost, *indices.compare(headers)):
            raise ValueError(str(problem))
