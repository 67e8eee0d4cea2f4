# SPDX-License-Identifier: Apache-2.0
"""Those who save: fastshard and what people use today, all behind the same two steps.

``prepare(job)`` imports and builds what is not to be timed and returns the call that is; it runs once
for each case and mode, the call once in each round. A new rival is one function and one entry below.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .samples import MODES, RETURN

Shard = dict[str, torch.Tensor]
"""The tensors of one file. Names are unique over all the shards of a case."""


@dataclass(frozen=True)
class Job:
    """One save: which tensors, into which directory, and when it counts as done."""

    shards: list[Shard]
    out: Path
    """An empty directory at the start of every run."""
    durable: bool
    preallocate: bool = True
    """Whether the filesystem reserves space at no cost; only the ceilings ask."""

    @property
    def paths(self) -> list[Path]:
        count = len(self.shards)
        if count == 1:
            return [self.out / "model.safetensors"]
        return [self.out / f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for shard in self.shards for t in shard.values())

    def contiguous(self) -> list[Shard]:
        """What a saver that refuses strided tensors must be given; no copy where none is needed."""
        return [{name: t.contiguous() for name, t in shard.items()} for shard in self.shards]

    def merged(self) -> Shard:
        """All shards in one dict, for savers that lay out the files themselves."""
        return {name: t for shard in self.contiguous() for name, t in shard.items()}


Prepare = Callable[[Job], Callable[[], None]]


@dataclass(frozen=True)
class Rival:
    """One way to save, or a ceiling (``writes is None``) that only moves the same bytes."""

    name: str
    about: str
    prepare: Prepare
    writes: str | None = "safetensors"
    """What the output is, for ``verify``: safetensors, torch, dcp, dcp-hf."""
    modes: tuple[str, ...] = MODES
    slow: bool = False
    """Takes part in the first rounds only: more would double the length of the whole bench."""
    many_files_only: bool = False
    footprint: float = 1.0
    """Memory a save dirties, page cache included, in multiples of the bytes saved: sizes the ballast."""
    detail: Callable[[], dict[str, Any]] | None = None


def fsync_tree(directory: Path) -> None:
    """fsync every file, all at once (the way that is kindest to the saver), then the directories."""

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


def _then_sync(job: Job, save: Callable[[], None]) -> Callable[[], None]:
    """The call, followed by the fsync a careful user adds when the saver itself has none."""
    if not job.durable:
        return save

    def save_and_sync() -> None:
        save()
        fsync_tree(job.out)

    return save_and_sync


def _fastshard(job: Job) -> Callable[[], None]:
    import fastshard

    save_file, save_files = fastshard.save_file, fastshard.save_files
    strided = any(not t.is_contiguous() for shard in job.shards for t in shard.values())
    if len(job.shards) == 1:
        (path,), (tensors,) = job.paths, job.shards
        return lambda: save_file(tensors, path, durable=job.durable, allow_strided=strided)
    files: dict[str | os.PathLike[str], Shard] = dict(zip(job.paths, job.shards))
    return lambda: save_files(files, durable=job.durable, allow_strided=strided)


def _fastshard_detail() -> dict[str, Any]:
    import fastshard

    stats = fastshard.stats()
    fields = [name for name in dir(stats) if not name.startswith("_")] if stats else []
    return {name: getattr(stats, name) for name in fields if not callable(getattr(stats, name))}


def _safetensors(job: Job) -> Callable[[], None]:
    from safetensors.torch import save_file

    def save() -> None:
        for path, tensors in zip(job.paths, job.contiguous()):
            save_file(tensors, path)

    return _then_sync(job, save)


def _safetensors_threads(job: Job) -> Callable[[], None]:
    from safetensors.torch import save_file

    def save() -> None:
        with ThreadPoolExecutor(len(job.shards)) as pool:
            list(pool.map(save_file, job.contiguous(), job.paths))

    return _then_sync(job, save)


def _torch_save(job: Job) -> Callable[[], None]:
    def save() -> None:
        for path, tensors in zip(job.paths, job.contiguous()):
            torch.save(tensors, path.with_suffix(".pt"))  # torch.load goes by the suffix

    return _then_sync(job, save)


def _torch_save_nocrc(job: Job) -> Callable[[], None]:
    from torch.utils.serialization import config

    default = config.save.compute_crc32  # raises here, before the rounds, where torch has no such switch
    save = _torch_save(job)

    def save_without_crc() -> None:
        config.save.compute_crc32 = False
        try:
            save()
        finally:
            config.save.compute_crc32 = default

    return save_without_crc


def _checkpoint(job: Job, make_writer: Callable[[], Any]) -> Callable[[], None]:
    """torch.distributed.checkpoint in one process; without a process group it needs no telling."""
    from torch.distributed import checkpoint

    make_writer()

    def save() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "torch.distributed is uninitialized": as intended
            checkpoint.save(job.merged(), storage_writer=make_writer())

    return _then_sync(job, save)


def _dcp_fs(job: Job) -> Callable[[], None]:
    from torch.distributed.checkpoint import FileSystemWriter

    return _checkpoint(job, lambda: FileSystemWriter(job.out))


def _dcp_fs_nosync(job: Job) -> Callable[[], None]:
    from torch.distributed.checkpoint import FileSystemWriter

    return _checkpoint(job, lambda: FileSystemWriter(job.out, sync_files=False))


def _dcp_hf(job: Job) -> Callable[[], None]:
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    return _checkpoint(job, lambda: HuggingFaceStorageWriter(str(job.out)))


_ALL = (
    Rival("fastshard", "fastshard.save_file / save_files", _fastshard, detail=_fastshard_detail),
    Rival("safetensors", "safetensors.torch.save_file, one file after the other", _safetensors),
    Rival(
        "safetensors-threads",
        "safetensors.torch.save_file, one thread for each file",
        _safetensors_threads,
        many_files_only=True,
    ),
    Rival("torch.save", "torch.save as it comes", _torch_save, writes="torch", slow=True),
    Rival(
        "torch.save-nocrc", "torch.save, compute_crc32=False", _torch_save_nocrc, writes="torch", slow=True
    ),
    Rival("dcp-fs", "DCP FileSystemWriter (fsyncs by default)", _dcp_fs, writes="dcp", slow=True),
    Rival(
        "dcp-fs-nosync",
        "DCP FileSystemWriter, sync_files=False: like for like on return",
        _dcp_fs_nosync,
        writes="dcp",
        modes=(RETURN,),
        slow=True,
    ),
    Rival(
        "dcp-hf",
        "DCP HuggingFaceStorageWriter (fsyncs by default)",
        _dcp_hf,
        writes="dcp-hf",
        slow=True,
        footprint=3.0,
    ),
)
RIVALS: dict[str, Rival] = {rival.name: rival for rival in _ALL}
US = "fastshard"
BASE = "safetensors"
"""Every ratio is taken against this one unless it says otherwise."""
