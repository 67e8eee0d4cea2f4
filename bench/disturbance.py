# SPDX-License-Identifier: Apache-2.0
"""What a job that runs beside a save notices: the same step again and again, timed by its own device.

On a GPU the steps are matrix products on the default stream, between CUDA events: what a save puts before
them on that stream, takes from the memory's bandwidth or from the host that launches them shows as longer
steps. On the CPU the job and the save share the cores.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

import torch

from . import machine
from .samples import Disturbance

QUIET_S = 0.5
"""How long the job runs alone: enough steps for a median."""
SIZE = {"cpu": 256, "cuda": 4096}
PRODUCTS = 4
"""A step: about a millisecond on a large GPU."""
AHEAD = 16
"""Steps enqueued before the first of them has ended: a real job keeps its GPU fed, and no more."""


class _Steps:
    """The job."""

    def __init__(self, device: str) -> None:
        self._cuda = machine.device_kind(device) == "cuda"
        size = SIZE[machine.device_kind(device)]
        dtype = torch.bfloat16 if self._cuda else torch.float32
        self._a, self._b, self._out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))

    def _step(self) -> None:
        for _ in range(PRODUCTS):
            torch.mm(self._a, self._b, out=self._out)

    def run_until(self, stop: Callable[[], bool]) -> list[float]:
        """Milliseconds of every step until ``stop()``; at least one."""
        return self._by_events(stop) if self._cuda else self._by_clock(stop)

    def _by_clock(self, stop: Callable[[], bool]) -> list[float]:
        times = [time.perf_counter()]
        while len(times) < 2 or not stop():
            self._step()
            times.append(time.perf_counter())
        return [(end - begin) * 1000 for begin, end in zip(times, times[1:])]

    def _by_events(self, stop: Callable[[], bool]) -> list[float]:
        def mark() -> None:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        events: list[torch.cuda.Event] = []
        mark()
        while len(events) < 2 or not stop():
            self._step()
            mark()
            if len(events) > AHEAD:
                events[-AHEAD].synchronize()
        events[-1].synchronize()
        return [begin.elapsed_time(end) for begin, end in zip(events, events[1:])]


def _for(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def measure(rival: str, run: Callable[[], None], device: str, quiet_s: float | None = None) -> Disturbance:
    """One save, ``run()``, on a thread of its own, while the job's steps go on in this one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one that shares its step among the cores waits for the slowest of them
    try:
        return _measure(rival, run, _Steps(device), quiet_s or QUIET_S)
    finally:
        torch.set_num_threads(threads)


def _measure(rival: str, run: Callable[[], None], steps: _Steps, quiet_s: float) -> Disturbance:
    found = Disturbance(rival)
    steps.run_until(_for(quiet_s / 4))
    alone = statistics.median(steps.run_until(_for(quiet_s)))
    failed: list[Exception] = []

    def save() -> None:
        began = time.perf_counter()
        try:
            run()
        except Exception as error:  # shown in its row, as everywhere
            failed.append(error)
        found.save_s = time.perf_counter() - began

    thread = threading.Thread(target=save)
    thread.start()
    during = steps.run_until(lambda: not thread.is_alive())
    thread.join()
    if failed:
        return Disturbance(rival, error=f"{type(failed[0]).__name__}: {failed[0]}".splitlines()[0])
    found.step_ms, found.during_ms, found.worst_ms = alone, statistics.median(during), max(during)
    found.steps, found.excess_ms = len(during), sum(during) - len(during) * alone
    return found
