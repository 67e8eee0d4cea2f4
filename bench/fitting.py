# SPDX-License-Identifier: Apache-2.0
"""How to measure, and how large a case can be on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from . import machine
from .cases import SHM, Case
from .job import CPU
from .machine import free_nbytes, memory_nbytes
from .rank_cases import RankCase
from .samples import MIB

LEAST_NBYTES = 64 * MIB
"""A case that would have to be smaller than this is not run."""
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
    fit: bool = False
    """Whether cases on the disk shrink, too, where there is little room or memory; otherwise the whole run is
    refused."""
    stop: float | None = None
    """When all must be over (time.monotonic), done or not."""

    def out_of(self, case: Case | RankCase) -> Path | None:
        return self.shm if case.place == SHM else self.out

    def in_time(self) -> bool:
        return self.stop is None or time.monotonic() < self.stop


def asked(case: Case | RankCase, settings: Settings) -> int:
    """The size at which the case is run where there is room for it."""
    return min(settings.nbytes, case.natural(machine.device_kind(settings.device)) or settings.nbytes)


def fitting(case: Case | RankCase, settings: Settings) -> int:
    """The size at which the case is run: what was asked for, or less where memory or the place is scarce.

    To be called before each case: the memory of some machines grows while it is used.
    """
    wanted, out = asked(case, settings), settings.out_of(case)
    if out is None or not (case.place == SHM or settings.fit):
        return wanted
    # In memory at once: what stands in the directory, or as much of the page cache; a ceiling's target, ballast,
    # and host tensors.
    takes = case.copies + 2.25 + (machine.device_kind(settings.device) == CPU)
    # On a disk beside the file: a temporary of some savers.
    copies = case.copies * 1.05 if case.place == SHM else 2 * case.copies
    room = min(free_nbytes(out.parent) / copies, memory_nbytes("MemAvailable") / takes)
    return wanted if room >= wanted else int(room) // MIB * MIB


def why_not(case: Case | RankCase, settings: Settings) -> str | None:
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
        return (
            f"only {nbytes / MIB:.0f} MiB fit into {'--shm' if case.place == SHM else '--dir'} and the memory"
        )
    return None
