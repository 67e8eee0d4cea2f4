# SPDX-License-Identifier: Apache-2.0
"""The manifests of a checkpoint that was cut into parts: written beside the weights, and checked when they
are read.

In the folder there are the number of ranks, and headers and index of the source, as they were. In each rank's
folder there are, for each tensor, the whole shape, the dimension that is split, and the intervals of it that
this rank holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from ..formats.hf_index import (
    Checkpoint,
    StoredFile,
    check_index,
    files_of_index,
    is_plain,
    read_checkpoint,
    read_object,
    read_text,
    stored_file,
)
from ..formats.naming import INDEX_SUFFIX, RANK_MANIFEST, ROOT_MANIFEST, WEIGHTS_SUFFIX, rank_folder
from ..formats.safetensors import StoredTensor
from .parts import Whole

MAX_RANKS: Final = 4096
_FORMAT: Final = "fastshard tensor parallel"
_VERSION: Final = 1


class Index(NamedTuple):
    name: str
    text: str


class RankFolders(NamedTuple):
    """A checkpoint in parts."""

    files: dict[str, StoredFile]
    """The source's files, without the tensors' bytes. They are what is to be made again."""
    source_index: Index | None
    ranks: list[Checkpoint]
    tensors: dict[str, Whole]


def root_manifest(ranks: int, source: Checkpoint) -> str:
    """Returns the manifest that describes the source. Raises ``ValueError`` for a header that is not UTF-8."""
    files = {}
    for name, file in source.files.items():
        try:
            files[name] = file.raw[8:].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file.path!r}: {error}") from None
    index = None if source.index_text is None else Index(source.index_name, source.index_text)._asdict()
    return _manifest(ranks=ranks, source={"files": files, "index": index})


def rank_manifest(ranks: int, rank: int, tensors: Mapping[str, object]) -> str:
    """Returns the manifest of a rank's tensors; each is described by
    :meth:`fastshard.tools.parts.Part.described`."""
    return _manifest(ranks=ranks, rank=rank, tensors=tensors)


def _manifest(**contents: object) -> str:
    return json.dumps({"format": _FORMAT, "version": _VERSION, **contents}) + "\n"


def read_ranks(folder: str) -> RankFolders:
    """Reads a checkpoint in parts, and checks whether its parts make up the source.

    Raises ``OSError``, and ``ValueError``, naming the file, for contents that contradict each other.
    """
    ranks, files, index = _read_root(folder)
    tensors = {tensor.name: tensor for file in files.values() for tensor in file.header.tensors}
    checkpoints, manifests, homes = [], [], []
    for rank in range(ranks):
        checkpoint, manifest = _read_rank(folder, rank, ranks)
        home = {name: tensor for name, (_, tensor) in checkpoint.home().items()}
        for name in home.keys() ^ tensors.keys():
            what = "missing" if name in tensors else "not of the source"
            raise ValueError(f"{checkpoint.folder!r}: tensor {name!r} is {what}")
        checkpoints.append(checkpoint)
        manifests.append(manifest)
        homes.append(home)
    return RankFolders(
        files,
        index,
        checkpoints,
        {
            name: _whole(
                tensor, [manifest[name] for manifest in manifests], [home[name] for home in homes], folder
            )
            for name, tensor in tensors.items()
        },
    )


def _read_root(folder: str) -> tuple[int, dict[str, StoredFile], Index | None]:
    path = os.path.join(folder, ROOT_MANIFEST)
    found = _read_manifest(path)
    source = found.get("source")
    headers = source.get("files") if isinstance(source, dict) else None
    if not isinstance(headers, dict):
        raise ValueError(f"{path!r} has no description of the files of the source")
    files = {}
    seen: dict[str, str] = {}
    for name, text in headers.items():
        if not is_plain(name) or not name.endswith(WEIGHTS_SUFFIX) or name.startswith("."):
            raise ValueError(f"{path!r}: {name!r} is not the name of a file")
        if not isinstance(text, str):
            raise ValueError(f"{path!r} does not have the header of {name!r}")
        try:
            raw = text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{path!r}: {name!r}: {error}") from None
        files[name] = stored_file(f"{path}: {name}", len(raw).to_bytes(8, "little") + raw)
        for tensor in files[name].header.tensors:
            other = seen.setdefault(tensor.name, name)
            if other != name:
                raise ValueError(f"{path!r}: tensor {tensor.name!r} lies in {other!r} and in {name!r}")
    index = source.get("index") if isinstance(source, dict) else None
    if index is None:
        return found["ranks"], files, None
    name, text = (index.get("name"), index.get("text")) if isinstance(index, dict) else (None, None)
    if (
        not is_plain(name)
        or not isinstance(text, str)
        or not str(name).endswith(INDEX_SUFFIX)
        or str(name).startswith(".")
    ):
        raise ValueError(f"{path!r} has no description of the index of the source")
    for filename in files_of_index(text, f"{path}: {name}") - files.keys():
        raise ValueError(f"{path!r}: the index names {filename!r}, which is not described")
    check_index(text, files, f"{path}: {name}")
    return found["ranks"], files, Index(str(name), text)


def _read_rank(folder: str, rank: int, ranks: int) -> tuple[Checkpoint, dict[str, dict[str, Any]]]:
    place = os.path.join(folder, rank_folder(rank))
    path = os.path.join(place, RANK_MANIFEST)
    found = _read_manifest(path)
    if (found["ranks"], found.get("rank")) != (ranks, rank):
        raise ValueError(f"{path!r} is that of rank {found.get('rank')!r} of {found['ranks']}")
    checkpoint = read_checkpoint(place)
    tensors = found.get("tensors")
    if not isinstance(tensors, dict):
        raise ValueError(f"{path!r} describes no tensors")
    for name in checkpoint.home():
        if not isinstance(tensors.get(name), dict):
            raise ValueError(f"{path!r} does not describe tensor {name!r}")
    return checkpoint, tensors


def _read_manifest(path: str) -> dict[str, Any]:
    found = read_object(read_text(path), path)
    if found.get("format") != _FORMAT or found.get("version") != _VERSION:
        raise ValueError(f"{path!r} is not a manifest of version {_VERSION}")
    ranks = found.get("ranks")
    if type(ranks) is not int or not 1 <= ranks <= MAX_RANKS:
        raise ValueError(f"{path!r}: {ranks!r} is not a number of ranks")
    return found


def _whole(
    tensor: StoredTensor,
    described: list[dict[str, Any]],
    stored_by_rank: list[StoredTensor],
    folder: str,
) -> Whole:
    """Checks the ranks' manifests and headers of a tensor against each other and against the source's
    header."""

    def refuse(rank: int, text: str) -> ValueError:
        path = os.path.join(folder, rank_folder(rank), RANK_MANIFEST)
        return ValueError(f"{path!r}: tensor {tensor.name!r} {text}")

    dim = described[0].get("dim")
    intervals = []
    for rank, told in enumerate(described):
        stored = stored_by_rank[rank]
        if told.get("shape") != list(tensor.shape) or told.get("dim") != dim or stored.code != tensor.code:
            raise refuse(rank, "is not what the source or rank 0 says")
        shape = list(tensor.shape)
        if dim is not None:
            if type(dim) is not int or dim not in range(len(shape)):
                raise refuse(rank, f"cannot be split along dimension {dim!r}")
            held = 0
            for interval in told.get("intervals") or [None]:
                if not _is_interval(interval, shape[dim]):
                    raise refuse(rank, f"has no interval {interval!r}")
                begin, end = interval
                intervals.append((begin, end, rank, held))
                held += end - begin
            shape[dim] = held
        if list(stored.shape) != shape:
            raise refuse(rank, f"has shape {list(stored.shape)} in its file, {shape} here")
    if dim is None:
        return Whole(tensor, 0, None)
    intervals.sort()
    reached = 0
    for begin, end, rank, _ in intervals:
        if begin != reached:
            raise refuse(rank, f"has an interval at {begin}, others end at {reached}")
        reached = end
    if reached != tensor.shape[dim]:
        raise refuse(0, f"ends at {reached} of {tensor.shape[dim]}")
    return Whole(tensor, dim, intervals)


def _is_interval(interval: Any, size: int) -> bool:
    return (
        isinstance(interval, list)
        and len(interval) == 2
        and all(type(number) is int for number in interval)
        and 0 <= interval[0] <= interval[1] <= size
    )
