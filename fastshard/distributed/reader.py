# SPDX-License-Identifier: Apache-2.0
"""A reader for ``torch.distributed.checkpoint`` of folders of safetensors files."""

from __future__ import annotations

import contextlib
import io
import os
import uuid
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader

from ..engine.mapped import in_torch
from ..formats.dcp_metadata import SHARDING_KEY, sharding_info
from ..formats.hf_index import files_of_index, read_object, read_stored, read_text
from ..formats.naming import INDEX_NAME, WEIGHTS_SUFFIX, is_dcp_objects, number_of_dcp_shard
from ..formats.safetensors import FileHeader, StoredTensor
from .slices import Box, read_boxes
from .stock import InFolder
from .stored import OpenCheckpoint, open_checkpoint


class _Place(NamedTuple):
    """Where an item is stored."""

    relative_path: str
    shape: torch.Size
    dtype: torch.dtype | None
    """``None`` for what is no tensor."""
    name: str
    """Under which it is stored."""


class FastshardReader(InFolder, StorageReader):
    """Loads checkpoints of :class:`FastshardWriter`, of the stock ``HuggingFaceStorageWriter``, and plain folders of
    Hugging Face models with ``dcp.load``.

    A rank reads of each tensor the part that it asks for, in long runs, in parallel, and in bounded memory. All dtypes
    of the format are known, and what is no tensor is read from the files that :class:`FastshardWriter` has beside the
    tensors. In a plain folder with an index only the files count that the index names.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = os.fspath(path)
        self._places: dict[MetadataIndex, _Place] = {}
        self._load_id = str(uuid.uuid4())

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._places = {}
        if checkpoint_id is not None:
            self.path = os.fspath(checkpoint_id)
        self._load_id = str(uuid.uuid4())

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Returns what the headers of all files say.

        Raises ``OSError``, and ``SafetensorError`` for a file that is broken, or of which the parts do not make up
        tensors.
        """
        tensors: dict[str, TensorStorageMetadata] = {}
        objects: dict[str, BytesStorageMetadata] = {}
        places: dict[MetadataIndex, _Place] = {}
        names, noted = _files_of(self.path)
        for name in names:
            header = read_stored(os.path.join(self.path, name)).header
            if is_dcp_objects(name):
                for stored in header.tensors:
                    objects[stored.name] = BytesStorageMetadata()
                    places[MetadataIndex(stored.name)] = _Place(
                        name, torch.Size(stored.shape), None, stored.name
                    )
                continue
            offsets = _offsets(header, name)
            for stored in header.tensors:
                dtype, chunk = _chunk(stored, offsets, name)
                _add_chunk(tensors, stored.name, chunk, dtype, name)
                place = _Place(name, chunk.sizes, dtype, stored.name)
                places[MetadataIndex(stored.name, chunk.offsets)] = place
            noted.update(header.metadata or {})
        for fqn, kept in noted.items():  # savers note under which name a tensor is stored that has several
            if isinstance(kept, str) and kept in tensors and fqn not in tensors:
                tensors[fqn] = tensors[kept]
                for chunk in tensors[kept].chunks:
                    places[MetadataIndex(fqn, chunk.offsets)] = places[MetadataIndex(kept, chunk.offsets)]
        storage_meta = StorageMeta(checkpoint_id=self.path, load_id=self._load_id)
        return Metadata({**tensors, **objects}, storage_data=places, storage_meta=storage_meta)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self._places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        boxes: list[Box] = []
        filled: list[tuple[ReadItem, torch.Tensor]] = []
        with contextlib.ExitStack() as stack:
            files: dict[str, OpenCheckpoint] = {}
            for item in plan.items:
                place = self._places[item.storage_index]
                name = place.relative_path
                if name not in files:
                    files[name] = stack.enter_context(open_checkpoint(os.path.join(self.path, name)))
                stored = files[name].tensor(place.name)
                if item.type == LoadItemType.BYTE_IO:
                    data = torch.empty(stored.shape, dtype=torch.uint8, device="cpu")
                    read_boxes([Box(stored, [0], stored.shape, data)])
                    planner.load_bytes(item, io.BytesIO(data.numpy().tobytes()))
                    continue
                target = planner.resolve_tensor(item).detach()
                boxes.append(Box(stored, item.storage_offsets, item.lengths, target))
                filled.append((item, target))
            read_boxes(boxes)
        for item, target in filled:
            planner.commit_tensor(item, target)
        future: torch.futures.Future[None] = torch.futures.Future()
        future.set_result(None)
        return future


def _files_of(folder: str) -> tuple[list[str], dict[str, object]]:
    """Returns the names of the files that make up the checkpoint in a folder, and what the index notes besides."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    shards = [name for name in names if number_of_dcp_shard(name) is not None]
    if shards:
        return shards, {}
    objects = [name for name in names if is_dcp_objects(name)]
    if INDEX_NAME in names:
        path = os.path.join(folder, INDEX_NAME)
        text = read_text(path)
        noted = read_object(text, path).get("metadata")
        return [*sorted(files_of_index(text, path)), *objects], noted if isinstance(noted, dict) else {}
    found = [name for name in names if name.endswith(WEIGHTS_SUFFIX)] + objects
    if not found:
        raise FileNotFoundError(2, "there are no safetensors files in the folder", folder)
    return found, {}


def _offsets(header: FileHeader, name: str) -> dict[str, tuple[int, ...]] | None:
    """Returns where in the whole tensors those of a file begin; ``None`` if they are whole."""
    try:
        return sharding_info(header.metadata or {})
    except ValueError as error:
        raise SafetensorError(f"{name}: {error}") from None


def _chunk(
    stored: StoredTensor, offsets: dict[str, tuple[int, ...]] | None, name: str
) -> tuple[torch.dtype, ChunkStorageMetadata]:
    try:
        dtype, shape = in_torch(stored)
    except ValueError as error:
        raise SafetensorError(f"{name}: tensor {stored.name!r}: {error}") from None
    begin = (0,) * len(shape) if offsets is None else offsets.get(stored.name, ())
    if len(begin) != len(shape):
        raise SafetensorError(f"{name}: {SHARDING_KEY} does not say where {stored.name!r} begins")
    return dtype, ChunkStorageMetadata(offsets=torch.Size(begin), sizes=torch.Size(shape))


def _add_chunk(
    tensors: dict[str, TensorStorageMetadata],
    fqn: str,
    chunk: ChunkStorageMetadata,
    dtype: torch.dtype,
    name: str,
) -> None:
    """Adds a part of a tensor, whose size is where its parts end."""
    end = torch.Size([offset + size for offset, size in zip(chunk.offsets, chunk.sizes)])
    known = tensors.get(fqn)
    if known is None:
        tensors[fqn] = TensorStorageMetadata(TensorProperties(dtype=dtype), end, [chunk])
        return
    if known.properties.dtype != dtype or len(known.size) != len(end):
        raise SafetensorError(
            f"{name}: {fqn!r} has a different dtype or number of dimensions in another file"
        )
    known.chunks.append(chunk)
    known.size = torch.Size(map(max, known.size, end))
