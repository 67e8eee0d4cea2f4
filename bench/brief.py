# SPDX-License-Identifier: Apache-2.0
"""The short table of a run, from its JSON: what fits on a screen. Of the standard library only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MOST_LINES = 60
GIB, MIB = 1 << 30, 1 << 20


def brief(phases: Iterable[dict[str, Any]], bench: dict[str, Any] | None) -> str:
    """At most 60 lines: how the phases went, a line for each case and mode, the goals."""
    lines = [f"{p['name']}: {p['state']}, {p['seconds']:.0f} s; {p['note']}" for p in phases]
    if bench is None:
        lines.append("no bench")
    else:
        cases = bench["cases"]
        lines = [_machine(bench["machine"]), *lines, *_cases(cases), *_disturbances(cases), *_goals(bench)]
    lines = [line.rstrip()[:150] for line in lines]
    return "\n".join(lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], "..."])


def _machine(found: dict[str, Any]) -> str:
    device = f"{found['gpu']}, driver {found.get('driver', '?')}" if "gpu" in found else found["device"]
    return (
        f"{device}; {found['cpus']} CPUs, {found['memory_nbytes'] / GIB:.0f} GiB, {found['filesystem']}; "
        f"torch {found['torch']}, safetensors {found['safetensors']}, fastshard {found['commit'] or '?'}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _cases(cases: list[dict[str, Any]]) -> list[str]:
    head = f"{'GiB/s, medians':24}{'GiB':>6}{'us':>8}{'them':>8}{'x':>7}{'ceiling':>9}{'of it':>7}"
    lines = [head]
    for case in cases:
        if case["skipped"]:
            lines.append(f"{case['name']:24}skipped: {case['skipped']}")
            continue
        rows = {(row["rival"], row["mode"]): row for row in case["rows"]}
        for mode in dict.fromkeys(row["mode"] for row in case["rows"]):
            ours, theirs = rows.get((case["us"], mode), {}), rows.get((case["base"], mode), {})
            bound, times = ours.get("of_ceiling") or {}, ours.get("ratio") or {}
            over = rows.get((bound.get("against", ""), mode), {})
            figures = (ours.get("median_gib_s"), theirs.get("median_gib_s"), times.get("median"))
            shown = [_number(f) for f in (*figures, over.get("median_gib_s"), bound.get("median"))]
            lines.append(
                f"{case['name'] + ', ' + mode:24}{case['nbytes'] / GIB:>6.2f}{shown[0]:>8}{shown[1]:>8}{shown[2]:>7}"
                f"{shown[3]:>9}{shown[4]:>7}  {ours.get('error') or bound.get('against', '')}"
            )
            lines += [f"  fell back: {text}" for text in ours.get("fallbacks", ())]
    return lines


def _disturbances(cases: list[dict[str, Any]]) -> list[str]:
    lines = []
    for case in cases:
        lost = [d for d in case["disturbance"] if d["excess_ms"] is not None]
        told = [
            f"{d['rival']} {d['longer']:.1f} % a step, {d['excess_ms']:.0f} ms of {d['save_s'] * 1000:.0f}"
            for d in lost
        ]
        if told:
            lines.append(f"a job beside {case['name']} lost: {', '.join(told)}")
    return lines


def _goals(bench: dict[str, Any]) -> list[str]:
    lines = [f"bytes {'verified' if bench['sound'] else 'NOT VERIFIED'}; goals:"]
    for finding in bench["verdict"]:
        goal = finding["goal"]
        within = goal.get("unit")
        what = f"{goal['case']}, {goal['mode']}, to {goal['against']}"
        what = f"{goal['case']}, {goal['against']}, {within} at most" if within else what
        figure = _number(finding["value"])
        lines.append(f"  {what:44}{goal['limit']:>8g}{figure:>9}  {finding['state']}")
    return lines
