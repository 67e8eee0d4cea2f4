# SPDX-License-Identifier: Apache-2.0
"""``python tests/faults``: every system call of every saver fails once, every saver is killed at every change
it makes, and the power fails while every durable saver saves.

``--saver NAME`` (a saver, or a part of names; more than once) chooses; ``--call``, ``--nth`` and ``--error``
repeat one case, ``--cut`` a power cut; ``--sample N`` takes N cases of each saver, evenly spread. Exit status
1: something was wrong; 77: calls cannot be watched here.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_VERBOSITY": "error",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TQDM_DISABLE": "1",
}
warnings.filterwarnings("ignore")

import calls  # noqa: E402
import cases  # noqa: E402
import places as filesystems  # noqa: E402
import power  # noqa: E402
import report  # noqa: E402
from cases import KILLED, Case, Result, Template  # noqa: E402
from savers import Saver, all_savers  # noqa: E402

SKIPPED: Final = 77
CUTS: Final = 60
"""Of each durable saver."""
_templates: dict[str, Template] = {}
_recordings: dict[str, power.Recording] = {}
_places = cases.Places("", "")
Job = TypeVar("Job")
Done = TypeVar("Done", Result, power.Outcome)


def main() -> int:
    given = _arguments()
    if refusal := calls.refusal():
        print(f"skipped: {refusal}")
        return SKIPPED
    savers = _chosen(given.saver)
    if not savers:
        print("no such saver; there are", ", ".join(all_savers()), file=sys.stderr)
        return 2
    global _places
    results: list[Result] = []
    outcomes: list[power.Outcome] = []
    with filesystems.places(given.dir) as (disk, memory):
        _places = cases.Places(disk, memory)
        no_power = power.refusal()
        if given.only != "calls" and no_power:
            print(f"no power cuts: {no_power}")
        cutting = given.only != "calls" and not no_power and given.call is None
        began = time.monotonic()
        for saver in savers:
            if saver.missing:
                print(f"{saver.name}: skipped, as it needs {saver.missing}")
            elif given.only != "power" or saver.durable:
                _prepare(saver, cutting and saver.durable and not saver.memory)
        gc.collect()
        gc.freeze()  # so that a collection in a child touches, and so copies, nothing of what is here
        print(f"{len(_templates)} savers made ready in {time.monotonic() - began:.0f} s", flush=True)
        if given.only != "power":
            todo = [case for template in _templates.values() for case in _cases(template, given)]
            print(f"{len(todo)} failing calls and kills", flush=True)
            results = list(_all(_one_case, [(case, given.limit) for case in todo], given))
        if cutting:
            numbers = range(given.cuts) if given.cut is None else [given.cut]
            cuts = [power.Cut(name, number) for name in _recordings for number in numbers]
            print(f"{len(cuts)} power cuts", flush=True)
            outcomes = list(_all(_one_cut, cuts, given))
    shown = sys.maxsize if given.call or given.cut is not None else report.SHOWN
    if given.only != "power":
        report.show_cases(_templates, results, shown)
    if cutting:
        report.show_cuts(_recordings, outcomes, shown)
    return int(any(result.wrong for result in (*results, *outcomes)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/faults", description=__doc__)
    parser.add_argument("--saver", action="append", help="a saver, or part of savers' names; may be repeated")
    parser.add_argument(
        "--only", choices=("calls", "power"), help="only failing calls and kills, or power cuts"
    )
    parser.add_argument("--call", help="only this system call")
    parser.add_argument("--nth", type=int, help="only the Nth one")
    parser.add_argument("--error", help=f"only this errno, as EIO, or {KILLED}")
    parser.add_argument("--sample", type=int, metavar="N", help="N cases of each saver, evenly spread")
    parser.add_argument(
        "--cuts", type=int, default=CUTS, metavar="N", help="power cuts of each durable saver"
    )
    parser.add_argument("--cut", type=int, metavar="N", help="only the Nth one")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that a save may take")
    parser.add_argument("--dir", help="work in here (default: with root, an ext4 in memory)")
    parser.add_argument("--out", help="write each result to this file, as JSON lines")
    given = parser.parse_args()
    if given.out:
        open(given.out, "w").close()
    return given


def _chosen(wanted: Sequence[str] | None) -> list[Saver]:
    """Those whose name is given; if there is none, those of whose names a part is given."""
    savers = all_savers()
    found = [] if wanted is None else [savers[name] for name in savers if name in wanted]
    parts = [part for part in wanted or [""] if part not in savers]
    return found + [
        saver for saver in savers.values() if saver not in found and any(part in saver.name for part in parts)
    ]


def _prepare(saver: Saver, recorded: bool) -> None:
    cases.warm(saver, _places)
    template = _templates[saver.name] = cases.make_template(saver, _places)
    if recorded:
        _recordings[saver.name] = power.record(saver, template, _places.memory)


def _cases(template: Template, given: argparse.Namespace) -> list[Case]:
    found = [
        case
        for case in cases.cases_of(template, _places.root(template.saver))
        if given.call in (None, case.call)
        and given.nth in (None, case.nth)
        and given.error in (None, case.error)
    ]
    if given.sample is None or len(found) <= given.sample:
        return found
    return [found[i * len(found) // given.sample] for i in range(given.sample)]


def _one_case(job: tuple[Case, float]) -> Result:
    case, limit = job
    return cases.run_case(case, _templates[case.saver], _places, limit)


def _one_cut(which: power.Cut) -> power.Outcome:
    return power.cut(_recordings[which.saver], which, _places.memory)


def _all(do: Callable[[Any], Done], jobs: Sequence[Job], given: argparse.Namespace) -> Iterator[Done]:
    """In processes beside each other; what is here is theirs, too, as they are forked."""
    shown = time.monotonic()
    with multiprocessing.get_context("fork").Pool(given.jobs, calls.end_with_parent) as pool:
        for done, result in enumerate(pool.imap_unordered(do, jobs, chunksize=2), 1):
            if given.out:
                with open(given.out, "a", encoding="utf-8") as file:
                    report.write(result, file)
            if time.monotonic() - shown > 30:
                shown = time.monotonic()
                print(f"{done} of {len(jobs)}", file=sys.stderr, flush=True)
            yield result


if __name__ == "__main__":
    sys.exit(main())
