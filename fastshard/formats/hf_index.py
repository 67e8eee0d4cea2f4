# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders as Hugging Face lays them out: safetensors files, an index if there are several, other
files.

What a folder says of itself is not to be trusted. Names in an index must be those of files in the folder, and
index and headers must agree, tensor by tensor. Symbolic links are followed, as the hub's cache consists of
them.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from typing import Any, BinaryIO, Final, NamedTuple

from .json_text import read_json_object
from .naming import INDEX_NAME, INDEX_SUFFIX, MANIFESTS, RECORDS, WEIGHTS_SUFFIX, goes_with_weights
from .safetensors import MAX_HEADER_NBYTES, FileHeader, StoredTensor, parse_header, read_header

_MAX_JSON_NBYTES: Final = 4 * MAX_HEADER_NBYTES


class StoredFile(NamedTuple):
    """A safetensors file, as its header describes it."""

    path: str
    raw: bytes
    """The length prefix and the JSON, as they are in the file."""
    header: FileHeader

    def tensor(self, name: str) -> StoredTensor:
        """Returns the entry of that name. Raises ``KeyError``."""
        return next(tensor for tensor in self.header.tensors if tensor.name == name)


class Checkpoint(NamedTuple):
    """The contents of a checkpoint folder."""

    folder: str
    files: dict[str, StoredFile]
    """The files with tensors, by name."""
    index_text: str | None
    """The text of the index; ``None`` if there is one file and no index."""
    index_name: str
    others: list[str]
    """Names of the other files that belong to the model: configuration, tokenizer, ..."""

    def home(self) -> dict[str, tuple[str, StoredTensor]]:
        """Returns for each tensor the name of its file and its entry there."""
        return {
            tensor.name: (name, tensor) for name, file in self.files.items() for tensor in file.header.tensors
        }


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Reads index and headers, and checks them against each other.

    Raises ``OSError``, and ``ValueError``, naming the file, for contents that contradict each other: see
    :func:`check_index` and :func:`fastshard.formats.safetensors.read_header`.
    """
    folder = os.fspath(folder)
    names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    weights = [name for name in names if name.endswith(WEIGHTS_SUFFIX)]
    if len(indices) > 1:
        raise ValueError(f"{folder!r} holds several checkpoints: {', '.join(indices)}")
    text = None
    if indices:
        text = read_text(os.path.join(folder, indices[0]))
        named = files_of_index(text, os.path.join(folder, indices[0]))
        for name in sorted(named):
            if name not in weights:
                raise ValueError(f"{os.path.join(folder, name)!r} is missing, but {indices[0]} names it")
        for name in weights:
            if name not in named:
                raise ValueError(
                    f"{os.path.join(folder, name)!r} does not belong to the checkpoint: {indices[0]} does not name it"
                )
    elif not weights:
        raise ValueError(f"{folder!r} holds no {WEIGHTS_SUFFIX} file")
    elif len(weights) > 1:
        raise ValueError(f"{folder!r} holds several files and no index: {', '.join(weights)}")
    files = {name: read_stored(os.path.join(folder, name)) for name in weights}
    if text is not None:
        check_index(text, files, os.path.join(folder, indices[0]))
    return Checkpoint(folder, files, text, indices[0] if indices else INDEX_NAME, other_files(folder))


def other_files(folder: str) -> list[str]:
    """Returns the names of a model's files without weights. Hidden files and folders are not among them."""
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_file()
        and not entry.name.startswith(".")
        and not goes_with_weights(entry.name)
        and entry.name not in (*MANIFESTS, *RECORDS)
    )


def exists(path: str) -> bool:
    """Returns whether there is something of this name. Raises ``OSError`` if that cannot be told."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_folder(path: str) -> bool:
    """Returns whether it is a folder. Raises ``OSError`` if that cannot be told."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def same_file(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Returns whether both paths lead to the same file or folder. Raises ``OSError`` if that cannot be told."""
    try:
        return os.path.samestat(os.stat(one), os.stat(other))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def open_file(path: str) -> BinaryIO:
    """Opens a regular file for reading.

    Raises ``OSError``, and ``ValueError``, naming it, for anything else. It does not wait for the other end
    of a pipe.
    """
    file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115 - returned
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{path!r} is not a regular file")
    # A regular file always is seekable: else Python has swallowed why its position could not be told.
    if not file.seekable():
        file.close()
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)
    return file


def read_stored(path: str) -> StoredFile:
    """Reads the header of a safetensors file. Raises ``OSError``, and ``ValueError`` naming the file."""
    with open_file(path) as file:
        info = os.fstat(file.fileno())
        try:
            header = read_header(file, info.st_size)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from None
        file.seek(0)
        return StoredFile(path, file.read(header.nbytes), header)


def stored_file(path: str, raw: bytes) -> StoredFile:
    """Returns what :func:`read_stored` would find in a file that begins like this. Raises ``ValueError``
    naming it."""
    try:
        return StoredFile(path, raw, parse_header(raw[8:]))
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}") from None


def read_text(path: str) -> str:
    """Returns the text of a small file. Raises ``OSError``, and ``ValueError`` if it is too large or not
    text."""
    with open_file(path) as file:
        data = file.read(_MAX_JSON_NBYTES + 1)
    if len(data) > _MAX_JSON_NBYTES:
        raise ValueError(f"{path!r} is too large")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path!r}: {error}") from None


def write_text(path: str, text: str) -> None:
    """Writes a text as it is, without translating line ends."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def read_object(text: str, path: str) -> dict[str, Any]:
    """Returns the JSON object in a text. ``path`` is named in errors.

    Raises ``ValueError``: see :func:`fastshard.formats.json_text.read_json`.
    """
    try:
        return read_json_object(text)
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}") from None


def is_plain(name: object) -> bool:
    """Returns whether this names a file in the folder itself."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(character in name for character in "/\\\0")
    )


def weight_map(text: str, path: str, suffix: str = WEIGHTS_SUFFIX) -> dict[str, str]:
    """Returns the file of each tensor from an index. The files' names have this suffix.

    Raises ``ValueError`` for what is not an index, or names files in other folders.
    """
    found = read_object(text, path).get("weight_map")
    if not isinstance(found, dict):
        raise ValueError(f"{path!r} has no weight_map")
    for tensor, name in found.items():
        if not is_plain(name) or not name.endswith(suffix) or name.startswith("."):
            raise ValueError(f"{path!r}: tensor {tensor!r} cannot lie in {name!r}")
    return found


def files_of_index(text: str, path: str) -> set[str]:
    """Returns the names of the files of an index. Raises as :func:`weight_map`."""
    return set(weight_map(text, path).values())


def check_index(text: str, files: Mapping[str, StoredFile], path: str) -> None:
    """Raises ``ValueError`` unless every tensor is in the one file that the index names."""
    mapped = weight_map(text, path)
    found: dict[str, str] = {}
    for name, file in files.items():
        for tensor in file.header.tensors:
            other = found.setdefault(tensor.name, name)
            if other != name:
                raise ValueError(f"{file.path!r}: tensor {tensor.name!r} also lies in {other!r}")
            if mapped.get(tensor.name) != name:
                told = mapped.get(tensor.name)
                where = f"in {told!r}" if told else "nowhere"
                raise ValueError(f"{file.path!r}: tensor {tensor.name!r} should lie {where}, says {path!r}")
    missing = mapped.keys() - found.keys()
    if missing:
        lost = min(missing)
        raise ValueError(f"{path!r}: tensor {lost!r} is not in {mapped[lost]!r}")


def make_index(metadata: Mapping[str, object], places: Mapping[str, str]) -> str:
    """Returns an index as transformers writes it."""
    return json.dumps({"metadata": metadata, "weight_map": places}, indent=2, sort_keys=True) + "\n"
