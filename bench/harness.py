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
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import memory
from .cases import Case
from .ceilings import CEILINGS
from .machine import memory_nbytes
from .rivals import US, Job, Rival
from .samples import DURABLE, GIB, MIB, CaseResult, Row
from .verify import Mismatch, Reference

SLACK_NBYTES = 512 * MIB
WARM_UP_NBYTES = MIB


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
        ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(ballast)), 1, nbytes)


def empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _extra_copies(entry: _Entry) -> float:
    """Memory the run will take, in multiples of the bytes saved."""
    strided = any(not t.is_contiguous() for shard in entry.job.shards for t in shard.values())
    copies = strided and entry.rival.writes is not None and entry.rival.name != US
    return entry.rival.footprint + copies


def _settle(entry: _Entry, nbytes: int) -> None:
    """Same starting line for everyone; see the top of this file."""
    empty(entry.job.out)
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
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _timed(entry: _Entry, device: str) -> tuple[float, float]:
    """(wall, CPU) seconds of one run."""
    _synchronize(device)
    cpu, wall = time.process_time(), time.perf_counter()
    entry.run()
    _synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


class Contest:
    """One case: all its rivals and ceilings, over all rounds."""

    def __init__(self, case: Case, rivals: list[Rival], settings: Settings) -> None:
        self.case, self.settings = case, settings
        self.nbytes = min(settings.nbytes, case.natural_nbytes or settings.nbytes)
        shards = case.build(self.nbytes, settings.device)
        self.job = Job(shards, settings.out, durable=False, preallocate=settings.preallocate)
        self.result = CaseResult(
            name=case.name,
            about=case.about,
            nbytes=self.job.nbytes,
            full_nbytes=case.natural_nbytes or 4 * GIB,
            tensors=sum(len(shard) for shard in shards),
            files=len(shards),
            ceilings=case.bound_by,
        )
        self.rivals = [r for r in rivals if len(shards) > 1 or not r.many_files_only]
        self.reference: Reference | None = None
        self.warm_up = replace(self.job, shards=case.build(min(self.nbytes, WARM_UP_NBYTES), settings.device))

    def run(self, deadline: float | None = None) -> CaseResult:
        """All rounds; those that would not end by ``deadline`` (time.monotonic) are left out."""
        if self.settings.verify:
            empty(self.job.out)
            self.reference = Reference(self.job)
        entries = self._entries()
        for round_ in range(self.settings.rounds):
            started, slow = time.monotonic(), 0.0
            for mode in self.settings.modes:
                turn = [e for e in entries if e.row.mode == mode and not e.row.error]
                # Shuffled, not rotated: what a run leaves behind must not always fall on the same rival.
                for entry in random.Random(round_).sample(turn, len(turn)):
                    if entry.rival.slow and round_ >= self.settings.slow_rounds:
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
        entries.clear()
        return self.result

    def _entries(self) -> list[_Entry]:
        """Every rival prepared and warmed up on a small save; one that cannot is a row with an error."""
        entries: list[_Entry] = []
        for rival in [*self.rivals, *(CEILINGS[name] for name in self.case.measures)]:
            modes = self.settings.slow_modes if rival.slow else self.settings.modes
            for mode in (m for m in modes if m in rival.modes):
                row = Row(rival.name, mode, ceiling=rival.writes is None)
                self.result.rows.append(row)
                durable = mode == DURABLE
                job = replace(self.job, durable=durable)
                try:
                    empty(job.out)
                    # Imports, thread pools, a lazily made engine: paid once by a process, not by a save.
                    rival.prepare(replace(self.warm_up, durable=durable))()
                    empty(job.out)
                    entries.append(_Entry(rival, job, row, rival.prepare(job)))
                except Exception as error:  # whatever a rival raises, the others go on
                    row.error = _text(error)
        return entries

    def _run_one(self, entry: _Entry, round_: int) -> None:
        row = entry.row
        try:
            _settle(entry, self.result.nbytes)
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
        if self.reference is None or entry.rival.writes is None or entry.row.checked:
            return False
        modes = [r for r in self.result.rows if r.rival == entry.rival.name and r.checked]
        return not modes or entry.rival.name == US


def run_case(
    case: Case, rivals: list[Rival], settings: Settings, deadline: float | None = None
) -> CaseResult:
    """The rounds, then the memory, with the tensors of the rounds freed before."""
    contest = Contest(case, rivals, settings)
    result, names = contest.run(deadline), [rival.name for rival in contest.rivals]
    nbytes = contest.nbytes
    del contest
    gc.collect()
    if case.memory:
        for name in names:
            if name in settings.memory:
                empty(settings.out)
                result.memory.append(memory.measure(case.name, name, nbytes, settings.device, settings.out))
    empty(settings.out)
    return result
