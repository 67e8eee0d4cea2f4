# SPDX-License-Identifier: Apache-2.0
"""``python bench/gpu.py --out DIR``: builds, tests and measures on a machine with a GPU, in one go.

Made for a machine that is lent for ten minutes, from a bare checkout, without a network. A phase that fails
or takes too long is noted, and the next one begins; what was found is on disk after every phase and every
case. Needs Python and torch with CUDA; for a build a C++ compiler, CMake and pybind11, else a
``fastshard/_native*.so`` built before; and safetensors and tqdm.

All of it takes longer than nine minutes. ``--part 1`` builds, tests, and measures the goals in memory;
``--part 2`` those on the disk, then runs compute-sanitizer and the probe. Each writes to a folder of its own.

``--device cpu --tiny`` runs all of it without a GPU, to see that it works. No figure of that counts.

What only a GPU can answer: do the primary context, torch's streams and raw pointers work together? What does
``cuMemHostRegister`` accept and cost? How much of the link's bandwidth do gathers reach through scratch, over the
link and by pitched copies? What is the ratio to ``safetensors.torch.save_file``, are durable saves of device memory
faster direct or buffered, and would checksums in the kernel cost less than 2 %? How long does an asynchronous save
stall a step, and what do its copies cost the next one?
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
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

from . import budget, build, gpu_tests, grow
from .brief import brief
from .machine import COMMIT_VARIABLE, MEMORY_BACKED, mount_of

ROOT = Path(__file__).resolve().parents[1]
CAPS = {"build": 200.0, "memory": 60.0, "tests": 120.0, "sanitizer": 150.0, "probe": 100.0}
"""Seconds a phase may take at most; the bench has what is left."""
BENCH_PART = 0.5
"""Of the budget, kept for the bench by the phases before it."""
LATER_PART = 0.4
"""Of the budget, kept by the bench for the phases after it."""
PROBE_SECONDS = 60.0
"""Of these, kept for the probe by the sanitizer."""
MARGIN_SECONDS = 25.0
"""For the save that is under way when the bench's time is over, and the plot; for a section of the probe."""
MEMORY_COPIES = 6.0
"""Memory that a case takes at once, in multiples of its size: see ``fitting``."""
PARTS = {
    1: ("prepared", "prepared-cast", "prepared-small", "tmpfs-eight", "columns", "small"),
    2: ("one-file", "eight-files", "tmpfs-one", "cast", "cast-fp8", "archive", "adamw", "hub", "pretrained"),
}
"""The cases of each part, those with goals first. Without a part: one after the other, in this order."""
PHASES = {
    1: ("build", "memory", "tests", "bench"),
    2: ("build", "memory", "bench", "sanitizer", "probe"),
    None: ("build", "memory", "tests", "bench", "sanitizer", "probe"),
}
SHORTER = {"budget": 120.0, "gib": 1 / 1024}
SHM = Path("/dev/shm")
OURS = "fastshard-*"
"""What the bench and the probe name their scratch files."""


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
    add(
        "--part",
        type=int,
        choices=(1, 2),
        help="1: the tests, and the cases in memory; 2: those on the disk, compute-sanitizer, the probe;"
        " into DIR/part-N (default: everything, into DIR)",
    )
    add("--gib", type=float, default=4.0, help="largest size of a case (default 4)")
    add("--rounds", type=int, default=3, help="at most (default 3)")
    add("--cases", help="as of bench/save.py (default: those of the part, or of both)")
    add("--dir", type=Path, help="a directory on the disk to measure (default: the temporary one)")
    add("--shm", type=Path, help="a directory on tmpfs (default /dev/shm)")
    add(
        "--probe",
        metavar="COMMAND",
        help="a Python file and its arguments, run after the bench with --seconds N --json FILE: it begins"
        " nothing after N seconds and writes what it has found to FILE as it goes on",
    )
    add("--commit", help="of this checkout, where git cannot say")
    add("--no-build", action="store_true", help="use what was built before")
    add("--no-tests", action="store_true", help="no tests, nor compute-sanitizer")
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
        self.machine["memory"] = grow.state(self.shm)

    @property
    def shm(self) -> Path:
        return self.args.shm or SHM

    @property
    def names(self) -> list[str]:
        """The phases, in order."""
        left_out = set() if self.args.probe else {"probe"}
        left_out |= {"tests", "sanitizer"} if self.args.no_tests else set()
        return [name for name in PHASES[self.args.part] if name not in left_out]

    def all(self) -> None:
        for name in self.names:
            self.phase(name, getattr(self, name))
            if name == "build" and self.phases[-1]["state"] != "ok":
                return

    def phase(self, name: str, work: Callable[[], tuple[str, str]]) -> None:
        """``work`` returns (state, note); whatever it raises is a state, too."""
        began = time.monotonic()
        found: dict[str, Any] = {"name": name, "state": "running", "note": "", "seconds": 0.0}
        self.phases.append(found)
        self.write()  # should it be the last thing that this process does
        try:
            found["state"], found["note"] = work()
        except Exception as error:
            found["state"], found["note"] = "failed", f"{type(error).__name__}: {error}"
        found["seconds"] = time.monotonic() - began
        print(f"{name}: {found['state']}, {found['seconds']:.0f} s; {found['note']}", flush=True)
        self.write()

    def command(self, command: list[str], seconds: float, log: str) -> budget.Outcome:
        """A phase's command. One that had to be killed has not removed its scratch files."""
        before = self._scratch_files()
        done = budget.run(command, seconds, self.out / log, self.environment(), self.scratch)
        if done.status == -signal.SIGKILL:
            for path in self._scratch_files() - before:
                shutil.rmtree(path, ignore_errors=True)
                path.unlink(missing_ok=True)
        return done

    def _scratch_files(self) -> set[Path]:
        return {path for place in (self.shm, self.args.dir) if place for path in place.glob(OURS)}

    def write(self) -> None:
        document = {"schema": 1, "machine": self.machine, "phases": self.phases, "arguments": vars(self.args)}
        document["probe"] = self.probe_document()
        document["bench"] = self.bench_document()
        for name, text in (
            ("gpu.json", json.dumps(document, indent=1, default=str)),
            ("gpu.txt", self.short()),
        ):
            beside = self.scratch / name
            beside.write_text(text + "\n")
            shutil.copy2(beside, self.out / f".{name}")
            (self.out / f".{name}").replace(self.out / name)

    def probe_document(self) -> Any:
        path = self.scratch / "probe.json"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):  # none, or one that was cut off while it was written
            return None

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

    def memory(self) -> tuple[str, str]:
        """Before anything looks at how much there is."""
        wanted = 1.5 * self.args.gib if self.args.tiny else MEMORY_COPIES * self.args.gib
        command = [sys.executable, str(ROOT / "bench" / "grow.py"), f"{wanted:.3f}", str(self.shm)]
        done = self.command(command, self.budget.share(CAPS["memory"], self.kept), "build.log")
        self.machine["memory grown"] = grow.state(self.shm)
        return _state(done), (done.output.strip().splitlines() or [""])[-1]

    def tests(self) -> tuple[str, str]:
        if util.find_spec("pytest") is None:
            return "left out", "no pytest here"
        command = gpu_tests.command(ROOT, self.args.tiny)
        done = self.command(command, self.budget.share(CAPS["tests"], self.kept), "tests.log")
        return _state(done), gpu_tests.summary(done.output)

    def sanitizer(self) -> tuple[str, str]:
        found = gpu_tests.find_sanitizer()
        if found is None or util.find_spec("pytest") is None:
            return "left out", f"no {'pytest' if found else 'compute-sanitizer'} here"
        states, notes = [], []
        most, kept = CAPS["sanitizer"] / len(gpu_tests.TOOLS), PROBE_SECONDS if self.args.probe else 0.0
        for tool in gpu_tests.TOOLS:
            seconds = self.budget.share(most, kept)
            began = time.monotonic()
            done = self.command(gpu_tests.sanitizer_command(ROOT, found, tool), seconds, "tests.log")
            refused = gpu_tests.refused(done.output)
            states.append("left out" if refused else _state(done))
            said = refused or gpu_tests.verdict(done.output)
            notes.append(f"{tool} {states[-1]}, {time.monotonic() - began:.0f} s: {said}")
        worst = next((s for s in ("failed", "cut off", "left out") if s in states), "ok")
        return worst, "; ".join(notes)

    def environment(self) -> dict[str, str]:
        variables = build.environment(self.site)
        variables["FASTSHARD_REQUIRE_CUDA"] = "0" if self.args.device == "cpu" else "1"
        variables["PYTHONUNBUFFERED"] = "1"
        if self.args.commit:
            variables[COMMIT_VARIABLE] = self.args.commit
        return variables

    def probe(self) -> tuple[str, str]:
        file, *arguments = shlex.split(self.args.probe)
        seconds = self.budget.share(CAPS["probe"])
        own = f"{seconds - min(MARGIN_SECONDS, seconds / 2):.0f}"
        command = [sys.executable, str(Path(file).resolve()), *arguments]
        command += ["--seconds", own, "--json", str(self.scratch / "probe.json")]
        done = self.command(command, seconds - budget.GRACE_SECONDS, "probe.log")
        return _state(done), f"{len(self.probe_document() or ())} answers; see probe.log"

    def bench(self) -> tuple[str, str]:
        later = {"sanitizer", "probe"}.intersection(self.names)
        seconds = self.budget.share(self.args.budget, self.args.budget * LATER_PART if later else 0.0)
        done = self.command(self.bench_command(seconds), seconds - budget.GRACE_SECONDS - 1, "bench.txt")
        return _state(done), (done.output.strip().splitlines() or [""])[-1]

    def bench_command(self, seconds: float) -> list[str]:
        args = self.args
        command = [sys.executable, str(ROOT / "bench" / "save.py"), "--device", args.device]
        command += ["--fit", "--gib", str(args.gib), "--rounds", str(args.rounds)]
        parts = [args.part] if args.part else list(PARTS)
        command += ["--cases", args.cases or ",".join(name for part in parts for name in PARTS[part])]
        margin = min(MARGIN_SECONDS, seconds / 4)
        command += ["--budget", f"{seconds - margin:.0f}", "--json", str(self.out / "bench.json")]
        for name in ("dir", "shm"):
            value = getattr(args, name)
            command += [f"--{name}", str(value)] if value else []
        if args.tiny:
            command += ["--no-memory"]
        return command + (["--plot", str(self.out / "bench.png")] if util.find_spec("matplotlib") else [])


def _state(done: budget.Outcome) -> str:
    return "cut off" if done.timed_out else "ok" if done.ok else "failed"


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
    args.out = args.out.resolve() / (f"part-{args.part}" if args.part else ".")
    args.out.mkdir(parents=True, exist_ok=True)
    args.dir = (args.dir or _on_disk(Path(tempfile.gettempdir()), args.out)).resolve()
    args.shm = args.shm.resolve() if args.shm else None
    for old in ("bench.json", "bench.txt", "bench.png", "build.log", "tests.log", "probe.log"):
        (args.out / old).unlink(missing_ok=True)
    before = signal.signal(signal.SIGTERM, _terminate)
    scratch = Path(tempfile.mkdtemp(prefix="fastshard-gpu-"))
    run = Run(args, scratch)
    try:
        run.all()
    finally:
        signal.signal(signal.SIGTERM, before)
        run.write()
        shutil.rmtree(scratch, ignore_errors=True)
        print("\n" + run.short(), flush=True)
    return 0 if all(phase["state"] in ("ok", "left out") for phase in run.phases) else 1


if __name__ == "__main__":
    sys.exit(main())
