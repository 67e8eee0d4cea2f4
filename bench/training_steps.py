# SPDX-License-Identifier: Apache-2.0
"""What saves cost the job that makes them: steps that change every tensor right after the call, while the files are
still being written, against the same steps without a save.

A step is matrix products, as of a forward and a backward pass, and then every tensor is changed in place, as an
optimizer does it. What a snapshot leaves to be paid later shows here: pages that are copied when they are
changed, cores and bandwidth that the writers take. The changes cancel out over the steps, so each round saves
the same values, and a file with a byte of a later step is not the file that was to be written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import machine
from .job import CPU, Shard
from .samples import FILE, JOB, LOST, MIB, Row

STEPS = 10
"""An even number: what the first half changes the second half changes back."""
SIZE = 512
NBYTES_OF_PRODUCT = 32 * MIB
"""One product of matrices for each of so many bytes of the tensors: about as long as changing them takes."""


@dataclass
class JobSample:
    """One run of a job, in seconds."""

    stall: float
    """From the call of a saver until it returned: the values are captured."""
    job: float
    """From the same moment until the last step had ended."""
    file: float | None = None
    """From the same moment until the files stood."""
    cpu: float = 0.0
    """User plus system time of the process during the stall."""
    lost: float | None = None
    """What the job has lost to its saves, where it can tell by itself: how much longer its steps were with a save than
    without, all together."""


class Steps:
    """A job whose state is the tensors of a case."""

    def __init__(self, shards: list[Shard], device: str) -> None:
        self.shards = shards
        self._bits = [t.view(torch.int16) for shard in shards for t in shard.values()]
        self._device = device
        self._a, self._b, self._out = (torch.randn(SIZE, SIZE, device=device) for _ in range(3))
        nbytes = sum(bits.nbytes for bits in self._bits)
        self._products = max(1, nbytes // NBYTES_OF_PRODUCT)

    def run(self) -> None:
        for number in range(STEPS):
            self._step(number)
        if machine.device_kind(self._device) != CPU:
            torch.cuda.synchronize(self._device)

    def _step(self, number: int) -> None:
        for _ in range(self._products):
            torch.mm(self._a, self._b, out=self._out)
        for bits in self._bits:
            bits.bitwise_xor_(12345 + number % (STEPS // 2))

    def after(self, save: Callable[[], Any], unchanged: bool) -> JobSample:
        """One save and the steps after it. ``save`` returns a future, or nothing if its files stand already.
        ``unchanged``: the steps must wait until then, as the saver was promised that nothing changes."""
        ended: list[float] = []
        written = threading.Event()

        def note(_: object = None) -> None:
            ended.append(time.perf_counter())
            written.set()

        cpu, began = time.process_time(), time.perf_counter()
        future = save()
        stall = time.perf_counter() - began
        cpu = time.process_time() - cpu
        if future is None:
            note()
        else:
            future.add_done_callback(note)
        if unchanged:
            written.wait()
        self.run()
        job = time.perf_counter() - began
        written.wait()
        if future is not None:
            future.result()
        return JobSample(stall, job, ended[0] - began, cpu)


def beside(row: Row, samples: dict[int, JobSample], alone: dict[int, JobSample]) -> Iterator[Row]:
    """Rows of what was measured beside the stalls of ``row``, by round; ``alone``: the job that saves nothing."""
    times: dict[str, dict[int, float | None]] = {
        FILE: {round_: sample.file for round_, sample in samples.items()},
        JOB: {round_: sample.job for round_, sample in samples.items()},
        LOST: {
            round_: sample.job - alone[round_].job if sample.lost is None else sample.lost
            for round_, sample in samples.items()
            if round_ in alone
        },
    }
    if samples is alone and all(sample.lost is None for sample in samples.values()):
        del times[LOST]  # nothing, by definition; else it shows how well the others are known
    for mode in times:
        known = {round_: seconds for round_, seconds in times[mode].items() if seconds is not None}
        if known:
            yield Row(
                row.rival,
                mode,
                ceiling=row.ceiling,
                seconds=list(known.values()),
                rounds=list(known),
                checked=row.checked,
            )
