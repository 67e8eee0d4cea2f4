# SPDX-License-Identifier: Apache-2.0
"""``python bench/save.py``: fastshard beside what people save with today, and beside the hardware."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Run as a script: again, as a module of its package. The checkout goes last on the path, so that an
    # installed fastshard is the one measured and not a source folder without its native part.
    here = Path(__file__).resolve().parent
    sys.path = [*(path for path in sys.path if path != str(here)), str(here.parent)]
    sys.exit(importlib.import_module(f"{here.name}.save").main())

from . import machine, memory, report
from .cases import CASES, GOALS
from .ceilings import CEILINGS
from .harness import Settings, run_case
from .rivals import BASE, RIVALS, US, Rival
from .samples import GIB, MIB, MODES, RETURN, CaseResult

QUICK_SECONDS = 90.0
"""Rounds of a quick run stop here, on however slow a machine; at least one round is always run."""


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
    add("--quick", action="store_true", help="smaller and fewer: under two minutes")
    add("--dir", type=Path, help="directory to save into (default: the system's temporary one)")
    add("--gib", type=float, metavar="N", help="largest size of a case in GiB (default 4; quick: 0.5)")
    add("--mib", type=float, metavar="N", help="the same in MiB; 1 runs everything as a test")
    add("--rounds", type=int, metavar="N", help="interleaved rounds (default 6; quick: 3)")
    add("--slow-rounds", type=int, metavar="N", help="of which slow rivals run (default 3; quick: 1)")
    add("--cases", type=_names(CASES), default=list(CASES), metavar="A,B", help="see --list")
    add("--rivals", type=_names(RIVALS), metavar="A,B", help="in every case (default: as each case says)")
    add("--modes", type=_names(MODES), default=list(MODES), metavar="A,B", help="return, durable")
    add("--device", default="cpu", help="where the tensors are: cpu (default), cuda, cuda:1")
    add("--no-verify", action="store_true", help="do not compare the bytes written")
    add("--no-memory", action="store_true", help="do not measure memory in fresh processes")
    add("--json", type=Path, metavar="OUT", help="write every sample here")
    add("--plot", type=Path, metavar="OUT.png", help="draw it (needs matplotlib)")
    add("--list", action="store_true", help="cases, rivals, ceilings and goals; then stop")
    add("--probe", help=argparse.SUPPRESS)
    return parser


def _list() -> str:
    lines = []
    for title, known in (("cases", CASES), ("rivals", RIVALS), ("ceilings", CEILINGS)):
        lines += [title, *(f"  {name:20} {entry.about}" for name, entry in known.items())]
    lines.append("goals")
    lines += [f"  {g.case:20} {g.mode:8} {g.against:20} {g.limit:g}" for g in GOALS]
    return "\n".join(lines)


def _settings(args: argparse.Namespace, out: Path) -> Settings:
    nbytes = int(args.mib * MIB) if args.mib else int((args.gib or (0.5 if args.quick else 4)) * GIB)
    measured = () if args.no_memory else (US,) if args.quick else tuple(RIVALS)
    return Settings(
        out=out,
        nbytes=nbytes,
        rounds=args.rounds or (3 if args.quick else 6),
        slow_rounds=args.slow_rounds or (1 if args.quick else 3),
        modes=tuple(args.modes),
        slow_modes=tuple(mode for mode in args.modes if mode == RETURN or not args.quick),
        verify=not args.no_verify,
        memory=measured,
        device=args.device,
        preallocate=machine.mount_of(out.parent)[0] in machine.PREALLOCATE,
    )


def _rivals(args: argparse.Namespace, case: str) -> list[Rival]:
    names = args.rivals or CASES[case].rivals
    return [rival for name, rival in RIVALS.items() if name in names]


def _refuse(settings: Settings, free_nbytes: int) -> str | None:
    """Why this run cannot work; better said before minutes have passed."""
    if settings.nbytes < MIB // 4:
        return "the smallest size is 0.25 MiB"
    # The file, a temporary beside it on some savers, and room to breathe.
    if free_nbytes < 2 * settings.nbytes:
        return f"--dir has {report.size(free_nbytes)} free; {report.size(2 * settings.nbytes)} are needed"
    available = machine.memory_nbytes("MemAvailable")
    if available < 2.25 * settings.nbytes:
        return (
            f"{report.size(available)} of memory are available; the tensors and as much for the page cache "
            f"need {report.size(int(2.25 * settings.nbytes))}: choose a smaller --gib"
        )
    return None


def _run(args: argparse.Namespace, settings: Settings) -> list[CaseResult]:
    """The cases in turn; in a quick run each gets its part of the time that is left."""
    stop = time.monotonic() + QUICK_SECONDS
    weights = [len(_rivals(args, name)) + len(CASES[name].measures) for name in args.cases]
    results: list[CaseResult] = []
    for i, name in enumerate(args.cases):
        now = time.monotonic()
        deadline = now + (stop - now) * weights[i] / sum(weights[i:]) if args.quick else None
        result = run_case(CASES[name], _rivals(args, name), settings, deadline)
        results.append(result)
        print("\n" + report.table(result), flush=True)
    return results


def _sound(results: list[CaseResult], settings: Settings) -> bool:
    """Nothing was written wrong, and fastshard, where it took part, was seen to write right."""
    rows = [row for result in results for row in result.rows]
    unseen = settings.verify and any(row.rival == US and not row.checked for row in rows)
    return not unseen and not any(row.wrong for row in rows)


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 when bytes were wrong or could not be verified; goals never change it."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.probe:
        memory.probe(args.probe)
        return 0
    if args.list:
        print(_list())
        return 0
    if args.dir:
        args.dir.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="fastshard-bench-", dir=args.dir))
    try:
        found = machine.describe(scratch, args.device)
        settings = _settings(args, scratch / "out")
        reason = _refuse(settings, found["free_nbytes"])
        if reason:
            parser.error(reason)
        title = machine.headline(found)
        print(title, flush=True)
        started = time.monotonic()
        results = _run(args, settings)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    findings = report.judge(results)
    sound = _sound(results, settings)
    print("\n" + report.verdict(findings))
    state = "verified" if settings.verify and sound else "NOT VERIFIED"
    print(f"\nbytes {state}; {time.monotonic() - started:.0f} s in all")
    if args.json:
        document = {
            "schema": 1,
            "machine": found,
            "settings": {
                "nbytes": settings.nbytes,
                "rounds": settings.rounds,
                "slow_rounds": settings.slow_rounds,
                "modes": settings.modes,
                "verify": settings.verify,
                "quick": args.quick,
            },
            "cases": [result.as_dict(BASE) for result in results],
            "verdict": [finding.as_dict() for finding in findings],
            "sound": sound,
        }
        args.json.write_text(json.dumps(document, indent=1, default=str) + "\n")
    if args.plot:
        report.plot(results, title, args.plot)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
