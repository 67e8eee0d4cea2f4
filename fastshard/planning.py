# SPDX-License-Identifier: Apache-2.0
"""What a door is given -> what the engine is given: checked names, tensors in file order, header, fetcher."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError

from . import tensors as _tensors
from .errors import SaveError
from .layout import HeaderTooLarge, header

PathLike = str | os.PathLike[str]
StateDict = dict[str, torch.Tensor]
Entries = list[_tensors.Entry]


def lay_out(
    tensors: StateDict,
    metadata: dict[str, str] | None,
    allow_strided: bool,
    dtype: torch.dtype | str | None,
    filename: object = "",
) -> tuple[Entries, bytes]:
    """The tensors in file order, and the header that goes before them."""
    dtype = _tensors.check_dtype(dtype)
    entries = _tensors.describe(tensors, allow_strided=allow_strided, dtype=dtype)
    check_filename(filename)
    _check_metadata(metadata)
    _tensors.check_format(entries)
    try:
        head = header(((e.name, e.code, e.shape, e.view.nbytes) for e in entries), metadata)
    except HeaderTooLarge:
        raise SafetensorError("Error while serializing: header too large") from None
    return entries, head


def fetcher(
    entries_of: list[Entries], dtype: torch.dtype | str | None
) -> Callable[[int, int, int, int, int], None]:
    """What brings the bytes only Python can bring, for the entries of each file."""
    target = _tensors.check_dtype(dtype)

    def fetch(file: int, item: int, first_byte: int, nbytes: int, address: int) -> None:
        _tensors.fetch(entries_of[file][item].tensor, first_byte, nbytes, address, target)

    return fetch


def check_filename(filename: object) -> None:
    path: Any = filename
    if not isinstance(path, str):
        try:
            path = os.fspath(path)
        except TypeError as error:
            raise TypeError(f"argument 'filename': {error}") from None
    if isinstance(path, bytes):
        raise TypeError("argument 'filename': 'bytes' object is not an instance of 'str'")
    os.fsencode(path)


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        raise TypeError(
            f"argument 'metadata': '{type(metadata).__name__}' object is not an instance of 'dict'"
        )
    for pair in metadata.items():
        for text in pair:
            if not isinstance(text, str):
                raise TypeError(
                    f"argument 'metadata': {_tensors.what_it_is(text)} is not an instance of 'str'"
                )
            text.encode()


def encoded_path(filename: PathLike) -> bytes:
    path = os.fsencode(filename)
    if b"\0" in path:
        raise SaveError(22, os.strerror(22), filename)
    return path
