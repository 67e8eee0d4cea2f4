# SPDX-License-Identifier: Apache-2.0
"""Who saves, and loads, in all ranks of a group at once. ``prepare`` and the call run in each of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from .job import Job, Rival, Unavailable, fsync_tree
from .rank_job import RankJob, distributed_tensor, part_of
from .samples import RETURN, STALL

Call = Callable[[], Any]


def _rank(job: Job) -> RankJob:
    assert isinstance(job, RankJob)
    return job


def _dcp(make: Callable[[RankJob], Any]) -> Callable[[Job], Call]:
    """Prepares ``dcp.save`` with such a writer."""

    def prepare(job: Job) -> Call:
        from torch.distributed import checkpoint

        ours = _rank(job)
        make(ours)
        return lambda: checkpoint.save(ours.state, storage_writer=make(ours))

    return prepare


def _stock_file_system(job: RankJob) -> Any:
    from torch.distributed.checkpoint import FileSystemWriter

    return FileSystemWriter(job.out, sync_files=job.durable)


def _stock_hugging_face(job: RankJob) -> Any:
    from torch.distributed import checkpoint

    if not hasattr(checkpoint, "HuggingFaceStorageWriter"):
        raise Unavailable("this torch has no HuggingFaceStorageWriter")
    writer = checkpoint.HuggingFaceStorageWriter(str(job.out), save_distributed=True)
    writer.sync_files = job.durable  # always on, if nobody says so
    return writer


def _fastshard(job: RankJob) -> Any:
    from fastshard.dcp import FastshardWriter

    return FastshardWriter(job.out, durable=job.durable)


def _fastshard_file_system(job: RankJob) -> Any:
    from fastshard.dcp import FastshardFileSystemWriter

    return FastshardFileSystemWriter(job.out, sync_files=job.durable)


def _save_distributed(job: Job) -> Call:
    import fastshard

    ours = _rank(job)
    return lambda: fastshard.save_distributed(
        ours.state, ours.out, max_shard_size=ours.most, durable=ours.durable
    )


def _one_process(job: Job) -> Call:
    """The first rank, which has the whole model, saves it, and the others are idle."""
    import fastshard

    ours = _rank(job)

    def save() -> None:
        if ours.rank == 0:
            fastshard.save_torch_state_dict(
                ours.whole, ours.out, max_shard_size=ours.most, durable=ours.durable
            )

    return save


def _gather(job: Job) -> Call:
    """What a full state dict is saved with today: each tensor is gathered, the first rank keeps it, and then
    huggingface_hub cuts them into shards and calls ``safetensors.torch.save_file`` for each."""
    from huggingface_hub import save_torch_state_dict

    ours = _rank(job)

    def save() -> None:
        gathered: dict[str, torch.Tensor] = {}
        for name, tensor in ours.state.items():
            full = tensor.full_tensor()
            if ours.rank == 0:
                gathered[name] = full
        if ours.rank == 0:
            save_torch_state_dict(gathered, ours.out, max_shard_size=ours.most)
            if ours.durable:
                fsync_tree(ours.out)

    return save


class _Load:
    """A call that fills tensors, and what they must then hold."""

    def __init__(self, job: RankJob, dim: int) -> None:
        self.source = job.sources / "whole"
        if job.rank == 0 and not self.source.exists():
            import fastshard

            self.source.mkdir(parents=True)
            fastshard.save_torch_state_dict(job.whole, self.source, max_shard_size=job.most)
        distributed.barrier()
        mesh = distributed.device_mesh.init_device_mesh("cpu", (job.size,))
        self.parts: dict[str, tuple[slice, ...]] = {}
        self.local: dict[str, torch.Tensor] = {}
        self.state: dict[str, Any] = {}
        self.wanted = {name: tensor for name, tensor in job.whole.items() if tensor.ndim > dim}
        for name, tensor in self.wanted.items():
            first, number = part_of(tuple(tensor.shape), dim, job.rank, job.size)
            part = (slice(None),) * dim + (slice(first, first + number),)
            self.parts[name] = part
            self.local[name] = torch.empty_like(tensor[part], memory_format=torch.contiguous_format).fill_(0)
            self.state[name] = distributed_tensor(self.local[name], mesh, dim, tensor.shape)

    def wrong(self) -> str | None:
        """Says which tensor is not what it should be. Zeros it then, so that the next call has to fill it."""
        for name, local in self.local.items():
            wanted = self.wanted[name][self.parts[name]].contiguous()
            if not torch.equal(local.view(torch.int16), wanted.view(torch.int16)):
                return f"tensor {name!r} came back different"
        for local in self.local.values():
            local.fill_(0)
        return None


class _LoadDistributed(_Load):
    def __call__(self) -> None:
        import fastshard

        self.loaded = fastshard.load_distributed(self.state, self.source, strict=False)

    def detail(self) -> dict[str, Any]:
        """How many bytes this rank has read for each that it wanted."""
        return {"read_ratio": self.loaded.read_nbytes / max(1, self.loaded.nbytes)}


class _GetSlice(_Load):
    """What is written by hand: ``param.copy_(file.get_slice(name)[part])``."""

    def __call__(self) -> None:
        from safetensors import safe_open

        for path in sorted(self.source.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in self.parts.keys() & set(file.keys()):
                    self.local[name].copy_(file.get_slice(name)[self.parts[name]])


def _loading(kind: type[_Load], dim: int) -> Callable[[Job], Call]:
    def prepare(job: Job) -> Call:
        import fastshard

        if kind is _LoadDistributed and not hasattr(fastshard, "load_distributed"):
            raise Unavailable("this fastshard has no load_distributed")
        return kind(_rank(job), dim)  # type: ignore[return-value]

    return prepare


class _Async:
    """``dcp.async_save`` in a thread, and what has to be closed after its last time."""

    def __init__(self, job: RankJob, stager: Any, writer: Callable[[RankJob], Any] | None) -> None:
        self.job, self.stager, self.writer = job, stager, writer

    def __call__(self) -> Any:
        from torch.distributed import checkpoint

        keywords: dict[str, Any] = {"async_stager": self.stager} if self.stager is not None else {}
        if (
            self.writer is None
        ):  # a writer of torch's would be its own stager: the default is asked for by a path
            keywords["checkpoint_id"] = self.job.out
        else:
            keywords["storage_writer"] = self.writer(self.job)
        response: Any = checkpoint.async_save(self.job.state, **keywords)
        if not hasattr(response, "staging_completion"):
            return response
        response.staging_completion.result()
        return response.upload_completion

    def close(self) -> None:
        if self.stager is not None:
            self.stager.close()


def _async_stock(kept: bool) -> Callable[[Job], Call]:
    def prepare(job: Job) -> Call:
        from torch.distributed.checkpoint import staging

        if not hasattr(staging, "DefaultStager"):
            raise Unavailable("this torch has no DefaultStager")
        stager = staging.DefaultStager(staging.StagingOptions(False, False, True, False)) if kept else None
        return _Async(_rank(job), stager, None)

    return prepare


def _async_fastshard(job: Job) -> Call:
    from fastshard import dcp

    if not hasattr(dcp, "FastshardStager"):
        raise Unavailable("this fastshard has no FastshardStager")
    from fastshard import Options

    ours = _rank(job)
    # As much memory as there is to copy, as a job with such a model would allow.
    budget = Options(snapshot_budget=ours.nbytes + (64 << 20))
    return _Async(ours, dcp.FastshardStager(engine=budget), _fastshard)


def _dcp_source(job: RankJob) -> Path:
    """A ``.distcp`` folder that torch's own writer has written."""
    from torch.distributed import checkpoint

    source = job.sources / "distcp"
    if not (source / ".metadata").exists():
        distributed.barrier()
        checkpoint.save(job.state, storage_writer=checkpoint.FileSystemWriter(source, sync_files=False))
    distributed.barrier()
    return source


def _convert(job: Job) -> Call:
    try:
        from fastshard.tools.dcp_folders import convert_dcp
    except ImportError:
        raise Unavailable("this fastshard does not convert such folders") from None
    ours = _rank(job)
    source = _dcp_source(ours)

    def convert() -> None:
        if ours.rank == 0:
            convert_dcp(source, ours.out / "model.safetensors", durable=ours.durable)

    return convert


def _dcp_to_torch_save(job: Job) -> Call:
    from safetensors.torch import save_file
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    ours = _rank(job)
    source = _dcp_source(ours)

    def convert() -> None:
        if ours.rank == 0:
            between = ours.out / "model.pt"
            dcp_to_torch_save(source, between)
            tensors = torch.load(between, mmap=True, weights_only=True)
            save_file(tensors, ours.out / "model.safetensors", metadata={"format": "pt"})
            between.unlink()

    return convert


logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)

_ALL = (
    Rival("fastshard-writer", "dcp.save with FastshardWriter", _dcp(_fastshard), writes="dcp-hf"),
    Rival(
        "fastshard-distcp",
        "dcp.save with FastshardFileSystemWriter",
        _dcp(_fastshard_file_system),
        writes="dcp",
    ),
    Rival("stock-distcp", "dcp.save with FileSystemWriter", _dcp(_stock_file_system), "dcp", slow=True),
    Rival(
        "stock-hf",
        "dcp.save with HuggingFaceStorageWriter(save_distributed=True)",
        _dcp(_stock_hugging_face),
        writes="dcp-hf",
        slow=True,
        footprint=3.0,
    ),
    Rival("save_distributed", "fastshard.save_distributed: slices into the final files", _save_distributed),
    Rival("one-process", "the same files by fastshard in the first rank, which has all", _one_process),
    Rival(
        "gather",
        "full_tensor() of each, kept by the first rank, then huggingface_hub (save_file)",
        _gather,
        slow=True,
        footprint=2.0,
    ),
    *(
        Rival(f"{name}-{kind}", f"{about}, {kind}", _loading(call, dim), "loaded", (RETURN,), footprint=0.0)
        for name, about, call in (
            ("load_distributed", "fastshard.load_distributed", _LoadDistributed),
            ("get_slice", "safe_open().get_slice on each rank", _GetSlice),
        )
        for dim, kind in enumerate(("rows", "columns"))
    ),
    Rival("convert", "fastshard convert, one process", _convert, modes=(RETURN,)),
    Rival(
        "dcp_to_torch_save",
        "dcp_to_torch_save, then save_file, one process",
        _dcp_to_torch_save,
        modes=(RETURN,),
        slow=True,
        footprint=3.0,
    ),
    Rival(
        "fastshard-stager",
        "dcp.async_save, thread, FastshardStager and FastshardWriter",
        _async_fastshard,
        writes="dcp-hf",
        modes=(STALL,),
        footprint=1.0,
    ),
    Rival(
        "default-stager",
        "dcp.async_save, thread, its default stager and writer",
        _async_stock(kept=False),
        writes="dcp",
        modes=(STALL,),
        footprint=2.0,
        slow=True,
    ),
    Rival(
        "default-stager-kept",
        "the same with a stager that is kept; until staging_completion",
        _async_stock(kept=True),
        writes="dcp",
        modes=(STALL,),
        slow=True,
    ),
)
RANK_RIVALS: dict[str, Rival] = {rival.name: rival for rival in _ALL}
