# SPDX-License-Identifier: Apache-2.0
"""What is saved, and by whom. A new case is one builder in ``builders`` and one entry in ``CASES``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .builders import (
    ADAMW_NBYTES,
    BF16,
    DECODER_NBYTES,
    HUB_NBYTES,
    LLAMA_NBYTES,
    QWEN_NBYTES,
    SMALL_COUNT,
    SMALL_NBYTES,
    adamw,
    blocks,
    columns,
    decoder,
    hub,
    llama,
    qwen,
    small,
    strided,
    training,
)
from .job import BASE, CPU, CUDA, KINDS, Shard
from .models import LIBRARIES
from .samples import DURABLE, GIB, RETURN, STALL, WRITTEN

DISK, SHM = "disk", "shm"
"""Places that a case saves to: ``--dir`` or ``--shm``."""
FULL_NBYTES = 4 * GIB
"""The size that the goals speak of, where a case has none of its own."""


@dataclass(frozen=True)
class Case:
    """One dict, or what a library makes of it, saved by several rivals."""

    name: str
    about: str
    build: Callable[[int, str], list[Shard]]
    """(bytes wanted, device) -> the tensors of each file."""
    rivals: tuple[str, ...]
    """The first one is ours: the one that the case is about."""
    base: str = BASE
    """Whom ratios are taken against, and who writes what all others must write."""
    needs: tuple[str, ...] = ()
    """Libraries that it cannot be run without."""
    natural_nbytes: int | None = None
    """The size it has by its nature; None: as large as ``--gib`` says. ``--gib`` caps it."""
    host_nbytes: int | None = None
    """The same for host tensors, where memory is scarcer."""
    dtype: torch.dtype | None = None
    """What the tensors are cast to on their way."""
    place: str = DISK
    modes: tuple[str, ...] = WRITTEN
    default_on: tuple[str, ...] = KINDS
    """Kinds of devices on which it is run without being asked for."""
    quick: bool = False
    """Whether ``--quick`` runs it without being asked."""
    bound: tuple[str, ...] = ()
    """Ceilings of the time to return, where it is not the writer."""
    copies: float = 1.0
    """Most bytes it has in ``place`` at once, in multiples of its size."""
    writer: str = "pwrite-1"
    """The ceiling of buffered writes: one writer, or one for each file."""
    memory: bool = False
    """Whether peak memory is measured too."""
    without: str = "no-save"
    """In the mode STALL, the row of the job that saves nothing."""
    disturbs: bool = False
    """Whether a job that runs beside the save is watched too."""

    @property
    def us(self) -> str:
        return self.rivals[0]

    def natural(self, kind: str) -> int | None:
        return self.host_nbytes or self.natural_nbytes if kind == CPU else self.natural_nbytes

    @property
    def measures(self) -> tuple[str, ...]:
        """Ceilings to run beside the rivals."""
        named = ["memcpy-1", "memcpy-n", *self.bound, self.writer, "direct", "link", "link-whole"]
        if DURABLE not in self.modes:
            named.remove("direct")
        if STALL in self.modes and self.without not in self.rivals:
            named.append(self.without)
        return tuple(dict.fromkeys(named))

    @property
    def bound_by(self) -> dict[str, tuple[str, ...]]:
        """For each mode the ceilings that bound it."""
        writer = (self.writer, "link") if self.place == SHM else (self.writer,)
        return {
            RETURN: self.bound or writer,
            DURABLE: (self.writer, "direct"),
            STALL: self.bound or writer,
        }


_ONE = ("fastshard", "safetensors")
_MANY = ("fastshard", "safetensors", "safetensors-threads")
_PINNED = ("torch.save-d2h", "torch.save-pinned")
_OTHERS = ("torch.save", "torch.save-nocrc", *_PINNED, "dcp-fs", "dcp-fs-nosync", "dcp-hf")

_ALL = (
    Case(
        "prepared",
        "64 MiB tensors in one file on tmpfs, prepared once and saved again and again",
        blocks,
        ("prepared", *_ONE),
        host_nbytes=2 * GIB,
        place=SHM,
        modes=(RETURN,),
        quick=True,
        bound=("memcpy-all", "memmove-all", "link", "link-whole"),
        copies=3.0,  # two generations stand while another one writes
        disturbs=True,
    ),
    Case(
        "prepared-cast",
        "the same from fp32 to bf16; the others call .to() first",
        lambda nbytes, device: blocks(nbytes, device, numbers=torch.float32),
        ("prepared", *_ONE),
        host_nbytes=2 * GIB,
        dtype=BF16,
        place=SHM,
        modes=(RETURN,),
        default_on=(CUDA,),
        bound=("memcpy-all", "link", "link-whole"),
        copies=1.5,
    ),
    Case(
        "prepared-small",
        "20,000 tensors of 16 KiB in one file on tmpfs, prepared once",
        small,
        ("prepared", *_ONE),
        natural_nbytes=SMALL_COUNT * SMALL_NBYTES,
        place=SHM,
        modes=(RETURN,),
        default_on=(CUDA,),
        bound=("memcpy-all", "link-whole"),
        copies=3.0,
    ),
    Case(
        "tmpfs-eight",
        "first save to tmpfs, eight files",
        lambda nbytes, device: blocks(nbytes, device, files=8),
        (*_MANY, "fastshard-registered", "fastshard-buffered"),
        host_nbytes=2 * GIB,
        place=SHM,
        modes=(RETURN,),
        writer="pwrite-n",
        memory=True,
        disturbs=True,
    ),
    Case(
        "eight-files",
        "64 MiB tensors in eight files",
        lambda nbytes, device: blocks(nbytes, device, files=8),
        (*_MANY, "fastshard-direct"),
        default_on=(CUDA,),
        writer="pwrite-n",
    ),
    Case(
        "one-file",
        "64 MiB bf16 tensors in one file",
        blocks,
        (*_ONE, "fastshard-direct", *_OTHERS),
        quick=True,
        memory=True,
        disturbs=True,
    ),
    Case(
        "columns",
        "column slices of eight ranks on tmpfs, a file each; the others call .contiguous() first",
        columns,
        ("fastshard", "fastshard-contiguous", "fastshard-noscratch", "safetensors"),
        natural_nbytes=4 * GIB,
        host_nbytes=GIB,
        place=SHM,
        modes=(RETURN,),
        writer="pwrite-n",
        memory=True,
    ),
    Case(
        "small",
        "20,000 tensors of 16 KiB, one file, the whole call",
        small,
        (*_ONE, "fastshard-noscratch"),
        natural_nbytes=SMALL_COUNT * SMALL_NBYTES,
        quick=True,
        memory=True,
    ),
    Case(
        "archive",
        "64 MiB tensors in one archive of torch.save",
        blocks,
        ("fastshard-archive", "torch.save", "safetensors"),
        quick=True,
    ),
    Case(
        "adamw",
        "the state of BERT-base's AdamW in an archive: 400 moments, 200 scalars of the host",
        adamw,
        ("fastshard-archive", "torch.save", "safetensors"),
        natural_nbytes=ADAMW_NBYTES,
    ),
    Case(
        "four-files",
        "the same bytes in four files",
        lambda nbytes, device: blocks(nbytes, device, files=4),
        _MANY,
        default_on=(CPU,),
        quick=True,
        writer="pwrite-n",
    ),
    Case(
        "sharded-state",
        "a rank's sharded state in four parts",
        lambda nbytes, device: blocks(nbytes, device, files=4),
        ("fastshard-sharded", "vllm-sharded", "safetensors"),
        default_on=(CPU,),
        writer="pwrite-n",
    ),
    Case(
        "qwen",
        "Qwen2-0.5B-shaped dict, one file",
        qwen,
        _ONE,
        natural_nbytes=QWEN_NBYTES,
        default_on=(CPU,),
        quick=True,
    ),
    Case(
        "qwen-4",
        "Qwen2-0.5B-shaped dict, four shards",
        lambda nbytes, device: qwen(nbytes, device, files=4),
        _MANY,
        natural_nbytes=QWEN_NBYTES,
        default_on=(CPU,),
        quick=True,
        writer="pwrite-n",
    ),
    Case(
        "strided",
        "a column half of each of 64 matrices; the others call .contiguous() first",
        strided,
        _ONE,
        natural_nbytes=GIB,
        default_on=(CPU,),
        quick=True,
        memory=True,
    ),
    Case(
        "hub",
        "huggingface_hub's save_torch_state_dict, 64 MiB tensors in shards of 1 GB",
        hub,
        ("fastshard-hub", "huggingface_hub"),
        base="huggingface_hub",
        needs=("huggingface_hub",),
        natural_nbytes=HUB_NBYTES,
        modes=(RETURN,),
        writer="pwrite-n",
    ),
    Case(
        "pretrained",
        "save_pretrained of a Llama in bf16, four shards",
        lambda nbytes, device: llama(nbytes, device, files=4),
        ("fastshard-pretrained", "transformers-pretrained"),
        base="transformers-pretrained",
        needs=LIBRARIES,
        natural_nbytes=LLAMA_NBYTES,
        modes=(RETURN,),
        writer="pwrite-n",
    ),
    Case(
        "pretrained-one",
        "the same in one file",
        llama,
        ("fastshard-pretrained", "transformers-pretrained"),
        base="transformers-pretrained",
        needs=LIBRARIES,
        natural_nbytes=LLAMA_NBYTES,
        modes=(RETURN,),
        default_on=(CPU,),
    ),
    Case(
        "trainer",
        "a checkpoint of a Trainer: a Llama in fp32 and its AdamW state, twice as large",
        training,
        ("fastshard-trainer", "transformers-trainer"),
        base="transformers-trainer",
        needs=LIBRARIES,
        natural_nbytes=2 * GIB,
        modes=(RETURN,),
        default_on=(CPU,),
        writer="pwrite-n",
    ),
    Case(
        "offloaded",
        "save_pretrained of a Llama in bf16 that lies on disk (device_map), one file",
        llama,
        ("fastshard-offloaded", "transformers-offloaded"),
        base="transformers-offloaded",
        needs=LIBRARIES,
        natural_nbytes=LLAMA_NBYTES,
        modes=(RETURN,),
        default_on=(CPU,),
        memory=True,
    ),
    Case(
        "tp-shard",
        "a checkpoint on disk cut into the parts of four ranks, against two threads that copy it",
        decoder,
        ("fastshard-shard", "copy-threads"),
        base="copy-threads",
        natural_nbytes=DECODER_NBYTES,
        modes=(RETURN,),
        default_on=(CPU,),
        memory=True,
    ),
    Case(
        "tmpfs-one",
        "first save to tmpfs, one file",
        blocks,
        (*_ONE, "fastshard-registered", "fastshard-buffered"),
        host_nbytes=2 * GIB,
        place=SHM,
    ),
    Case(
        "cast",
        "fp32 to bf16 on the way into one file on tmpfs; the others call .to() first",
        lambda nbytes, device: blocks(nbytes, device, numbers=torch.float32),
        _ONE,
        host_nbytes=2 * GIB,
        dtype=BF16,
        place=SHM,
        modes=(RETURN,),
    ),
    Case(
        "cast-fp8",
        "the same from bf16 to float8_e4m3fn",
        lambda nbytes, device: blocks(nbytes, device, numbers=BF16),
        _ONE,
        host_nbytes=2 * GIB,
        dtype=torch.float8_e4m3fn,
        place=SHM,
        modes=(RETURN,),
    ),
    Case(
        "async",
        "64 MiB bf16 tensors in one file, while a job goes on that changes them",
        blocks,
        ("async-copy", "fastshard", "async-fork", "async-none", "torch-save-thread", "dcp-async"),
        base="fastshard",
        modes=(STALL,),
        default_on=(CPU,),
        bound=("memcpy-n",),
        memory=True,
    ),
    Case(
        "async-kept",
        "the same against DCP with a stager that keeps its copies, which a fork would have to share, too",
        blocks,
        ("async-copy", "fastshard", "dcp-async-kept"),
        base="fastshard",
        modes=(STALL,),
        default_on=(CPU,),
        bound=("memcpy-n",),
    ),
    Case(
        "async-trainer",
        "a Trainer with AdamW that saves every 20 steps: a Llama in fp32 and its state, twice as large",
        training,
        ("training-async", "training-installed", "training-unpatched", "training-no-save"),
        base="training-unpatched",
        needs=LIBRARIES,
        natural_nbytes=GIB,
        modes=(STALL,),
        default_on=(CPU,),
        bound=("memcpy-n",),
        copies=3.0,  # two checkpoints stand while the next one is written
        writer="pwrite-n",
        without="training-no-save",
    ),
)
CASES: dict[str, Case] = {case.name: case for case in _ALL}
"""In the order of a run: where its time is short, the last ones are left out."""
