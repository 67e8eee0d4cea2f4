# SPDX-License-Identifier: Apache-2.0
"""``python bench/save.py``: fastshard beside what people save with today, and beside the hardware."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:
    # Run as a script: again, as a module of its package. The checkout goes last on the path, so that an
    # installed fastshard is the one measured and not a source folder without its native part.
    here = Path(__file__).resolve().parent
    sys.path = [*(path for path in sys.path if path != str(here)), str(here.parent)]
    sys.exit(importlib.import_module(f"{here.name}.save").main())

import torch

from . import machine, memory, report
from .cases import CASES, FULL_NBYTES, Case
from .ceilings import CEILINGS
from .fitting import Settings
from .goals import GOALS
from .harness import run_case
from .job import CPU, KINDS, US, Rival
from .rank_cases import RANK_CASES, RankCase
from .rank_process import main as be_a_rank
from .ranks import run_rank_case
from .rivals import RIVALS
from .rivals_ranks import RANK_RIVALS
from .samples import DURABLE, GIB, MIB, MODES, CaseResult

QUICK_SECONDS = 90.0
"""Rounds of a quick run stop here, on however slow a machine; at least one round is always run."""
SHM = Path("/dev/shm")
ALL_CASES: dict[str, Case | RankCase] = {**CASES, **RANK_CASES}
ALL_RIVALS = {**RIVALS, **RANK_RIVALS}


def _names(known: Collection[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = list(known) if text == "all" else text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(known)}, all")
        return names

    return parse


def _parser() -> argparse.ArgumentParser:
    prog = "bench/save.py" if __package__ == "bench" else "fastshard bench"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="measure smaller and fewer cases, in under two minutes")
    add("--dir", type=Path, help="the directory to save into (default: the system's temporary one)")
    add("--shm", type=Path, metavar="DIR", help=f"the directory on a filesystem in memory (default: {SHM})")
    add(
        "--gib",
        type=float,
        metavar="N",
        help="the largest size of a case in GiB (default: 4; with --quick: 0.5)",
    )
    add(
        "--mib",
        type=float,
        metavar="N",
        help="the largest size of a case in MiB; 1 runs everything as a test",
    )
    add(
        "--rounds",
        type=int,
        metavar="N",
        help="the number of interleaved rounds (default: 6; with --quick: 3)",
    )
    add(
        "--slow-rounds",
        type=int,
        metavar="N",
        help="the number of rounds in which slow rivals take part (default: 3; with --quick: 1)",
    )
    add("--fit", action="store_true", help="make cases smaller where there is too little room or memory")
    add("--budget", type=float, metavar="SECONDS", help="end within this time, and leave out the last cases")
    add(
        "--cases",
        type=_names(ALL_CASES),
        metavar="A,B",
        help="the cases, as --list shows them (default: those of the device)",
    )
    add(
        "--rivals",
        type=_names(ALL_RIVALS),
        metavar="A,B",
        help="the rivals of every case (default: as each case says)",
    )
    add(
        "--modes",
        type=_names(MODES),
        default=list(MODES),
        metavar="A,B",
        help=f"what is measured: {', '.join(MODES)}",
    )
    add("--device", default="cpu", help="where the tensors are: cpu (default), cuda, cuda:1")
    add("--no-verify", action="store_true", help="do not compare the bytes written")
    add("--no-memory", action="store_true", help="do not measure memory in fresh processes")
    add("--no-disturbance", action="store_true", help="do not watch a job that runs beside a save")
    add("--json", type=Path, metavar="OUT", help="write every sample into this file")
    add("--plot", type=Path, metavar="OUT.png", help="draw the result into this file (needs matplotlib)")
    add("--list", action="store_true", help="print the cases, rivals, ceilings and goals, and stop")
    add("--probe", help=argparse.SUPPRESS)
    add("--rank", help=argparse.SUPPRESS)
    return parser


def _list() -> str:
    lines = []
    for title, known in (("cases", ALL_CASES), ("rivals", ALL_RIVALS), ("ceilings", CEILINGS)):
        lines += [title, *(f"  {name:23} {entry.about}" for name, entry in known.items())]
    lines.append("goals")
    lines += [f"  {g.on:5} {g.case:12} {g.by:20} {g.mode:8} {g.against:23} {g.limit:g}" for g in GOALS]
    return "\n".join(lines)


def _cases(args: argparse.Namespace) -> list[str]:
    """Those asked for, else those of the device (and of a quick run)."""
    if args.cases:
        return list(args.cases)
    kind = machine.device_kind(args.device)
    return [c.name for c in ALL_CASES.values() if kind in c.default_on and (c.quick or not args.quick)]


def _no_shm(directory: Path) -> str:
    """Why a directory is not one for the cases on tmpfs; empty if it is. Its room is each case's own question."""
    if not directory.is_dir():
        return f"no directory {directory}"
    filesystem, _ = machine.mount_of(directory)
    if filesystem not in machine.MEMORY_BACKED:
        return f"{directory} is {filesystem}, not memory"
    if not os.access(directory, os.W_OK):
        return f"{directory} cannot be written to"
    return ""


def _settings(args: argparse.Namespace, out: Path, shm: Path | None, no_shm: str) -> Settings:
    full = FULL_NBYTES / GIB
    nbytes = int(args.mib * MIB) if args.mib else int((args.gib or (0.5 if args.quick else full)) * GIB)
    short = args.quick or args.budget is not None
    ours = tuple({case.us for case in ALL_CASES.values()})
    measured = () if args.no_memory else ours if short else tuple(ALL_RIVALS)
    return Settings(
        out=out,
        shm=shm,
        no_shm=no_shm,
        stop=time.monotonic() + args.budget if args.budget is not None else None,
        fit=args.fit,
        disturbance=not (args.quick or args.no_disturbance),
        nbytes=nbytes,
        rounds=args.rounds or (3 if args.quick else 6),
        slow_rounds=args.slow_rounds or (1 if short else 3),
        modes=tuple(args.modes),
        slow_modes=tuple(mode for mode in args.modes if mode != DURABLE or not short),
        verify=not args.no_verify,
        memory=measured,
        device=args.device,
        preallocate=machine.mount_of(out.parent)[0] in machine.PREALLOCATE,
    )


def _rivals(args: argparse.Namespace, case: str) -> list[Rival]:
    names = args.rivals or ALL_CASES[case].rivals
    known = RANK_RIVALS if case in RANK_CASES else RIVALS
    # Of a group only those of the case: another case's sides save or load something else.
    return [
        rival
        for name, rival in known.items()
        if name in names and (case not in RANK_CASES or name in RANK_CASES[case].rivals)
    ]


def _refuse(args: argparse.Namespace, settings: Settings, free_nbytes: int) -> str | None:
    """Why this run cannot work; better said before minutes have passed."""
    if settings.nbytes < MIB // 4:
        return "the smallest size is 0.25 MiB"
    if args.shm and settings.no_shm:
        return f"--shm: {settings.no_shm}"
    if args.shm and machine.free_nbytes(args.shm) < 4 * min(settings.nbytes, 64 * MIB):
        return f"--shm has only {report.size(machine.free_nbytes(args.shm))} free"
    if settings.fit:
        return None
    # The file, a temporary beside it on some savers, and room to breathe.
    if free_nbytes < 2 * settings.nbytes:
        return f"--dir has {report.size(free_nbytes)} free; {report.size(2 * settings.nbytes)} are needed"
    available = machine.memory_nbytes("MemAvailable")
    needed = int((1.25 + (machine.device_kind(args.device) == CPU)) * settings.nbytes)
    if available < needed:
        return (
            f"{report.size(available)} of memory are available; the tensors and as much for the page cache "
            f"need {report.size(needed)}: choose a smaller --gib"
        )
    return None


def _run(args: argparse.Namespace, settings: Settings) -> Iterator[CaseResult]:
    """The cases in turn; where time is short each gets its part of what is left."""
    stop = settings.stop or (time.monotonic() + QUICK_SECONDS if args.quick else None)
    names = _cases(args)
    weights = [
        (len(_rivals(args, name)) + len(ALL_CASES[name].measures)) * len(ALL_CASES[name].modes)
        for name in names
    ]
    for i, name in enumerate(names):
        now = time.monotonic()
        deadline = now + (stop - now) * weights[i] / sum(weights[i:]) if stop else None
        if name in RANK_CASES:
            result = run_rank_case(RANK_CASES[name], _rivals(args, name), settings, deadline)
        else:
            result = run_case(CASES[name], _rivals(args, name), settings, deadline)
        result.device = machine.device_kind(args.device)
        print("\n" + report.table(result), flush=True)
        yield result


def _sound(results: list[CaseResult], settings: Settings) -> bool:
    """Nothing was written wrong, and fastshard, where it took part, was seen to write right."""
    rows = [row for result in results for row in result.rows]
    ours = [
        row for result in results for row in result.rows if row.rival in (US, result.us) and not row.absent
    ]
    unseen = settings.verify and any(not row.checked for row in ours)
    return not unseen and not any(row.wrong for row in rows)


def _document(
    args: argparse.Namespace, found: dict[str, Any], settings: Settings, results: list[CaseResult]
) -> dict[str, Any]:
    return {
        "schema": 1,
        "machine": found,
        "settings": {
            "nbytes": settings.nbytes,
            "rounds": settings.rounds,
            "slow_rounds": settings.slow_rounds,
            "modes": settings.modes,
            "verify": settings.verify,
            "quick": args.quick,
            "budget": args.budget,
        },
        "cases": [result.as_dict() for result in results],
        "verdict": [finding.as_dict() for finding in report.judge(results)],
        "sound": _sound(results, settings),
    }


def _write(path: Path, document: dict[str, Any]) -> None:
    """In one step: whoever is killed meanwhile leaves the document of before."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(document, indent=1, default=str) + "\n")
    beside.replace(path)


@contextlib.contextmanager
def _scratch(directory: Path | None) -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="fastshard-bench-", dir=directory))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 when bytes were wrong or could not be verified; goals never change it."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["small-saves"]:  # with options of its own
        from .small_saves import main as small_saves

        return small_saves(argv[1:])
    parser = _parser()
    args = parser.parse_args(argv)
    if args.probe:
        memory.probe(args.probe)
        return 0
    if args.rank:
        return be_a_rank(args.rank)
    if args.list:
        print(_list())
        return 0
    if args.plot:  # now, not after everything has been measured
        try:
            importlib.import_module("matplotlib")
        except ImportError:
            parser.error("--plot needs matplotlib")
    kind = machine.device_kind(args.device)
    if kind not in KINDS or (kind != CPU and not torch.cuda.is_available()):
        parser.error(f"--device {args.device}: torch has none here")
    if ":" in args.device:
        torch.cuda.set_device(args.device)  # streams and events are the current device's
    if args.dir:
        args.dir.mkdir(parents=True, exist_ok=True)
    directory = args.shm or SHM
    no_shm = _no_shm(directory)
    started = time.monotonic()
    results: list[CaseResult] = []
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(_scratch(args.dir))
        shm = None if no_shm else stack.enter_context(_scratch(directory)) / "out"
        settings = _settings(args, scratch / "out", shm, no_shm)
        found = machine.describe(scratch, args.device, None if no_shm else directory)
        reason = _refuse(args, settings, found["free_nbytes"])
        if reason:
            parser.error(reason)
        title = machine.headline(found)
        print(title, flush=True)
        for result in _run(args, settings):
            results.append(result)
            if args.json:
                _write(args.json, _document(args, found, settings, results))
    sound = _sound(results, settings)
    print("\n" + report.verdict(report.judge(results)))
    checked = sound and any(row.checked for result in results for row in result.rows)
    state = "verified" if checked else "NOT VERIFIED"
    print(f"\nbytes {state}; {time.monotonic() - started:.0f} s in all")
    if args.plot:
        report.plot(results, title, args.plot)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
