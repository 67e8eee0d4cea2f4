# SPDX-License-Identifier: Apache-2.0
"""What was measured: rows of samples and their statistics. Plain data, no torch."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

MIB = 1 << 20
GIB = 1 << 30

RETURN = "return"
"""The call came back and the file can be read by others; its pages may still be dirty."""
DURABLE = "durable"
"""The files and their directory are on stable storage."""
WRITTEN = (RETURN, DURABLE)
STALL = "stall"
"""The call came back, the values are captured, and the tensors may be changed. The files appear later."""
MODES = (*WRITTEN, STALL)
"""What can be asked for."""
FILE, JOB, LOST = "file", "job", "lost"
"""Measured beside a stall: the time from the call until the files stood; that of the job that goes on after the call (or
makes several saves), from the first call to its last step; and what of that is lost to saves, which is the difference to
a job without saves in the same round, or to the job's own steps without a save."""
RATED = (*WRITTEN, FILE)
"""Where bytes have moved in the time that was measured."""
LEAST_LOST_S = 1e-3
"""A difference may be within the noise, or negative. In ratios it counts as so much."""


@dataclass
class Row:
    """All samples of one rival (or ceiling) in one case and mode."""

    rival: str
    mode: str
    ceiling: bool = False
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """User plus system time of the whole process, for each sample."""
    rounds: list[int] = field(default_factory=list)
    """The round each sample was taken in: ratios are formed within one round only."""
    checked: str | None = None
    """How the output was verified ("same bytes", "loads back"); None: it was not."""
    wrong: bool = False
    """Verification failed: the times of this row mean nothing."""
    error: str | None = None
    absent: bool = False
    """It could not take part (this version has no such thing, or no time was left): neither good nor bad."""
    detail: dict[str, Any] | None = None
    """What the rival says about its newest save (fastshard's ``stats()``)."""
    plan_seconds: list[float] = field(default_factory=list)
    """Of each timed save, where the rival tells."""
    fallbacks: list[str] = field(default_factory=list)
    """What was refused to its timed saves, and what they did instead."""

    def keep(self, detail: dict[str, Any]) -> None:
        """Of a timed save: the newest details, its planning, and every fallback once."""
        self.detail = detail
        if "plan_seconds" in detail:
            self.plan_seconds.append(detail["plan_seconds"])
        self.fallbacks += [text for text in detail.get("fallbacks", ()) if text not in self.fallbacks]

    @property
    def best(self) -> float:
        """Seconds of the fastest sample. Stalls only ever add time, so this is the steadiest figure."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def worst(self) -> float:
        return max(self.seconds)


@dataclass
class Ratio:
    """How many times faster a row is than another one of the same case and mode."""

    median: float
    """Median of the ratios taken within each round."""
    best: float
    """Ratio of the two best times."""
    rounds: int


def ratio(row: Row | None, base: Row | None) -> Ratio | None:
    """``base`` time / ``row`` time; None when the two share no round."""
    if row is None or base is None:
        return None
    least = LEAST_LOST_S if row.mode == LOST else 0.0
    base_at = {r: max(least, s) for r, s in zip(base.rounds, base.seconds)}
    shared = [base_at[r] / max(least, s) for r, s in zip(row.rounds, row.seconds) if r in base_at]
    if not shared:
        return None
    return Ratio(statistics.median(shared), max(least, base.best) / max(least, row.best), len(shared))


@dataclass
class Memory:
    """Extra memory of one save in a fresh process, over what the process had before it."""

    rival: str
    extra_nbytes: int | None = None
    """Growth of anonymous plus shared memory, sampled: the figure that counts."""
    high_water_nbytes: int | None = None
    """Growth of the resident set's high-water mark: exact, but counts mapped file pages too."""
    device_nbytes: int | None = None
    """Most memory of the GPU taken at once, sampled; what the driver loads at a first save included."""
    pinned_nbytes: int | None = None
    """Most page-locked staging at once, by fastshard's and torch's own books: no kernel counts it."""
    budget_nbytes: int | None = None
    """What the saver was told that it may take."""
    error: str | None = None


@dataclass
class Disturbance:
    """What a job that runs beside saves noticed of them, by the clock of its own device."""

    rival: str
    step_ms: float | None = None
    """Median of a step while nothing is saved."""
    during_ms: float | None = None
    """Median of a step during the saves."""
    worst_ms: float | None = None
    excess_ms: float | None = None
    """All steps of the saves' time together, less what as many undisturbed ones take: the job's loss."""
    steps: int = 0
    save_s: float | None = None
    """Of all saves together."""
    error: str | None = None

    @property
    def longer(self) -> float | None:
        """How many per cent longer the median step is during the saves."""
        if not self.step_ms or self.during_ms is None:
            return None
        return 100 * (self.during_ms / self.step_ms - 1)


@dataclass
class CaseResult:
    """Everything one case gave."""

    name: str
    about: str
    nbytes: int
    full_nbytes: int
    """The size the goals speak of; ``nbytes`` is smaller in a quick run."""
    tensors: int
    files: int
    ceilings: dict[str, tuple[str, ...]]
    """For each mode the rows that bound it; the fastest of them that ran is *the* ceiling."""
    rows: list[Row] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    disturbance: list[Disturbance] = field(default_factory=list)
    device: str = "cpu"
    """Kind of the device the tensors were on."""
    us: str = "fastshard"
    """The row that the case is about."""
    base: str = "safetensors"
    """The row that ratios are taken against."""
    fitted: bool = False
    """Whether it is smaller than was asked for, for want of room or memory."""
    skipped: str | None = None
    """Why the case was not run at all."""

    def row(self, rival: str, mode: str) -> Row | None:
        """The row, if it has samples that mean something."""
        for row in self.rows:
            if (row.rival, row.mode) == (rival, mode) and row.seconds and not row.wrong:
                return row
        return None

    def ceiling(self, mode: str) -> Row | None:
        rows = [self.row(name, mode) for name in self.ceilings.get(mode, ())]
        return min((r for r in rows if r is not None), key=lambda r: r.best, default=None)

    def rate(self, seconds: float) -> float:
        """GiB/s of a save that took ``seconds``."""
        return self.nbytes / GIB / seconds

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every sample, and the statistics beside the base and the ceiling."""
        out = asdict(self)
        for disturbance, written in zip(self.disturbance, out["disturbance"]):
            written["longer"] = disturbance.longer
        for row, written in zip(self.rows, out["rows"]):
            if not row.seconds:
                continue
            if row.mode in RATED:
                written["best_gib_s"] = self.rate(row.best)
                written["median_gib_s"] = self.rate(row.median)
                written["worst_gib_s"] = self.rate(row.worst)
            for key, other in (
                ("ratio", self.row(self.base, row.mode)),
                ("of_ceiling", self.ceiling(row.mode)),
            ):
                found = ratio(row, other)
                written[key] = {**asdict(found), "against": other.rival} if found and other else None
        return out
