# SPDX-License-Identifier: Apache-2.0
"""``load_distributed``: each rank fills its own parts of a state dict from ordinary Hugging Face files.

The files may be those of any saver and of any number of ranks. Everything is compared, by all ranks, before a byte is
read.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import torch

from ..api.sharded_state import State, has_memory, state_of
from ..base.loading import load
from ..engine.engine import Engine, Options, engine_for, progress_wanted
from ..engine.sharing import overlapping
from .boxes import Boxes, boxes_of
from .group import Group
from .slices import Box, Figures, read_boxes
from .stored import OpenCheckpoint, Stored, open_checkpoint

_FAULTS_SHOWN: Final = 10


class Loaded(NamedTuple):
    """What :func:`load_distributed` has done on this rank, and what it has not."""

    missing_keys: list[str]
    """Names that a rank has and the checkpoint has not; only with ``strict=False``, else it is an error."""
    unexpected_keys: list[str]
    """Names that the checkpoint has and no rank."""
    nbytes: int
    """Bytes of this rank's parts, as they are stored."""
    read_nbytes: int
    """Bytes that this rank has copied out of files: at most a fifth more."""
    staged_nbytes: int
    """Those of them that went by way of staging buffers, to be cast, turned or copied to a device."""


def load_distributed(
    state_dict: State,
    folder: str | os.PathLike[str],
    *,
    process_group: Any = None,
    timeout: float | None = None,
    strict: bool = True,
    progress: bool | None = None,
    engine: Engine | Options | None = None,
) -> Loaded:
    """Fills the tensors of a state dict from a checkpoint, each rank only its own parts of them.

    All ranks of the process group call this. The checkpoint is a folder as :func:`fastshard.save_distributed`,
    :func:`fastshard.save_torch_state_dict` or transformers' ``save_pretrained`` make it, or one safetensors file; who
    saved it, and how many they were, does not matter. A plain tensor is read whole, and of a ``DTensor``, a
    ``ShardedTensor`` or a tensor that describes itself by ``CheckpointableTensor`` what this rank has of it: rows,
    columns, or any box. Bytes go straight to where the tensors lie. Only what has to be cast, or lies on a device, goes
    by way of staging buffers, within the engine's ``memory_budget``. Values are cast where the dtypes differ, as
    ``load_state_dict`` does.

    A name that is not stored is filled from the one that it was saved under, where the files say so, or shares its
    memory with one that is: tied weights have several names. Ranks may have different names, as with expert
    parallelism.

    Args:
        state_dict: what ``model.state_dict()`` returns, or a module. Its tensors are changed in place.
        folder: the checkpoint. All ranks must be able to read it.
        process_group: the ranks; ``None``: all of them. Without ``torch.distributed`` there is one.
        timeout: seconds that a rank is waited for; ``None``: half an hour.
        strict: whether names must be the same on both sides. If not, they are returned.
        progress: whether the first rank shows a bar; ``None``: as the environment says.
        engine: its ``memory_budget`` limits the staging buffers.

    Raises:
        RuntimeError: on all ranks, with what ``load_state_dict`` would say: names are missing or unexpected, or shapes
            differ. Or another rank has failed, or was not heard of. Nothing is read, but where a rank fails while it
            reads: then some tensors have changed.
        SafetensorError: index or files are not what they should be.
        OSError: they cannot be read.
        ValueError: a tensor is placed in a way that leaves its parts unknown.
    """
    budget = engine_for(engine).options.memory_budget
    with (
        Group(process_group, timeout=timeout, doing="load") as group,
        contextlib.ExitStack() as stack,
    ):
        compared: list[_Own] = []

        def compare() -> _Told:
            checkpoint = stack.enter_context(open_checkpoint(folder))
            compared.append(_Own(state_of(state_dict), checkpoint))
            return compared[0].told

        told = group.exchange(compare, lambda told: [told] * group.size)
        (own,) = compared
        missing, unexpected = _compared(told, own.checkpoint, strict)
        bar = stack.enter_context(_bar(progress_wanted(progress) and group.first, own))
        with group.agreed():
            figures = own.read(budget, bar)
    return Loaded(missing, unexpected, figures.wanted_nbytes, figures.read_nbytes, figures.staged_nbytes)


class _Told(NamedTuple):
    """What a rank tells the others."""

    digest: int
    missing: list[str]
    wrong: list[str]
    unused: list[str]


class _Own:
    """The parts of this rank, and where they are stored."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], checkpoint: OpenCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.missing: list[str] = []
        self.wrong: list[str] = []
        """What does not fit, in words."""
        self._boxes: dict[object, Box] = {}
        """By the memory that they fill: of two names for the same memory the last one counts."""
        parts = {name: boxes_of(value, name) for name, value in tensors.items()}
        sources = _sources(parts, checkpoint)
        for name, boxes in parts.items():
            source = sources.get(name)
            if source is not None:
                self._add(name, boxes, checkpoint.tensor(source))
            elif boxes.pieces or not math.prod(boxes.shape):  # else other ranks can tell whether it is tied
                self.missing.append(name)
        used = {*sources.values()}
        self.unused = [name for name in checkpoint.names() if name not in used]
        """Names in the checkpoint."""

    @property
    def told(self) -> _Told:
        return _Told(self.checkpoint.digest, self.missing, self.wrong, self.unused)

    @property
    def nbytes(self) -> int:
        return sum(box.destination.numel() * box.stored.dtype.itemsize for box in self._boxes.values())

    def read(self, staging: int, told: Callable[[int], object]) -> Figures:
        boxes = [*self._boxes.values()]
        if not overlapping([_span(box.destination) for box in boxes]):
            return read_boxes(boxes, staging=staging, told=told)
        # Views of the same memory are filled in their order, as ``load_state_dict`` does.
        found = [read_boxes([box], staging=staging, told=told) for box in boxes]
        return Figures(*map(sum, zip(*found)))

    def _add(self, name: str, boxes: Boxes, stored: Stored) -> None:
        fault = _misfit(name, boxes, stored)
        if fault:
            self.wrong.append(fault)
            return
        for offsets, target in boxes.pieces:
            memory = _memory(target)
            self._boxes.pop(memory, None)
            self._boxes[memory] = Box(stored, offsets, tuple(target.shape), target)


def _sources(parts: Mapping[str, Boxes], checkpoint: OpenCheckpoint) -> dict[str, str]:
    """Returns under which name each tensor is stored, as far as it is."""
    found: dict[str, str] = {}
    for name in parts:
        saved_as = name if name in checkpoint else checkpoint.metadata.get(name)
        if saved_as is not None and saved_as in checkpoint:
            found[name] = saved_as
    if len(found) < len(parts):
        names = {_place(parts[name]): name for name in found if parts[name].pieces}
        for name, boxes in parts.items():
            holder = names.get(_place(boxes)) if boxes.pieces else None
            if name not in found and holder is not None:
                found[name] = found[holder]
    return found


def _place(boxes: Boxes) -> object:
    """Returns what two names of the same tensor have in common on a rank."""
    return boxes.shape, *((offsets, _memory(target)) for offsets, target in boxes.pieces)


def _memory(tensor: torch.Tensor) -> object:
    address = tensor.data_ptr() if has_memory(tensor) else id(tensor)
    return tensor.device, address, tuple(tensor.shape), tensor.stride(), tensor.dtype


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    begin, last = tensor.data_ptr(), sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
    return begin, begin + (last + 1) * tensor.element_size()


def _misfit(name: str, boxes: Boxes, stored: Stored) -> str:
    """Returns why this tensor cannot be filled from that one; an empty text if it can."""
    where = f"of {stored.file.name!r}"
    if boxes.shape != stored.shape:
        return (
            f"size mismatch for {name}: copying a param with shape {torch.Size(stored.shape)} {where}, the shape in "
            f"current model is {torch.Size(boxes.shape)}."
        )
    if boxes.dtype is not stored.dtype and not _can_cast(stored.dtype, boxes.dtype):
        return f"dtype mismatch for {name}: {stored.dtype} {where} cannot be cast to {boxes.dtype}."
    for _, target in boxes.pieces:
        if not has_memory(target) or (target.device.type in ("cpu", "cuda") and not target.data_ptr()):
            return f"{name} has no memory to load into (device {target.device})."
        if any(stride == 0 and size > 1 for size, stride in zip(target.shape, target.stride())):
            return f"{name} is expanded: its elements are not its own."
    return ""


@functools.cache
def _can_cast(source: torch.dtype, target: torch.dtype) -> bool:
    if source.is_complex and not target.is_complex:
        return False
    try:
        torch.empty(1, dtype=source, device="cpu").to(target)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _compared(told: list[_Told], checkpoint: OpenCheckpoint, strict: bool) -> tuple[list[str], list[str]]:
    """Returns the names that are missing and those that are unexpected. Raises for all ranks what is wrong on some."""
    others = [rank for rank, of_rank in enumerate(told) if of_rank.digest != told[0].digest]
    if others:
        raise RuntimeError(f"rank {others[0]} finds another checkpoint in {checkpoint.place!r} than rank 0")
    missing: dict[str, list[int]] = {}
    wrong: dict[str, list[int]] = {}
    for rank, of_rank in enumerate(told):
        for name in of_rank.missing:
            missing.setdefault(name, []).append(rank)
        for fault in of_rank.wrong:
            wrong.setdefault(fault, []).append(rank)
    unused = set(told[0].unused).intersection(*(of_rank.unused for of_rank in told[1:]))
    unexpected = sorted(unused)
    lines = [f"{fault}{_on(ranks, told)}" for fault, ranks in sorted(wrong.items())]
    if strict and unexpected:
        names = _listed([f'"{name}" of {checkpoint.file_of(name)!r}' for name in unexpected])
        lines.insert(0, f"Unexpected key(s) in checkpoint: {names}.")
    if strict and missing:
        names = _listed([f'"{name}"{_on(ranks, told)}' for name, ranks in sorted(missing.items())])
        lines.insert(0, f"Missing key(s) in checkpoint: {names}.")
    if lines:
        more = [f"and {len(lines) - _FAULTS_SHOWN} more"] if len(lines) > _FAULTS_SHOWN else []
        text = "".join(f"\n\t{line}" for line in [*lines[:_FAULTS_SHOWN], *more])
        raise RuntimeError(f"Error(s) in loading {checkpoint.place!r}:{text}")
    return sorted(missing), unexpected


def _on(ranks: list[int], told: list[_Told]) -> str:
    """Says which ranks these are, unless they are all."""
    return "" if len(ranks) == len(told) else f" (rank {', '.join(map(str, ranks))})"


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - _FAULTS_SHOWN} more" if len(names) > _FAULTS_SHOWN else ""
    return ", ".join(names[:_FAULTS_SHOWN]) + more


@contextlib.contextmanager
def _bar(shown: bool, own: _Own) -> Iterator[Callable[[int], object]]:
    """Shows how much of this rank's parts has been read, which the block tells."""
    if not shown or not own.nbytes:
        yield lambda nbytes: None
        return
    name = os.path.basename(os.path.normpath(own.checkpoint.place))
    bar: Any = load("tqdm.auto").tqdm(total=own.nbytes, unit="B", unit_scale=True, desc=name)
    with bar:
        yield bar.update
