# SPDX-License-Identifier: Apache-2.0
"""``python bench/load_ranks.py``: slices of ordinary files into the parameters of ranks, beside ``get_slice``.

Each rank of a tensor-parallel model fills its rows or columns of every matrix. The other way is what is written by
hand: ``param.copy_(safe_open(...).get_slice(name)[...])`` on each rank.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:
    # As in save.py.
    here = Path(__file__).resolve().parent
    sys.path = [*(path for path in sys.path if path != str(here)), str(here.parent)]
    sys.exit(importlib.import_module(f"{here.name}.load_ranks").main())

import torch
from torch import distributed
from torch import multiprocessing as processes

from . import machine, report
from .samples import GIB, RETURN, CaseResult, Row, ratio

US, BASE = "load_distributed", "get_slice"
GOALS = {"columns": 1.5, "rows": 1.0}
MOST_READ = 1.2
SHAPE = 4096, 4096
MATRIX_NBYTES = 2 * SHAPE[0] * SHAPE[1]
SHARDS = 2


def _columns_or_rows(dim: int, rank: int, ranks: int) -> tuple[slice, ...]:
    each = SHAPE[dim] // ranks
    part = slice(rank * each, (rank + 1) * each)
    return (part,) if dim == 0 else (slice(None), part)


def _get_slice(tensors: dict[str, torch.Tensor], folder: Path, part: tuple[slice, ...]) -> None:
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensors[name].copy_(file.get_slice(name)[part])


def _rank(number: int, ranks: int, folder: Path, dim: int, rounds: int, cold: bool, out: Any) -> None:
    """Loads in turn with the others; rank 0 tells the times of the slowest and what was read."""
    from safetensors import safe_open
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    import fastshard

    torch.set_num_threads(1)  # as torchrun does
    distributed.init_process_group(
        "cpu:gloo",
        init_method=f"file://{folder}/.rendezvous",
        rank=number,
        world_size=ranks,
        timeout=timedelta(minutes=10),
    )
    part = _columns_or_rows(dim, number, ranks)
    expected: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            expected |= {name: file.get_slice(name)[part].clone() for name in file.keys()}  # noqa: SIM118
    local = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    mesh = init_device_mesh("cpu", (ranks,))
    state = {name: DTensor.from_local(tensor, mesh, [Shard(dim)]) for name, tensor in local.items()}
    figures: list[Any] = []
    loaders: dict[str, Callable[[], object]] = {
        US: lambda: figures.append(fastshard.load_distributed(state, folder)),
        BASE: lambda: _get_slice(local, folder, part),
    }
    for round_ in range(-1, rounds):  # the first one warms up
        for rival in random.Random(round_).sample([*loaders], len(loaders)):
            for tensor in local.values():
                tensor.view(torch.int16).fill_(round_)
            if cold and number == 0:
                _drop(folder)
            distributed.barrier()
            cpu, began = time.process_time(), time.perf_counter()
            loaders[rival]()
            took = time.perf_counter() - began, time.process_time() - cpu
            same = all(
                torch.equal(local[n].view(torch.int16), t.view(torch.int16)) for n, t in expected.items()
            )
            told: list[Any] = [None] * ranks
            distributed.all_gather_object(told, (*took, same))
            if number == 0:
                out.put(
                    (rival, round_, max(t[0] for t in told), sum(t[1] for t in told), all(t[2] for t in told))
                )
    read = [figures[-1].read_nbytes / figures[-1].nbytes]
    reads: list[Any] = [None] * ranks
    distributed.all_gather_object(reads, read[0])
    if number == 0:
        out.put(max(reads))
    distributed.destroy_process_group()


def _drop(folder: Path) -> None:
    """Out of the page cache."""
    for path in folder.glob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _matrices(nbytes: int) -> int:
    return max(SHARDS, nbytes // MATRIX_NBYTES)


def _save(_: int, nbytes: int, folder: Path) -> None:
    """Writes a checkpoint of square matrices."""
    import fastshard

    count = _matrices(nbytes)
    state = {
        f"layers.{number}.weight": torch.randint(-9999, 9999, SHAPE, dtype=torch.int16).view(torch.bfloat16)
        for number in range(count)
    }
    fastshard.save_torch_state_dict(state, folder, max_shard_size=-(-count // SHARDS) * MATRIX_NBYTES)
    os.sync()


def measure(
    kind: str, nbytes: int, ranks: int, rounds: int, cold: bool, folder: Path
) -> tuple[CaseResult, float]:
    """Returns the times, and how many bytes a rank has read for each that it wanted."""
    total = _matrices(nbytes) * MATRIX_NBYTES
    # Forked, as this script is no module that a new process could import. It has no threads yet.
    processes.start_processes(_save, (nbytes, folder), nprocs=1, start_method="fork")
    about = f"{kind} of matrices into {ranks} ranks, {'from the disk' if cold else 'files in the page cache'}"
    result = CaseResult(f"load-{kind}", about, total, total, 0, SHARDS, {})
    result.rows = [Row(name, RETURN) for name in (US, BASE)]
    out = torch.multiprocessing.get_context("fork").SimpleQueue()
    dim = 1 if kind == "columns" else 0
    started = processes.start_processes(
        _rank, (ranks, folder, dim, rounds, cold, out), nprocs=ranks, join=False, start_method="fork"
    )
    for _ in range(2 * (rounds + 1)):
        while out.empty():
            started.join(timeout=0.05)  # raises what a rank has raised
        rival, round_, wall, cpu, same = out.get()
        row = next(row for row in result.rows if row.rival == rival)
        row.checked, row.wrong = "same bytes", row.wrong or not same
        if round_ >= 0:
            row.seconds.append(wall)
            row.cpu_seconds.append(cpu)
            row.rounds.append(round_)
    read = out.get()
    while not started.join():
        pass
    return result, read


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 when bytes were wrong; the goal never changes it."""
    parser = argparse.ArgumentParser(prog="bench/load_ranks.py", description=__doc__)
    parser.add_argument(
        "--dir", type=Path, help="directory to load from (default: the system's temporary one)"
    )
    parser.add_argument("--gib", type=float, default=2.0, help="size of the checkpoint (default 2)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--kind", choices=[*GOALS], help="only one of them")
    parser.add_argument(
        "--cold", action="store_true", help="from the disk: files are dropped from the page cache"
    )
    args = parser.parse_args(argv)
    wrong = False
    for kind in [args.kind] if args.kind else GOALS:
        with tempfile.TemporaryDirectory(prefix="fastshard-bench-", dir=args.dir) as scratch:
            print(machine.headline(machine.describe(Path(scratch), "cpu")))
            result, read = measure(
                kind, int(args.gib * GIB), args.ranks, args.rounds, args.cold, Path(scratch)
            )
        print(f"{result.name}: {result.about} ({report.size(result.nbytes)}, {result.files} files)")
        for row in result.rows:
            note = "WRONG" if row.wrong else row.checked
            rates = f"{result.rate(row.best):6.2f} GiB/s at best, {result.rate(row.median):6.2f} at median"
            print(
                f"  {row.rival:20} {rates}, {row.median:.3f} s, cpu {sum(row.cpu_seconds) / len(row.seconds):.2f} s, {note}"
            )
        found = ratio(result.row(US, RETURN), result.row(BASE, RETURN))
        if found:
            reached = "reached" if min(found.median, found.best) >= GOALS[kind] else "not reached"
            print(
                f"  {found.median:.2f} times as fast ({found.best:.2f} at best); wanted {GOALS[kind]:.2f}: {reached}; "
                f"{read:.2f} bytes read for each that is wanted (at most {MOST_READ})"
            )
        wrong = wrong or any(row.wrong for row in result.rows)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
