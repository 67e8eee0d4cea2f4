# SPDX-License-Identifier: Apache-2.0
"""The tensors that lie under a path, whatever files they lie in, and what manifests say of their bytes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from ..formats.file_kinds import SAFETENSORS, what_is
from ..formats.hf_index import files_of_index, is_folder, read_stored, read_text
from ..formats.manifest import FileEntry, read_manifest
from ..formats.naming import (
    INDEX_SUFFIX,
    RECORDS,
    SUMS_NAME,
    WEIGHTS_SUFFIX,
    index_of_what,
    is_manifest,
)
from ..formats.sha256sums import read_sums

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
    sha256: str | None = None
    """Of the whole file, as ``SHA256SUMS`` has it."""


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
            raise ValueError(f"{path}: {what.text} is neither a safetensors file nor an index nor a folder")
        names = [name]
    _add_files(found, "", {name: os.path.join(folder, name) for name in names}, _known(folder or "."))
    return found


def _add_folder(found: Contents, within: str, above: _Known | None = None) -> None:
    folder = os.path.join(found.path, within)
    with os.scandir(folder) as entries:
        listed = sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    known = _known(folder, above)
    files = {e.name: e.path for e in listed if e.name.endswith(WEIGHTS_SUFFIX) and not e.is_dir()}
    _add_files(found, within, files, known)
    for entry in listed:
        name = os.path.join(within, entry.name)
        if entry.is_dir(follow_symlinks=False):
            _add_folder(found, name, known.within(entry.name))
        elif entry.name not in files and not _follows(entry.name) and not entry.is_dir():
            found.others[name] = _whole(entry.path, entry.name, known)


def _whole(path: str, name: str, known: _Known) -> Placed:
    info = os.stat(path)
    entry = known.entries.get(name)
    crc32 = entry.crc32 if entry is not None and entry.nbytes == info.st_size else None
    identity = (info.st_dev, info.st_ino)
    return Placed(path, identity, "U8", (info.st_size,), 0, info.st_size, crc32, known.sums.get(name))


def _follows(name: str) -> bool:
    """Returns whether what is in the file follows from the other ones."""
    return index_of_what(name) is not None or name in RECORDS or is_manifest(name)


class _Known(NamedTuple):
    """What is known of the files of a folder, by their names relative to it."""

    entries: Mapping[str, FileEntry]
    sums: Mapping[str, str]

    def within(self, name: str) -> _Known:
        """Returns what is known of a folder of the folder."""
        return _Known(_below(self.entries, f"{name}/"), _below(self.sums, f"{name}/"))


T = TypeVar("T")


def _below(told: Mapping[str, T], above: str) -> dict[str, T]:
    return {name.removeprefix(above): what for name, what in told.items() if name.startswith(above)}


def _known(folder: str, above: _Known | None = None) -> _Known:
    """Returns what manifests and sums of a folder say of its files. One that cannot be read says nothing."""
    entries: dict[str, FileEntry] = dict(above.entries) if above is not None else {}
    sums: dict[str, str] = dict(above.sums) if above is not None else {}
    with os.scandir(folder) as found:
        names = [entry.name for entry in found if entry.name in RECORDS or is_manifest(entry.name)]
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            if name == SUMS_NAME:
                sums.update(read_sums(os.path.join(folder, name)))
            else:
                entries.update(read_manifest(os.path.join(folder, name)).files)
    return _Known(entries, sums)


def _add_files(found: Contents, within: str, files: Mapping[str, str], known: _Known) -> None:
    placed = {name: dict(_of_file(path, name, known)) for name, path in files.items()}
    counts: dict[str, int] = {}
    for tensors in placed.values():
        for tensor in tensors:
            counts[tensor] = counts.get(tensor, 0) + 1
    for name, tensors in placed.items():
        for tensor, place in tensors.items():
            label = tensor if counts[tensor] == 1 else f"{name}: {tensor}"
            found.tensors[os.path.join(within, label)] = place


def _of_file(path: str, name: str, known: _Known) -> Iterator[tuple[str, Placed]]:
    stored, whole = read_stored(path), _whole(path, name, known)
    told = known.entries.get(name)
    entries = told.tensors if told is not None and told.nbytes == whole.nbytes and told.tensors else {}
    for tensor in stored.header.tensors:
        offset, nbytes = stored.header.nbytes + tensor.begin, tensor.end - tensor.begin
        entry = entries.get(tensor.name)
        crc32 = entry.crc32 if entry is not None and entry[:2] == (offset, nbytes) else None
        yield (
            tensor.name,
            whole._replace(code=tensor.code, shape=tensor.shape, offset=offset, nbytes=nbytes, crc32=crc32),
        )
