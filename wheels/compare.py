#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compares the speed of a wheel with that of a build by this machine's compiler: both save the same, in turn.

    python wheels/compare.py WHEEL [--mib 1024] [--rounds 7] [--folder /dev/shm]

It runs in an environment that has torch, for the Python of the wheel. The other build is made of the checkout, by pip. Each
round starts a new process for each of the two. The table has the median of each, and of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "compare"

JOB = """
import json, sys, time, torch, fastshard
folder, mib = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
large = {f"layer{i}": torch.randn(256, 1024) for i in range(mib)}
small = {f"small{i}": torch.randn(32, 32) for i in range(20_000)}
strided = {name: tensor.t() for name, tensor in large.items()}
jobs = {
    "one file": lambda path: fastshard.save_file(large, path),
    "four files": lambda path: fastshard.save_files(
        {f"{path}.{part}": dict(list(large.items())[part::4]) for part in range(4)}
    ),
    "20,000 small tensors": lambda path: fastshard.save_file(small, path),
    "cast to bfloat16": lambda path: fastshard.save_file(large, path, dtype="bfloat16"),
    "transposed": lambda path: fastshard.save_file(strided, path, allow_strided=True),
    "with checksums": lambda path: fastshard.save_file(large, path, checksums=True),
}
seconds = {}
for name, job in jobs.items():
    samples = []
    for _ in range(3):
        begin = time.perf_counter()
        job(folder + "/compared")
        samples.append(time.perf_counter() - begin)
    seconds[name] = min(samples)
print(json.dumps(seconds))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("wheel")
    parser.add_argument("--mib", default="1024", help="of the large tensors")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", default="/dev/shm", help="where to save")
    options = parser.parse_args()
    kinds = {"compiler": str(ROOT), "wheel": options.wheel}
    for kind, source in kinds.items():
        shutil.rmtree(WORK / kind, ignore_errors=True)
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", WORK / kind, source]
        subprocess.run(install, check=True)
    folder = Path(options.folder, f"fastshard-compare-{os.getpid()}")
    folder.mkdir()
    rounds: list[dict[str, dict[str, float]]] = []
    try:
        for number in range(options.rounds):
            order = list(kinds) if number % 2 else list(kinds)[::-1]
            rounds.append({kind: once(kind, folder, options.mib) for kind in order})
    finally:
        shutil.rmtree(folder)
    print("| saved | this machine's compiler | wheel | ratio of the wheel's speed |\n|---|---|---|---|")
    for name in rounds[0]["wheel"]:
        medians = [statistics.median(one[kind][name] for one in rounds) for kind in kinds]
        ratio = statistics.median(one["compiler"][name] / one["wheel"][name] for one in rounds)
        print(f"| {name} | {medians[0]:.3f} s | {medians[1]:.3f} s | {ratio:.2f} |")


def once(kind: str, folder: Path, mib: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(WORK / kind)}
    command = [sys.executable, "-c", JOB, folder, mib]
    said = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment, cwd=folder
    ).stdout
    seconds: dict[str, float] = json.loads(said)
    return seconds


if __name__ == "__main__":
    main()
