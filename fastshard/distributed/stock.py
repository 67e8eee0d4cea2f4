# SPDX-License-Identifier: Apache-2.0
"""What is borrowed of ``torch.distributed.checkpoint`` without being public there. No other module does that.

The classes are needed because torch's own readers expect them, in the pickle of ``.metadata`` and in the results of
a writer.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem


def _borrowed(name: str) -> Any:
    found = getattr(filesystem, name, None)
    if found is None:
        raise ImportError(
            f"torch {torch.__version__} has no torch.distributed.checkpoint.filesystem.{name}: "
            "fastshard.dcp needs torch 2.6 or later"
        )
    return found


StorageInfo: Any = _borrowed("_StorageInfo")
"""``(relative_path, offset, length)``: where an item was written."""


class InFolder:
    """What a writer or a reader says of the folder that its checkpoint lies in."""

    path: str

    @property
    def checkpoint_id(self) -> str:
        """The folder of the checkpoint."""
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Returns whether it can be a path."""
        return "://" not in os.fspath(checkpoint_id)


def metadata_version() -> str | None:
    """Returns what torch writes into ``Metadata.version``; ``None`` if it has no such number."""
    version: str | None = getattr(filesystem, "CURRENT_DCP_VERSION", None)
    return version


def resolved(planner: SavePlanner, item: WriteItem) -> torch.Tensor:
    """Returns what is to be written of an item: the tensor itself, or the bytes of an object as a tensor."""
    data = planner.resolve_data(item)
    if not isinstance(data, torch.Tensor):
        return torch.frombuffer(data.getbuffer(), dtype=torch.uint8)
    if hasattr(data, "trigger_wait"):  # the result of a collective that may still be under way
        data = data.trigger_wait()
    return data.detach()


def sharded_tensor_of(like: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """Returns a ``ShardedTensor`` as ``like`` with these tensors, which are in host memory, for its local shards."""
    metadata = copy.deepcopy(like.metadata())
    shards = copy.copy(like.local_shards())
    for shard in metadata.shards_metadata:
        shard.placement = type(shard.placement)(f"rank:{shard.placement.rank()}/cpu")
    for number, (shard, tensor) in enumerate(zip(shards, tensors)):
        own = next(
            one for one in metadata.shards_metadata if one.shard_offsets == shard.metadata.shard_offsets
        )
        shards[number] = type(shard)(tensor, own)
    return type(like)._init_from_local_shards_and_global_metadata(
        shards, sharded_tensor_metadata=metadata, process_group=like._process_group
    )
