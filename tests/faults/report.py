# SPDX-License-Identifier: Apache-2.0
"""What came of it: a table by saver, and of each kind of wrong outcome the first few with the command that
repeats them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from cases import KILLED, KINDS, Case, Result
from power import Cut, Outcome, after_return

SHOWN = 3
"""Of each kind of wrong outcome of a saver."""
_CUT_KINDS = ("mixture", "lie", "died", "next", "leftover")


def show_cases(names: Iterable[str], results: Sequence[Result], shown: int = SHOWN) -> None:
    """Of the failing calls and the kills."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    for result in results:
        count = counts[result.case.saver]
        count["missed" if not result.reached else "killed" if result.case.error == KILLED else "failed"] += 1
        count.update({wrong.kind for wrong in result.wrong})
    _table(("failed", "killed", "missed", *KINDS), counts)
    _reproducers(
        (
            (
                result.case.saver,
                wrong.kind,
                wrong.text,
                f"{result.case.call} of {result.place}",
                reproducer(result.case),
            )
            for result in sorted(results, key=lambda result: result.case)
            for wrong in result.wrong
        ),
        shown,
    )


def show_cuts(names: Iterable[str], outcomes: Sequence[Outcome], shown: int = SHOWN) -> None:
    """Of the power cuts."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    for outcome in outcomes:
        counts[outcome.cut.saver]["after" if after_return(outcome.cut) else "during"] += 1
        counts[outcome.cut.saver].update({wrong.kind for wrong in outcome.wrong})
    _table(("during", "after", *_CUT_KINDS), counts)
    _reproducers(
        (
            (outcome.cut.saver, wrong.kind, wrong.text, outcome.place, reproducer_of_cut(outcome.cut))
            for outcome in sorted(outcomes, key=lambda outcome: outcome.cut)
            for wrong in outcome.wrong
        ),
        shown,
    )


def reproducer(case: Case) -> str:
    return (
        f"python tests/faults --saver {case.saver} --call {case.call} --nth {case.nth} --error {case.error}"
    )


def reproducer_of_cut(cut: Cut) -> str:
    return f"python tests/faults --only power --saver {cut.saver} --cut {cut.number}"


def _table(columns: Sequence[str], counts: dict[str, Counter[str]]) -> None:
    total = sum(counts.values(), Counter())
    rows = [("saver", *columns)]
    for name, count in (*counts.items(), ("all", total)):
        rows.append((name, *(str(count[column]) if count[column] else "." for column in columns)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print()
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]))


def _reproducers(wrong: Iterable[tuple[str, str, str, str, str]], shown: int) -> None:
    count: Counter[tuple[str, str]] = Counter()
    for saver, kind, text, place, command in wrong:
        count[saver, kind] += 1
        if count[saver, kind] <= shown:
            print(f"\n{saver}: {kind}: {text.strip()}\n    at {place}\n    {command}", flush=True)


def write(result: Result | Outcome, file: TextIO) -> None:
    """As a line of JSON."""
    told: dict[str, Any] = {"place": result.place, "wrong": [wrong._asdict() for wrong in result.wrong]}
    if isinstance(result, Result):
        told |= {**result.case._asdict(), "reached": result.reached, "outcome": result.outcome}
        told["command"] = reproducer(result.case)
    else:
        told |= {**result.cut._asdict(), "command": reproducer_of_cut(result.cut)}
    print(json.dumps(told), file=file, flush=True)
