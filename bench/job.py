# SPDX-License-Identifier: Apache-2.0
"""One save, which is a ``Job``, and one way to do it, which is a ``Rival``.

``prepare(job)`` imports and builds what is not to be timed and returns the call that is; it runs once
for each case and mode, the call once in each round.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .samples import WRITTEN

CPU, CUDA = KINDS = ("cpu", "cuda")
"""Kinds of devices that tensors can be on."""

US = "fastshard"
"""The rival whose speed the bench is about."""
BASE = "safetensors"
"""The rival that ratios are taken against, unless a case has a base of its own."""
SOURCES = "sources"
"""The directory beside the output where checkpoints that are read lie until their case has ended."""
OFFLOADED = "offloaded"
"""The directory beside the output where models that are on disk lie until their case has ended."""

Shard = dict[str, torch.Tensor]
"""The tensors of one file. Names are unique over all the shards of a case."""


class Unavailable(Exception):
    """What was to be measured does not exist in this version. Nothing went wrong."""


@dataclass(frozen=True)
class Job:
    """One save: which tensors, into which directory, and when it counts as done."""

    shards: list[Shard]
    out: Path
    """An empty directory at the start of every run."""
    durable: bool
    preallocate: bool = True
    """Whether the filesystem reserves space at no cost; only the ceilings ask."""
    dtype: torch.dtype | None = None
    """What the tensors are cast to on their way into the files; None: nothing is cast."""

    @property
    def paths(self) -> list[Path]:
        count = len(self.shards)
        if count == 1:
            return [self.out / "model.safetensors"]
        return [self.out / f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]

    @property
    def nbytes(self) -> int:
        """Of the tensors in the files."""
        return sum(map(self.nbytes_of_shard, self.shards))

    @property
    def largest(self) -> int:
        """The bytes of the largest shard. With them as ``max_shard_size`` a library makes these shards."""
        return max(map(self.nbytes_of_shard, self.shards))

    @property
    def strided(self) -> bool:
        return any(not t.is_contiguous() for shard in self.shards for t in shard.values())

    def nbytes_of(self, tensor: torch.Tensor) -> int:
        return tensor.numel() * (self.dtype or tensor.dtype).itemsize

    def nbytes_of_shard(self, shard: Shard) -> int:
        return sum(map(self.nbytes_of, shard.values()))

    def contiguous(self) -> list[Shard]:
        """Returns what a saver that refuses strided tensors and casts nothing must be given. It copies only
        where it must."""
        return [
            {name: t.to(self.dtype or t.dtype).contiguous() for name, t in s.items()} for s in self.shards
        ]

    def merged(self) -> Shard:
        """Returns all shards in one dict, for savers that lay out the files themselves."""
        return {name: t for shard in self.contiguous() for name, t in shard.items()}


Prepare = Callable[[Job], Callable[[], Any]]
"""In the mode STALL the call may return a future that is done when the files stand."""


def finish(made: Any) -> None:
    """Waits for what a call has begun, if it returned a future."""
    getattr(made, "result", lambda: None)()


@dataclass(frozen=True)
class Rival:
    """One way to save, or a ceiling (``writes is None``) that only moves the same bytes."""

    name: str
    about: str
    prepare: Prepare
    writes: str | None = "safetensors"
    """What the output is, for ``verify``: safetensors (the same files as the base), files (other safetensors
    files), torch, dcp, dcp-hf."""
    modes: tuple[str, ...] = WRITTEN
    slow: bool = False
    """Takes part in the first rounds only: more would double the length of the whole bench."""
    own: bool = False
    """Saves more than the tensors, with files of its own: takes part only in cases that name it."""
    many_files_only: bool = False
    one_file_only: bool = False
    devices: tuple[str, ...] = KINDS
    """Where the tensors must be for this to mean anything."""
    stands: bool = False
    """Its files stand from round to round, in a directory of their own; ``close`` of the call ends them."""
    footprint: float = 1.0
    """Memory a save dirties, page cache included, in multiples of the bytes saved: sizes the ballast."""
    within: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    """Entered before each run and left after it; neither is timed."""
    detail: Callable[[], dict[str, Any]] | None = None
    unchanged: bool = False
    """Its files hold what the tensors were only if nobody changes them until the files stand."""
    trains: bool = False
    """The call is a whole job that makes several saves, and returns a ``JobSample`` of them."""
    budget: Callable[[Job], int] | None = None
    """The bytes of memory that it is told it may take."""


def fsync_tree(directory: Path) -> None:
    """Calls fsync for all files at once, which is kindest to the saver, and then for the directories."""

    def fsync(path: Path) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    entries = [directory, *directory.rglob("*")]
    files = [path for path in entries if path.is_file()]
    with ThreadPoolExecutor(max(1, min(16, len(files)))) as pool:
        list(pool.map(fsync, files))
    for path in entries:
        if path.is_dir():
            fsync(path)


def then_sync(job: Job, save: Callable[[], None]) -> Callable[[], None]:
    """Adds the fsync that a careful user adds when the saver has none, if the job is durable."""
    if not job.durable:
        return save

    def save_and_sync() -> None:
        save()
        fsync_tree(job.out)

    return save_and_sync
