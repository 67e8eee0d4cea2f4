# SPDX-License-Identifier: Apache-2.0
"""What fastshard must show in each case: times as fast as another row, or memory to stay within."""

from __future__ import annotations

from dataclasses import dataclass

from .job import CPU, CUDA
from .samples import DURABLE, RETURN

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
