# SPDX-License-Identifier: Apache-2.0
"""Who writes what: the plan of a save by many ranks, which the first rank makes.

Each rank tells which boxes of which tensors it has (:func:`told_of`). :func:`plan_of` puts the whole state dict
together, without its elements, splits it as huggingface_hub does, makes the headers, and gives each box to one of the
ranks that have it, so that all write about as many bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from safetensors import SafetensorError

from ..api.hub import duplicate_names, index_text, metadata_in_files, split_by_size
from ..engine.plan import HOST, TensorView
from ..engine.sharing import storage_of
from ..engine.tensors import DTYPES, Entry, check_format, check_names, stored_as
from ..formats.safetensors import HeaderTooLarge, header
from .boxes import Boxes, Offsets, boxes_of, first_overlap, is_whole

_LEAST_CUT: Final = 1 << 20
"""A box that several ranks have is cut where it is larger, and larger than a part of what a rank writes."""
_CUTS_OF_A_SHARE: Final = 4

Box = tuple[Offsets, tuple[int, ...]]
"""Offsets and sizes in the whole tensor."""


class Told(NamedTuple):
    """What a rank tells of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: list[Box]
    storage: tuple[object, int] | None
    """Which storage a plain tensor fills, and the size of that; ``None`` if it is saved as one of its own."""
    kept: str | None
    """Name of the tensor that is saved instead, as both are the same."""


class File(NamedTuple):
    name: str
    header: bytes
    nbytes: int


class Piece(NamedTuple):
    """Rows of a box that a rank has."""

    file: int
    name: str
    box: int
    """Which of the boxes of this name that the rank has told."""
    first: int
    """The row of the box with which it begins."""
    rows: int | None
    """``None``: all of the box."""
    begin: int
    """Where the whole tensor begins in the file."""


class Plan(NamedTuple):
    files: list[File]
    index_text: str | None
    """Of the index, if there is one."""
    pieces: list[list[Piece]]
    """Those of each rank."""
    split: Any
    """By huggingface_hub."""
    metadata: dict[str, str]
    """Of each file."""


def told_of(
    state_dict: Mapping[str, object], dtype: torch.dtype | None
) -> tuple[dict[str, Boxes], dict[str, Told]]:
    """Returns the boxes that this rank has, and what it tells of them. Raises as :func:`boxes_of`."""
    check_names(state_dict)  # type: ignore[arg-type]
    boxes = {name: boxes_of(value, name) for name, value in state_dict.items()}
    whole: dict[str, torch.Tensor] = {
        name: value
        for name, value in state_dict.items()
        if is_whole(value) and isinstance(value, torch.Tensor)
    }
    kept = {
        **duplicate_names(whole),
        **_tied({name: have for name, have in boxes.items() if name not in whole}),
    }
    told = {}
    for name, (shape, kind, pieces) in boxes.items():
        if kind not in DTYPES:
            raise KeyError(f"{kind} of tensor {name!r}")
        storage = _storage(whole[name], dtype) if name in whole else None
        parts = [(offsets, tuple(tensor.shape)) for offsets, tensor in pieces]
        told[name] = Told(shape, kind, parts, storage, kept.get(name))
    return boxes, told


def _storage(tensor: torch.Tensor, dtype: torch.dtype | None) -> tuple[object, int] | None:
    """Returns by which storage huggingface_hub's split knows a tensor, and its size."""
    if (dtype is not None and tensor.is_floating_point()) or not tensor.is_contiguous():
        return None
    return storage_of(tensor)


def _tied(boxes: Mapping[str, Boxes]) -> dict[str, str]:
    """Returns which names stand for the same memory as another one that is kept, which is the smallest."""
    same: dict[object, list[str]] = {}
    for name, have in boxes.items():
        if have.pieces:
            places = [(offsets, part.data_ptr(), part.shape, part.stride()) for offsets, part in have.pieces]
            same.setdefault((have.shape, have.dtype, repr(places)), []).append(name)
    return {name: min(names) for names in same.values() for name in names if name != min(names)}


def plan_of(
    told: Sequence[Mapping[str, Told]],
    pattern: str,
    max_shard_size: int | str,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None,
) -> Plan:
    """Returns the plan of the state dict of which the ranks have told these parts.

    Raises ``ValueError``, naming tensor and ranks, if the parts are not those of one tensor or leave out something.
    """
    whole = {name: _agreed(name, told) for name in _merged([list(names) for names in told])}
    kept = _kept(told, whole)
    metadata = dict(metadata)
    for name in _in_groups(kept, whole):
        metadata.setdefault(name, kept[name])
        del whole[name]
    sized = {name: _Sized(name, one, _cast(one.dtype, dtype)) for name, one in whole.items()}
    split = split_by_size(sized, pattern, max_shard_size, lambda one: one.storage)
    begins: dict[str, tuple[int, int]] = {}
    files, in_files = [], metadata_in_files(split, metadata)
    for number, (name, names) in enumerate(split.filename_to_tensors.items()):
        entries = sorted(sized[tensor].entry() for tensor in names)
        made = _header(entries, in_files)
        at = len(made)
        for entry in entries:
            begins[entry.name] = number, at
            at += entry.view.nbytes
        files.append(File(name, made, at))
    pieces = _shares(told, sized, begins)
    return Plan(files, index_text(split, metadata) if split.is_sharded else None, pieces, split, in_files)


class _Sized:
    """What huggingface_hub's split has to know of a whole tensor."""

    def __init__(self, name: str, told: Told, dtype: torch.dtype) -> None:
        self.name, self.shape, self.dtype = name, told.shape, dtype
        self.packed_nbytes = math.prod(told.shape) * dtype.itemsize
        self.storage, self.nbytes = told.storage or (None, self.packed_nbytes)

    def entry(self) -> Entry:
        code, shape = stored_as(self.dtype, self.shape)
        view = TensorView(0, self.packed_nbytes, HOST)
        return Entry(DTYPES[self.dtype][0], self.name, code, shape, view, torch.empty(0, device="meta"))


def _cast(source: torch.dtype, target: torch.dtype | None) -> torch.dtype:
    return target if target is not None and source.is_floating_point else source


def _header(entries: list[Entry], metadata: dict[str, str]) -> bytes:
    check_format(entries)
    try:
        return header([(e.name, e.code, e.shape, e.view.nbytes) for e in entries], metadata)
    except HeaderTooLarge:
        raise SafetensorError("Error while serializing: header too large") from None


def _merged(orders: Sequence[list[str]]) -> list[str]:
    """Returns all names in an order that keeps those of the ranks as far as they agree.

    Names that only later ranks have come before the next one that earlier ranks have, too.
    """
    merged = list(orders[0])
    known = set(merged)
    for order in orders[1:]:
        if known.issuperset(order):
            continue
        before: dict[str, list[str]] = {}
        new: list[str] = []
        for name in order:
            if name not in known:
                new.append(name)
            elif new:
                before[name], new = new, []
        merged = [one for name in merged for one in (*before.get(name, ()), name)] + new
        known.update(order)
    return merged


def _agreed(name: str, told: Sequence[Mapping[str, Told]]) -> Told:
    """Returns what the ranks say of a whole tensor."""
    those = [(rank, names[name]) for rank, names in enumerate(told) if name in names]
    first_rank, first = those[0]
    for rank, one in those[1:]:
        if (one.shape, one.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"tensor {name!r} is {first.dtype} of {first.shape} on rank {first_rank} and {one.dtype} of {one.shape}"
                f" on rank {rank}"
            )
    return first


def _kept(told: Sequence[Mapping[str, Told]], whole: Mapping[str, Told]) -> dict[str, str]:
    """Returns which names are left out, and what is saved instead: what all ranks say that have elements of it."""
    kept: dict[str, str] = {}
    for name in whole:
        said = {names[name].kept for names in told if name in names and names[name].boxes}
        if len(said) == 1 and (other := said.pop()) is not None:
            kept[name] = other
    return kept


def _in_groups(kept: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """Returns the names that are left out in the order in which huggingface_hub leaves them out."""
    groups: dict[str, list[str]] = {}
    holders = {*kept.values()}
    for name in names:
        if name in kept or name in holders:
            groups.setdefault(kept.get(name, name), []).append(name)
    return [name for group in groups.values() for name in sorted(group) if name in kept]


def _shares(
    told: Sequence[Mapping[str, Told]], sized: Mapping[str, _Sized], begins: Mapping[str, tuple[int, int]]
) -> list[list[Piece]]:
    """Gives each box to one of the ranks that have it."""
    shares: list[list[Piece]] = [[] for _ in told]
    loads = [0] * len(told)
    shared: list[tuple[str, Box, list[tuple[int, int]]]] = []
    for name, one in sized.items():
        holders: dict[Box, list[tuple[int, int]]] = {}
        for rank, names in enumerate(told):
            for number, box in enumerate(names[name].boxes if name in names else ()):
                holders.setdefault(box, []).append((rank, number))
        _check_tiled(name, one.shape, holders)
        for box, those in holders.items():
            if len(those) > 1:
                shared.append((name, box, those))
                continue
            ((rank, number),) = those
            loads[rank] += math.prod(box[1]) * one.dtype.itemsize
            shares[rank].append(Piece(begins[name][0], name, number, 0, None, begins[name][1]))
    total = sum(loads) + sum(math.prod(box[1]) * sized[name].dtype.itemsize for name, box, _ in shared)
    most = max(_LEAST_CUT, total // (_CUTS_OF_A_SHARE * len(told)))
    cuts = []
    for name, box, those in shared:
        nbytes = math.prod(box[1]) * sized[name].dtype.itemsize
        for first, rows in _cut(box[1], nbytes, most):
            cuts.append((nbytes if rows is None else nbytes * rows // box[1][0], name, first, rows, those))
    for nbytes, name, first, rows, those in sorted(cuts, key=lambda cut: -cut[0]):
        rank, number = min(those, key=lambda holder: loads[holder[0]])
        loads[rank] += nbytes
        shares[rank].append(Piece(begins[name][0], name, number, first, rows, begins[name][1]))
    return shares


def _cut(sizes: tuple[int, ...], nbytes: int, most: int) -> list[tuple[int, int | None]]:
    """Returns first rows and numbers of rows of the parts in which a box is written."""
    if nbytes <= most or not sizes or sizes[0] == 1:
        return [(0, None)]
    step = max(1, sizes[0] * most // nbytes)
    return [(first, min(step, sizes[0] - first)) for first in range(0, sizes[0], step)]


def _check_tiled(name: str, shape: tuple[int, ...], holders: Mapping[Box, list[tuple[int, int]]]) -> None:
    """Raises ``ValueError`` unless the boxes are all of a tensor, and none of it twice."""
    have, volume = sum(math.prod(sizes) for _, sizes in holders), math.prod(shape)
    for offsets, sizes in holders:
        if len(offsets) != len(shape) or any(o + s > full for o, s, full in zip(offsets, sizes, shape)):
            raise ValueError(
                f"tensor {name!r} of {shape}: rank {holders[offsets, sizes][0][0]} has {sizes} at {offsets}"
            )
    if have < volume:
        raise ValueError(f"tensor {name!r} of {shape}: the ranks have only {have} of {volume} elements")
    boxes = [*holders]
    overlapping = first_overlap(boxes)
    if overlapping is not None:
        (one, other), (ranks, theirs) = (
            [boxes[n] for n in overlapping],
            [holders[boxes[n]] for n in overlapping],
        )
        raise ValueError(
            f"tensor {name!r} of {shape}: rank {ranks[0][0]} has {one[1]} at {one[0]} and rank {theirs[0][0]} has "
            f"{other[1]} at {other[0]}, which overlap"
        )
