# SPDX-License-Identifier: Apache-2.0
"""The rounds: rivals and ceilings in turn, under conditions that are the same for each of them.

Two things mislead whoever times file writes, and both are met here before every timed run. Memory that
a virtual machine has given back to its host costs ten times a copy at first touch, at random; so more
memory than the save will use is touched and freed. And dirty pages of the former run are written back
during the next one; so former files are removed first, and what is left is waited for.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from . import ceilings, disturbance, machine, memory
from .cases import FULL_NBYTES, SHM, Case
from .ceilings import CEILINGS
from .job import BASE, CPU, OFFLOADED, SOURCES, US, Job, Rival, Unavailable
from .machine import cpu_count, free_nbytes, memory_nbytes
from .rivals import RIVALS
from .samples import DURABLE, GIB, MIB, CaseResult, Disturbance, Row
from .verify import Mismatch, Reference

SLACK_NBYTES = 512 * MIB
WARM_UP_NBYTES = MIB
LEAST_NBYTES = 64 * MIB
"""A case on tmpfs that would have to be smaller than this is not run."""
STANDING_CHECKS = 3
"""Runs of a standing save that are verified: each of its generations, and the first of them again."""
WATCHED = (US, BASE, "prepared")
NO_TIME = "no time left"


@dataclass(frozen=True)
class Settings:
    """How to measure, for all cases."""

    out: Path
    """Scratch directory; emptied before every run."""
    nbytes: int
    """Largest size of a case."""
    rounds: int
    slow_rounds: int
    """Rounds that slow rivals take part in."""
    modes: tuple[str, ...]
    slow_modes: tuple[str, ...]
    """The modes that slow rivals take part in."""
    verify: bool
    memory: tuple[str, ...]
    """Rivals whose memory is measured."""
    device: str
    preallocate: bool
    shm: Path | None = None
    """Scratch directory on a memory-backed filesystem; None: there is none, ``no_shm`` says why."""
    no_shm: str = ""
    disturbance: bool = False
    """Whether a job beside the save is watched."""
    stop: float | None = None
    """When all must be over (time.monotonic), done or not."""

    def out_of(self, case: Case) -> Path | None:
        return self.shm if case.place == SHM else self.out

    def in_time(self) -> bool:
        return self.stop is None or time.monotonic() < self.stop


@dataclass
class _Entry:
    """One rival in one mode of a case, ready to run."""

    rival: Rival
    job: Job
    row: Row
    run: Callable[[], None]


def touch_and_free(nbytes: int) -> None:
    """Make the kernel's free memory real, so that no run pays for the host's page faults."""
    if nbytes <= 0:
        return
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as ballast:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel built without them
                ballast.madvise(mmap.MADV_HUGEPAGE)  # the same pages, in a tenth of the faults
        begin = ctypes.addressof(ctypes.c_char.from_buffer(ballast))
        step = max(64 * MIB, -(-nbytes // cpu_count()))
        with ThreadPoolExecutor(cpu_count()) as pool:  # ctypes lets the GIL go
            parts = [(begin + at, 1, min(step, nbytes - at)) for at in range(0, nbytes, step)]
            list(pool.map(lambda part: ctypes.memset(*part), parts))


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
    """Same starting line for everyone; see the top of this file."""
    empty(out)
    if nbytes >= 16 * MIB:  # less leaves no writeback worth waiting for, nor garbage worth collecting
        gc.collect()
        os.sync()
    copies = _extra_copies(entry)
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


def _text(error: Exception) -> str:
    if isinstance(error, Unavailable):
        return str(error)
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _close(run: Callable[[], None]) -> None:
    """Ends what stands from round to round."""
    getattr(run, "close", lambda: None)()


def fitting(case: Case, settings: Settings) -> int:
    """The size at which the case is run: what was asked for, or less where ``--shm`` or memory is scarce."""
    kind = machine.device_kind(settings.device)
    wanted = min(settings.nbytes, case.natural(kind) or settings.nbytes)
    if case.place != SHM or settings.shm is None:
        return wanted
    # In memory at once: what stands in the directory, a ceiling's target, ballast, and host tensors.
    takes = case.copies + 2.25 + (kind == CPU)
    room = min(free_nbytes(settings.shm.parent) / case.copies / 1.05, memory_nbytes("MemAvailable") / takes)
    return wanted if room >= wanted else int(room) // MIB * MIB


def why_not(case: Case, settings: Settings) -> str | None:
    """Why a case cannot be run here at all."""
    if not settings.in_time():
        return NO_TIME
    missing = [library for library in case.needs if find_spec(library) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if settings.out_of(case) is None:
        return settings.no_shm
    nbytes = fitting(case, settings)
    if nbytes < min(LEAST_NBYTES, settings.nbytes):
        return f"only {nbytes / MIB:.0f} MiB fit into --shm and the memory"
    return None


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
        full = self.case.natural(self.kind) or FULL_NBYTES[self.kind]
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
                self.result.skipped = f"{self.case.base}: {_text(error)}"
                return self.result
        with self._entries() as entries:
            self._rounds(entries, deadline)
        return self.result

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
                        row.error, row.absent = _text(error), isinstance(error, Unavailable)
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
                warm_up()
        finally:
            _close(warm_up)
        empty(out)
        job = replace(self.job, durable=durable, out=out)
        return _Entry(rival, job, row, rival.prepare(job))

    def disturbances(self) -> None:
        """What a job beside the save of each of WATCHED notices."""
        for rival in (r for r in self.rivals if r.name in WATCHED and r.modes[0] in self.modes):
            if not self.settings.in_time():
                return
            row = Row(rival.name, rival.modes[0])
            try:
                entry = self._entry(rival, row)
                try:
                    _settle(entry, self.result.nbytes, self.job.out)
                    found = disturbance.measure(rival.name, entry.run, self.settings.device)
                finally:
                    _close(entry.run)
            except Exception as error:  # as in the rounds
                found = Disturbance(rival.name, error=_text(error))
            self.result.disturbance.append(found)

    def _run_one(self, entry: _Entry, round_: int) -> None:
        row = entry.row
        try:
            _settle(entry, self.result.nbytes, self.job.out)
            seconds, cpu_seconds = _timed(entry, self.settings.device)
            row.seconds.append(seconds)
            row.cpu_seconds.append(cpu_seconds)
            row.rounds.append(round_)
            if entry.rival.detail:
                row.detail = entry.rival.detail()
            if self._must_check(entry):
                assert self.reference
                row.checked = self.reference.check(entry.rival, entry.job)
        except Mismatch as error:
            row.wrong, row.error = True, f"WRONG: {error}"
        except Exception as error:
            row.error = _text(error)

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


def run_case(
    case: Case, rivals: list[Rival], settings: Settings, deadline: float | None = None
) -> CaseResult:
    """The rounds and what disturbs a job; then the memory, with the tensors of the rounds freed before."""
    reason = why_not(case, settings)
    if reason:
        return CaseResult(
            case.name, case.about, 0, 0, 0, 0, case.bound_by, us=case.us, base=case.base, skipped=reason
        )
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
