# SPDX-License-Identifier: Apache-2.0
"""What it costs to lay out many small tensors: everything before the first byte moves, natively and in Python in turn.

    python -m fastshard.bench.planning [--tensors N] [--rounds N] [--dir DIR] [--json FILE]

With ``--dir`` the tensors are saved, too, by fastshard and by safetensors in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import safetensors.torch
import torch

import fastshard
from fastshard.engine import pipeline, planning

from . import machine
from .samples import RETURN, Row

TENSORS: Final = 20_000
NBYTES: Final = 16 << 10
GOAL: Final = 0.5e-6
"""Seconds for each tensor, natively."""
_PARTS: Final = ("down_proj", "gate_proj", "up_proj")

StateDict = dict[str, torch.Tensor]


def model(count: int) -> StateDict:
    """Tensors with the names of a mixture of experts, in a model's order."""
    return {
        f"model.layers.{number // 384}.mlp.experts.{number % 384 // 3}.{_PARTS[number % 3]}.weight": torch.ones(
            NBYTES // 2, dtype=torch.bfloat16
        )
        for number in range(count)
    }


def _plan(tensors: StateDict, native: bool, dtype: torch.dtype | None = None) -> Callable[[], object]:
    def plan() -> object:
        os.environ[planning.VARIABLE] = "1" if native else "0"
        return pipeline.plan_file(tensors, "unused", None, pipeline.How(dtype=dtype))

    return plan


def plans(tensors: StateDict) -> Iterator[tuple[str, Callable[[], object]]]:
    """Names and calls, each of which plans one file."""
    yield "natively", _plan(tensors, True)
    yield "natively, cast to float16", _plan(tensors, True, torch.float16)
    yield "in Python", _plan(tensors, False)


def saves(tensors: StateDict, folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """The same for saves of a file that is there already."""

    def save(native: bool) -> None:
        os.environ[planning.VARIABLE] = "1" if native else "0"
        fastshard.save_file(tensors, folder / "ours")

    yield "fastshard, laid out natively", lambda: save(True)
    yield "fastshard, laid out in Python", lambda: save(False)
    yield "safetensors", lambda: safetensors.torch.save_file(tensors, folder / "theirs")


def measure(calls: Iterator[tuple[str, Callable[[], object]]], rounds: int) -> list[Row]:
    """Calls them in turn, one after the other in each round. The first round is not counted."""
    known = os.environ.get(planning.VARIABLE)
    found = [(Row(name, RETURN), call) for name, call in calls]
    try:
        for number in range(rounds + 1):
            for row, call in found:
                began = time.perf_counter()
                made = call()
                seconds = time.perf_counter() - began
                del made
                if number:
                    row.seconds.append(seconds)
    finally:
        os.environ.pop(planning.VARIABLE)
        if known is not None:
            os.environ[planning.VARIABLE] = known
    return [row for row, _ in found]


def table(title: str, results: Sequence[Row], count: int) -> str:
    """As it is printed: milliseconds of a call, and microseconds for each tensor."""
    lines = [f"{title:32}  best ms  median ms  best us  median us"]
    for result in results:
        figures = [
            1e3 * result.best,
            1e3 * result.median,
            1e6 * result.best / count,
            1e6 * result.median / count,
        ]
        lines.append(
            f"{result.rival:32}{figures[0]:9.2f}{figures[1]:11.2f}{figures[2]:9.3f}{figures[3]:11.3f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables; 1 if planning takes longer than :data:`GOAL`, where it is native."""
    parser = argparse.ArgumentParser(
        prog="fastshard.bench.planning", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--tensors", type=int, default=TENSORS, metavar="N", help=f"default {TENSORS}")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="default 15")
    parser.add_argument("--dir", type=Path, help="directory to save into; without it nothing is saved")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    given = parser.parse_args(arguments)
    tensors = model(given.tensors)
    why_not = planning.why_not_native()
    results = measure(plans(tensors), given.rounds)
    print(table(f"plan {given.tensors} tensors", results, given.tensors))
    if why_not:
        print(f"nothing was laid out natively: {why_not}")
    saved: list[Row] = []
    if given.dir:
        with tempfile.TemporaryDirectory(dir=given.dir) as folder:
            saved = measure(saves(tensors, Path(folder)), given.rounds)
        print(table("save them", saved, given.tensors))
        print(f"safetensors' time over ours: {saved[2].median / saved[0].median:.2f} (medians)")
    if given.json:
        found = {
            "machine": machine.describe(given.dir or Path(tempfile.gettempdir()), "cpu"),
            "tensors": given.tensors,
            "native": not why_not,
            "plans": [{"name": result.rival, "seconds": result.seconds} for result in results],
            "saves": [{"name": result.rival, "seconds": result.seconds} for result in saved],
        }
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(not why_not and results[0].median > GOAL * given.tensors)


if __name__ == "__main__":
    raise SystemExit(main())
