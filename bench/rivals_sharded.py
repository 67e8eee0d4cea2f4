# SPDX-License-Identifier: Apache-2.0
"""Savers of what a server of models loads: sharded state, and checkpoints cut for tensor parallelism."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .builders import TP, TP_PLAN
from .job import CPU, SOURCES, Job, Rival, Shard, then_sync
from .rivals_fastshard import require, variant
from .samples import MIB, RETURN


def _fastshard_sharded(job: Job) -> Callable[[], None]:
    import fastshard

    require("save_sharded_state")
    save_sharded_state, most = fastshard.save_sharded_state, job.largest

    def save() -> None:
        tensors = job.merged() if job.dtype else {n: t for shard in job.shards for n, t in shard.items()}
        save_sharded_state(tensors, job.out, max_size=most, durable=job.durable)

    return save


def _vllm_sharded(job: Job) -> Callable[[], None]:
    """Does what vLLM 0.33's ``ShardedStateLoader.save_model`` does, but looks for no views."""
    from safetensors.torch import save_file

    most = job.largest

    def save() -> None:
        parts: list[Shard] = [{}]
        held = 0
        for name, tensor in job.merged().items():
            if held + tensor.nbytes > most:
                parts.append({})
                held = 0
            parts[-1][name] = tensor
            held += tensor.nbytes
        for i, part in enumerate(parts):
            save_file(part, job.out / f"model-rank-0-part-{i}.safetensors")

    return then_sync(job, save)


def source_of(job: Job) -> Path:
    """Returns a folder beside the output with the job's tensors in one file, in the page cache. The first
    call makes it."""
    from safetensors.torch import save_file

    folder = job.out.with_name(SOURCES) / str(job.nbytes)
    if not folder.exists():
        folder.mkdir(parents=True)
        save_file(job.merged(), folder / "model.safetensors")
    return folder


def _shard(job: Job) -> Callable[[], None]:
    import fastshard

    require("shard_checkpoint")
    shard_checkpoint, source = fastshard.shard_checkpoint, source_of(job)
    return lambda: shard_checkpoint(source, job.out, TP, plan=TP_PLAN)


def _copy_threads(job: Job) -> Callable[[], None]:
    """Copies the same bytes to as many files, a quarter of the source to each. The kernel does all of it."""
    source = source_of(job) / "model.safetensors"
    nbytes = source.stat().st_size
    cuts = [nbytes * rank // TP for rank in range(TP + 1)]

    def copy(rank: int) -> None:
        with open(source, "rb") as file, open(job.out / f"{rank}.part", "xb") as out:
            at = cuts[rank]
            while at < cuts[rank + 1]:
                count = min(16 * MIB, cuts[rank + 1] - at)
                at += os.copy_file_range(file.fileno(), out.fileno(), count, at)

    def copy_all() -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(copy, range(TP)))

    return copy_all


SHARDED_STATE = (
    variant("fastshard-sharded", "save_sharded_state", _fastshard_sharded, writes="sharded"),
    Rival(
        "vllm-sharded", "vLLM's save_sharded_state: one part after the other", _vllm_sharded, writes="sharded"
    ),
)

TENSOR_PARALLEL = (
    variant(
        "fastshard-shard",
        "shard_checkpoint of a file",
        _shard,
        writes="ranks",
        modes=(RETURN,),
        own=True,
        devices=(CPU,),
    ),
    Rival(
        "copy-threads",
        "the same file copied to four by two threads, copy_file_range",
        _copy_threads,
        writes="copy",
        modes=(RETURN,),
        own=True,
        devices=(CPU,),
    ),
)
