# SPDX-License-Identifier: Apache-2.0
"""Which part of a tensor this rank has: boxes of the whole tensor, and the plain tensors that hold them."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

Offsets = tuple[int, ...]


class Boxes(NamedTuple):
    """The parts of one tensor that this rank has."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: torch.dtype
    pieces: list[tuple[Offsets, torch.Tensor]]
    """Where each part begins in the whole tensor, and its elements. Parts without elements are left out."""

    def whole(self) -> torch.Tensor:
        """Returns the tensor, if this rank has all of it in one part."""
        return self.pieces[0][1] if self.pieces else torch.empty(self.shape, dtype=self.dtype)


def boxes_of(value: object, name: str = "") -> Boxes:
    """Returns the parts of a tensor that this rank has. Nothing is copied, and no collective is called.

    A plain tensor is whole. A ``DTensor`` may be sharded and replicated over a mesh of any number of dimensions, also
    by ``_StridedShard``, as FSDP2 does over tensor parallelism: there the rank's part is still one box. A
    ``ShardedTensor`` has its shards, and a tensor that describes itself by ``CheckpointableTensor`` (torch 2.14) has
    several.

    Raises ``ValueError``, naming the tensor, for ``Partial`` placements, whose elements are known only after a
    reduction, and for placements that leave a rank more than one box.
    """
    named = f"tensor {name!r}" if name else "the tensor"
    if not isinstance(value, torch.Tensor):
        if callable(getattr(value, "local_shards", None)):
            return _sharded(value)
        raise ValueError(f"Key `{name}` is invalid, expected torch.Tensor but received {type(value)}")
    if _is_dtensor(value):
        return _distributed(value, named)
    if callable(getattr(value, "local_shards", None)):
        return _sharded(value)
    if hasattr(value, "global_offsets") and hasattr(value, "local_sizes"):
        return _described(value, named)
    plain = value.detach()
    return Boxes(tuple(plain.shape), plain.dtype, _kept([((0,) * plain.dim(), plain)]))


def is_whole(value: object) -> bool:
    """Returns whether every rank that has this value has all of it, in an ordinary tensor."""
    return (
        isinstance(value, torch.Tensor)
        and not _is_dtensor(value)
        and not hasattr(value, "local_shards")
        and not hasattr(value, "global_offsets")
    )


def _is_dtensor(value: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # else there is none
    return module is not None and isinstance(value, module.DTensor)


def _kept(pieces: list[tuple[Offsets, torch.Tensor]]) -> list[tuple[Offsets, torch.Tensor]]:
    return [(offsets, tensor) for offsets, tensor in pieces if tensor.numel()]


def _distributed(value: Any, named: str) -> Boxes:
    with torch.no_grad():
        local = value.to_local().detach()
    if callable(getattr(local, "wait", None)):  # a collective under way
        local = local.wait()
    shape = tuple(value.shape)
    coordinate = value.device_mesh.get_coordinate()
    if coordinate is None or local.numel() == 0:  # this process is not in the mesh, or its part is empty
        _check_placements(value.placements, named)
        return Boxes(shape, value.dtype, [])
    offsets, sizes = local_box(shape, value.placements, tuple(value.device_mesh.shape), coordinate, named)
    if tuple(local.shape) != sizes:
        raise ValueError(
            f"{named} has {tuple(local.shape)} on this rank, where {value.placements} of {shape} give {sizes}"
        )
    return Boxes(shape, value.dtype, [(offsets, local)])


def local_box(
    shape: Sequence[int],
    placements: Sequence[Any],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    named: str = "the tensor",
) -> tuple[Offsets, tuple[int, ...]]:
    """Returns offsets and sizes of the box that the placements of a DTensor leave at a coordinate of its mesh."""
    _check_placements(placements, named)
    offsets, sizes = [0] * len(shape), list(shape)
    for mesh_dim in _in_order_of_sharding(placements, mesh_shape, named):
        dim = placements[mesh_dim].dim
        chunk = -(-sizes[dim] // mesh_shape[mesh_dim])  # as torch.chunk divides
        begin = min(coordinate[mesh_dim] * chunk, sizes[dim])
        offsets[dim] += begin
        sizes[dim] = min(chunk, sizes[dim] - begin)
    return tuple(offsets), tuple(sizes)


def _check_placements(placements: Sequence[Any], named: str) -> None:
    for placement in placements:
        if placement.is_partial():
            raise ValueError(
                f"{named} is {placement!r}: its elements are known only after a reduction; redistribute it first"
            )
        if not placement.is_replicate() and type(placement).__name__ not in ("Shard", "_StridedShard"):
            raise ValueError(f"{named} is placed by {placement!r}, which fastshard does not know")


def _in_order_of_sharding(placements: Sequence[Any], mesh_shape: Sequence[int], named: str) -> list[int]:
    """Returns the dimensions of the mesh that shard, in the order in which they do.

    It is their own order, but that a ``_StridedShard`` comes after those behind it that had divided the same dimension
    of the tensor before: together they have as many parts as its ``split_factor`` says.
    """
    order: list[int] = []
    for mesh_dim in reversed(range(len(placements))):
        placement = placements[mesh_dim]
        if placement.is_replicate():
            continue
        same = [other for other in order if placements[other].dim == placement.dim]
        factor = int(getattr(placement, "split_factor", 1))
        before = next(
            (n for n in range(len(same) + 1) if math.prod(mesh_shape[other] for other in same[:n]) == factor),
            None,
        )
        if before is None:
            raise ValueError(
                f"{named} is placed by {tuple(placements)!r}, which leaves a rank more than one box; redistribute it "
                "first"
            )
        at = order.index(same[before - 1]) + 1 if before else 0
        order.insert(at, mesh_dim)
    return order


def _sharded(value: Any) -> Boxes:
    pieces = [
        (tuple(map(int, shard.metadata.shard_offsets)), shard.tensor.detach())
        for shard in value.local_shards()
    ]
    return Boxes(tuple(value.size()), value.dtype, _kept(pieces))


def _described(value: Any, named: str) -> Boxes:
    """Returns the parts of a tensor that is a buffer for several shards."""
    buffer, shape = value.detach(), tuple(value.global_shape)
    pieces = []
    for offsets, begins, sizes in zip(
        value.global_offsets, value.local_offsets, value.local_sizes, strict=True
    ):
        part = buffer
        merged = len(sizes) - buffer.dim()  # leading dimensions that are one in the buffer
        lengths = (math.prod(sizes[: merged + 1]), *sizes[merged + 1 :])
        if merged < 0 or len(offsets) != len(shape):
            raise ValueError(f"{named} describes shards of {len(sizes)} dimensions in {tuple(buffer.shape)}")
        for dim, length in enumerate(lengths):
            part = part.narrow(dim, begins[dim] if dim < len(begins) else 0, length)
        pieces.append((tuple(offsets), part.view(tuple(sizes)) if merged else part))
    return Boxes(shape, buffer.dtype, _kept(pieces))


def first_overlap(boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[int, int] | None:
    """Returns the numbers of two boxes, given as offsets and sizes, that have elements in common; ``None`` if there are
    none. Boxes without elements must be left out.

    Of many boxes those are compared that overlap in the dimension that divides them most.
    """
    if len(boxes) < 2:
        return None
    dims = len(boxes[0][0])
    if dims == 0:
        return 0, 1
    ends = [[offset + size for offset, size in zip(*box)] for box in boxes]
    along = max(range(dims), key=lambda dim: len({offsets[dim] for offsets, _ in boxes}))
    reached: list[int] = []  # those that are not left behind
    for number in sorted(range(len(boxes)), key=lambda number: boxes[number][0][along]):
        offsets, end = boxes[number][0], ends[number]
        reached = [other for other in reached if ends[other][along] > offsets[along]]
        for other in reached:
            if all(a < d and c < b for a, b, c, d in zip(offsets, end, boxes[other][0], ends[other])):
                return other, number
        reached.append(number)
    return None
