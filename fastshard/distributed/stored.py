# SPDX-License-Identifier: Apache-2.0
"""The tensors of a checkpoint as Hugging Face lays it out, with their files open for reading.

Index and headers are not trusted: see :mod:`fastshard.formats.hf_index`.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError

from ..engine.mapped import in_torch
from ..formats.hf_index import (
    StoredFile,
    check_index,
    files_of_index,
    is_folder,
    open_file,
    read_stored,
    read_text,
)
from ..formats.naming import HUB_PATTERN, INDEX_SUFFIX, WEIGHTS_SUFFIX
from ..formats.safetensors import StoredTensor

_TRIES = 8


class Stored(NamedTuple):
    """A tensor in a file, where its elements lie one behind the other."""

    file: BinaryIO
    """Open as long as anything is read of it."""
    offset: int
    """Of the first byte, from the beginning of the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    """As torch counts it: an element of float4 has two numbers."""


class OpenCheckpoint:
    """A checkpoint whose files are open."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.metadata: dict[str, str] = {}
        """Of all files. Savers note here which name a tensor is stored under that has several."""
        self.digest = 0
        """Of all headers: tells checkpoints apart whose tensors have other names, shapes or places."""
        self._tensors: dict[str, tuple[BinaryIO, int, StoredTensor]] = {}

    def names(self) -> list[str]:
        return [*self._tensors]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def file_of(self, name: str) -> str:
        """Returns the path of the file that holds a tensor."""
        return str(self._tensors[name][0].name)

    def tensor(self, name: str) -> Stored:
        """Returns where a tensor is. Raises ``SafetensorError``, naming it and its file, if torch has no such
        tensors."""
        file, begin, stored = self._tensors[name]
        try:
            dtype, shape = in_torch(stored)
        except ValueError as error:
            raise SafetensorError(f"tensor {name!r} of {file.name!r}: {error}") from None
        return Stored(file, begin + stored.begin, dtype, shape)

    def add(self, file: BinaryIO, described: StoredFile) -> None:
        header = described.header
        self.digest = zlib.crc32(described.raw, self.digest)
        self.metadata.update(header.metadata or {})
        self._tensors.update((stored.name, (file, header.nbytes, stored)) for stored in header.tensors)


@contextlib.contextmanager
def open_checkpoint(place: str | os.PathLike[str]) -> Iterator[OpenCheckpoint]:
    """Opens a checkpoint: a file, or a folder with one file, or with an index and the files that it names.

    Files of the folder that the index does not name are left alone. All files are of one save, whatever is saved there
    meanwhile.

    Raises ``OSError``, and ``SafetensorError``, naming the file, for what is no checkpoint or contradicts itself.
    """
    path = os.fspath(place)
    with contextlib.ExitStack() as stack:
        try:
            found = _open(path, stack)
        except ValueError as error:
            raise SafetensorError(str(error)) from None
        yield found


def _open(place: str, stack: contextlib.ExitStack) -> OpenCheckpoint:
    for left in reversed(range(_TRIES)):
        with contextlib.ExitStack() as files:
            try:
                found = _open_once(place, files)
            except FileNotFoundError:
                if not left or not os.path.lexists(place):
                    raise
                continue  # perhaps replaced between the index and its files
            if found is not None:
                stack.push(files.pop_all())
                return found
    raise OSError(f"{place!r} is replaced faster than it can be opened")


def _open_once(place: str, files: contextlib.ExitStack) -> OpenCheckpoint | None:
    """Returns ``None`` if what stands there now is no longer what was opened."""
    found, paths = OpenCheckpoint(place), [place]
    index = ""
    if is_folder(place):
        index, names = _weights_of(place)
        paths = [os.path.join(place, name) for name in names]
    opened = [files.enter_context(open_file(path)) for path in paths]
    stored = {os.path.basename(path): read_stored(path) for path in paths}
    if index:
        check_index(read_text(index), stored, index)
    for file, described in zip(opened, stored.values()):
        if file.read(len(described.raw)) != described.raw:
            return None
        found.add(file, described)
    same = all(os.path.samestat(os.fstat(file.fileno()), os.stat(path)) for file, path in zip(opened, paths))
    return found if same else None


def _weights_of(folder: str) -> tuple[str, list[str]]:
    """Returns the path of the index, if there is one, and the names of the files with tensors."""
    names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    weights = [name for name in names if name.endswith(WEIGHTS_SUFFIX)]
    alone = HUB_PATTERN.format(suffix="")
    if alone in weights:  # first of all, as in transformers
        return "", [alone]
    if len(indices) > 1:
        raise ValueError(f"{folder!r} holds several checkpoints: {', '.join(indices)}")
    if indices:
        index = os.path.join(folder, indices[0])
        return index, sorted(files_of_index(read_text(index), index))
    if not weights:
        raise FileNotFoundError(2, f"there is no {WEIGHTS_SUFFIX} file in the folder", folder)
    if len(weights) > 1:
        raise ValueError(f"{folder!r} holds several files and no index: {', '.join(weights)}")
    return "", weights
