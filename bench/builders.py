# SPDX-License-Identifier: Apache-2.0
"""The tensors that are saved.

A builder takes the bytes wanted and a device, and returns the tensors of each file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from .job import Shard
from .models import llama_shapes
from .samples import GIB, MIB

BF16 = torch.bfloat16
BLOCK_NUMEL = 8 * MIB


class Filler:
    """Fills tensors with random bits at the speed of memory: one block, with another salt for each tensor.

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
        return self.fill(torch.empty(shape, dtype=BF16, device=self.device))

    def fill(self, tensor: torch.Tensor) -> torch.Tensor:
        cuts = list(range(self._block.numel(), tensor.numel(), self._block.numel()))
        for part in tensor.view(torch.int16).view(-1).tensor_split(cuts):
            self._salt = (self._salt + 40503) & 0x7FFF
            torch.bitwise_xor(self._block[: part.numel()], self._salt, out=part)
        return tensor


class NumberFiller:
    """Fills tensors with numbers as weights have them. What is cast needs them: random bits hold NaNs."""

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
    """Returns tensors of about 64 MiB in ``files`` files, of random bits or of ``numbers`` of that type."""
    fill = NumberFiller(device, nbytes, numbers) if numbers else Filler(device, nbytes)
    per_file = max(4, round(nbytes / files / (64 * MIB)))
    numel = nbytes // files // per_file // (numbers or BF16).itemsize
    cols = 8192 if numel >= MIB else 64
    return [
        {f"layers.{f * per_file + i}.weight": fill(max(1, numel // cols), cols) for i in range(per_file)}
        for f in range(files)
    ]


def qwen_shapes(shrink: float = 1.0) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Yields names and shapes of Qwen2-0.5B (it has no lm_head), each width divided by ``shrink``."""

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
    """Returns a Qwen2-0.5B-shaped dict, in order, cut into ``files`` shards of about equal bytes."""
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
    """Returns tensors of 16 KiB, which show what is paid for each tensor rather than for each byte."""
    fill = Filler(device, nbytes)
    return [{f"experts.{i}.scale": fill(SMALL_NBYTES // 128, 64) for i in range(nbytes // SMALL_NBYTES)}]


def bert_shapes(shrink: float = 1.0) -> Iterable[tuple[int, ...]]:
    """Yields the shapes of BERT-base's parameters (109 million), each width divided by ``shrink``."""

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
    """Returns what AdamW keeps of BERT-base. Each parameter has two float32 moments and a step, which is a
    scalar of the host."""
    fill = Filler(device, nbytes)
    state: Shard = {}
    for i, shape in enumerate(bert_shapes(max(1.0, math.sqrt(ADAMW_NBYTES / nbytes)))):
        state[f"state.{i}.step"] = torch.tensor(float(i), device="cpu")
        for name in ("exp_avg", "exp_avg_sq"):
            state[f"state.{i}.{name}"] = fill(*shape[:-1], 2 * shape[-1]).view(torch.float32)
    return [state]


STRIDED_COUNT = 64


def strided(nbytes: int, device: str) -> list[Shard]:
    """Returns the right half of the columns of each of 64 matrices, as tensor parallelism cuts a weight."""
    fill = Filler(device, nbytes)
    rows = max(1, math.isqrt(nbytes // STRIDED_COUNT // 4))
    return [{f"layers.{i}.weight": fill(rows, 4 * rows)[:, 2 * rows :] for i in range(STRIDED_COUNT)}]


RANKS = 8


def columns(nbytes: int, device: str) -> list[Shard]:
    """Returns what eight ranks of tensor parallelism save: each matrix is cut by columns, and each file has
    one slice of it. Rows of a slice are 2 KiB."""
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
    """Cuts the tensors into shards, in order. A new shard begins where the next tensor would make one larger
    than ``most`` bytes, which is huggingface_hub's rule for tensors of at most that size."""
    shards, held = [Shard()], 0
    for name, tensor in tensors.items():
        if held and held + tensor.nbytes > most:
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        held += tensor.nbytes
    return shards


def hub(nbytes: int, device: str) -> list[Shard]:
    """Returns tensors of 64 MiB. They are in shards of 1 GB if all of them are 4 GiB, and in as many shards
    if they are less."""
    (tensors,) = blocks(nbytes, device)
    return cut(tensors, nbytes * GB // HUB_NBYTES)


def _width(nbytes: float) -> float:
    """Returns what the widths of a Llama of so many bytes (bf16) are divided by."""
    return max(1.0, math.sqrt(LLAMA_NBYTES / nbytes))


LLAMA_NBYTES = 2 * sum(map(math.prod, llama_shapes().values()))


def llama(nbytes: int, device: str, files: int = 1) -> list[Shard]:
    """Returns the weights of a Llama in bf16, in ``files`` shards. The library cuts by a largest size."""
    fill = Filler(device, nbytes)
    tensors = {name: fill(*shape) for name, shape in llama_shapes(_width(nbytes)).items()}
    sizes = [tensor.nbytes for tensor in tensors.values()]
    # A shard that is closed is short of this by less than a tensor: the rest always fits into the last one.
    return cut(tensors, (sum(sizes) + (files - 1) * max(sizes)) // files)


TP = 4
"""The number of ranks of tensor parallelism."""
TP_PLAN = {
    "model.embed_tokens": "embedding_rowwise",
    "lm_head": "colwise",
    **{f"model.layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
    **{f"model.layers.*.mlp.{name}_proj": "colwise" for name in ("gate", "up")},
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}


def decoder_shapes(width: float = 1.0) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of eight layers of Llama-3-8B's widths with a vocabulary of 32000, which are
    3.7 GiB in bf16. Each width is divided by ``width`` and still divisible by the ranks."""

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


def model_shapes(nbytes: int) -> dict[str, tuple[int, ...]]:
    """Returns those of a decoder of at most about so many bytes in bf16, and its norms, which are small."""
    shapes = decoder_shapes(max(1.0, math.sqrt(DECODER_NBYTES / nbytes)))
    hidden = shapes["lm_head.weight"][1]
    for i in range(8):
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{name}.weight"] = (hidden,)
    return {**shapes, "model.norm.weight": (hidden,)}


MODEL_NBYTES = 2 * sum(map(math.prod, model_shapes(DECODER_NBYTES).values()))


def decoder(nbytes: int, device: str) -> list[Shard]:
    """Returns the weights of a decoder in one file."""
    fill = Filler(device, nbytes)
    width = max(1.0, math.sqrt(DECODER_NBYTES / nbytes))
    return [{name: fill(*shape) for name, shape in decoder_shapes(width).items()}]


def training(nbytes: int, device: str) -> list[Shard]:
    """Returns a Llama in fp32, and what AdamW knows of each weight, which is twice the bytes."""
    fill = NumberFiller(device, nbytes, torch.float32)
    shapes = llama_shapes(_width(nbytes / 6))
    weights = {name: fill(*shape) for name, shape in shapes.items()}
    moments = {
        f"{n}.{kind}": fill(*shape) for n, shape in shapes.items() for kind in ("exp_avg", "exp_avg_sq")
    }
    return [weights, moments]
