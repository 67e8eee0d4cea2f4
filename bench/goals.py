# SPDX-License-Identifier: Apache-2.0
"""What fastshard must show in each case: times as fast as another row, or memory to stay within."""

from __future__ import annotations

from dataclasses import dataclass

from .job import CPU, CUDA
from .samples import DURABLE, LOST, RETURN, STALL, WRITTEN

MEMORY, HIGH_WATER, DEVICE_MEMORY, PINNED = "memory", "high water", "device memory", "pinned memory"
OVER_BUDGET = "memory over budget"
"""Extra memory, less what the saver was told that it may take."""
EXTRA = (MEMORY, HIGH_WATER, DEVICE_MEMORY, PINNED, OVER_BUDGET)
STEP = "a step"
"""A step of a job that runs beside the save."""
PLANNING = "planning"
"""Checking the tensors and laying out the files: seconds of a timed save, for each tensor."""
READ = "read"
"""Bytes that a rank has read for each that it wanted."""
_UNITS = {**dict.fromkeys(EXTRA, "MiB"), STEP: "%", PLANNING: "us", READ: "bytes"}


@dataclass(frozen=True)
class Goal:
    """What fastshard must show in a case."""

    case: str
    limit: float
    """Times as fast as ``against``, at least; or what to stay within: extra MiB of memory, the per cent by
    which a step is longer, microseconds for a tensor."""
    mode: str = RETURN
    against: str = "safetensors"
    """A rival, a ceiling, one of EXTRA, STEP, PLANNING, or READ."""
    by: str = "fastshard"
    """Who must reach it."""
    on: str = CPU
    """Kind of the device the tensors are on."""

    @property
    def unit(self) -> str:
        """Of a limit to stay within; empty for a ratio."""
        return _UNITS.get(self.against, "")


_HOST = (
    Goal("prepared", 3.5, by="prepared"),
    Goal("prepared", 0.9, against="memcpy-all", by="prepared"),
    Goal("four-files", 1.7),
    Goal("four-files", 0.97, against="safetensors-threads"),  # level: equals differ by 3 %
    Goal("four-files", 1.4, mode=DURABLE),
    Goal("four-files", 3.0, against="parallel-saver"),
    Goal("four-files", 1.8, mode=DURABLE, against="parallel-saver"),
    Goal("tmpfs-eight", 1.6, against="parallel-saver"),
    Goal("sharded-state", 1.6, against="vllm-sharded", by="fastshard-sharded"),
    Goal("manifest", 1 / 1.05, against="fastshard", by="fastshard-manifest"),
    Goal("manifest", 1 / 1.1, against="sha256sum-2", by="fastshard-sha256"),
    Goal("verify", 0.9, against="sha256sum-2", by="fastshard-verify"),
    Goal("verify", 0.8, against="read-threads", by="fastshard-verify-crc32"),
    Goal("one-file", 1.4),
    Goal("one-file", 0.95, against="pwrite-1"),
    Goal("one-file", 1.4, mode=DURABLE),
    Goal("tmpfs-one", 1.2),
    Goal("small", 5.0),
    Goal("small", 0.5, against=PLANNING),
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
    # At most 0.5, 0.1 and 0.35 of the other one's time.
    Goal("async", 2.0, mode=STALL, against="fastshard", by="async-copy"),
    Goal("async", 10.0, mode=STALL, against="fastshard", by="async-fork"),
    Goal("async", 3.0, mode=STALL, against="dcp-async", by="async-copy"),
    Goal("async", 4, mode=STALL, against=OVER_BUDGET, by="async-copy"),
    # At most 0.2 of the time of a save.
    Goal("incremental", 5.0, mode=STALL, against="frozen-installed", by="frozen-incremental"),
    Goal("async-trainer", 1 / 0.35, mode=LOST, against="training-unpatched", by="training-async"),
)

_RANKS = (
    *(
        Goal("dcp-ranks", limit, mode=mode, against=against, by=by)
        for by in ("fastshard-writer", "fastshard-distcp")
        for against, limit in (("stock-distcp", 4.0), ("stock-hf", 8.0))
        for mode in WRITTEN
    ),
    Goal("save-distributed", 2.0, against="gather", by="save_distributed"),
    Goal("save-distributed", 1.0, against="one-process", by="save_distributed"),
    Goal("save-distributed", 64, against=MEMORY, by="save_distributed"),
    Goal("load-ranks", 1.5, against="get_slice-columns", by="load_distributed-columns"),
    Goal("load-ranks", 1.0, against="get_slice-rows", by="load_distributed-rows"),
    *(Goal("load-ranks", 1.2, against=READ, by=f"load_distributed-{kind}") for kind in ("columns", "rows")),
    Goal("convert-dcp", 3.0, against="dcp_to_torch_save", by="convert"),
    Goal("convert-dcp", 128, against=MEMORY, by="convert"),
    Goal("dcp-async", 3.0, mode=STALL, against="default-stager", by="fastshard-stager"),
)

_TAKES_MEMORY = ("tmpfs-eight", "one-file", "columns")
_GPU = (
    Goal("prepared", 0.97, against="link", by="prepared", on=CUDA),
    Goal("prepared-cast", 0.9, against="link", by="prepared", on=CUDA),
    # Not to copies of 16 KiB each, which are no ceiling.
    Goal("prepared-small", 0.5, against="link-whole", by="prepared", on=CUDA),
    Goal("tmpfs-eight", 0.5, against="link", on=CUDA),
    Goal("tmpfs-eight", 8, on=CUDA),
    Goal("columns", 0.9, against="fastshard-contiguous", on=CUDA),
    Goal("small", 10, on=CUDA),
    Goal("eight-files", 10, on=CUDA),
    Goal("one-file", 0.95, against="pwrite-1", on=CUDA),
    Goal("one-file", 2, on=CUDA),
    Goal("one-file", 0.95, mode=DURABLE, against="direct", on=CUDA),
    *(Goal(case, 64, against=DEVICE_MEMORY, on=CUDA) for case in _TAKES_MEMORY),
    *(Goal(case, 128, against=PINNED, on=CUDA) for case in _TAKES_MEMORY),
    Goal("prepared", 3, against=STEP, by="prepared", on=CUDA),
    *(Goal(case, 3, against=STEP, on=CUDA) for case in ("tmpfs-eight", "one-file")),
)
"""Where a rate depends on the machine, the goal is a part of a ceiling of the same rounds."""
GOALS = _HOST + _RANKS + _GPU
