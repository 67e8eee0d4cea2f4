# SPDX-License-Identifier: Apache-2.0
"""What a case of the bench is: one dict, or what a library makes of it, saved by several rivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .job import BASE, CPU, KINDS, Shard
from .samples import DURABLE, GIB, RETURN, STALL, WRITTEN

DISK, SHM = "disk", "shm"
"""Places that a case saves to: ``--dir`` or ``--shm``."""
FULL_NBYTES = 4 * GIB
"""The size that the goals speak of, where a case has none of its own."""


@dataclass(frozen=True)
class Case:
    """One dict, or what a library makes of it, saved by several rivals."""

    name: str
    about: str
    build: Callable[[int, str], list[Shard]]
    """(bytes wanted, device) -> the tensors of each file."""
    rivals: tuple[str, ...]
    """The first one is ours: the one that the case is about."""
    base: str = BASE
    """Whom ratios are taken against, and who writes what all others must write."""
    needs: tuple[str, ...] = ()
    """Libraries that it cannot be run without."""
    natural_nbytes: int | None = None
    """The size it has by its nature; None: as large as ``--gib`` says. ``--gib`` caps it."""
    host_nbytes: int | None = None
    """The same for host tensors, where memory is scarcer."""
    dtype: torch.dtype | None = None
    """What the tensors are cast to on their way."""
    place: str = DISK
    modes: tuple[str, ...] = WRITTEN
    default_on: tuple[str, ...] = KINDS
    """Kinds of devices on which it is run without being asked for."""
    quick: bool = False
    """Whether ``--quick`` runs it without being asked."""
    bound: tuple[str, ...] = ()
    """Ceilings of the time to return, where it is not the writer."""
    copies: float = 1.0
    """Most bytes it has in ``place`` at once, in multiples of its size."""
    writer: str = "pwrite-1"
    """The ceiling of buffered writes: one writer, or one for each file."""
    memory: bool = False
    """Whether peak memory is measured too."""
    without: str = "no-save"
    """In the mode STALL, the row of the job that saves nothing."""
    disturbs: bool = False
    """Whether a job that runs beside the save is watched too."""

    @property
    def us(self) -> str:
        return self.rivals[0]

    def natural(self, kind: str) -> int | None:
        return self.host_nbytes or self.natural_nbytes if kind == CPU else self.natural_nbytes

    @property
    def measures(self) -> tuple[str, ...]:
        """Ceilings to run beside the rivals."""
        named = ["memcpy-1", "memcpy-n", *self.bound, self.writer, "direct", "link", "link-whole"]
        if DURABLE not in self.modes:
            named.remove("direct")
        if STALL in self.modes and self.without not in self.rivals:
            named.append(self.without)
        return tuple(dict.fromkeys(named))

    @property
    def bound_by(self) -> dict[str, tuple[str, ...]]:
        """For each mode the ceilings that bound it."""
        writer = (self.writer, "link") if self.place == SHM else (self.writer,)
        return {
            RETURN: self.bound or writer,
            DURABLE: (self.writer, "direct"),
            STALL: self.bound or writer,
        }
