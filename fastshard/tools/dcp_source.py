# SPDX-License-Identifier: Apache-2.0
"""What is in a checkpoint of ``torch.distributed.checkpoint``: where the boxes of its tensors lie, and which tensors
are the model's."""

from __future__ import annotations

import contextlib
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import BinaryIO, Final, NamedTuple

import torch

from ..engine.mapped import DTYPES, in_torch
from ..formats.dcp_metadata import Chunk, is_dcp_folder, read_metadata, sharding_info
from ..formats.hf_index import StoredFile, is_folder, open_file, read_stored
from ..formats.naming import DISTCP_SUFFIX, WEIGHTS_SUFFIX
from ..formats.safetensors import BITS, CODES
from ..formats.torch_items import contiguous_strides, extent, find_tensor
from .stored_boxes import Box, Target, complete

_MODELS: Final = ("model", "state_dict", "model_state_dict", "module")
"""What trainers call the model among what they save."""
_BLOCK_NBYTES: Final = 1 << 20


class Tensor(NamedTuple):
    """A tensor of a checkpoint."""

    name: str
    code: str
    """Of its dtype in a header."""
    shape: tuple[int, ...]
    """As torch counts it: an element of float4 has two numbers."""
    boxes: list[Box]

    def target(self, dtype: torch.dtype | None) -> Target:
        source = DTYPES[self.code]
        if dtype is None or not source.is_floating_point:
            return Target(source, source, self.code)
        if self.code == "F4":
            raise ValueError(f"tensor {self.name!r} is {source}, which torch does not cast to {dtype}")
        return Target(source, dtype, self.code)


class Folder(NamedTuple):
    """A checkpoint of DCP."""

    tensors: dict[str, Tensor]
    paths: dict[str, tuple[str | int, ...]]
    """Of each name the keys of the nested dicts that it was made of."""
    objects: list[str]


def read_folder(folder: str, *, verify: bool = False, plain: bool = False) -> Folder:
    """Finds the boxes of all tensors, and checks that they make up whole ones.

    With ``plain`` safetensors files that do not say which parts they have may be all that there is; they have whole
    tensors.

    Raises ``OSError``, and ``ValueError`` naming file and tensor.
    """
    metadata = read_metadata(folder)
    if metadata is None:
        return _read_safetensors(folder, plain)
    tensors = {}
    with contextlib.closing(_Files()) as files:
        for name, told in metadata.tensors.items():
            code = CODES.get(told.dtype)
            if code is None:
                raise ValueError(
                    f"{folder}: tensor {name!r} is torch.{told.dtype}, which safetensors does not have"
                )
            if code not in DTYPES:
                raise ValueError(
                    f"{folder}: tensor {name!r} is {told.dtype}, which this version of torch does not have"
                )
            boxes = [_box(name, told.dtype, chunk, files, verify) for chunk in told.chunks]
            tensors[name] = Tensor(name, code, told.shape, _complete(folder, name, told.shape, boxes))
    return Folder(tensors, metadata.paths, metadata.objects)


class _Files:
    """Open files, of which ranges are read."""

    def __init__(self) -> None:
        self._path = ""
        self._file: BinaryIO | None = None

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        if path != self._path or self._file is None:
            self.close()
            self._file, self._path = open_file(path), path
            self.nbytes = os.fstat(self._file.fileno()).st_size
        data = os.pread(self._file.fileno(), nbytes, min(offset, self.nbytes))
        if len(data) < nbytes:
            raise ValueError(
                f"the file has {self.nbytes} bytes, and {offset + nbytes} are needed: it has been cut"
            )
        return data

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _box(name: str, dtype: str, chunk: Chunk, files: _Files, verify: bool) -> Box:
    """Returns where the bytes of a part lie. The archive of ``torch.save`` that it is in must be what the metadata
    say."""

    def read(offset: int, nbytes: int) -> bytes:
        return files.read(chunk.path, chunk.begin + offset, nbytes)

    try:
        saved = find_tensor(read, chunk.nbytes)
        if (saved.dtype, saved.shape) != (dtype, chunk.sizes):
            raise ValueError(
                f"{saved.dtype} {list(saved.shape)} is stored, and the metadata say {dtype} {list(chunk.sizes)}"
            )
        itemsize = BITS[CODES[dtype]] // 8 or 1
        wanted = max(saved.first + extent(saved.shape, saved.strides), math.prod(saved.shape))
        if wanted * itemsize > saved.nbytes:
            raise ValueError(f"its {saved.nbytes} bytes are too few")
        read(saved.begin + saved.nbytes, 0)
        if verify and saved.crc:
            _check_crc(read, saved.begin, saved.nbytes, saved.crc)
    except ValueError as error:
        raise ValueError(f"{chunk.path}: tensor {name!r}, part at {list(chunk.offsets)}: {error}") from None
    begin = chunk.begin + saved.begin + saved.first * itemsize
    plain = all(
        size == 1 or one == other
        for size, one, other in zip(saved.shape, saved.strides, contiguous_strides(saved.shape))
    )
    return Box(chunk.offsets, chunk.sizes, chunk.path, begin, None if plain else saved.strides)


def _check_crc(read: Callable[[int, int], bytes], begin: int, nbytes: int, crc: int) -> None:
    found = 0
    for done in range(0, nbytes, _BLOCK_NBYTES):
        found = zlib.crc32(read(begin + done, min(_BLOCK_NBYTES, nbytes - done)), found)
    if found != crc:
        raise ValueError(f"its CRC-32 is {found:08x}, not {crc:08x}: it is damaged")


def _read_safetensors(folder: str, plain: bool) -> Folder:
    """Reads the headers of files of ranks."""
    names = sorted(n for n in os.listdir(folder) if n.endswith(WEIGHTS_SUFFIX) and not n.startswith("."))
    if not names:
        raise ValueError(f"{folder}: {_not_a_checkpoint(folder)}")
    codes: dict[str, str] = {}
    boxes: dict[str, list[Box]] = {}
    order: dict[str, None] = {}
    files = {path: read_stored(path) for path in (os.path.join(folder, name) for name in names)}
    told = {path: _told(stored) for path, stored in files.items()}
    plain &= not any(offsets is not None for offsets in told.values())
    for path, stored in files.items():
        offsets = {} if plain else told[path]
        if offsets is None:
            continue  # another checkpoint's, or one that was made of this one
        order.update(dict.fromkeys(offsets))
        for tensor in stored.header.tensors:
            order.setdefault(tensor.name)
            named = f"{path}: tensor {tensor.name!r}"
            if codes.setdefault(tensor.name, tensor.code) != tensor.code:
                raise ValueError(f"{named} is {tensor.code} here and {codes[tensor.name]} in another file")
            try:
                _, shape = in_torch(tensor)
            except ValueError as error:
                raise ValueError(f"{named}: {error}") from None
            at = offsets.get(tensor.name, (0,) * len(shape))
            if len(at) != len(shape):
                raise ValueError(f"{named} of shape {list(shape)} cannot lie at {list(at)}")
            box = Box(at, shape, path, stored.header.nbytes + tensor.begin)
            boxes.setdefault(tensor.name, []).append(box)
    found = {}
    for name in order:
        if name in boxes:
            shape = tuple(max(ends) for ends in zip(*(box.ends for box in boxes[name])))
            found[name] = Tensor(name, codes[name], shape, _complete(folder, name, shape, boxes[name]))
    return Folder(found, {}, [])


def _told(stored: StoredFile) -> dict[str, tuple[int, ...]] | None:
    try:
        return sharding_info(stored.header.metadata or {})
    except ValueError as error:
        raise ValueError(f"{stored.path}: {error}") from None


def _complete(folder: str, name: str, shape: tuple[int, ...], boxes: list[Box]) -> list[Box]:
    try:
        return complete(shape, boxes)
    except ValueError as error:
        raise ValueError(f"{folder}: tensor {name!r}: {error}") from None


def _not_a_checkpoint(folder: str) -> str:
    names = sorted(os.listdir(folder))
    if any(name.endswith(DISTCP_SUFFIX) for name in names):
        return f"{DISTCP_SUFFIX} files without .metadata: the save has not ended"
    inner = [
        n for n in names if is_folder(os.path.join(folder, n)) and is_dcp_folder(os.path.join(folder, n))
    ]
    hint = f", but {', '.join(inner)} in it may be" if inner else ""
    return f"not a checkpoint of torch.distributed.checkpoint{hint}"


def choose(found: Folder, key: str | None, folder: str) -> tuple[list[Tensor], dict[str, int]]:
    """Returns the tensors to be written, with their names in the files, and how many of which entries are left out.

    Raises ``ValueError`` if it is not clear which ones are meant.
    """
    paths = _paths(found, key)
    left_out: dict[str, int] = {}
    if key is not None:
        begin = _begin_of(paths, key, folder)
    else:
        begin = ()
        while (entry := _entry(paths, begin, folder, left_out)) is not None:
            begin = (*begin, entry)
    chosen = []
    for name in _in_order(found):
        path = paths[name]
        if path[: len(begin)] == begin and len(path) > len(begin) and (key or len(path) == len(begin) + 1):
            chosen.append(found.tensors[name]._replace(name=".".join(map(str, path[len(begin) :]))))
    if not chosen:
        raise ValueError(f"{folder}: there are no tensors in it")
    names = [tensor.name for tensor in chosen]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{folder}: two tensors would be called {twice!r}")
    return chosen, left_out


def _paths(found: Folder, key: str | None) -> dict[str, tuple[str | int, ...]]:
    """Returns the keys of each tensor. Where a planner has noted none, and a key is given, its name is cut at dots."""
    if found.paths or key is None:
        return {name: found.paths.get(name, (name,)) for name in found.tensors}
    return {name: tuple(name.split(".")) for name in found.tensors}


def _in_order(found: Folder) -> Iterable[str]:
    """Returns the names in the order of the state dict, which decides about shards."""
    if found.tensors.keys() <= found.paths.keys():
        return (name for name in found.paths if name in found.tensors)
    return found.tensors


def _begin_of(paths: Mapping[str, tuple[str | int, ...]], key: str, folder: str) -> tuple[str | int, ...]:
    """Returns the keys that lead to an entry, whose own names may have dots in them."""
    for path in paths.values():
        for length in range(1, len(path)):
            if ".".join(map(str, path[:length])) == key:
                return path[:length]
    entries = {str(path[0]): None for path in paths.values() if len(path) > 1} or {
        str(path[0]): None for path in paths.values()
    }
    raise ValueError(f"{folder}: it has no entry {key!r}, but {_listed([*entries])}")


def _entry(
    paths: Mapping[str, tuple[str | int, ...]],
    begin: tuple[str | int, ...],
    folder: str,
    left_out: dict[str, int],
) -> str | int | None:
    """Returns the entry of a dict that has the model; ``None`` if the model's tensors are the dict's own."""
    own = False
    entries: dict[str | int, int] = {}
    for path in paths.values():
        if path[: len(begin)] == begin:
            rest = path[len(begin) :]
            own |= len(rest) == 1
            if len(rest) > 1:
                entries[rest[0]] = entries.get(rest[0], 0) + 1
    taken: str | int | None = None
    if not own and entries:
        models: list[str | int] = [entry for entry in entries if entry in _MODELS]
        if len(models) != 1:
            models = [entry for entry in entries if "optim" not in str(entry)] if len(entries) == 1 else []
        if len(models) != 1:
            names = [".".join(map(str, (*begin, entry))) for entry in entries]
            raise ValueError(
                f"{folder}: which tensors are meant is not clear; --key takes those of an entry: {_listed(names)}"
            )
        taken = models[0]
    for entry, count in entries.items():
        if entry != taken:
            left_out[".".join(map(str, (*begin, entry)))] = count
    return taken


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(repr(name) for name in names[:5]) + more
