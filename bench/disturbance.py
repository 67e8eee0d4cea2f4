# SPDX-License-Identifier: Apache-2.0
"""What a job that runs beside saves notices: the same step again and again, timed by its own device.

On a GPU a step is matrix products and a copy of one number to the host, as a loss is fetched, on the default
stream between CUDA events. What a save puts before them on that stream, takes from the memory's bandwidth, from
the copy engines (which know no priorities) or from the host that launches them shows as longer steps. On the
CPU the job and the save share the cores.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable

import torch

from . import ceilings, machine
from .samples import Disturbance

QUIET_S = 0.5
"""How long the job runs alone before each save: enough steps for a median."""
SAVES = 3
"""Each after a while of quiet, so that what else the machine does falls on both."""
SIZE = {"cpu": 256, "cuda": 4096}
PRODUCTS = 4
"""A step: about a millisecond on a large GPU."""
AHEAD = 16
"""Steps enqueued before the first of them has ended: a real job keeps its GPU fed, and no more."""
HOST_NBYTES = 64


class _Steps:
    """The job."""

    def __init__(self, device: str) -> None:
        self._cuda = machine.device_kind(device) == "cuda"
        size = SIZE[machine.device_kind(device)]
        dtype = torch.bfloat16 if self._cuda else torch.float32
        self._a, self._b, self._out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
        memory = (
            ceilings.page_locked(HOST_NBYTES) if self._cuda else torch.empty(HOST_NBYTES, dtype=torch.uint8)
        )
        self._loss = memory.view(dtype)[:1]

    def _step(self) -> None:
        for _ in range(PRODUCTS):
            torch.mm(self._a, self._b, out=self._out)
        self._loss.copy_(self._out[0, :1], non_blocking=True)

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


def measure(
    rival: str,
    run: Callable[[], None],
    device: str,
    before: Callable[[], None] = lambda: None,
    quiet_s: float = QUIET_S,
    own_stream: bool = False,
) -> Disturbance:
    """A few saves, ``run()``, on a thread, while the job's steps go on in this one. The job stands still for
    ``before()``, before each of them. ``own_stream``: for copies that would else wait in the job's stream."""
    cuda = machine.device_kind(device) == "cuda"
    stream = torch.cuda.Stream(device) if own_stream and cuda else None

    def save() -> None:
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            run()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one that shares its step among the cores waits for the slowest of them
    try:
        return _measure(rival, save, _Steps(device), before, quiet_s)
    finally:
        torch.set_num_threads(threads)


def _measure(
    rival: str, run: Callable[[], None], steps: _Steps, before: Callable[[], None], quiet_s: float
) -> Disturbance:
    alone: list[float] = []
    during: list[float] = []
    seconds = 0.0
    for _ in range(SAVES):
        before()
        steps.run_until(_for(quiet_s / 4))
        alone += steps.run_until(_for(quiet_s))
        times, took, failed = _beside(run, steps)
        if failed:
            return Disturbance(rival, error=f"{type(failed).__name__}: {failed}".splitlines()[0])
        during += times
        seconds += took
    step = statistics.median(alone)
    return Disturbance(
        rival,
        step_ms=step,
        during_ms=statistics.median(during),
        worst_ms=max(during),
        excess_ms=sum(during) - len(during) * step,
        steps=len(during),
        save_s=seconds,
    )


def _beside(run: Callable[[], None], steps: _Steps) -> tuple[list[float], float, Exception | None]:
    """The steps beside one save, its seconds, and how it failed."""
    failed: list[Exception] = []
    seconds: list[float] = []

    def save() -> None:
        began = time.perf_counter()
        try:
            run()
        except Exception as error:  # shown in its row, as everywhere
            failed.append(error)
        seconds.append(time.perf_counter() - began)

    thread = threading.Thread(target=save)
    thread.start()
    times = steps.run_until(lambda: not thread.is_alive())
    thread.join()
    return times, seconds[0], failed[0] if failed else None
