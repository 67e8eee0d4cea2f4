# SPDX-License-Identifier: Apache-2.0
"""The tensors that lie under a path, whatever files they lie in, and what manifests say of their bytes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..formats.file_kinds import SAFETENSORS, what_is
from ..formats.hf_index import files_of_index, is_folder, read_stored, read_text
from ..formats.manifest import FileEntry, read_manifest
from ..formats.naming import (
    INDEX_SUFFIX,
    MANIFEST_NAME,
    RECORDS,
    WEIGHTS_SUFFIX,
    index_of_what,
    is_manifest,
)

Identity = tuple[int, int]


class Placed(NamedTuple):
    """A tensor, or a whole file, and where its bytes lie."""

    path: str
    identity: Identity
    """Device and number of the file, which two names of it have in common."""
    code: str
    shape: tuple[int, ...]
    offset: int
    """From the beginning of the file."""
    nbytes: int
    crc32: int | None
    """As a manifest has it that knows something of this size at this place."""


@dataclass
class Contents:
    """What lies under a path."""

    path: str
    tensors: dict[str, Placed] = field(default_factory=dict)
    """By name; those in a folder of the folder have that before it, and names that several files have the file's."""
    others: dict[str, Placed] = field(default_factory=dict)
    """The other files as a whole, by their names relative to the path. What follows from the tensors is left out: indices,
    manifests, sums."""
    is_folder: bool = False


def tensors_of(path: str | os.PathLike[str]) -> Contents:
    """Finds the tensors of a safetensors file, of an index, or of a folder and the folders in it.

    Raises ``OSError``, and ``ValueError`` naming the file for one that is damaged or of another kind.
    """
    path = os.fspath(path)
    found = Contents(path, is_folder=is_folder(path))
    if found.is_folder:
        _add_folder(found, "")
        return found
    folder, name = os.path.split(path)
    if name.endswith(INDEX_SUFFIX):
        names = sorted(files_of_index(read_text(path), path))
    else:
        what = what_is(path)
        if what.kind != SAFETENSORS:
            raise ValueError(f"{path}: {what.text} is no safetensors file, no index and no folder")
        names = [name]
    _add_files(found, "", {name: os.path.join(folder, name) for name in names}, _known(folder or "."))
    return found


def _add_folder(found: Contents, within: str, above: Mapping[str, FileEntry] | None = None) -> None:
    folder = os.path.join(found.path, within)
    with os.scandir(folder) as entries:
        listed = sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    known = {**(above or {}), **_known(folder)}
    files = {e.name: e.path for e in listed if e.name.endswith(WEIGHTS_SUFFIX) and not e.is_dir()}
    _add_files(found, within, files, known)
    for entry in listed:
        name = os.path.join(within, entry.name)
        if entry.is_dir(follow_symlinks=False):
            below = f"{entry.name}/"
            inner = {n.removeprefix(below): known[n] for n in known if n.startswith(below)}
            _add_folder(found, name, inner)
        elif entry.name not in files and not _follows(entry.name) and not entry.is_dir():
            found.others[name] = _whole(entry.path, known.get(entry.name))


def _whole(path: str, known: FileEntry | None) -> Placed:
    info = os.stat(path)
    crc32 = known.crc32 if known is not None and known.nbytes == info.st_size else None
    return Placed(path, (info.st_dev, info.st_ino), "U8", (info.st_size,), 0, info.st_size, crc32)


def _follows(name: str) -> bool:
    """Returns whether what is in the file follows from the other ones."""
    return index_of_what(name) is not None or name in RECORDS or is_manifest(name)


def _known(folder: str) -> dict[str, FileEntry]:
    """Returns what the manifests of a folder say of its files. One that cannot be read says nothing."""
    known: dict[str, FileEntry] = {}
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name == MANIFEST_NAME or is_manifest(entry.name)]
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            known.update(read_manifest(os.path.join(folder, name)).files)
    return known


def _add_files(
    found: Contents, within: str, files: Mapping[str, str], known: Mapping[str, FileEntry]
) -> None:
    placed = {name: dict(_of_file(path, known.get(name))) for name, path in files.items()}
    counts: dict[str, int] = {}
    for tensors in placed.values():
        for tensor in tensors:
            counts[tensor] = counts.get(tensor, 0) + 1
    for name, tensors in placed.items():
        for tensor, place in tensors.items():
            label = tensor if counts[tensor] == 1 else f"{name}: {tensor}"
            found.tensors[os.path.join(within, label)] = place


def _of_file(path: str, known: FileEntry | None) -> Iterator[tuple[str, Placed]]:
    stored = read_stored(path)
    info = os.stat(path)
    if known is not None and known.nbytes != info.st_size:
        known = None
    told = known.tensors if known is not None and known.tensors is not None else {}
    for tensor in stored.header.tensors:
        offset, nbytes = stored.header.nbytes + tensor.begin, tensor.end - tensor.begin
        entry = told.get(tensor.name)
        crc32 = entry.crc32 if entry is not None and entry[:2] == (offset, nbytes) else None
        identity = (info.st_dev, info.st_ino)
        yield tensor.name, Placed(path, identity, tensor.code, tensor.shape, offset, nbytes, crc32)
