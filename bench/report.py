# SPDX-License-Identifier: Apache-2.0
"""What was found, for people: a table for each case, the verdict on the goals, a plot."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .goals import DEVICE_MEMORY, GOALS, HIGH_WATER, MEMORY, OVER_BUDGET, PINNED, PLANNING, READ, STEP, Goal
from .samples import FILE, GIB, JOB, LOST, MIB, RATED, STALL, WRITTEN, CaseResult, Memory, Ratio, Row, ratio

_COLOURS = {"return": "#2b6cb0", "durable": "#dd8452"}
_WITHIN = {"MiB": "extra", "%": "longer", "us": "a tensor's", "bytes": "for each wanted,"}
_TITLES = {
    "return": "time to return",
    "durable": "time to stable storage",
    STALL: "until a save returned",
    FILE: "until its files stood",
    JOB: "a job with its saves",
    LOST: "of that lost to saves",
}


def size(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= 0.1 * GIB else f"{nbytes / MIB:.2f} MiB"


def _columns(lines: list[list[str]]) -> str:
    """First column to the left, the rest to the right, except the last, which may be long."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    widths[-1] = 0
    out = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths)]
        cells[0], cells[-1] = line[0].ljust(widths[0]), line[-1]
        out.append("  " + "  ".join(cells).rstrip())
    return "\n".join(out)


def _times(found: Ratio | None) -> tuple[str, str]:
    return (f"{found.median:.2f}", f"{found.best:.2f}") if found else ("-", "-")


def _line(result: CaseResult, row: Row) -> list[str]:
    name = f"[{row.rival}]" if row.ceiling else row.rival
    note = "; ".join(filter(None, [row.error or row.checked, *row.fallbacks]))
    if not row.seconds or row.wrong:
        return [name, *["-"] * 10, note]
    to_base = _times(ratio(row, result.row(result.base, row.mode)))
    to_ceiling = _times(ratio(row, result.ceiling(row.mode)))
    rates = ["-", "-"]
    if row.mode in RATED:
        rates = [f"{result.rate(row.best):.2f}", f"{result.rate(row.median):.2f}"]
    cpu = f"{sorted(row.cpu_seconds)[len(row.cpu_seconds) // 2]:.2f}" if row.cpu_seconds else "-"
    return [
        name,
        str(len(row.seconds)),
        f"{row.best:.3f}",
        f"{row.median:.3f}",
        f"{row.worst:.3f}",
        *rates,
        *to_base,
        to_ceiling[0],
        cpu,
        note,
    ]


def _mib(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / MIB:.1f}"


def _memory_table(result: CaseResult) -> str:
    lines = [["extra memory, MiB", "held", "high water", "of the GPU", "pinned", "allowed", ""]]
    for m in result.memory:
        figures = (m.extra_nbytes, m.high_water_nbytes, m.device_nbytes, m.pinned_nbytes, m.budget_nbytes)
        lines.append([m.rival, *map(_mib, figures), m.error or ""])
    return _columns(lines)


def _disturbance_table(result: CaseResult) -> str:
    units = ["step ms", "during", "longer %", "worst", "steps", "lost ms", "saves s"]
    lines = [["a job beside the saves", *units, ""]]
    for d in result.disturbance:
        figures = [d.step_ms, d.during_ms, d.longer, d.worst_ms, float(d.steps), d.excess_ms, d.save_s]
        shown = ["-" if f is None else f"{f:.{digits}f}" for f, digits in zip(figures, (3, 3, 1, 2, 0, 1, 3))]
        lines.append([d.rival, *shown, d.error or ""])
    return _columns(lines)


def table(result: CaseResult) -> str:
    """One case: a block for each mode, then the memory, then what a job noticed. Ceilings in brackets."""
    if result.skipped:
        return f"{result.name}: {result.about}\n  skipped: {result.skipped}"
    count = f"{result.tensors} tensors, {result.files} file" + ("s" if result.files > 1 else "")
    fitted = ", for want of room" if result.fitted else ""
    parts = [f"{result.name}: {result.about} ({size(result.nbytes)}{fitted}, {count})"]
    for mode in _TITLES:
        rows = [row for row in result.rows if row.mode == mode]
        if not rows:
            continue
        bound = result.ceiling(mode)
        over = "of " + (bound.rival if bound else "ceiling")
        units = ["n", "best s", "median s", "worst s", "best GiB/s", "median GiB/s"]
        head = [_TITLES[mode], *units, f"x {result.base}", "x at best", over, "cpu s", "output"]
        parts.append(_columns([head, *(_line(result, row) for row in rows)]))
    if result.memory:
        parts.append(_memory_table(result))
    if result.disturbance:
        parts.append(_disturbance_table(result))
    return "\n".join(parts)


@dataclass
class Finding:
    """A goal beside what was measured."""

    goal: Goal
    state: str
    """reached (by the median of the ratios and by the best times), at median only, at best only, not
    reached, not measured."""
    value: float | None = None
    best: float | None = None
    allowed: float | None = None
    """What the ceiling of the same run would have reached of this goal."""
    nbytes: int | None = None
    full_nbytes: int | None = None

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self)
        found["goal"]["unit"] = self.goal.unit
        return found


def _extra(found: Memory, kind: str) -> int | None:
    return {
        MEMORY: found.extra_nbytes,
        HIGH_WATER: found.high_water_nbytes,
        DEVICE_MEMORY: found.device_nbytes,
        PINNED: found.pinned_nbytes,
        OVER_BUDGET: _less(found.extra_nbytes, found.budget_nbytes),
    }[kind]


def _less(nbytes: int | None, allowed: int | None) -> int | None:
    return None if nbytes is None or allowed is None else nbytes - allowed


def _within(goal: Goal, result: CaseResult) -> float | None:
    """What must stay within the goal's limit, in its unit."""
    if goal.against == STEP:
        return next((d.longer for d in result.disturbance if d.rival == goal.by), None)
    if goal.against == PLANNING:
        row = result.row(goal.by, goal.mode)
        return (
            1e6 * statistics.median(row.plan_seconds) / result.tensors if row and row.plan_seconds else None
        )
    if goal.against == READ:
        row = result.row(goal.by, goal.mode)
        return row.detail["read_ratio"] if row and row.detail else None
    known = next((_extra(m, goal.against) for m in result.memory if m.rival == goal.by), None)
    return None if known is None else known / MIB


def _judge(goal: Goal, result: CaseResult) -> Finding:
    sizes = {"nbytes": result.nbytes, "full_nbytes": result.full_nbytes}
    if goal.unit:
        value = _within(goal, result)
        if value is None:
            return Finding(goal, "not measured")
        state = "reached" if value <= goal.limit else "not reached"
        return Finding(goal, state, value, value, **sizes)
    against = result.row(goal.against, goal.mode)
    found = ratio(result.row(goal.by, goal.mode), against)
    if found is None:
        return Finding(goal, "not measured")
    # A stall of the other side lifts the median, one of ours lowers it: both figures have to agree.
    state = {
        (True, True): "reached",
        (True, False): "at median only",
        (False, True): "at best only",
        (False, False): "not reached",
    }[found.median >= goal.limit, found.best >= goal.limit]
    ceiling = result.ceiling(goal.mode)
    bound = None if ceiling is against else ratio(ceiling, against)
    allowed = bound.median if bound else None
    return Finding(goal, state, found.median, found.best, allowed, **sizes)


def judge(results: Iterable[CaseResult]) -> list[Finding]:
    """Every goal of the cases that ran, for the kind of device they ran on."""
    by_name = {result.name: result for result in results}
    asked = [goal for goal in GOALS if goal.case in by_name and goal.on == by_name[goal.case].device]
    return [_judge(goal, by_name[goal.case]) for goal in asked]


def verdict(findings: list[Finding]) -> str:
    """The goals, one a line; a remark where the size was not the goal's."""
    lines = [["goal", "wanted", "found", "at best", "ceiling", "verdict"]]
    for f in findings:
        goal = f.goal
        if goal.unit:
            whose = f" of {goal.by}" if goal.against == READ else ""
            name, wanted = (
                f"{goal.case}, {_WITHIN[goal.unit]} {goal.against}{whose}",
                f"<= {goal.limit:g} {goal.unit}",
            )
        else:
            several = len({other.by for other in GOALS if other.case == goal.case}) > 1
            who = f" of {goal.by}" if several else ""
            name, wanted = f"{goal.case}, {goal.mode}{who}, to {goal.against}", f"{goal.limit:.2f} x"
        figures = [f"{v:.2f}" if v is not None else "-" for v in (f.value, f.best, f.allowed)]
        remark = ""
        if f.nbytes and f.full_nbytes and f.nbytes < 0.95 * f.full_nbytes:
            remark = f" (at {size(f.nbytes)} instead of {size(f.full_nbytes)})"
        lines.append([name, wanted, *figures, f.state + remark])
    return "verdict\n" + _columns(lines)


def plot(results: list[CaseResult], title: str, path: Path) -> None:
    """A panel for each case: median GiB/s, whiskers from worst to best, the ceilings as lines."""
    # Of those that moved bytes in the time that was measured.
    results = [r for r in results if any(row.mode in _COLOURS for row in r.rows)]
    if not results:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import patches, pyplot

    across = min(2, len(results))
    bars = [len(_rivals_of(result)) for result in results]
    heights = [1.4 + 0.42 * max(bars[i : i + across]) for i in range(0, len(results), across)]
    figure, axes = pyplot.subplots(
        len(heights),
        across,
        figsize=(7.5 * across, sum(heights) + 1.2),
        height_ratios=heights,
        squeeze=False,
    )
    for axis, result in zip(axes.flat, results):
        _panel(axis, result)
    for axis in axes.flat[len(results) :]:
        axis.set_visible(False)
    handles = [patches.Patch(color=_COLOURS[mode]) for mode in WRITTEN]
    labels = [_TITLES[mode] for mode in WRITTEN]
    figure.legend(handles, labels, loc="lower center", ncols=2, frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout(rect=(0, 0.5 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _rivals_of(result: CaseResult) -> list[str]:
    return list(dict.fromkeys(row.rival for row in result.rows if not row.ceiling and row.seconds))


def _panel(axis: Any, result: CaseResult) -> None:
    names = _rivals_of(result)
    top = 0.0
    for shift, (mode, colour) in zip((-0.2, 0.2), _COLOURS.items()):
        bound = result.ceiling(mode)
        if bound:
            rate = result.rate(bound.median)
            top = max(top, rate)
            axis.axvline(rate, color=colour, linestyle="--", linewidth=1, zorder=0)
            above = axis.get_xaxis_transform()  # x in GiB/s, y from 0 to 1 over the panel
            label = f"{bound.rival} {rate:.2f}\n" if mode == WRITTEN[0] else f"\n{bound.rival} {rate:.2f}"
            axis.text(rate, 1.01, label, transform=above, ha="center", fontsize=7, color=colour)
        for i, name in enumerate(names):
            row = result.row(name, mode)
            if row is None:
                continue
            rate, best = result.rate(row.median), result.rate(row.best)
            axis.barh(i + shift, rate, height=0.38, color=colour)
            axis.plot([result.rate(row.worst), best], [i + shift] * 2, color="#333333", linewidth=1)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
            at = (max(rate, best), i + shift)
            axis.annotate(
                f"{rate:.2f}", at, (4, 0), textcoords="offset points", va="center", fontsize=7, bbox=box
            )
            top = max(top, best)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, top * 1.15 or 1)
    axis.set_xlabel("GiB/s, median; line from worst to best; dashed: ceiling, median", fontsize=7)
    axis.tick_params(axis="x", labelsize=7)
    axis.set_title(f"{result.name} ({size(result.nbytes)})", fontsize=9, loc="left", pad=22)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
