# SPDX-License-Identifier: Apache-2.0
"""Those who save: fastshard and what people use today, all behind the same two steps.

``prepare(job)`` imports and builds what is not to be timed and returns the call that is; it runs once
for each case and mode, the call once in each round. A new rival is one function and one entry below.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import models
from .samples import DURABLE, MIB, MODES, RETURN

KINDS = ("cpu", "cuda")
"""Kinds of devices that tensors can be on."""

TP = 4
"""Ranks of tensor parallelism."""
TP_PLAN = {
    "model.embed_tokens": "embedding_rowwise",
    "lm_head": "colwise",
    **{f"model.layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
    **{f"model.layers.*.mlp.{name}_proj": "colwise" for name in ("gate", "up")},
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}

Shard = dict[str, torch.Tensor]
"""The tensors of one file. Names are unique over all the shards of a case."""


class Unavailable(Exception):
    """What was to be measured does not exist in this version; nothing went wrong."""


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
        """Bytes of the largest shard: ``max_shard_size`` for a library to make these shards of the tensors."""
        return max(map(self.nbytes_of_shard, self.shards))

    @property
    def strided(self) -> bool:
        return any(not t.is_contiguous() for shard in self.shards for t in shard.values())

    def nbytes_of(self, tensor: torch.Tensor) -> int:
        return tensor.numel() * (self.dtype or tensor.dtype).itemsize

    def nbytes_of_shard(self, shard: Shard) -> int:
        return sum(map(self.nbytes_of, shard.values()))

    def contiguous(self) -> list[Shard]:
        """What a saver that refuses strided tensors and casts nothing must be given; no copy where none
        is needed."""
        return [
            {name: t.to(self.dtype or t.dtype).contiguous() for name, t in s.items()} for s in self.shards
        ]

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


def _accepts(function: Callable[..., Any], **keywords: Any) -> dict[str, Any]:
    """The keywords, if this fastshard has them all."""
    missing = keywords.keys() - inspect.signature(function).parameters.keys()
    if missing:
        raise Unavailable(f"this fastshard has no {', '.join(sorted(missing))}=")
    return keywords


def _fastshard(job: Job, **keywords: Any) -> Callable[[], None]:
    import fastshard

    if job.dtype is not None:
        keywords["dtype"] = job.dtype
    keywords = _accepts(fastshard.save_file, durable=job.durable, allow_strided=job.strided, **keywords)
    save_file, save_files = fastshard.save_file, fastshard.save_files
    if len(job.shards) == 1:
        (path,), (tensors,) = job.paths, job.shards
        return lambda: save_file(tensors, path, **keywords)
    files: dict[str | os.PathLike[str], Shard] = dict(zip(job.paths, job.shards))
    return lambda: save_files(files, **keywords)


def _fastshard_with(**options: Any) -> Prepare:
    """The same through an engine of its own options."""

    def prepare(job: Job) -> Callable[[], None]:
        import fastshard
        from fastshard.engine.engine import engine_for

        chosen = fastshard.Options(**_accepts(fastshard.Options, **options))
        try:
            engine = engine_for(chosen)
        except ValueError as error:  # no such write path
            raise Unavailable(str(error)) from None
        return _fastshard(job, engine=engine)

    return prepare


def _fastshard_contiguous(job: Job) -> Callable[[], None]:
    """The same bytes from tensors that need no packing: what packing costs is the difference."""
    return _fastshard(replace(job, shards=job.contiguous(), dtype=None))


class _Standing:
    """A prepared save, called once in each round."""

    def __init__(self, job: Job) -> None:
        import fastshard

        if not hasattr(fastshard, "prepare"):
            raise Unavailable("this fastshard has no prepare")
        (path,), (tensors,) = job.paths, job.shards
        cast = {} if job.dtype is None else {"dtype": job.dtype}
        keywords = _accepts(fastshard.prepare, allow_strided=job.strided, **cast)
        self._prepared = fastshard.prepare(tensors, path, **keywords)

    def __call__(self) -> None:
        self._prepared.save()

    def close(self) -> None:
        self._prepared.close()


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


def _fastshard_archive(job: Job) -> Callable[[], None]:
    import fastshard

    if not hasattr(fastshard, "torch_save"):
        raise Unavailable("this fastshard has no torch_save")
    torch_save = fastshard.torch_save

    def save() -> None:
        for path, tensors in zip(job.paths, job.contiguous()):
            torch_save(tensors, path.with_suffix(".pt"), durable=job.durable)

    return save


def _configured(save: Callable[[], None], **switches: bool) -> Callable[[], None]:
    """The call with other settings of torch.save, which is put back as it was."""
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
    """The best one can do by hand: page-locked copies that are kept, so that locking is paid once."""
    staged = [{name: _staging(t) for name, t in shard.items()} for shard in job.contiguous()]
    save = _torch_save_nocrc(replace(job, shards=staged, dtype=None))

    def stage_and_save() -> None:
        for shard, copies in zip(job.contiguous(), staged):
            for name, tensor in shard.items():
                copies[name].copy_(tensor, non_blocking=True)
        torch.cuda.synchronize()
        save()

    return stage_and_save


def _checkpoint(job: Job, make_writer: Callable[[], Any]) -> Callable[[], None]:
    """torch.distributed.checkpoint in one process; without a process group it needs no telling."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    make_writer()

    def save() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "torch.distributed is uninitialized": as intended
            try:
                checkpoint.save(job.merged(), storage_writer=make_writer())
            except CheckpointException as error:  # a BaseException, which nobody expects
                raise RuntimeError(f"DCP failed: {list(error.failures.values())}") from None

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


def _fastshard_sharded(job: Job) -> Callable[[], None]:
    import fastshard

    if not hasattr(fastshard, "save_sharded_state"):
        raise Unavailable("this fastshard has no save_sharded_state")
    save_sharded_state, most = fastshard.save_sharded_state, _largest(job)

    def save() -> None:
        tensors = job.merged() if job.dtype else {n: t for shard in job.shards for n, t in shard.items()}
        save_sharded_state(tensors, job.out, max_size=most, durable=job.durable)

    return save


def _largest(job: Job) -> int:
    return max(sum(job.nbytes_of(t) for t in shard.values()) for shard in job.shards)


def _vllm_sharded(job: Job) -> Callable[[], None]:
    """What vLLM 0.33's ``ShardedStateLoader.save_model`` does, without the views of others that it looks for."""
    from safetensors.torch import save_file

    most = _largest(job)

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

    return _then_sync(job, save)


def _fastshard_uncached(job: Job) -> Callable[[], None]:
    return _fastshard(job, keep_cached=False)


def _huggingface_hub(job: Job) -> Callable[[], None]:
    from huggingface_hub import save_torch_state_dict

    tensors = job.merged()
    return lambda: save_torch_state_dict(dict(tensors), job.out, max_shard_size=job.largest)


def _fastshard_hub(job: Job) -> Callable[[], None]:
    import fastshard

    if not hasattr(fastshard, "save_torch_state_dict"):
        raise Unavailable("this fastshard has no save_torch_state_dict")
    save_torch_state_dict, tensors = fastshard.save_torch_state_dict, job.merged()
    return lambda: save_torch_state_dict(dict(tensors), job.out, max_shard_size=job.largest)


def _pretrained(job: Job) -> Callable[[], None]:
    with models.quiet():
        model = models.llama(job.merged())
    return lambda: model.save_pretrained(job.out, max_shard_size=job.largest)


def _trainer(job: Job) -> Callable[[], None]:
    weights, moments = job.shards
    with models.quiet():
        trainer = models.trainer(weights, moments, job.out)
    # What training calls when a checkpoint is due.
    return lambda: trainer._save_checkpoint(trainer.model_wrapped, trial=None)


def _offloaded(job: Job) -> Callable[[], None]:
    with models.quiet():
        model = models.on_disk(job.merged(), job.out.with_name(OFFLOADED) / str(job.nbytes))
    return lambda: model.save_pretrained(job.out)


def source_of(job: Job) -> Path:
    """A folder beside the output with the job's tensors in a file, in the page cache; made when first asked for."""
    from safetensors.torch import save_file

    folder = job.out.with_name(SOURCES) / str(job.nbytes)
    if not folder.exists():
        folder.mkdir(parents=True)
        save_file(job.merged(), folder / "model.safetensors")
    return folder


def _shard(job: Job) -> Callable[[], None]:
    import fastshard

    if not hasattr(fastshard, "shard_checkpoint"):
        raise Unavailable("this fastshard has no shard_checkpoint")
    shard_checkpoint, source = fastshard.shard_checkpoint, source_of(job)
    return lambda: shard_checkpoint(source, job.out, TP, plan=TP_PLAN)


def _copy_threads(job: Job) -> Callable[[], None]:
    """The same bytes to as many files, a quarter of the source to each: nothing but the kernel's own copying."""
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


@contextlib.contextmanager
def _installed() -> Iterator[None]:
    import fastshard

    with models.quiet(), fastshard.installed():
        yield


def _with_fastshard(prepare: Prepare) -> Prepare:
    """The same call, with fastshard in the place of what it calls."""

    def prepare_if_possible(job: Job) -> Callable[[], None]:
        import fastshard

        if not hasattr(fastshard, "installed"):
            raise Unavailable("this fastshard has no installed()")
        return prepare(job)

    return prepare_if_possible


def _transformers(name: str, call: str, prepare: Prepare, **fields: Any) -> tuple[Rival, Rival]:
    """A call of transformers' as it comes, and inside ``fastshard.installed()``."""
    fields |= {"modes": (RETURN,), "own": True}
    return (
        Rival(
            f"fastshard-{name}",
            f"{call}, inside fastshard.installed()",
            _with_fastshard(prepare),
            within=_installed,
            detail=_fastshard_detail,
            **fields,
        ),
        Rival(f"transformers-{name}", f"{call}, as it comes", prepare, within=models.quiet, **fields),
    )


def _variant(name: str, about: str, prepare: Prepare, **fields: Any) -> Rival:
    return Rival(name, f"fastshard, {about}", prepare, detail=_fastshard_detail, **fields)


_ALL = (
    Rival("fastshard", "fastshard.save_file / save_files", _fastshard, detail=_fastshard_detail),
    Rival(
        "prepared",
        "fastshard.prepare: prepared once, saved each round",
        _Standing,
        modes=(RETURN,),
        one_file_only=True,
        stands=True,
        footprint=0.0,
        detail=_fastshard_detail,
    ),
    _variant("fastshard-buffered", 'write_path="buffered"', _fastshard_with(write_path="buffered")),
    _variant("fastshard-mapped", 'write_path="mapped"', _fastshard_with(write_path="mapped")),
    _variant(
        "fastshard-registered",
        'write_path="registered": the device writes the pages of the file',
        _fastshard_with(write_path="registered"),
        devices=("cuda",),
    ),
    _variant(
        "fastshard-direct", 'write_path="direct"', _fastshard_with(write_path="direct"), modes=(DURABLE,)
    ),
    _variant("fastshard-uncached", "keep_cached=False", _fastshard_uncached, modes=(DURABLE,)),
    _variant(
        "fastshard-noscratch",
        "device_scratch=0: kernels store over the link",
        _fastshard_with(device_scratch=0),
        devices=("cuda",),
    ),
    _variant("fastshard-contiguous", "the same bytes, contiguous before", _fastshard_contiguous),
    _variant("fastshard-sharded", "save_sharded_state", _fastshard_sharded, writes="sharded"),
    Rival(
        "vllm-sharded", "vLLM's save_sharded_state: one part after the other", _vllm_sharded, writes="sharded"
    ),
    _variant("fastshard-archive", "torch_save: torch.save's file", _fastshard_archive, writes="torch"),
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
        devices=("cuda",),
    ),
    Rival(
        "torch.save-pinned",
        "copied to kept pinned memory, then torch.save without CRC",
        _torch_save_pinned,
        writes="torch",
        slow=True,
        devices=("cuda",),
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
    _variant("fastshard-hub", "save_torch_state_dict", _fastshard_hub, modes=(RETURN,), own=True),
    Rival(
        "huggingface_hub",
        "huggingface_hub.save_torch_state_dict",
        _huggingface_hub,
        modes=(RETURN,),
        own=True,
    ),
    _variant(
        "fastshard-shard",
        "shard_checkpoint of a file",
        _shard,
        writes="ranks",
        modes=(RETURN,),
        own=True,
        devices=("cpu",),
    ),
    Rival(
        "copy-threads",
        "the same file copied to four by two threads, copy_file_range",
        _copy_threads,
        writes="copy",
        modes=(RETURN,),
        own=True,
        devices=("cpu",),
    ),
    *_transformers("pretrained", "PreTrainedModel.save_pretrained", _pretrained),
    *_transformers("trainer", "a checkpoint of a Trainer", _trainer),
    *_transformers(
        "offloaded",
        "save_pretrained of a model on disk",
        _offloaded,
        devices=("cpu",),
        footprint=2.0,  # the model in memory, once
    ),
)
RIVALS: dict[str, Rival] = {rival.name: rival for rival in _ALL}
US = "fastshard"
BASE = "safetensors"
"""Whom ratios are taken against, unless a case has a base of its own."""
SOURCES = "sources"
"""Directory beside the output where checkpoints lie that are read, until their case has ended."""
OFFLOADED = "offloaded"
"""Directory beside the output where models lie that are on disk, until their case has ended."""
