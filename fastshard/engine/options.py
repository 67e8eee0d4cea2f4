# SPDX-License-Identifier: Apache-2.0
"""The options of an engine, and the figures of a save."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from ..base.settings import parse_size

_WRITE_PATHS: Final = ("auto", "buffered", "direct", "mapped", "registered")
_BUDGET: Final = 128 << 20
_LEAST_BUDGET: Final = 1 << 20
_DEVICE_SCRATCH: Final = 64 << 20
_MOST_NBYTES: Final = (1 << 63) - 1
_MOST_THREADS: Final = 4096
_MAX_IN_FLIGHT: Final = 2


def usable_cpus() -> int:
    """Returns the number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True, kw_only=True, init=False)
class Options:
    """Limits of an engine. Sizes are numbers of bytes, or texts as ``"1GB"`` and ``"64MiB"``.

    Raises ``ValueError`` or ``TypeError``, naming the option, for values that cannot work.
    """

    memory_budget: int = _BUDGET
    """Bytes of staging memory of all saves of the engine together; at least 1 MiB. Contiguous host tensors
    that are not cast need none of it."""
    threads: int | None = None
    """Number of writer threads; ``None``: one for each CPU that this process may use, at most 16."""
    write_path: str = "auto"
    """``"buffered"`` (pwrite into the page cache, one thread a file), ``"direct"`` (past the page cache, from staging memory,
    or from where a snapshot lies), ``"mapped"`` (stores into the mapped file), ``"registered"`` (as mapped, with devices
    copying straight into page-locked windows), or ``"auto"``: what suits the save and the filesystem (``fastshard env PATH``
    tells). Where that is ``"buffered"``, idle threads store a part of a large file through mappings."""
    max_in_flight: int = _MAX_IN_FLIGHT
    """Asynchronous saves of the engine that may be in flight. The call of a further one waits for the oldest."""
    snapshot_budget: int | None = None
    """Bytes of host memory that the snapshots of asynchronous saves may take together, between saves, too. ``None``:
    half of the memory that is free when the first one is made."""
    device_scratch: int = _DEVICE_SCRATCH
    """Bytes of each CUDA device's memory in which strided, cast and small tensors may be packed before they
    are copied to the host, with the 2 MiB of the code that packs them. It is taken in units of 2 MiB when it is
    first needed and kept until the engine is closed. With less than 6 MiB, or if the device has no memory to
    spare, they are packed straight into host memory."""

    def __init__(
        self,
        *,
        memory_budget: int | str = _BUDGET,
        threads: int | None = None,
        write_path: str = "auto",
        device_scratch: int | str = _DEVICE_SCRATCH,
        max_in_flight: int = _MAX_IN_FLIGHT,
        snapshot_budget: int | str | None = None,
    ) -> None:
        budget = _size("memory_budget", memory_budget)
        if budget < _LEAST_BUDGET:
            raise ValueError(f"memory_budget must be at least 1 MiB, not {memory_budget!r}")
        if threads is not None:
            threads = _integer("threads", threads)
            if not 1 <= threads <= _MOST_THREADS:
                raise ValueError(f"threads must be between 1 and {_MOST_THREADS}, or None, not {threads}")
        if not isinstance(write_path, str):
            raise TypeError(f"write_path must be a str, not {type(write_path).__name__}")
        if write_path not in _WRITE_PATHS:
            raise ValueError(f"write_path must be one of {', '.join(_WRITE_PATHS)}, not {write_path!r}")
        max_in_flight = _integer("max_in_flight", max_in_flight)
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight must be at least 1, not {max_in_flight}")
        for name, value in (
            ("memory_budget", budget),
            ("max_in_flight", max_in_flight),
            (
                "snapshot_budget",
                None if snapshot_budget is None else _size("snapshot_budget", snapshot_budget),
            ),
            ("threads", threads),
            ("write_path", str(write_path)),
            ("device_scratch", _size("device_scratch", device_scratch)),
        ):
            object.__setattr__(self, name, value)

    @property
    def writers(self) -> int:
        """The number of writer threads, with ``None`` resolved."""
        return min(16, usable_cpus()) if self.threads is None else self.threads

    @property
    def key(self) -> tuple[int, int | None, str, int, int, int | None]:
        """Tells these options from others. It is compared without running any Python code."""
        limits = self.memory_budget, self.threads, self.write_path, self.device_scratch
        return *limits, self.max_in_flight, self.snapshot_budget


def _size(option: str, size: object) -> int:
    if isinstance(size, str):
        if size.strip() == "0":
            return 0
        try:
            nbytes = parse_size(size)
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from None
    else:
        nbytes = _integer(option, size, " of bytes, or a text such as '64MiB'")
    if not 0 <= nbytes <= _MOST_NBYTES:
        raise ValueError(f"{option} must not be negative, nor more than 2**63 - 1, not {nbytes}")
    return nbytes


def _integer(option: str, number: object, more: str = "") -> int:
    if not isinstance(number, bool):
        try:
            return operator.index(number)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise TypeError(f"{option} must be a whole number{more}, not {number!r}")


@dataclass(frozen=True, kw_only=True)
class Changed:
    """What of a prepared save's file is not as it was in the save before, byte for byte."""

    first: bool
    """There is no save before to compare with, so all of it counts as changed."""
    tensors: tuple[str, ...]
    """Names of the tensors, in the order of the file."""
    ranges: tuple[tuple[int, int], ...]
    """Offset in the file and size of each stretch of changed blocks of 4 KiB; the last may end with the file.
    Where these are copied over the same places of the file before, the file is the new one."""

    @property
    def nbytes(self) -> int:
        """Bytes of the ranges."""
        return sum(nbytes for _, nbytes in self.ranges)


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Figures of one save. The ``*_seconds`` of the stages are thread-seconds: they add up over the writers."""

    files: int
    nbytes: int
    """Bytes of the finished files, but for those that are linked or that others write."""
    seconds: float
    """Seconds from the call of the function until the files are finished."""
    plan_seconds: float
    """Seconds spent checking the tensors and laying out the files."""
    copy_seconds: float
    """Seconds spent packing and waiting for copies from devices."""
    write_seconds: float
    """Seconds spent in pwrite, waiting for direct writes, or populating mapped pages."""
    sync_seconds: float
    """Seconds spent in fsync and rename."""
    write_path: str
    """``"buffered"``, ``"direct"``, ``"mapped"``, ``"registered"``, ``"standing"`` (a prepared save),
    ``"memory"`` or ``"link"``."""
    priority: str = "normal"
    """That of the writers: ``"normal"``, or where nobody waited for them ``"idle"`` (``SCHED_IDLE``: they get processors
    that nobody else wants), ``"nice"`` where the system refuses that."""
    taken_over: str = ""
    """Why writers of normal priority took over from such writers; empty if they did not."""
    staging: str
    """``"none"`` (written from the tensors' own memory), ``"in place"`` (devices copied into the target itself),
    ``"pageable"`` or ``"pinned"``."""
    staging_nbytes: int
    """The most bytes that were staged at once."""
    mapped_nbytes: int
    """Bytes that further threads have stored into a file through mappings, beside the thread that writes it."""
    written_runs: int = 0
    """Stretches of bytes that were written one by one or stored between those of others, into files that several
    ranks write."""
    device_scratch_nbytes: int
    """Bytes of device memory that packing took, of all devices together: in whole units of the driver, the
    code included."""
    snapshot: str = "none"
    """What an asynchronous save has written its files from: ``"copy"``, ``"fork"``, or ``"none"``: the tensors
    themselves. ``"written"``: the same, and its caller waited until they were written."""
    staged_seconds: float = 0.0
    """Seconds from the call of an asynchronous save until the tensors might be changed."""
    linked_files: int = 0
    """Files that have not changed since ``base``, and so were linked or cloned instead of written."""
    linked_nbytes: int = 0
    """Bytes of these. They do not count in ``nbytes``, nor do these files in ``files``."""
    fallbacks: tuple[str, ...]
    """What the filesystem, the kernel or a device refused, and what was done instead."""
    checksums: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """By file and tensor, the CRC-32 of the tensor's bytes in the file, as ``zlib.crc32`` computes it; empty
    unless asked for."""
    changed: Changed | None = None
    """Of a prepared save that was asked for it, what differs from the save before."""
