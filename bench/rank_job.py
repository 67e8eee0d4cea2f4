# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a group save together: a model whose tensors are cut by rows, as FSDP2 cuts them.

The model lies in memory that all processes share, so there is one copy of it however many ranks there are: a rank's
part is its own piece of it, and a side in one process, or the check of what was written, has all of it.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .builders import BF16, Filler, model_shapes
from .job import Job, Shard
from .samples import MIB

ALIGNMENT = 64
WARM_UP_NBYTES = MIB
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class RankJob(Job):
    """One save of a group, as one of its ranks sees it. ``shards`` is this rank's part as plain tensors."""

    rank: int = 0
    size: int = 1
    state: dict[str, Any] = field(default_factory=dict)
    """This rank's part as a state dict of ``DTensor``."""
    whole: Shard = field(default_factory=dict)
    sources: Path = Path()
    """Where checkpoints that are read lie until their case has ended."""
    most: int = 0
    """The largest shard of a checkpoint, where it has several."""

    @property
    def paths(self) -> list[Path]:
        """For the ceilings: each rank has a file of its own."""
        return [self.out / f"rank-{self.rank}.bin"]

    def smallest(self) -> RankJob:
        """The same with its smallest tensors only: for the first call, which imports and makes ready."""
        names: list[str] = []
        held = 0
        for name in sorted(self.whole, key=lambda name: self.whole[name].nbytes):
            held += self.whole[name].nbytes
            if names and held > WARM_UP_NBYTES:
                break
            names.append(name)
        (part,) = self.shards
        return replace(
            self,
            shards=[{name: part[name] for name in names}],
            state={name: self.state[name] for name in names},
            whole={name: self.whole[name] for name in names},
            sources=self.sources / "warm-up",
        )


def _offsets(shapes: Shapes) -> dict[str, int]:
    """Where each tensor begins, and under "" where the last one ends."""
    at, offsets = 0, {}
    for name, shape in shapes.items():
        offsets[name] = at
        at += -(-2 * math.prod(shape) // ALIGNMENT) * ALIGNMENT
    return {**offsets, "": at}


def shared_nbytes(nbytes: int) -> int:
    return _offsets(model_shapes(nbytes))[""]


def _tensor(memory: mmap.mmap, at: int, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of exactly these bytes: one that is a view of a larger storage is copied by some savers."""
    if not math.prod(shape):
        return torch.empty(shape, dtype=BF16)
    return torch.frombuffer(memory, dtype=BF16, count=math.prod(shape), offset=at).view(shape)


def whole_model(memory: mmap.mmap, nbytes: int) -> Shard:
    """All tensors, in the shared memory."""
    shapes = model_shapes(nbytes)
    offsets = _offsets(shapes)
    return {name: _tensor(memory, offsets[name], shape) for name, shape in shapes.items()}


def fill(memory: mmap.mmap, nbytes: int) -> Shard:
    """The same, filled with random bits."""
    fill = Filler("cpu", nbytes)
    whole = whole_model(memory, nbytes)
    for tensor in whole.values():
        fill.fill(tensor)
    return whole


def part_of(shape: tuple[int, ...], dim: int, rank: int, size: int) -> tuple[int, int]:
    """(first, number) of the rows or columns of a rank. The last ranks have fewer, or none."""
    each = -(-shape[dim] // size)
    first = min(rank * each, shape[dim])
    return first, min(each, shape[dim] - first)


def parts(memory: mmap.mmap, nbytes: int, rank: int, size: int) -> Shard:
    """A rank's rows of each tensor."""
    shapes, found = model_shapes(nbytes), {}
    offsets = _offsets(shapes)
    for name, shape in shapes.items():
        first, number = part_of(shape, 0, rank, size)
        begin = offsets[name] + 2 * first * math.prod(shape[1:])
        found[name] = _tensor(memory, begin, (number, *shape[1:]))
    return found


def distributed_tensor(local: torch.Tensor, mesh: Any, dim: int, shape: torch.Size) -> Any:
    """This rank's part as a ``DTensor``; nothing is sent."""
    from torch.distributed.tensor import DTensor, Shard

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(dim)], run_check=False, shape=shape, stride=stride)


def touch(tensors: Shard) -> None:
    """Maps every page of them into this process, so that a save is not charged for them."""
    for tensor in tensors.values():
        if tensor.numel():
            tensor.view(torch.uint8).reshape(-1)[:: mmap.PAGESIZE].sum()
