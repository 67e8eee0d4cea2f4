# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders as Hugging Face lays them out: safetensors files, an index if there are several, other files.

What a folder says of itself is data, not to be trusted: names in an index must be those of files in the folder, and
index and headers must agree, tensor by tensor. Links are followed: the hub's cache consists of them.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from typing import Any, BinaryIO, Final, NamedTuple

from .json_text import read_json_object
from .naming import INDEX_NAME, INDEX_SUFFIX, MANIFESTS, WEIGHTS_SUFFIX, goes_with_weights
from .safetensors import MAX_HEADER_NBYTES, FileHeader, StoredTensor, parse_header, read_header

_MAX_JSON_NBYTES: Final = 4 * MAX_HEADER_NBYTES


class StoredFile(NamedTuple):
    """A safetensors file, as far as its header tells."""

    path: str
    raw: bytes
    """Length prefix and JSON as they are."""
    header: FileHeader

    def tensor(self, name: str) -> StoredTensor:
        """Raises ``KeyError``."""
        return next(tensor for tensor in self.header.tensors if tensor.name == name)


class Checkpoint(NamedTuple):
    """What a folder holds."""

    folder: str
    files: dict[str, StoredFile]
    """Those with tensors, by name."""
    index_text: str | None
    """``None``: there is one file and no index."""
    index_name: str
    others: list[str]
    """Names of the other files that belong to the model: configuration, tokenizer, ..."""

    def home(self) -> dict[str, tuple[str, StoredTensor]]:
        """Tensor -> its file's name and its entry there."""
        return {
            tensor.name: (name, tensor) for name, file in self.files.items() for tensor in file.header.tensors
        }


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Reads index and headers, and checks them against each other.

    Raises ``OSError``, and ``ValueError`` naming the file for what cannot be right: see :func:`check_index` and
    :func:`fastshard.formats.safetensors.read_header`.
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
    """Names of a model's files that hold no weights; hidden files and folders are nobody's."""
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_file()
        and not entry.name.startswith(".")
        and not goes_with_weights(entry.name)
        and entry.name not in MANIFESTS
    )


def exists(path: str) -> bool:
    """Whether there is something of this name. What cannot be looked at is an ``OSError``, not an absence."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_folder(path: str) -> bool:
    """Whether it is one. What cannot be looked at is an ``OSError``, not an absence."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def same_file(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether both lead to the same file or folder. What cannot be looked at is an ``OSError``."""
    try:
        return os.path.samestat(os.stat(one), os.stat(other))
    except (FileNotFoundError, NotADirectoryError):
        return False


def open_file(path: str) -> BinaryIO:
    """A regular file, to be read. Raises ``OSError``, and ``ValueError`` naming what is none; does not hang on a pipe."""
    file = open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")  # noqa: SIM115 - returned
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{path!r} is not a regular file")
    # A regular file always is seekable: else Python has swallowed why its position could not be told.
    if not file.seekable():
        file.close()
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)
    return file


def read_stored(path: str) -> StoredFile:
    """The header of a safetensors file. Raises ``OSError``, and ``ValueError`` naming the file."""
    with open_file(path) as file:
        info = os.fstat(file.fileno())
        try:
            header = read_header(file, info.st_size)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from None
        file.seek(0)
        return StoredFile(path, file.read(header.nbytes), header)


def stored_file(path: str, raw: bytes) -> StoredFile:
    """What :func:`read_stored` would find in a file that begins like this. Raises ``ValueError`` naming it."""
    try:
        return StoredFile(path, raw, parse_header(raw[8:]))
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}") from None


def read_text(path: str) -> str:
    """Of a small file. Raises ``OSError``, and ``ValueError`` for one that is too large or no text."""
    with open_file(path) as file:
        data = file.read(_MAX_JSON_NBYTES + 1)
    if len(data) > _MAX_JSON_NBYTES:
        raise ValueError(f"{path!r} is too large")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path!r}: {error}") from None


def write_text(path: str, text: str) -> None:
    """As it is, without translating line ends."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def read_object(text: str, path: str) -> dict[str, Any]:
    """The JSON object in a text; ``path`` is for errors. Raises ``ValueError``: see :func:`fastshard.formats.json_text.read_json`."""
    try:
        return read_json_object(text)
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}") from None


def is_plain(name: object) -> bool:
    """Whether this names a file in the folder itself."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(character in name for character in "/\\\0")
    )


def weight_map(text: str, path: str, suffix: str = WEIGHTS_SUFFIX) -> dict[str, str]:
    """Tensor -> file, whose name has this suffix, from an index. Raises ``ValueError`` for what is no index or names files elsewhere."""
    found = read_object(text, path).get("weight_map")
    if not isinstance(found, dict):
        raise ValueError(f"{path!r} has no weight_map")
    for tensor, name in found.items():
        if not is_plain(name) or not name.endswith(suffix) or name.startswith("."):
            raise ValueError(f"{path!r}: tensor {tensor!r} cannot lie in {name!r}")
    return found


def files_of_index(text: str, path: str) -> set[str]:
    """Raises as :func:`weight_map`."""
    return set(weight_map(text, path).values())


def check_index(text: str, files: Mapping[str, StoredFile], path: str) -> None:
    """Raises ``ValueError`` unless every tensor lies in the one file that the index names."""
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
    """An index as transformers writes it."""
    return json.dumps({"metadata": metadata, "weight_map": places}, indent=2, sort_keys=True) + "\n"
