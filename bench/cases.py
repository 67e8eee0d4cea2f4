# SPDX-License-Identifier: Apache-2.0
"""What is saved, by whom, and the goals. A new case is one builder and one entry in ``CASES``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from .models import LIBRARIES, llama_shapes
from .rivals import BASE, KINDS, TP, Shard
from .samples import DURABLE, GIB, MIB, MODES, RETURN

BF16 = torch.bfloat16
CPU, CUDA = KINDS
DISK, SHM = "disk", "shm"
"""Where a case saves to: ``--dir`` or ``--shm``."""
FULL_NBYTES = {CPU: 4 * GIB, CUDA: 8 * GIB}
"""What the goals speak of where a case has no size of its own."""


BLOCK_NUMEL = 8 * MIB


class Filler:
    """Random bits at the speed of memory: one random block, with another salt for each tensor.

    Zeros would flatter anything that compresses or skips holes, and tensors that are alike would hide
    two that were swapped.
    """

    def __init__(self, device: str, nbytes: int, seed: int = 0) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        size = (min(BLOCK_NUMEL, nbytes // 2),)
        self._block = torch.randint(
            -(1 << 15), 1 << 15, size, dtype=torch.int16, device=device, generator=generator
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


class NumberFiller:
    """Numbers as weights have them, for what is cast: random bits hold NaNs and infinities."""

    def __init__(self, device: str, nbytes: int, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        numel = min(BLOCK_NUMEL, nbytes // dtype.itemsize)
        self._block = torch.randn(numel, dtype=torch.float32, device=device, generator=generator).to(dtype)
        self._turn = 0
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        cuts = list(range(self._block.numel(), tensor.numel(), self._block.numel()))
        for part in tensor.view(-1).tensor_split(cuts):
            self._turn = (self._turn + 53) % 128
            torch.mul(self._block[: part.numel()], 0.5 + self._turn / 128, out=part)
        return tensor


def blocks(nbytes: int, device: str, files: int = 1, numbers: torch.dtype | None = None) -> list[Shard]:
    """Tensors of about 64 MiB, spread over ``files`` files: random bits, or ``numbers`` of that type."""
    fill = NumberFiller(device, nbytes, numbers) if numbers else Filler(device, nbytes)
    per_file = max(4, round(nbytes / files / (64 * MIB)))
    numel = nbytes // files // per_file // (numbers or BF16).itemsize
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
    fill = Filler(device, nbytes)
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
    fill = Filler(device, nbytes)
    return [{f"experts.{i}.scale": fill(SMALL_NBYTES // 128, 64) for i in range(nbytes // SMALL_NBYTES)}]


def bert_shapes(shrink: float = 1.0) -> Iterable[tuple[int, ...]]:
    """Shapes of BERT-base's parameters (109 million), each width divided by ``shrink``."""

    def width(size: int) -> int:
        return max(1, round(size / shrink))

    hidden, inner = width(768), width(3072)
    yield from ((width(30522), hidden), (width(512), hidden), (2, hidden), (hidden,), (hidden,))
    for _ in range(12):
        for _ in range(4):  # query, key, value, output
            yield from ((hidden, hidden), (hidden,))
        yield from ((inner, hidden), (inner,), (hidden, inner), (hidden,))
        yield from ((hidden,),) * 4  # two norms
    yield from ((hidden, hidden), (hidden,))


ADAMW_NBYTES = sum(8 * math.prod(shape) + 4 for shape in bert_shapes())


def adamw(nbytes: int, device: str) -> list[Shard]:
    """What AdamW keeps of BERT-base: two float32 moments and a step, a scalar of the host, for each parameter."""
    fill = Filler(device, nbytes)
    state: Shard = {}
    for i, shape in enumerate(bert_shapes(max(1.0, math.sqrt(ADAMW_NBYTES / nbytes)))):
        state[f"state.{i}.step"] = torch.tensor(float(i), device="cpu")
        for name in ("exp_avg", "exp_avg_sq"):
            state[f"state.{i}.{name}"] = fill(*shape[:-1], 2 * shape[-1]).view(torch.float32)
    return [state]


STRIDED_COUNT = 64


def strided(nbytes: int, device: str) -> list[Shard]:
    """The right half of the columns of each of 64 matrices, as tensor parallelism cuts a weight."""
    fill = Filler(device, nbytes)
    rows = max(1, math.isqrt(nbytes // STRIDED_COUNT // 4))
    return [{f"layers.{i}.weight": fill(rows, 4 * rows)[:, 2 * rows :] for i in range(STRIDED_COUNT)}]


RANKS = 8


def columns(nbytes: int, device: str) -> list[Shard]:
    """Each matrix cut by columns into eight, a slice for each file: what eight ranks of tensor parallelism
    save. Rows of a slice are 2 KiB."""
    fill = Filler(device, nbytes)
    count = max(4, round(nbytes / (64 * MIB)))
    numel = nbytes // count // 2
    width = 1024 if numel >= MIB else 8
    matrices = [fill(max(1, numel // (RANKS * width)), RANKS * width) for _ in range(count)]
    return [
        {f"layers.{i}.weight.{r}": m[:, r * width : (r + 1) * width] for i, m in enumerate(matrices)}
        for r in range(RANKS)
    ]


GB = 10**9
HUB_NBYTES = 4 * GIB


def cut(tensors: Shard, most: int) -> list[Shard]:
    """In order, a new shard begun where the next tensor would make one larger than ``most`` bytes: huggingface_hub's
    rule for tensors of at most that size."""
    shards, held = [Shard()], 0
    for name, tensor in tensors.items():
        if held and held + tensor.nbytes > most:
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        held += tensor.nbytes
    return shards


def hub(nbytes: int, device: str) -> list[Shard]:
    """Tensors of 64 MiB, in shards of 1 GB where all of them are 4 GiB; in as many shards where they are less."""
    (tensors,) = blocks(nbytes, device)
    return cut(tensors, nbytes * GB // HUB_NBYTES)


def _width(nbytes: float) -> float:
    """What the widths of a Llama of so many bytes (bf16) are divided by."""
    return max(1.0, math.sqrt(LLAMA_NBYTES / nbytes))


LLAMA_NBYTES = 2 * sum(map(math.prod, llama_shapes().values()))


def llama(nbytes: int, device: str, files: int = 1) -> list[Shard]:
    """The weights of a Llama in bf16, in ``files`` shards. It is the library that cuts: by a largest size."""
    fill = Filler(device, nbytes)
    tensors = {name: fill(*shape) for name, shape in llama_shapes(_width(nbytes)).items()}
    sizes = [tensor.nbytes for tensor in tensors.values()]
    # A shard that is closed is short of this by less than a tensor: the rest always fits into the last one.
    return cut(tensors, (sum(sizes) + (files - 1) * max(sizes)) // files)


def decoder_shapes(width: float = 1.0) -> dict[str, tuple[int, ...]]:
    """Eight layers of Llama-3-8B's widths, a vocabulary of 32000: 3.7 GiB in bf16; each width divided by ``width`` and
    still divisible by the ranks."""

    def divided(size: int) -> int:
        return TP * max(1, round(size / width / TP))

    hidden, inner, kv, vocab = divided(4096), divided(14336), divided(1024), divided(32000)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
    }
    for i in range(8):
        layer = f"model.layers.{i}"
        for name, size in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (size, hidden)
        for name in ("gate", "up"):
            shapes[f"{layer}.mlp.{name}_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
    return shapes


DECODER_NBYTES = 2 * sum(map(math.prod, decoder_shapes().values()))


def decoder(nbytes: int, device: str) -> list[Shard]:
    """The weights of a decoder in one file."""
    fill = Filler(device, nbytes)
    width = max(1.0, math.sqrt(DECODER_NBYTES / nbytes))
    return [{name: fill(*shape) for name, shape in decoder_shapes(width).items()}]


def training(nbytes: int, device: str) -> list[Shard]:
    """A Llama in fp32, and what AdamW knows of each weight: twice the bytes."""
    fill = NumberFiller(device, nbytes, torch.float32)
    shapes = llama_shapes(_width(nbytes / 6))
    weights = {name: fill(*shape) for name, shape in shapes.items()}
    moments = {
        f"{n}.{kind}": fill(*shape) for n, shape in shapes.items() for kind in ("exp_avg", "exp_avg_sq")
    }
    return [weights, moments]


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
    modes: tuple[str, ...] = MODES
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
        named = ("memcpy-1", "memcpy-n", *self.bound, self.writer, "direct", "link", "link-whole")
        return tuple(dict.fromkeys(name for name in named if name != "direct" or DURABLE in self.modes))

    @property
    def bound_by(self) -> dict[str, tuple[str, ...]]:
        """For each mode the ceilings that bound it."""
        writer = (self.writer, "link") if self.place == SHM else (self.writer,)
        return {RETURN: self.bound or writer, DURABLE: (self.writer, "direct")}


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
        "small",
        "20,000 tensors of 16 KiB, one file, the whole call",
        small,
        (*_ONE, "fastshard-noscratch"),
        natural_nbytes=SMALL_COUNT * SMALL_NBYTES,
        quick=True,
        memory=True,
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
        modes=(RETURN,),
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
)
CASES: dict[str, Case] = {case.name: case for case in _ALL}
"""In the order of a run: where its time is short, the last ones are left out."""


MEMORY, HIGH_WATER, DEVICE_MEMORY, PINNED = "memory", "high water", "device memory", "pinned memory"
EXTRA = (MEMORY, HIGH_WATER, DEVICE_MEMORY, PINNED)


@dataclass(frozen=True)
class Goal:
    """What fastshard must show in a case."""

    case: str
    limit: float
    """Times as fast as ``against``, at least; or the extra MiB of memory to stay within."""
    mode: str = RETURN
    against: str = "safetensors"
    """A rival, a ceiling, or one of EXTRA."""
    by: str = "fastshard"
    """Who must reach it."""
    on: str = CPU
    """Kind of the device the tensors are on."""


GOALS = (
    Goal("prepared", 3.5, by="prepared"),
    Goal("prepared", 0.9, against="memcpy-all", by="prepared"),
    Goal("four-files", 1.7),
    Goal("four-files", 0.97, against="safetensors-threads"),  # level: equals differ by 3 %
    Goal("four-files", 1.4, mode=DURABLE),
    Goal("sharded-state", 1.6, against="vllm-sharded", by="fastshard-sharded"),
    Goal("one-file", 1.03),
    Goal("one-file", 0.95, against="pwrite-1"),
    Goal("one-file", 1.4, mode=DURABLE),
    Goal("small", 4.0),
    Goal("strided", 1.5),
    Goal("strided", 64, against=MEMORY),
    Goal("one-file", 3.0, against="torch.save"),
    Goal("archive", 3.0, against="torch.save", by="fastshard-archive"),
    Goal("adamw", 3.0, against="torch.save", by="fastshard-archive"),
    Goal("one-file", 4.0, against="dcp-fs"),
    Goal("one-file", 8.0, against="dcp-hf"),
    Goal("one-file", 64, against=MEMORY),
    Goal("small", 64, against=MEMORY),
    Goal("hub", 1.6, against="huggingface_hub", by="fastshard-hub"),
    Goal("pretrained", 1.5, against="transformers-pretrained", by="fastshard-pretrained"),
    Goal("trainer", 2.5, against="transformers-trainer", by="fastshard-trainer"),
    Goal("offloaded", 256, against=MEMORY, by="fastshard-offloaded"),
    Goal("offloaded", 256, against=HIGH_WATER, by="fastshard-offloaded"),
    Goal("tp-shard", 0.8, against="copy-threads", by="fastshard-shard"),
    Goal("tp-shard", 128, against=MEMORY, by="fastshard-shard"),
    Goal("tp-shard", 128, against=HIGH_WATER, by="fastshard-shard"),
    Goal("prepared", 0.95, against="link", by="prepared", on=CUDA),
    Goal("tmpfs-eight", 0.5, against="link", on=CUDA),
    Goal("tmpfs-eight", 10, on=CUDA),
    Goal("one-file", 0.95, against="pwrite-1", on=CUDA),
    Goal("one-file", 4, on=CUDA),
    Goal("eight-files", 10, on=CUDA),
    Goal("one-file", 0.95, mode=DURABLE, against="direct", on=CUDA),
    Goal("columns", 0.9, against="fastshard-contiguous", on=CUDA),
    Goal("small", 20, on=CUDA),
    *(Goal(case, 64, against=DEVICE_MEMORY, on=CUDA) for case in ("tmpfs-eight", "one-file", "columns")),
    *(Goal(case, 256, against=PINNED, on=CUDA) for case in ("tmpfs-eight", "one-file", "columns")),
)
