# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of ``torch.save`` -> safetensors, mapped on one side and streamed on the other."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import torch

from .checkpoint import INDEX_SUFFIX, WEIGHTS_SUFFIX, other_files, read_text, weight_map
from .directory import replacing
from .hub import save_torch_state_dict
from .saving import save_file
from .sharing import by_storage, shared_names

DTYPES: Final = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""What ``--dtype`` can name."""

_MOST_NAMED = 5
_EARLIER: Final = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


class Converted(NamedTuple):
    """What has become of a checkpoint."""

    tensors: int
    nbytes: int
    """Of the file written."""
    dropped: dict[str, str]
    """Names that stood for the same tensor as another one -> that name, which is in the file."""


def convert(
    source: str,
    destination: str,
    *,
    key: str | None = None,
    dtype: torch.dtype | str | None = None,
    force: bool = False,
) -> Converted:
    """Writes the tensors of a ``.bin``, ``.pt`` or ``.pth`` file to a safetensors file.

    The checkpoint must be a dict of tensors, or have one under ``key``. It is loaded with ``weights_only=True``, so
    nothing in it is executed, and mapped, if it is not of torch's old format. Of names that stand for one tensor the
    first is kept, and the others are in the metadata, as ``safetensors.torch.save_model`` has them; views that only
    overlap become tensors of their own. ``dtype``: as for :func:`fastshard.save_file`.

    Raises:
        ValueError: the checkpoint is not of this kind; the text says what can be done.
        OSError: a file cannot be read or written, or, unless ``force`` is given, ``destination`` exists.
    """
    if not force and os.path.lexists(destination):
        raise FileExistsError(errno.EEXIST, "exists; --force replaces it", destination)
    tensors = _tensors_of(_load(source), key)
    dropped = _separate(tensors)
    with _named(tensors):
        save_file(tensors, destination, {"format": "pt", **dropped}, dtype=dtype, allow_strided=True)
    return Converted(len(tensors), os.stat(destination).st_size, dropped)


def convert_folder(
    source: str,
    destination: str,
    *,
    key: str | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    force: bool = False,
) -> Converted:
    """The same for a checkpoint of several files, or one that becomes several: as :func:`convert`, but ``destination``
    is a folder, which gets shards and an index as ``huggingface_hub.save_torch_state_dict`` makes them.

    ``source``: a file; a ``*.bin.index.json``; or a folder with that, or with a ``pytorch_model.bin``, whose other files
    (configuration, tokenizer, ...) are copied. ``destination`` may be the same folder.

    Raises ``ValueError``, too, for an index that does not fit its files, naming them. Unless ``force`` is given, a folder
    that has safetensors files already is refused.
    """
    if not force and os.path.isdir(destination):
        for name in sorted(os.listdir(destination)):
            if name.endswith((WEIGHTS_SUFFIX, INDEX_SUFFIX)):
                path = os.path.join(destination, name)
                raise FileExistsError(errno.EEXIST, "exists; --force replaces it", path)
    folder = source if os.path.isdir(source) else None
    files = _files_of(source)
    tensors: dict[str, torch.Tensor] = {}
    for path, names in files.items():
        found = _tensors_of(_load(path), key)
        if names is not None and names != found.keys():
            different = _listed(sorted(names ^ found.keys()))
            raise ValueError(f"{path}: its tensors are not those of the index: {different}")
        tensors.update(found)
    dropped = _separate(tensors)
    for name, tensor in tensors.items():  # the hub takes no part of a storage for a tensor
        if tensor.layout == torch.strided and tensor.nbytes != tensor.untyped_storage().nbytes():
            tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
    with replacing(destination, lambda name: _EARLIER.fullmatch(name) is not None, create=True) as staging:
        with _named(tensors):
            save_torch_state_dict(
                tensors, staging, max_shard_size=max_shard_size, metadata=dict(dropped), dtype=dtype
            )
        nbytes = sum(entry.stat().st_size for entry in os.scandir(staging))
        if folder is not None and os.path.realpath(folder) != os.path.realpath(destination):
            for name in other_files(folder):
                shutil.copyfile(os.path.join(folder, name), os.path.join(staging, name))
    return Converted(len(tensors), nbytes, dropped)


def _files_of(source: str) -> dict[str, set[str] | None]:
    """Paths of a checkpoint's files, and the tensors that an index says are in them."""
    index = source
    if os.path.isdir(source):
        index = os.path.join(source, "pytorch_model.bin.index.json")
        if not os.path.exists(index):
            return {os.path.join(source, "pytorch_model.bin"): None}
    elif not source.endswith(".index.json"):
        return {source: None}
    files: dict[str, set[str] | None] = {}
    for tensor, name in weight_map(read_text(index), index, ".bin").items():
        path = os.path.join(os.path.dirname(index), name)
        files[path] = {*(files.get(path) or ()), tensor}
    return files


@contextlib.contextmanager
def _named(tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """What the format does not have, with the names of the tensors."""
    try:
        yield
    except KeyError as error:
        names = [name for name, tensor in tensors.items() if tensor.dtype == error.args[0]]
        raise ValueError(f"safetensors has no {error.args[0]}: {_listed(names)}") from None


def _load(source: str) -> object:
    with open(source, "rb") as file:
        mapped = file.read(4) == b"PK\x03\x04"  # the old format cannot be
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about TypedStorage, in the middle of torch
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of any kind, if it is no checkpoint at all
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"torch.load(weights_only=True) cannot read it: {reason[0]}") from None


def _tensors_of(loaded: object, key: str | None) -> dict[str, torch.Tensor]:
    found: Any = loaded
    if key is not None:
        if not isinstance(found, Mapping) or key not in found:
            names = list(found) if isinstance(found, Mapping) else []
            raise ValueError(f"no {key!r} in it, but {_listed(names)}" if names else f"no {key!r} in it")
        found = found[key]
    if not isinstance(found, Mapping):
        raise ValueError(f"a dict of tensors is wanted, not {type(found).__name__}")
    others = [name for name, value in found.items() if not isinstance(value, torch.Tensor)]
    if others:
        inner = [name for name in others if _is_state_dict(found[name])]
        hint = f"; --key {inner[0]} takes the tensors in there" if inner else ""
        raise ValueError(f"not only tensors in it: {_listed(others)}{hint}")
    unnamed = [name for name in found if not isinstance(name, str)]
    if unnamed:
        raise ValueError(f"names of tensors must be strings: {_listed(unnamed)}")
    return dict(found)


def _is_state_dict(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) != 0
        and all(isinstance(name, str) and isinstance(t, torch.Tensor) for name, t in value.items())
    )


def _separate(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Leaves each byte in there once; returns the names left out, and those that are kept for them."""
    dense = {name: t for name, t in tensors.items() if t.layout == torch.strided}
    dropped = {}
    for group in shared_names(dense, by_storage(dense)):
        views: dict[tuple[object, ...], str] = {}
        for name in sorted(group):
            tensor = tensors[name]
            what = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
            if what in views:
                dropped[name] = views[what]
                del tensors[name]
                continue
            if views:
                tensors[name] = tensor.clone()
            views[what] = name
    return dropped


def _listed(names: list[Any]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(repr(name) for name in names[:_MOST_NAMED]) + more
