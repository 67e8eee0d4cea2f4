# SPDX-License-Identifier: Apache-2.0
"""What is saved, by whom, and the goals. A new case is one builder and one entry in ``CASES``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from .rivals import Shard
from .samples import DURABLE, GIB, MIB, RETURN

BF16 = torch.bfloat16


class Filler:
    """Random bits at the speed of memory: one random block, with another salt for each tensor.

    Zeros would flatter anything that compresses or skips holes, and tensors that are alike would hide
    two that were swapped.
    """

    def __init__(self, device: str, seed: int = 0) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self._block = torch.randint(
            -(1 << 15), 1 << 15, (8 * MIB,), dtype=torch.int16, device=device, generator=generator
        )
        self._salt = 0
        self.device = device

    def __call__(self, *shape: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=BF16, device=self.device)
        cuts = list(range(self._block.numel(), tensor.numel(), self._block.numel()))
        for part in tensor.view(torch.int16).view(-1).tensor_split(cuts):
            self._salt = (self._salt + 40503) & 0x7FFF
            torch.bitwise_xor(self._block[: part.numel()], self._salt, out=part)
        return tensor


def blocks(nbytes: int, device: str, files: int = 1) -> list[Shard]:
    """Tensors of about 64 MiB, spread over ``files`` files."""
    fill = Filler(device)
    per_file = max(4, round(nbytes / files / (64 * MIB)))
    numel = nbytes // files // per_file // 2
    cols = 8192 if numel >= MIB else 64
    return [
        {f"layers.{f * per_file + i}.weight": fill(max(1, numel // cols), cols) for i in range(per_file)}
        for f in range(files)
    ]


def qwen_shapes(shrink: float = 1.0) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Names and shapes of Qwen2-0.5B (tied embeddings: no lm_head), each width divided by ``shrink``."""

    def width(size: int) -> int:
        return max(1, round(size / shrink))

    hidden, inner, kv, vocab = width(896), width(4864), width(2 * 64), width(151936)
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(24):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        for name, size in (("k", kv), ("q", hidden), ("v", kv)):
            yield f"{layer}.self_attn.{name}_proj.bias", (size,)
            yield f"{layer}.self_attn.{name}_proj.weight", (size, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
    yield "model.norm.weight", (hidden,)


QWEN_NBYTES = 2 * sum(math.prod(shape) for _, shape in qwen_shapes())


def qwen(nbytes: int, device: str, files: int = 1) -> list[Shard]:
    """A Qwen2-0.5B-shaped dict, in order, cut into ``files`` shards of about equal bytes."""
    fill = Filler(device)
    shards: list[Shard] = [{} for _ in range(files)]
    shapes = list(qwen_shapes(max(1.0, math.sqrt(QWEN_NBYTES / nbytes))))
    total = sum(math.prod(shape) for _, shape in shapes)
    done = 0
    for name, shape in shapes:
        shards[min(files - 1, done * files // total)][name] = fill(*shape)
        done += math.prod(shape)
    return [shard for shard in shards if shard]


SMALL_COUNT = 20_000
SMALL_NBYTES = 16 * 1024


def small(nbytes: int, device: str) -> list[Shard]:
    """Tensors of 16 KiB: what is paid for each tensor, rather than for each byte."""
    fill = Filler(device)
    return [{f"experts.{i}.scale": fill(SMALL_NBYTES // 128, 64) for i in range(nbytes // SMALL_NBYTES)}]


STRIDED_COUNT = 64


def strided(nbytes: int, device: str) -> list[Shard]:
    """The right half of the columns of each of 64 matrices, as tensor parallelism cuts a weight."""
    fill = Filler(device)
    rows = max(1, math.isqrt(nbytes // STRIDED_COUNT // 4))
    return [{f"layers.{i}.weight": fill(rows, 4 * rows)[:, 2 * rows :] for i in range(STRIDED_COUNT)}]


@dataclass(frozen=True)
class Case:
    """One dict, saved by several rivals."""

    name: str
    about: str
    build: Callable[[int, str], list[Shard]]
    """(bytes wanted, device) -> the tensors of each file."""
    rivals: tuple[str, ...]
    natural_nbytes: int | None = None
    """The size it has by its nature; None: as large as ``--gib`` says. ``--gib`` caps it."""
    writer: str = "pwrite-1"
    """The ceiling of buffered writes: one writer, or one for each file."""
    memory: bool = False
    """Whether peak memory is measured too."""

    @property
    def measures(self) -> tuple[str, ...]:
        """Ceilings to run beside the rivals."""
        return ("memcpy-1", "memcpy-n", self.writer, "direct")

    @property
    def bound_by(self) -> dict[str, tuple[str, ...]]:
        """For each mode the ceilings that bound it."""
        return {RETURN: (self.writer,), DURABLE: (self.writer, "direct")}


_ONE = ("fastshard", "safetensors")
_MANY = ("fastshard", "safetensors", "safetensors-threads")
_OTHERS = ("torch.save", "torch.save-nocrc", "dcp-fs", "dcp-fs-nosync", "dcp-hf")

_ALL = (
    Case("one-file", "64 MiB bf16 tensors in one file", blocks, _ONE + _OTHERS, memory=True),
    Case(
        "four-files",
        "the same bytes in four files",
        lambda nbytes, device: blocks(nbytes, device, files=4),
        _MANY,
        writer="pwrite-n",
    ),
    Case("qwen", "Qwen2-0.5B-shaped dict, one file", qwen, _ONE, natural_nbytes=QWEN_NBYTES),
    Case(
        "qwen-4",
        "Qwen2-0.5B-shaped dict, four shards",
        lambda nbytes, device: qwen(nbytes, device, files=4),
        _MANY,
        natural_nbytes=QWEN_NBYTES,
        writer="pwrite-n",
    ),
    Case(
        "small",
        "20,000 tensors of 16 KiB, one file, the whole call",
        small,
        _ONE,
        natural_nbytes=SMALL_COUNT * SMALL_NBYTES,
        memory=True,
    ),
    Case(
        "strided",
        "a column half of each of 64 matrices; the others call .contiguous() first",
        strided,
        _ONE,
        natural_nbytes=GIB,
        memory=True,
    ),
)
CASES: dict[str, Case] = {case.name: case for case in _ALL}


MEMORY = "memory"


@dataclass(frozen=True)
class Goal:
    """What fastshard must show in a case."""

    case: str
    limit: float
    """Times as fast as ``against``, at least; or the extra MiB of memory to stay within."""
    mode: str = RETURN
    against: str = "safetensors"
    """A rival, a ceiling, or MEMORY."""


GOALS = (
    Goal("four-files", 1.7),
    Goal("four-files", 0.97, against="safetensors-threads"),  # level: equals differ by 3 %
    Goal("four-files", 1.4, mode=DURABLE),
    Goal("one-file", 1.03),
    Goal("one-file", 0.95, against="pwrite-1"),
    Goal("one-file", 1.4, mode=DURABLE),
    Goal("small", 4.0),
    Goal("strided", 1.5),
    Goal("strided", 64, against=MEMORY),
    Goal("one-file", 3.0, against="torch.save"),
    Goal("one-file", 4.0, against="dcp-fs"),
    Goal("one-file", 8.0, against="dcp-hf"),
    Goal("one-file", 64, against=MEMORY),
    Goal("small", 64, against=MEMORY),
)
