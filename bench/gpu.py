# SPDX-License-Identifier: Apache-2.0
"""``python bench/gpu.py --out DIR``: builds, tests and measures on a machine with a GPU, in one go.

Made for a machine that is lent for ten minutes, from a bare checkout, without a network. A phase that fails
or takes too long is noted, and the next one begins; what was found is on disk after every phase and every
case. Needs Python and torch with CUDA; for a build a C++ compiler, CMake and pybind11, else a
``fastshard/_native*.so`` built before; and safetensors and tqdm.

``--device cpu --tiny`` runs all of it without a GPU, to see that it works. No figure of that counts.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:
    here = Path(__file__).resolve().parent  # as a module of its package: see save.py
    sys.path = [*(path for path in sys.path if path != str(here)), str(here.parent)]
    sys.exit(importlib.import_module(f"{here.name}.gpu").main())

from . import budget, build
from .brief import brief
from .machine import COMMIT_VARIABLE, MEMORY_BACKED, mount_of

ROOT = Path(__file__).resolve().parents[1]
CAPS = {"build": 200.0, "tests": 120.0, "probe": 90.0}
"""Seconds a phase may take at most; the bench has what is left."""
BENCH_PART = 0.5
"""Of the budget, kept for the bench by the phases before it."""
MARGIN_SECONDS = 25.0
"""For the save that is under way when the bench's time is over, and for the plot."""
REAL_GPU = re.compile(r"\breal_cuda\b|\bdevice: torch\.device\b|\bdef test_real_")
SIMULATOR = "test_the_simulator_beside_a_real_gpu"
SHORTER = {"budget": 120.0, "gib": 1 / 1024}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench/gpu.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    default = os.environ.get("OUT") or str(ROOT / "bench" / "out")
    add(
        "--out",
        type=Path,
        default=Path(default),
        help="directory of the results (default: $OUT, or bench/out)",
    )
    add("--budget", type=float, default=540.0, metavar="SECONDS", help="for everything (default 540)")
    add("--device", default="cuda", help="cuda (default), cuda:1; cpu only to see that it runs")
    add("--tiny", action="store_true", help="a few seconds' worth: 1 MiB, one test")
    add("--gib", type=float, default=8.0, help="largest size of a case (default 8)")
    add("--rounds", type=int, default=3, help="at most (default 3)")
    add("--cases", help="as of bench/save.py (default: all of the device's)")
    add("--dir", type=Path, help="a directory on the disk to measure (default: the temporary one)")
    add("--shm", type=Path, help="a directory on tmpfs (default /dev/shm)")
    add("--probe", metavar="COMMAND", help="a Python file, and its arguments, to run before the bench")
    add("--commit", help="of this checkout, where git cannot say")
    add("--no-build", action="store_true", help="use what was built before")
    add("--no-tests", action="store_true", help="no tests")
    return parser


class Run:
    """The phases and what they found."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.out, self.scratch = args, args.out, scratch
        self.budget = budget.Budget(args.budget)
        self.kept = args.budget * BENCH_PART
        self.site: Path | None = None
        self.phases: list[dict[str, Any]] = []
        self.machine = _machine()

    def phase(self, name: str, work: Callable[[], tuple[str, str]]) -> None:
        """``work`` returns (state, note); whatever it raises is a state, too."""
        began = time.monotonic()
        try:
            state, note = work()
        except Exception as error:
            state, note = "failed", f"{type(error).__name__}: {error}"
        found = {"name": name, "state": state, "note": note, "seconds": time.monotonic() - began}
        self.phases.append(found)
        print(f"{name}: {state}, {found['seconds']:.0f} s; {note}", flush=True)
        self.write()

    def write(self) -> None:
        document = {"schema": 1, "machine": self.machine, "phases": self.phases, "arguments": vars(self.args)}
        document["bench"] = self.bench_document()
        text = json.dumps(document, indent=1, default=str)
        (self.out / "gpu.json").write_text(text + "\n")
        (self.out / "gpu.txt").write_text(self.short() + "\n")

    def bench_document(self) -> dict[str, Any] | None:
        path = self.out / "bench.json"
        if not path.is_file():
            return None
        document: dict[str, Any] = json.loads(path.read_text())
        return document

    def short(self) -> str:
        return brief(self.phases, self.bench_document())

    def build(self) -> tuple[str, str]:
        site = self.scratch / "site"
        seconds = self.budget.share(CAPS["build"], self.kept)
        found = build.make(ROOT, site, seconds, self.out / "build.log", fresh=not self.args.no_build)
        if found is None:
            return "failed", "no fastshard can be loaded; see build.log"
        self.site = found.path
        return "ok", found.how

    def tests(self) -> tuple[str, str]:
        if util.find_spec("pytest") is None:
            return "left out", "no pytest here"
        done = budget.run(
            self.test_command(),
            self.budget.share(CAPS["tests"], self.kept),
            self.out / "tests.log",
            self.environment(),
            self.scratch,
        )
        lines = done.output.strip().splitlines() or [""]
        failed = [
            line.split(" ")[1].split("::")[-1] for line in lines if line.startswith(("FAILED ", "ERROR "))
        ]
        note = lines[-1].strip("= ") + (f": {', '.join(failed)}" if failed else "")
        return "cut off" if done.timed_out else "ok" if done.ok else "failed", note

    def test_command(self) -> list[str]:
        """Pytest, on what needs a real GPU; files that have nothing to do with one are not even collected."""
        files = sorted((ROOT / "tests").glob("test_*.py"))
        chosen = [str(path) for path in files if REAL_GPU.search(path.read_text())]
        which = f"(real or cuda) and not {SIMULATOR}"
        if self.args.tiny:
            chosen, which = [str(ROOT / "tests" / "test_cuda_path.py")], "test_real_bytes"
        options = ["-q", "-rfE", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-k", which]
        return [sys.executable, "-m", "pytest", *options, *chosen]

    def environment(self) -> dict[str, str]:
        variables = build.environment(self.site)
        variables["FASTSHARD_REQUIRE_CUDA"] = "0" if self.args.device == "cpu" else "1"
        variables["PYTHONUNBUFFERED"] = "1"
        if self.args.commit:
            variables[COMMIT_VARIABLE] = self.args.commit
        return variables

    def probe(self) -> tuple[str, str]:
        file, *arguments = shlex.split(self.args.probe)
        command = [sys.executable, str(Path(file).resolve()), *arguments]
        seconds = self.budget.share(CAPS["probe"], self.kept)
        done = budget.run(command, seconds, self.out / "probe.log", self.environment(), self.scratch)
        return "cut off" if done.timed_out else "ok" if done.ok else "failed", "see probe.log"

    def bench(self) -> tuple[str, str]:
        seconds = self.budget.share(self.args.budget)
        command = self.bench_command(seconds)
        done = budget.run(
            command,
            seconds - budget.GRACE_SECONDS - 1,
            self.out / "bench.txt",
            self.environment(),
            self.scratch,
        )
        last = (done.output.strip().splitlines() or [""])[-1]
        return "cut off" if done.timed_out else "ok" if done.ok else "failed", last

    def bench_command(self, seconds: float) -> list[str]:
        args = self.args
        command = [sys.executable, str(ROOT / "bench" / "save.py"), "--device", args.device]
        command += ["--gib", str(args.gib), "--rounds", str(args.rounds)]
        margin = min(MARGIN_SECONDS, seconds / 4)
        command += ["--budget", f"{seconds - margin:.0f}", "--json", str(self.out / "bench.json")]
        for name in ("dir", "shm", "cases"):
            value = getattr(args, name)
            command += [f"--{name}", str(value)] if value else []
        if args.tiny:
            command += ["--no-memory", "--no-disturbance"]
        return command + (["--plot", str(self.out / "bench.png")] if util.find_spec("matplotlib") else [])


def _machine() -> dict[str, Any]:
    """What the phases before torch can know."""

    def ask(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{type(error).__name__}: {error}"

    fields = "name,driver_version,memory.total,pcie.link.gen.max,pcie.link.width.max"
    return {
        "python": sys.version,
        "kernel": platform.release(),
        "cpus": len(os.sched_getaffinity(0)),
        "gpu": ask("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"),
        "topology": ask("nvidia-smi", "topo", "-m"),
        "nvcc": (ask(os.environ.get("NVCC", "nvcc"), "--version").splitlines() or [""])[-1],
        "compiler": (ask(os.environ.get("CXX", "c++"), "--version").splitlines() or [""])[0],
        "memory": ask("free", "-m"),
        "disks": ask("df", "-hT"),
    }


def _on_disk(*places: Path) -> Path:
    """The first place that is no memory, else the first."""
    return next((p for p in places if mount_of(p)[0] not in MEMORY_BACKED), places[0])


def _terminate(*_: object) -> None:
    sys.exit("terminated")


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 when the build, the tests and the bench all went well."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not (ROOT / "csrc").is_dir():
        parser.error("it builds and tests a checkout: run bench/gpu.py in one")
    if args.tiny:
        args.gib, args.rounds, args.budget = SHORTER["gib"], 1, min(args.budget, SHORTER["budget"])
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    args.dir = (args.dir or _on_disk(Path(tempfile.gettempdir()), args.out)).resolve()
    args.shm = args.shm.resolve() if args.shm else None
    for old in ("bench.json", "bench.txt", "bench.png", "build.log", "tests.log", "probe.log"):
        (args.out / old).unlink(missing_ok=True)
    before = signal.signal(signal.SIGTERM, _terminate)
    scratch = Path(tempfile.mkdtemp(prefix="fastshard-gpu-"))
    run = Run(args, scratch)
    try:
        run.phase("build", run.build)
        if run.phases[-1]["state"] == "ok":
            if not args.no_tests:
                run.phase("tests", run.tests)
            if args.probe:
                run.phase("probe", run.probe)
            run.phase("bench", run.bench)
    finally:
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(scratch, ignore_errors=True)
        run.write()
        print("\n" + run.short(), flush=True)
    return 0 if all(phase["state"] in ("ok", "left out") for phase in run.phases) else 1


if __name__ == "__main__":
    sys.exit(main())
