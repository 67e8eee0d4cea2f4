# SPDX-License-Identifier: Apache-2.0
"""Savers of files that safetensors and ``torch.load`` read: the libraries' own functions, and fastshard's for
the archive of ``torch.save``."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from .job import CUDA, Job, Rival, Unavailable, then_sync
from .rivals_fastshard import require, variant


def _safetensors(job: Job) -> Callable[[], None]:
    from safetensors.torch import save_file

    def save() -> None:
        for path, tensors in zip(job.paths, job.contiguous()):
            save_file(tensors, path)

    return then_sync(job, save)


def _safetensors_threads(job: Job) -> Callable[[], None]:
    from safetensors.torch import save_file

    def save() -> None:
        with ThreadPoolExecutor(len(job.shards)) as pool:
            list(pool.map(save_file, job.contiguous(), job.paths))

    return then_sync(job, save)


def _torch_save(job: Job) -> Callable[[], None]:
    def save() -> None:
        for path, tensors in zip(job.paths, job.contiguous()):
            torch.save(tensors, path.with_suffix(".pt"))  # torch.load goes by the suffix

    return then_sync(job, save)


def _fastshard_archive(job: Job) -> Callable[[], None]:
    import fastshard

    require("torch_save")
    torch_save = fastshard.torch_save

    def save() -> None:
        for path, tensors in zip(job.paths, job.contiguous()):
            torch_save(tensors, path.with_suffix(".pt"), durable=job.durable)

    return save


def _configured(save: Callable[[], None], **switches: bool) -> Callable[[], None]:
    """Makes the call with other settings of torch.save, and puts them back as they were."""
    from torch.utils.serialization import config

    for name in switches:  # found out here, before the rounds
        if not hasattr(config.save, name):
            raise Unavailable(f"this torch has no save.{name}")

    def configured_save() -> None:
        before = {name: getattr(config.save, name) for name in switches}
        try:
            for name, value in switches.items():
                setattr(config.save, name, value)
            save()
        finally:
            for name, value in before.items():
                setattr(config.save, name, value)

    return configured_save


def _torch_save_nocrc(job: Job) -> Callable[[], None]:
    return _configured(_torch_save(job), compute_crc32=False)


def _torch_save_d2h(job: Job) -> Callable[[], None]:
    return _configured(_torch_save(job), compute_crc32=False, use_pinned_memory_for_d2h=True)


def _staging(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=True)


def _torch_save_pinned(job: Job) -> Callable[[], None]:
    """Keeps page-locked copies, so that locking is paid once. Nobody can do better by hand."""
    staged = [{name: _staging(t) for name, t in shard.items()} for shard in job.contiguous()]
    save = _torch_save_nocrc(replace(job, shards=staged, dtype=None))

    def stage_and_save() -> None:
        for shard, copies in zip(job.contiguous(), staged):
            for name, tensor in shard.items():
                copies[name].copy_(tensor, non_blocking=True)
        torch.cuda.synchronize()
        save()

    return stage_and_save


TORCH = (
    variant("fastshard-archive", "torch_save: torch.save's file", _fastshard_archive, writes="torch"),
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
    Rival(
        "torch.save-d2h",
        "torch.save, use_pinned_memory_for_d2h, no CRC",
        _torch_save_d2h,
        writes="torch",
        slow=True,
        devices=(CUDA,),
    ),
    Rival(
        "torch.save-pinned",
        "copied to kept pinned memory, then torch.save without CRC",
        _torch_save_pinned,
        writes="torch",
        slow=True,
        devices=(CUDA,),
    ),
)
