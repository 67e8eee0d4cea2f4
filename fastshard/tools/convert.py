# SPDX-License-Identifier: Apache-2.0
"""Converts checkpoints of ``torch.save`` to safetensors, and back. The source is mapped, the target is
streamed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, Final, NamedTuple, cast

import torch

from ..api.archive import torch_save
from ..api.hub import save_torch_state_dict
from ..api.saving import save_file
from ..engine.mapped import load_mapped
from ..engine.sharing import by_storage, shared_names
from ..engine.tensors import check_dtype
from ..formats.file_kinds import FOLDER, INDEX, SAFETENSORS, TORCH, Watched, format_of_name, what_is
from ..formats.hf_index import (
    exists,
    is_folder,
    open_file,
    other_files,
    read_checkpoint,
    read_text,
    same_file,
    weight_map,
)
from ..formats.naming import (
    HUB_PATTERN,
    INDEX_SUFFIX,
    PICKLED_INDEX_NAME,
    PICKLED_NAME,
    PICKLED_SUFFIX,
    WEIGHTS_SUFFIX,
    names_of,
)
from ..formats.safetensors import read_header
from ..publish.directory import replacing

Dtype = torch.dtype | str | None

_MOST_NAMED = 5
_FAILED_CALL: Final = re.compile(r"unable to (?:open|mmap|stat)\b[^\n]*\((\d+)\)")
"""How torch says why it could not map a file."""
_EXPANDED_NBYTES: Final = 1 << 30


class Converted(NamedTuple):
    """The result of a conversion."""

    tensors: int
    nbytes: int
    """Bytes of the file that was written."""
    dropped: dict[str, str]
    """Names of tensors that were left out as the same tensor has another name, with the name that is in the
    file."""


def convert(
    source: str,
    destination: str,
    *,
    key: str | None = None,
    dtype: Dtype = None,
    force: bool = False,
    progress: bool | None = None,
) -> Converted:
    """Writes the tensors of a checkpoint to one file: to an archive of ``torch.save`` if ``destination`` ends in ``.pt``,
    ``.pth``, ``.bin`` or ``.ckpt``, else to a safetensors file.

    ``source``: a file of ``torch.save`` or a safetensors file, whatever its name; an index; or a folder with one of these.
    A checkpoint of ``torch.save`` must be a dict of tensors, or have one under ``key``. It is loaded with
    ``weights_only=True``, so nothing in it is executed, and mapped, if it is not of torch's old format. Of names that stand
    for one tensor a safetensors file keeps the first, and the others are in the metadata, as
    ``safetensors.torch.save_model`` has them; views that only overlap become tensors of their own. An archive keeps what
    is shared, and gets back the names that such metadata tell. ``dtype``: as for :func:`fastshard.save_file`; what is cast
    for an archive takes memory.

    Raises:
        ValueError: the checkpoint is not of this kind; the text says which file, what it is and what can be done.
        OSError: a file cannot be read or written, or, unless ``force`` is given, ``destination`` exists.
    """
    target = check_dtype(dtype)
    kind = format_of_name(destination)
    if not force and exists(destination):
        raise FileExistsError(errno.EEXIST, "it exists already; --force replaces it", destination)
    tensors, metadata = _load_all(source, key, into=destination if kind == TORCH else None)
    if kind == TORCH:
        for name, kept in metadata.items():
            if kept in tensors and name not in tensors:
                tensors[name] = tensors[kept]
        torch_save(_cast(tensors, target), destination, progress=progress)
        return Converted(len(tensors), _size_of(destination), {})
    dropped = _separate(tensors)
    with _named(tensors, source):
        save_file(
            tensors,
            destination,
            {"format": "pt", **metadata, **dropped},
            dtype=target,
            allow_strided=True,
            progress=progress,
        )
    return Converted(len(tensors), _size_of(destination), dropped)


def convert_folder(
    source: str,
    destination: str,
    *,
    key: str | None = None,
    dtype: Dtype = None,
    max_shard_size: int | str = "5GB",
    force: bool = False,
    progress: bool | None = None,
) -> Converted:
    """The same for a checkpoint that becomes a folder: as :func:`convert`, but ``destination`` gets shards and an index
    as ``huggingface_hub.save_torch_state_dict`` makes them.

    The other files of a source that is a folder (configuration, tokenizer, ...) are copied. ``destination`` may be the
    same folder.

    Raises ``ValueError``, too, for an index that does not fit its files, naming them. Unless ``force`` is given, a folder
    that has safetensors files already is refused.
    """
    target = check_dtype(dtype)
    if not force and is_folder(destination):
        for name in sorted(os.listdir(destination)):
            if name.endswith((WEIGHTS_SUFFIX, INDEX_SUFFIX)):
                path = os.path.join(destination, name)
                raise FileExistsError(errno.EEXIST, "it exists already; --force replaces it", path)
    folder = source if is_folder(source) else None
    tensors, metadata = _load_all(source, key)
    dropped = _separate(tensors)
    for name, tensor in tensors.items():  # the hub takes no part of a storage for a tensor
        if tensor.layout == torch.strided and tensor.nbytes != tensor.untyped_storage().nbytes():
            tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
    with replacing(
        destination, lambda name: names_of(HUB_PATTERN).fullmatch(name) is not None, create=True
    ) as staging:
        with _named(tensors, source):
            save_torch_state_dict(
                tensors,
                staging,
                max_shard_size=max_shard_size,
                metadata={**metadata, **dropped},
                dtype=target,
                progress=progress,
            )
        nbytes = sum(entry.stat().st_size for entry in os.scandir(staging))
        if folder is not None and not same_file(folder, destination):
            for name in other_files(folder):
                shutil.copyfile(os.path.join(folder, name), os.path.join(staging, name))
    return Converted(len(tensors), nbytes, dropped)


def _size_of(path: str) -> int:
    """Returns the size of the new file, whether or not it can be examined."""
    try:
        return os.stat(path).st_size
    except OSError as error:
        failed = OSError(error.errno, f"{error.strerror}; the new file is in place", path)
        failed.published = True  # type: ignore[attr-defined]
        raise failed from None


def _load_all(
    source: str, key: str | None, into: str | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Returns the tensors of all files of a checkpoint, and the metadata that its safetensors files have in
    common.

    ``into`` is a file that may be written in place, so no tensor may stay mapped from it.
    """
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] | None = None
    for path, names in _files_of(source).items():
        found, told = _load(path, key, mapped=into is None or not same_file(into, path))
        if names is not None and names != found.keys():
            different = _listed(sorted(names ^ found.keys()))
            raise ValueError(f"{path}: its tensors are not those of the index: {different}")
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise ValueError(f"{path}: another file has {_listed(twice)}, too")
        tensors.update(found)
        metadata = told if metadata is None else dict(metadata.items() & told.items())
    return tensors, metadata or {}


def _files_of(source: str) -> dict[str, set[str] | None]:
    """Returns the paths of a checkpoint's files, and the tensors that an index says are in them."""
    what = what_is(source)
    index = source
    if what.kind == FOLDER:
        index = os.path.join(source, PICKLED_INDEX_NAME)
        if not exists(index):
            whole = os.path.join(source, PICKLED_NAME)
            if exists(whole):
                return {whole: None}
            if "safetensors" not in what.text:
                raise ValueError(
                    f"{source}: {what.text}: no {PICKLED_NAME}, no index, no {WEIGHTS_SUFFIX} file"
                )
            checkpoint = read_checkpoint(source)
            return {file.path: {t.name for t in file.header.tensors} for file in checkpoint.files.values()}
    elif what.kind != INDEX:
        return {source: None}
    suffix = WEIGHTS_SUFFIX if index.endswith(INDEX_SUFFIX) else PICKLED_SUFFIX
    files: dict[str, set[str] | None] = {}
    for tensor, name in weight_map(read_text(index), index, suffix).items():
        path = os.path.join(os.path.dirname(index), name)
        files[path] = {*(files.get(path) or ()), tensor}
    return files


@contextlib.contextmanager
def _named(tensors: dict[str, torch.Tensor], source: str) -> Iterator[None]:
    """Lets errors about what the format does not have name the tensors and the file."""
    try:
        yield
    except KeyError as error:
        names = [name for name, tensor in tensors.items() if tensor.dtype == error.args[0]]
        raise ValueError(f"{source}: safetensors has no {error.args[0]}: {_listed(names)}") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _load(path: str, key: str | None, mapped: bool) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Returns the tensors of one file, whatever its name, and its metadata."""
    what = what_is(path)
    if what.kind == FOLDER:
        raise ValueError(f"{path}: {what.text}, not a file")
    if not what.is_whole or what.kind not in (TORCH, SAFETENSORS):
        raise ValueError(f"{path}: {what.text}: neither a checkpoint of torch.save nor a safetensors file")
    if what.kind == TORCH:
        try:
            return _tensors_of(_load_archive(path, mapped and "old" not in what.text), key), {}
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if key is not None:
        raise ValueError(f"{path}: a safetensors file has no entries for --key to name")
    with open_file(path) as file:
        try:
            metadata = read_header(file, os.fstat(file.fileno()).st_size).metadata
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    found = load_mapped(path)
    return (found if mapped else {name: t.clone() for name, t in found.items()}), metadata or {}


@contextlib.contextmanager
def _read_errors(path: str) -> Iterator[None]:
    """Gives failed system calls the name of the file and an errno, which Python leaves out if a seek fails."""
    try:
        yield
    except OSError as error:
        number = error.errno if error.errno is not None else errno.EIO
        raise OSError(number, os.strerror(number), path) from error


def _load_archive(path: str, mapped: bool) -> object:
    if mapped:
        with _read_errors(path):
            _check_records(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about TypedStorage, in the middle of torch
            with _read_errors(path), open_file(path) as file:
                # Under a name without suffix: torch reads what is called .safetensors in another way.
                name = f"/proc/self/fd/{file.fileno()}" if path.endswith(WEIGHTS_SUFFIX) else path
                return torch.load(name, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of any kind, if it is no checkpoint at all
        text = str(error).strip()
        if failed := _FAILED_CALL.search(text):
            number = int(failed[1])
            raise OSError(number, os.strerror(number), path) from None
        unsafe = re.search(r"(?:GLOBAL|class) ([\w.]+)", text)
        if unsafe:
            reason = f"there is a {unsafe[1]} in it, not only tensors"
        else:
            reason = (text.splitlines() or [type(error).__name__])[0]
        raise ValueError(f"torch.load(weights_only=True) cannot read it: {reason}") from None


def _check_records(path: str) -> None:
    """Records of ``torch.save`` lie in the file as they are, one behind the other: what is compressed, or lies there for
    several at once, could grow to anything."""
    with open_file(path) as file:
        watched = Watched(file)
        try:
            with zipfile.ZipFile(cast(BinaryIO, watched)) as archive:
                records = archive.infolist()
        except zipfile.BadZipFile as error:
            if watched.error is not None:
                raise watched.error from None
            raise ValueError(str(error)) from None
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("its records are compressed, which torch.save never does")
    if sum(record.file_size for record in records) > os.stat(path).st_size:
        raise ValueError("its records are larger than the file")


def _tensors_of(loaded: object, key: str | None) -> dict[str, torch.Tensor]:
    found: Any = loaded
    if key is not None:
        if not isinstance(found, Mapping) or key not in found:
            names = list(found) if isinstance(found, Mapping) else []
            raise ValueError(
                f"it has no entry {key!r}, but {_listed(names)}" if names else f"it has no entry {key!r}"
            )
        found = found[key]
    if not isinstance(found, Mapping):
        raise ValueError(f"it must hold a dict of tensors, not {type(found).__name__}")
    others = [name for name, value in found.items() if not isinstance(value, torch.Tensor)]
    if others:
        inner = [name for name in others if _is_state_dict(found[name])]
        hint = f"; --key {inner[0]} takes the tensors in there" if inner else ""
        raise ValueError(f"it holds not only tensors: {_listed(others)}{hint}")
    unnamed = [name for name in found if not isinstance(name, str)]
    if unnamed:
        raise ValueError(f"names of tensors must be strings: {_listed(unnamed)}")
    for name, tensor in found.items():
        if tensor.layout == torch.strided and tensor.nbytes > _EXPANDED_NBYTES:
            stored = tensor.untyped_storage().nbytes()
            if tensor.nbytes > 100 * stored:
                raise ValueError(
                    f"{name!r} has {stored} bytes, which its strides repeat to {tensor.nbytes}: a file that is made to fill a disk?"
                )
    return dict(found)


def _cast(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Returns the tensors with floating-point ones cast. A tensor that has several names stays one."""
    if dtype is None:
        return tensors
    made: dict[tuple[object, ...], torch.Tensor] = {}
    found = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.layout == torch.strided:
            what = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
            if what not in made or tensor.numel() == 0:
                made[what] = tensor.to(dtype)
            found[name] = made[what]
    return found


def _is_state_dict(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) != 0
        and all(isinstance(name, str) and isinstance(t, torch.Tensor) for name, t in value.items())
    )


def _separate(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Changes the dict so that no byte is in it twice. Returns the names left out, with the names that are
    kept for them."""
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
