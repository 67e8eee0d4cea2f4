# SPDX-License-Identifier: Apache-2.0
"""The rounds: rivals and ceilings in turn, under conditions that are the same for each of them.

Two things mislead whoever times file writes, and both are met here before every timed run. Memory that
a virtual machine has given back to its host costs ten times a copy at first touch, at random; so more
memory than the save will use is touched and freed. And dirty pages of the former run are written back
during the next one; so former files are removed first, and what is left is waited for.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from . import ceilings, disturbance, machine, memory, training_steps
from .cases import FULL_NBYTES, SHM, Case
from .ceilings import CEILINGS
from .fitting import NO_TIME, Settings, asked, fitting, why_not
from .grow import touch_and_free
from .job import BASE, CPU, OFFLOADED, SOURCES, US, Job, Rival, Unavailable, finish
from .machine import memory_nbytes
from .rivals import RIVALS
from .samples import DURABLE, GIB, MIB, STALL, CaseResult, Disturbance, Row
from .training_steps import JobSample, Steps
from .verify import Mismatch, Reference

SLACK_NBYTES = 512 * MIB
WARM_UP_NBYTES = MIB
STANDING_CHECKS = 3
"""Runs of a standing save that are verified: each of its generations, and the first of them again."""
WATCHED = (US, BASE, "prepared")
LINK = "link"
"""Watched beside them: what copies out of the device cost a job, whoever makes them."""
TINY_QUIET_S = 0.01
"""Of a run that only shows that it runs."""


@dataclass
class _Entry:
    """One rival in one mode of a case, ready to run."""

    rival: Rival
    job: Job
    row: Row
    run: Callable[[], Any]
    samples: dict[int, JobSample] = field(default_factory=dict)
    """By round, in the mode STALL."""


def empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _extra_copies(entry: _Entry) -> float:
    """Memory the run will take, in multiples of the bytes saved."""
    on_device = any(t.device.type != CPU for shard in entry.job.shards for t in shard.values())
    changed = entry.job.strided or entry.job.dtype is not None or on_device
    copies = changed and entry.rival.writes is not None and not entry.rival.name.startswith(US)
    return entry.rival.footprint + copies


def _settle(entry: _Entry, nbytes: int, out: Path) -> None:
    settle(_extra_copies(entry), nbytes, out)


def settle(copies: float, nbytes: int, out: Path) -> None:
    """Same starting line for everyone; see the top of this file. A run will take so many copies of its bytes."""
    empty(out)
    if nbytes >= 16 * MIB:  # less leaves no writeback worth waiting for, nor garbage worth collecting
        gc.collect()
        os.sync()
    available = memory_nbytes("MemAvailable") - GIB
    if (copies - 1) * nbytes > available:
        raise MemoryError(f"needs {(copies - 1) * nbytes / GIB:.1f} GiB beside the tensors")
    if copies:
        # The slack is for what else the machine does meanwhile; a tiny run needs little of it.
        touch_and_free(min(int(copies * nbytes) + min(SLACK_NBYTES, 8 * nbytes), available))


def _synchronize(device: str) -> None:
    if machine.device_kind(device) != CPU:
        torch.cuda.synchronize(device)


def _timed(entry: _Entry, device: str) -> tuple[float, float]:
    """(wall, CPU) seconds of one run."""
    with entry.rival.within():
        _synchronize(device)
        cpu, wall = time.process_time(), time.perf_counter()
        entry.run()
        _synchronize(device)
        return time.perf_counter() - wall, time.process_time() - cpu


def text_of(error: BaseException) -> str:
    if isinstance(error, Unavailable):
        return str(error)
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _close(run: Callable[[], Any]) -> None:
    """Ends what stands from round to round."""
    getattr(run, "close", lambda: None)()


class Contest:
    """One case: all its rivals and ceilings, over all rounds."""

    def __init__(self, case: Case, rivals: list[Rival], settings: Settings) -> None:
        self.case, self.settings = case, settings
        self.kind = machine.device_kind(settings.device)
        self.nbytes = fitting(case, settings)
        out = settings.out_of(case)
        assert out
        self.modes = [mode for mode in settings.modes if mode in case.modes]
        shards = case.build(self.nbytes, settings.device)
        preallocate = settings.preallocate and case.place != SHM
        self.job = Job(shards, out, durable=False, preallocate=preallocate, dtype=case.dtype)
        self.result = CaseResult(
            name=case.name,
            about=case.about,
            nbytes=self.job.nbytes,
            full_nbytes=self._full_nbytes(),
            fitted=self.nbytes < asked(case, settings),
            tensors=sum(len(shard) for shard in shards),
            files=len(shards),
            ceilings=case.bound_by,
            device=self.kind,
            us=case.us,
            base=case.base,
        )
        self.rivals = [r for r in rivals if self._takes_part(r)]
        self.reference: Reference | None = None
        self.warm_up = replace(self.job, shards=case.build(min(self.nbytes, WARM_UP_NBYTES), settings.device))

    def _full_nbytes(self) -> int:
        """Of the files, at the size the goals speak of: a cast makes them smaller than the tensors."""
        full = self.case.natural(self.kind) or FULL_NBYTES
        return full * self.job.nbytes // replace(self.job, dtype=None).nbytes

    def _takes_part(self, rival: Rival) -> bool:
        several = len(self.job.shards) > 1
        fits = not (rival.one_file_only if several else rival.many_files_only)
        # Where the base writes more than the tensors, so must all others.
        strange = rival.writes is not None and (rival.own or RIVALS[self.case.base].own)
        return fits and self.kind in rival.devices and not (strange and rival.name not in self.case.rivals)

    def run(self, deadline: float | None = None) -> CaseResult:
        """All rounds; those that would not end by ``deadline`` (time.monotonic) are left out."""
        if self.settings.verify:
            empty(self.job.out)
            try:
                self.reference = Reference(self.job, self.case.base)
            except Exception as error:  # another case's base may do better
                self.result.skipped = f"{self.case.base}: {text_of(error)}"
                return self.result
        with self._entries() as entries:
            self._rounds(entries, deadline)
            self._add_beside_stalls(entries)
        return self.result

    def _add_beside_stalls(self, entries: list[_Entry]) -> None:
        """Adds rows of what was measured beside the stalls."""
        taken = [entry for entry in entries if entry.samples and not entry.row.wrong]
        alone = next((e.samples for e in taken if e.rival.name == self.case.without), {})
        for entry in taken:
            self.result.rows += training_steps.beside(entry.row, entry.samples, alone)
            if entry.samples is alone:  # a job that saves nothing is not stalled
                self.result.rows.remove(entry.row)

    def _rounds(self, entries: list[_Entry], deadline: float | None) -> None:
        for round_ in range(self.settings.rounds):
            started, slow = time.monotonic(), 0.0
            for entry in self._turn(entries, round_):
                late = deadline is not None and time.monotonic() > deadline
                if not self.settings.in_time() or (late and entry.rival.slow):
                    if not entry.row.seconds:
                        entry.row.error, entry.row.absent = NO_TIME, True
                    continue
                since = time.monotonic()
                self._run_one(entry, round_)
                slow += time.monotonic() - since if entry.rival.slow else 0.0
            took = time.monotonic() - started
            note = f"{self.case.name}: round {round_ + 1} of {self.settings.rounds}, {took:.1f} s"
            print(note, file=sys.stderr, flush=True)
            # The next round lasts as long as this one, less those who do not take part in it.
            took -= slow if round_ + 1 >= self.settings.slow_rounds else 0.0
            if deadline is not None and time.monotonic() + took > deadline:
                break
            if not self.settings.in_time():
                break

    def _turn(self, entries: list[_Entry], round_: int) -> list[_Entry]:
        """Who runs in a round, in which order."""
        turn: list[_Entry] = []
        for mode in self.modes:
            ready = [e for e in entries if e.row.mode == mode and not e.row.error]
            if round_ >= self.settings.slow_rounds:
                ready = [e for e in ready if not e.rival.slow]
            # Shuffled, not rotated: what a run leaves behind must not always fall on the same rival.
            turn += random.Random(round_).sample(ready, len(ready))
        # Where time may run out, the slow ones are those to go without.
        return sorted(turn, key=lambda e: e.rival.slow) if self.settings.stop else turn

    @contextlib.contextmanager
    def _entries(self) -> Iterator[list[_Entry]]:
        """Every rival prepared and warmed up on a small save; one that cannot is a row with an error."""
        with contextlib.ExitStack() as stack:
            entries: list[_Entry] = []
            measures = [CEILINGS[name] for name in self.case.measures]
            for rival in [*self.rivals, *(c for c in measures if self._takes_part(c))]:
                modes = self.settings.slow_modes if rival.slow else self.modes
                for mode in (m for m in modes if m in rival.modes and m in self.modes):
                    row = Row(rival.name, mode, ceiling=rival.writes is None)
                    self.result.rows.append(row)
                    try:
                        entries.append(self._entry(rival, row))
                        stack.callback(_close, entries[-1].run)
                    except Exception as error:  # whatever a rival raises, the others go on
                        row.error, row.absent = text_of(error), isinstance(error, Unavailable)
            yield entries
            entries.clear()

    def _entry(self, rival: Rival, row: Row) -> _Entry:
        """Ready to run. What a process pays once and not for each save (imports, thread pools, a lazily made
        engine) is paid here."""
        out = self.job.out.with_name("standing") if rival.stands else self.job.out
        durable = row.mode == DURABLE
        empty(out)
        warm_up = rival.prepare(replace(self.warm_up, durable=durable, out=out))
        try:
            with rival.within():
                finish(warm_up())
        finally:
            _close(warm_up)
        empty(out)
        job = replace(self.job, durable=durable, out=out)
        entry = _Entry(rival, job, row, rival.prepare(job))
        if row.mode == STALL and rival.writes is not None and not rival.trains:
            # A job saves again and again: what a saver keeps for the next time is there before the rounds.
            with rival.within():
                finish(entry.run())
        return entry

    def disturbances(self) -> None:
        """What a job beside saves of each of WATCHED notices, and beside the link's own copies."""
        link = [CEILINGS[LINK]] if self._takes_part(CEILINGS[LINK]) else []
        for rival in [*(r for r in self.rivals if r.name in WATCHED and r.modes[0] in self.modes), *link]:
            if not self.settings.in_time():
                return
            try:
                found = self._disturbance(rival)
            except Exception as error:  # as in the rounds
                found = Disturbance(rival.name, error=text_of(error))
            self.result.disturbance.append(found)

    def _disturbance(self, rival: Rival) -> Disturbance:
        nbytes, out = self.result.nbytes, self.job.out
        entry = self._entry(rival, Row(rival.name, rival.modes[0]))
        try:
            return disturbance.measure(
                rival.name,
                entry.run,
                self.settings.device,
                before=lambda: _settle(entry, nbytes, out),
                quiet_s=disturbance.QUIET_S if nbytes >= 16 * MIB else TINY_QUIET_S,
                own_stream=rival.name == LINK,
            )
        finally:
            _close(entry.run)

    def _run_one(self, entry: _Entry, round_: int) -> None:
        row = entry.row
        try:
            _settle(entry, self.result.nbytes, self.job.out)
            seconds, cpu_seconds = self._sample(entry, round_)
            row.seconds.append(seconds)
            row.cpu_seconds.append(cpu_seconds)
            row.rounds.append(round_)
            if entry.rival.detail:
                row.keep(entry.rival.detail())
            if self._must_check(entry):
                assert self.reference
                row.checked = self.reference.check(entry.rival, entry.job)
        except Mismatch as error:
            row.wrong, row.error = True, f"WRONG: {error}"
        except Exception as error:
            row.error = text_of(error)

    def _sample(self, entry: _Entry, round_: int) -> tuple[float, float]:
        """(wall, CPU) seconds of one run; of one in the mode STALL more is kept."""
        rival = entry.rival
        if entry.row.mode != STALL or (rival.writes is None and rival.name != self.case.without):
            return _timed(entry, self.settings.device)
        with rival.within():
            if rival.trains:
                sample: JobSample = entry.run()
            else:
                sample = Steps(self.job.shards, self.settings.device).after(entry.run, rival.unchanged)
        entry.samples[round_] = sample
        return sample.stall, sample.cpu

    def _must_check(self, entry: _Entry) -> bool:
        """The first run of everyone, and of fastshard in each mode: a durable save goes other ways."""
        if self.reference is None or entry.rival.writes is None:
            return False
        if entry.rival.stands:
            return len(entry.row.seconds) <= STANDING_CHECKS
        if entry.row.checked:
            return False
        modes = [r for r in self.result.rows if r.rival == entry.rival.name and r.checked]
        return not modes or entry.rival.name in (US, self.case.us)


def skipped(case: Any, reason: str) -> CaseResult:
    """The result of a case that was not measured."""
    return CaseResult(
        case.name, case.about, 0, 0, 0, 0, case.bound_by, us=case.us, base=case.base, skipped=reason
    )


def run_case(
    case: Case, rivals: list[Rival], settings: Settings, deadline: float | None = None
) -> CaseResult:
    """The rounds and what disturbs a job; then the memory, with the tensors of the rounds freed before."""
    reason = why_not(case, settings)
    if reason:
        return skipped(case, reason)
    contest = Contest(case, rivals, settings)
    result, names = contest.run(deadline), [rival.name for rival in contest.rivals]
    nbytes, out = contest.nbytes, contest.job.out
    if case.disturbs and settings.disturbance:
        contest.disturbances()
    del contest
    ceilings.forget()
    # Less is not missed by the next case, and a collection takes longer than such a case.
    if nbytes >= 16 * MIB:
        gc.collect()
    if machine.device_kind(settings.device) != CPU:
        torch.cuda.empty_cache()
    for name in names if case.memory else ():
        if name in settings.memory and settings.in_time():
            empty(out)
            result.memory.append(memory.measure(case.name, name, nbytes, settings.device, out))
    for directory in (out, out.with_name("standing"), out.with_name(OFFLOADED), out.with_name(SOURCES)):
        shutil.rmtree(directory, ignore_errors=True)
    return result
