# SPDX-License-Identifier: Apache-2.0
"""``python bench/load.py``: a rank's sharded state into parameters that stand, beside vLLM's way to load it."""

from __future__ import annotations

import argparse
import importlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # As in save.py.
    here = Path(__file__).resolve().parent
    sys.path = [*(path for path in sys.path if path != str(here)), str(here.parent)]
    sys.exit(importlib.import_module(f"{here.name}.load").main())

import torch

from . import machine, report
from .builders import blocks
from .grow import touch_and_free
from .job import Shard
from .samples import GIB, MIB, RETURN, CaseResult, Row, ratio

US, BASE = "load_sharded_state", "vllm"
PARTS = 4
GOAL = 1.0


def _fastshard(tensors: Shard, directory: Path) -> None:
    import fastshard

    fastshard.load_sharded_state(tensors, directory)


def _vllm(tensors: Shard, directory: Path) -> None:
    """What vLLM 0.33's ``ShardedStateLoader.load_weights`` does."""
    from safetensors import safe_open

    for path in directory.glob("model-rank-0-part-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensors[name].copy_(file.get_tensor(name))


LOADERS: dict[str, Callable[[Shard, Path], None]] = {US: _fastshard, BASE: _vllm}


def _drop(directory: Path) -> None:
    """Out of the page cache."""
    for path in directory.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def measure(nbytes: int, rounds: int, cold: bool, scratch: Path) -> CaseResult:
    """Loads in turn; each round checks every byte, and changes them all before the next load."""
    import fastshard

    tensors = {name: t for shard in blocks(nbytes, "cpu", PARTS) for name, t in shard.items()}
    total = sum(t.nbytes for t in tensors.values())
    manifest = fastshard.save_sharded_state(tensors, scratch, max_size=-(-total // PARTS))
    os.sync()
    touch_and_free(total)
    target = {name: torch.zeros_like(t) for name, t in tensors.items()}
    about = f"sharded state into host parameters, {'from the disk' if cold else 'files in the page cache'}"
    result = CaseResult("sharded-load", about, total, total, len(tensors), len(manifest.files), {})
    result.rows = [Row(name, RETURN) for name in LOADERS]
    for round_ in range(-1, rounds):  # the first one warms up
        for row in random.Random(round_).sample(result.rows, len(result.rows)):
            for tensor in target.values():
                tensor.view(torch.int16).fill_(round_)
            if cold:
                _drop(scratch)
            cpu, wall = time.process_time(), time.perf_counter()
            LOADERS[row.rival](target, scratch)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            same = all(
                torch.equal(target[n].view(torch.int16), t.view(torch.int16)) for n, t in tensors.items()
            )
            row.checked, row.wrong = "same bytes", row.wrong or not same
            if round_ >= 0:
                row.seconds.append(wall)
                row.cpu_seconds.append(cpu)
                row.rounds.append(round_)
    return result


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 when bytes were wrong; the goal never changes it."""
    parser = argparse.ArgumentParser(prog="bench/load.py", description=__doc__)
    parser.add_argument(
        "--dir", type=Path, help="directory to load from (default: the system's temporary one)"
    )
    parser.add_argument("--gib", type=float, default=4.0, help="size of the state (default 4)")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument(
        "--cold", action="store_true", help="from the disk: files are dropped from the page cache"
    )
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="fastshard-bench-", dir=args.dir) as scratch:
        print(machine.headline(machine.describe(Path(scratch), "cpu")))
        result = measure(max(MIB, int(args.gib * GIB)), args.rounds, args.cold, Path(scratch))
    print(f"{result.name}: {result.about} ({report.size(result.nbytes)}, {result.files} files)")
    for row in result.rows:
        note = "WRONG" if row.wrong else row.checked
        rates = f"{result.rate(row.best):6.2f} GiB/s at best, {result.rate(row.median):6.2f} at median"
        print(
            f"  {row.rival:20} {rates}, {row.median:.3f} s, cpu {sum(row.cpu_seconds) / len(row.seconds):.2f} s, {note}"
        )
    found = ratio(result.row(US, RETURN), result.row(BASE, RETURN))
    if found:
        reached = "reached" if min(found.median, found.best) >= GOAL else "not reached"
        print(f"  {found.median:.2f} times as fast ({found.best:.2f} at best); wanted {GOAL:.2f}: {reached}")
    return int(any(row.wrong for row in result.rows))


if __name__ == "__main__":
    sys.exit(main())
