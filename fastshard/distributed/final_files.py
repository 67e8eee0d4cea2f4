# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a ``dcp.save`` have, written as ordinary Hugging Face files by
:func:`fastshard.save_distributed`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from .stock import resolved


def state_of(plan: SavePlan, planner: SavePlanner) -> dict[str, Any]:
    """Returns what a rank has to save, by name.

    Where a planner saves the state dict as it is, that is what it was given: a plan leaves out what another rank
    saves, and with it which names are tied. Where a planner changes what is saved, it is what the plan says.
    """
    state_dict = getattr(planner, "state_dict", None)
    if _takes_as_they_are(planner) and isinstance(state_dict, Mapping):
        return dict(state_dict)
    found: dict[str, Any] = {}
    for item in plan.items:
        parts = found.setdefault(item.index.fqn, _Parts(planner, []))
        parts.items.append(item)
    return found


def _takes_as_they_are(planner: SavePlanner) -> bool:
    own = ("resolve_data", "lookup_object", "transform_object", "create_local_plan")
    return isinstance(planner, DefaultSavePlanner) and all(
        getattr(type(planner), name) is getattr(DefaultSavePlanner, name) for name in own
    )


class _Parts:
    """A tensor's parts on this rank, with the interface of a ``ShardedTensor``. They are resolved when they are asked
    for, so that an error of that is told to the other ranks."""

    def __init__(self, planner: SavePlanner, items: list[WriteItem]) -> None:
        self._planner = planner
        self.items = items

    def size(self) -> torch.Size:
        return torch.Size(self._told().size)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._told().properties.dtype
        return dtype

    def local_shards(self) -> list[_Part]:
        self._told()
        return [_Part(_Where(item), resolved(self._planner, item)) for item in self.items]

    def _told(self) -> Any:
        (item, *_) = self.items
        if item.tensor_data is None:
            raise ValueError(f"{item.index.fqn!r} is not a tensor, and final=True has no place for it")
        return item.tensor_data


class _Where:
    def __init__(self, item: WriteItem) -> None:
        assert item.tensor_data is not None
        self.shard_offsets = item.tensor_data.chunk.offsets


class _Part(NamedTuple):
    metadata: _Where
    tensor: torch.Tensor
