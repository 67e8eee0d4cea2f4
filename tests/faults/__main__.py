# SPDX-License-Identifier: Apache-2.0
"""``python tests/faults``: every call of every saver fails once, and every saver is killed at every change; power cuts.

``--saver NAME`` (a part of a name; more than once) chooses; ``--call``, ``--nth`` and ``--error`` repeat one case and say more
about it; ``--sample N`` takes N cases of each saver, evenly spread. Exit status 1: something was wrong.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
warnings.filterwarnings("ignore")

import calls  # noqa: E402
import cases  # noqa: E402
import places as filesystems  # noqa: E402
from cases import KILLED, KINDS, Case, Result, Template  # noqa: E402
from savers import Saver, all_savers  # noqa: E402

SHOWN: Final = 3
"""Reproducers of each kind of wrong outcome of a saver."""
SKIPPED: Final = 77
_templates: dict[str, Template] = {}
_places = cases.Places("", "")


def main() -> int:
    given = _arguments()
    if refusal := calls.refusal():
        print(f"skipped: {refusal}")
        return SKIPPED
    savers = {
        name: saver
        for name, saver in all_savers().items()
        if not given.saver or any(part in name for part in given.saver)
    }
    if not savers:
        print("no such saver; there are", ", ".join(all_savers()), file=sys.stderr)
        return 2
    global _places
    with filesystems.places(given.dir) as (disk, memory):
        _places = cases.Places(disk, memory)
        began = time.monotonic()
        for saver in savers.values():
            if saver.missing:
                print(f"{saver.name}: skipped, as it needs {saver.missing}")
            else:
                _warm(saver)
                _templates[saver.name] = cases.make_template(saver, _places)
        gc.collect()
        gc.freeze()  # so that a collection in a child touches, and so copies, nothing of what is here
        todo = [case for template in _templates.values() for case in _cases(template, given)]
        print(f"{len(todo)} cases of {len(_templates)} savers; ready after {time.monotonic() - began:.0f} s")
        results = list(_run(todo, given))
    _show(results, given)
    return int(any(result.wrong for result in results))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/faults", description=__doc__)
    parser.add_argument("--saver", action="append", help="part of a saver's name; may be repeated")
    parser.add_argument("--call", help="only this system call")
    parser.add_argument("--nth", type=int, help="only the Nth one")
    parser.add_argument("--error", help=f"only this errno, as EIO, or {KILLED}")
    parser.add_argument("--sample", type=int, metavar="N", help="N cases of each saver")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that a save may take")
    parser.add_argument("--dir", help="work in here (default: with root, an ext4 in memory)")
    parser.add_argument("--out", help="write each result to this file, as JSON lines")
    return parser.parse_args()


def _warm(saver: Saver) -> None:
    """Once in this process, so that children import nothing."""
    import fastshard

    root = _places.root(saver)
    cases._fill(root, None)
    try:
        if saver.installed:
            with fastshard.installed():
                saver.before(root)
                saver.save(root)
        else:
            saver.before(root)
            saver.save(root)
    finally:
        cases.shutil.rmtree(root)


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


def _one(job: tuple[Case, float]) -> Result:
    case, limit = job
    return cases.run_case(case, _templates[case.saver], _places, limit)


def _run(todo: list[Case], given: argparse.Namespace) -> Iterable[Result]:
    jobs = [(case, given.limit) for case in todo]
    out = open(given.out, "w", encoding="utf-8") if given.out else None  # noqa: SIM115
    shown = time.monotonic()
    with multiprocessing.get_context("fork").Pool(given.jobs) as pool:
        for done, result in enumerate(pool.imap_unordered(_one, jobs, chunksize=4), 1):
            if out is not None:
                print(json.dumps(_as_dict(result)), file=out, flush=True)
            if time.monotonic() - shown > 30:
                shown = time.monotonic()
                print(f"{done} of {len(jobs)}", file=sys.stderr, flush=True)
            yield result
    if out is not None:
        out.close()


def _as_dict(result: Result) -> dict[str, Any]:
    return {
        **result.case._asdict(),
        "reached": result.reached,
        "outcome": result.outcome,
        "place": result.place,
        "wrong": [wrong._asdict() for wrong in result.wrong],
    }


def reproducer(case: Case) -> str:
    return f"python tests/faults --saver {case.saver} --call {case.call} --nth {case.nth} --error {case.error}"


def _show(results: list[Result], given: argparse.Namespace) -> None:
    by_saver: dict[str, list[Result]] = {}
    for result in results:
        by_saver.setdefault(result.case.saver, []).append(result)
    rows = [("saver", "failed", "killed", "missed", *KINDS)]
    total: Counter[str] = Counter()
    for name in _templates:
        counts = _counts(by_saver.get(name, []))
        total += counts
        rows.append((name, *_row(counts)))
    rows.append(("all", *_row(total)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]))
    for name in _templates:
        _show_wrong(by_saver.get(name, []), 10**6 if given.call else SHOWN)


def _counts(results: list[Result]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for result in results:
        counts["missed" if not result.reached else "killed" if result.case.error == KILLED else "failed"] += 1
        counts.update({wrong.kind for wrong in result.wrong})
    return counts


def _row(counts: Counter[str]) -> list[str]:
    return [str(counts[what]) if counts[what] else "." for what in ("failed", "killed", "missed", *KINDS)]


def _show_wrong(results: list[Result], shown: int) -> None:
    count: Counter[str] = Counter()
    for result in sorted(results, key=lambda result: result.case):
        for wrong in result.wrong:
            count[wrong.kind] += 1
            if count[wrong.kind] <= shown:
                print(f"\n{result.case.saver}: {wrong.kind}: {wrong.text}")
                print(f"    at {result.case.call} of {result.place}\n    {reproducer(result.case)}")


if __name__ == "__main__":
    sys.exit(main())
