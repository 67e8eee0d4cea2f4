# SPDX-License-Identifier: Apache-2.0
"""Manifest and ``SHA256SUMS`` for a folder that was saved without them: what it holds now is what it is to hold."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Final

from ..api.checked import Problem
from ..engine.checksums import Sums, take
from ..formats.hf_index import StoredFile, read_stored
from ..formats.manifest import FileEntry, Manifest, TensorEntry
from ..formats.naming import MANIFEST_NAME, SUMS_NAME, WEIGHTS_SUFFIX
from ..formats.sha256sums import format_sums
from ..publish.directory import replacing
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
    there = [name for name in (MANIFEST_NAME, SUMS_NAME) if os.path.lexists(os.path.join(folder, name))]
    if there and not force:
        raise FileExistsError(f"{os.path.join(folder, there[0])!r} is there already")
    before = {name: os.stat(os.path.join(folder, name)) for name in names}
    stored = {n: read_stored(os.path.join(folder, n)) for n in names if n.endswith(WEIGHTS_SUFFIX)}
    _compare_with_indices(folder, names, stored)
    wanted = {
        name: Sums(os.path.join(folder, name), info.st_size, _ranges(info.st_size, stored.get(name)), sha256)
        for name, info in before.items()
    }
    with bar(sum(sums.work for sums in wanted.values()), progress, "Describing") as passed:
        take(wanted.values(), passed=passed)
    for name, sums in wanted.items():
        if sums.error is not None:
            raise sums.error
        now = os.stat(sums.path)
        if (now.st_ino, now.st_size, now.st_mtime_ns) != (
            before[name].st_ino,
            before[name].st_size,
            before[name].st_mtime_ns,
        ):
            raise ValueError(f"{sums.path!r} was changed while it was read")
    manifest = Manifest(files={name: _entry(sums, stored.get(name)) for name, sums in wanted.items()})
    text = manifest.to_json().encode()
    with replacing(folder, obsolete=[SUMS_NAME]) as made:
        with open(os.path.join(made, MANIFEST_NAME), "wb") as file:
            file.write(text)
        if sha256:
            digests = {name: sums.sha256_found for name, sums in wanted.items()}
            digests[MANIFEST_NAME] = hashlib.sha256(text, usedforsecurity=False).hexdigest()
            with open(os.path.join(made, SUMS_NAME), "wb") as file:
                file.write(os.fsencode(format_sums(digests)))
    return manifest


def _names_in(folder: str) -> list[str]:
    """Returns the names of the files in a folder and in those in it, relative to it."""
    found, ahead = [], [""]
    while ahead:
        inner = ahead.pop()
        files, folders = entries_of(os.path.join(folder, inner) if inner else folder)
        if not inner and any(name.startswith(_RUN) for name in folders):
            raise ValueError(f"{folder!r} holds several checkpoints: each is to have a manifest of its own")
        found += [f"{inner}/{name}" if inner else name for name in files]
        ahead += [f"{inner}/{name}" if inner else name for name in folders]
    left = sorted({*found} - {MANIFEST_NAME, SUMS_NAME})
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
            for name in sorted(named - {*here})
        ]
        for problem in (*indices.problems, *lost, *indices.compare(headers)):
            raise ValueError(str(problem))


def _ranges(nbytes: int, stored: StoredFile | None) -> list[tuple[int, int]]:
    if stored is None:
        return [(0, nbytes)]
    begin = stored.header.nbytes
    return [(0, begin), *((begin + t.begin, t.end - t.begin) for t in stored.header.tensors)]


def _entry(sums: Sums, stored: StoredFile | None) -> FileEntry:
    first, *others = sums.crc32s
    if stored is None:
        return FileEntry(sums.nbytes, first)
    tensors = {
        tensor.name: TensorEntry(offset, nbytes, crc32)
        for tensor, (offset, nbytes), crc32 in zip(
            stored.header.tensors, sums.ranges[1:], others, strict=True
        )
    }
    return FileEntry(sums.nbytes, first, tensors)
