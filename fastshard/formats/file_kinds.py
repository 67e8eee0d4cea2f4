# SPDX-License-Identifier: Apache-2.0
"""Finds out what a file or a folder is, whatever its name says, so that errors can say it."""

from __future__ import annotations

import errno
import os
import stat
import struct
import zipfile
from collections.abc import Callable
from typing import BinaryIO, Final, NamedTuple, cast

from .hf_index import open_file
from .json_text import read_json
from .naming import (
    DCP_METADATA,
    DISTCP_SUFFIX,
    INDEX_SUFFIX,
    PICKLED_SUFFIX,
    RANK_MANIFEST,
    ROOT_MANIFEST,
    TORCH_SUFFIXES,
    WEIGHTS_SUFFIX,
)
from .safetensors import MAX_HEADER_NBYTES

SAFETENSORS: Final = "safetensors"
TORCH: Final = "torch"
"""A file that ``torch.save`` has made, in either of its formats."""
INDEX: Final = "index"
FOLDER: Final = "folder"
OTHER: Final = "other"

_FIRST_NBYTES: Final = 4096
_MAX_JSON_NBYTES: Final = 16 << 20
_OLD_TORCH: Final = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")
_BEGINNINGS: Final[dict[bytes, str]] = {
    b"version https://git-lfs.github.com/spec/": "a pointer of git-LFS, not the file itself (git lfs pull brings it)",
    b"version https://hawser.github.com/spec/": "a pointer of git-LFS, not the file itself (git lfs pull brings it)",
    b"/annex/objects/": "a pointer of git-annex, not the file itself (git annex get brings it)",
    b"GGUF": "a GGUF file (llama.cpp)",
    b"lmgg": "a GGML file (llama.cpp)",
    b"tjgg": "a GGJT file (llama.cpp)",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file (Keras, TensorFlow)",
    b"\x93NUMPY": "an array of numpy (.npy)",
    b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\xfd7zXZ\0": "compressed by xz",
    b"BZh": "compressed by bzip2",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x7fELF": "a program or a shared library",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"%PDF": "a PDF document",
    b"SQLite format 3\0": "a SQLite database",
    b"PAR1": "a Parquet file",
}
_SUFFIXES: Final[dict[str, str]] = {
    ".gguf": "GGUF",
    ".ggml": "GGML",
    ".h5": "HDF5",
    ".hdf5": "HDF5",
    ".keras": "Keras",
    ".onnx": "ONNX",
    ".msgpack": "msgpack",
    ".npz": "numpy",
    ".npy": "numpy",
    ".tflite": "TensorFlow Lite",
    ".pb": "TensorFlow",
    ".json": "JSON",
    ".zip": "zip",
    ".gz": "gzip",
    ".tar": "tar",
}


class What(NamedTuple):
    """What a path leads to."""

    kind: str
    """:data:`SAFETENSORS`, :data:`TORCH`, :data:`INDEX`, :data:`FOLDER` or :data:`OTHER`."""
    text: str
    """A description that can follow "it is"."""
    is_whole: bool = True
    """``False`` if it is something of that kind that has been cut."""


def what_is(path: str | os.PathLike[str]) -> What:
    """Examines the first bytes of a file, its size, or the names in a folder. Nothing is run or unpacked.

    Raises ``OSError`` if it cannot be examined; the text says so if a link leads nowhere.
    """
    name = os.fspath(path)
    try:
        info = os.stat(name)
    except FileNotFoundError as error:
        try:
            target = os.readlink(name)
        except OSError:
            raise error from None
        where = "git-annex has not got it" if "annex/objects" in target else "which is missing"
        raise FileNotFoundError(error.errno, f"a link to {target!r}, {where}", name) from None
    if stat.S_ISDIR(info.st_mode):
        return What(FOLDER, _of_folder(name))
    if not stat.S_ISREG(info.st_mode):
        return What(OTHER, "no regular file but a pipe, a socket or a device")
    with open_file(name) as file:
        return _of_file(file, info.st_size)


def format_of_name(path: str) -> str:
    """Returns the format that a file of this name is to have: :data:`SAFETENSORS` or :data:`TORCH`.

    Raises ``ValueError`` for a suffix of another format.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix in TORCH_SUFFIXES:
        return TORCH
    if suffix in _SUFFIXES:
        raise ValueError(
            f"{path}: no {_SUFFIXES[suffix]} files can be written, only {WEIGHTS_SUFFIX} and {', '.join(TORCH_SUFFIXES)}"
        )
    return SAFETENSORS


def _of_folder(folder: str) -> str:
    with os.scandir(folder) as entries:
        names = {entry.name for entry in entries}
    if not names:
        return "an empty folder"
    for name, text in (
        (ROOT_MANIFEST, "a folder that fastshard shard made: the parts of a checkpoint"),
        (RANK_MANIFEST, "one rank's part of a checkpoint"),
    ):
        if name in names:
            return text
    if DCP_METADATA in names and any(name.endswith(DISTCP_SUFFIX) for name in names):
        return "a checkpoint of torch.distributed.checkpoint"
    for suffix, text in (
        (INDEX_SUFFIX, "a checkpoint of several safetensors files"),
        (WEIGHTS_SUFFIX, "a folder with safetensors files"),
        (PICKLED_SUFFIX, "a folder with files of torch.save"),
        (".pt", "a folder with files of torch.save"),
        (".pth", "a folder with files of torch.save"),
        (".gguf", "a folder with GGUF files"),
        (".h5", "a folder with HDF5 files"),
        (".msgpack", "a folder with msgpack files (Flax)"),
    ):
        if any(name.endswith(suffix) for name in names):
            return text
    return "a folder without weights"


def _of_file(file: BinaryIO, nbytes: int) -> What:
    first = file.read(_FIRST_NBYTES)
    if not first:
        return What(OTHER, "an empty file")
    if first.startswith(b"PK\x03\x04") or first.startswith(b"PK\x05\x06"):
        return _of_zip(file, b"data.pkl" in first)
    if first.startswith(_OLD_TORCH):
        return What(TORCH, "an archive of torch.save, of its old format")
    for beginning, text in _BEGINNINGS.items():
        if first.startswith(beginning):
            return What(OTHER, text)
    if len(first) > 8:
        (length,) = struct.unpack("<Q", first[:8])
        if length <= MAX_HEADER_NBYTES and first[8:].lstrip(b" \t\r\n")[:1] == b"{":
            if 8 + length > nbytes:
                text = f"a safetensors file that has been cut in its header, at {nbytes} of {8 + length} bytes or more"
                return What(SAFETENSORS, text, False)
            return What(SAFETENSORS, "a safetensors file")
    if not first.strip(b"\0"):
        return What(OTHER, "nothing but zeros at its beginning (a download or a copy that did not end?)")
    if first[257:262] == b"ustar":
        return What(OTHER, "a tar archive")
    text_of_it = first.lstrip(b"\xef\xbb\xbf \t\r\n")[:200].lower()
    if text_of_it.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<!--")):
        return What(OTHER, "a page of HTML (an error page that was downloaded instead of the file?)")
    if text_of_it.startswith((b"<?xml", b"<error")):
        return What(OTHER, "XML (an error that was downloaded instead of the file?)")
    if text_of_it[:1] in (b"{", b"["):
        return _of_json(first + file.read(_MAX_JSON_NBYTES))
    if first[0] == 0x80 and first[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return What(OTHER, "a pickle, but not one of torch.save")
    try:
        first[:-3].decode() if len(first) == _FIRST_NBYTES else first.decode()
    except UnicodeDecodeError:
        return What(OTHER, "no file of a known kind")
    return What(OTHER, f"a text: {first[:40].decode(errors='replace')!r}")


def _of_json(data: bytes) -> What:
    try:
        found = read_json(data)
    except ValueError:
        return What(OTHER, "a text that looks like JSON")
    if isinstance(found, dict) and "weight_map" in found:
        return What(INDEX, "the index of a checkpoint")
    if isinstance(found, dict) and isinstance(found.get("error"), (str, dict)):
        return What(OTHER, "JSON with an error in it (downloaded instead of the file?)")
    return What(OTHER, "JSON, but not the index of a checkpoint")


class Watched:
    """A file that notes a failed system call. ``zipfile`` takes one for a sign that the file is no archive."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def read(self, *arguments: int) -> bytes:
        return cast(bytes, self._noting(self._file.read, *arguments))

    def seek(self, *arguments: int) -> int:
        return cast(int, self._noting(self._file.seek, *arguments))

    def tell(self) -> int:
        return cast(int, self._noting(self._file.tell))

    def seekable(self) -> bool:
        return True

    def _noting(self, call: Callable[..., object], *arguments: int) -> object:
        try:
            return call(*arguments)
        except OSError as error:
            # A place before the beginning is not the disk's fault.
            if error.errno not in (None, errno.EINVAL):
                self.error = error
            raise


def _of_zip(file: BinaryIO, has_pickle: bool) -> What:
    watched = Watched(file)
    try:
        with zipfile.ZipFile(cast(BinaryIO, watched)) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OverflowError):
        if watched.error is not None:
            raise watched.error from None
        kind, text = (TORCH, "an archive of torch.save") if has_pickle else (OTHER, "a zip archive")
        return What(kind, f"{text} that has been cut or is damaged", False)
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        return What(OTHER, "a program of TorchScript, not a dict of tensors")
    if "data.pkl" in inner or "data.pkl" in names:
        return What(TORCH, "an archive of torch.save")
    if (
        "archive_format" in inner
        or "archive_format" in names
        or any(n.endswith("exported_program.json") for n in names)
    ):
        return What(OTHER, "a program of torch.export")
    if names and all(name.endswith(".npy") for name in names):
        return What(OTHER, "arrays of numpy (.npz)")
    if "config.json" in names and "model.weights.h5" in names:
        return What(OTHER, "a model of Keras")
    return What(OTHER, "a zip archive, but not one of torch.save")
