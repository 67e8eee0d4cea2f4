# SPDX-License-Identifier: Apache-2.0
"""Whole runs of a transformers Trainer that saves a checkpoint every few steps, or none."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from . import models
from .job import Job, Prepare, Rival
from .rivals_fastshard import accepts, detail, require
from .rivals_hub import installed
from .samples import MIB, STALL
from .training_steps import JobSample

EVERY = 20
"""Steps from one checkpoint to the next."""
EVERY_OF_A_TINY_RUN = 2
"""Of one that only shows that it runs."""
CHECKPOINTS = 3
"""Of a run. After the newest one there are half as many steps as between two."""


FIRST = 4
"""Steps at the beginning that are like no others."""
BESIDE = 16
"""Steps after a checkpoint in which its files may still be written. Those after them are as without checkpoints."""


class _Clock:
    """When each step of a run began, and when the last one had ended.

    Whole runs of the same job differ by more than what saves cost. So what is lost to saves is told from the steps of
    one run: how much longer those with a checkpoint behind them are than the median of those that have none near.
    """

    def __init__(self, every: int) -> None:
        from transformers import TrainerCallback

        clock = self
        self._every = every
        self._begun: list[float] = []
        self._ended: list[float] = []

        class Callback(TrainerCallback):
            """Nothing is called when a checkpoint has been saved, as that might be to open it."""

            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                clock._begun.append(time.perf_counter())

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                clock._ended.append(time.perf_counter())

        self.callback = Callback()

    def stall(self) -> float:
        """Mean seconds from the end of a step to the beginning of the next one, where a checkpoint comes in between."""
        every = self._every
        return statistics.mean(
            self._begun[step] - self._ended[step - 1] for step in range(every, len(self._begun), every)
        )

    def lost(self, end: float) -> float | None:
        """Seconds that were lost to checkpoints in a run that ended at ``end``; ``None`` for one of a few steps."""
        if self._every < EVERY:
            return None
        # The step that ends with a checkpoint, and those after it.
        times = [after - before for before, after in zip(self._begun, [*self._begun[1:], end])]
        near = [
            step
            for step in range(len(times))
            if step >= self._every - 1 and (step + 1) % self._every < BESIDE
        ]
        alone = statistics.median(
            seconds for step, seconds in enumerate(times) if step >= FIRST and step not in near
        )
        return sum(times[step] - alone for step in near)


def _training(saves: bool) -> Prepare:
    def prepare(job: Job) -> Callable[[], JobSample]:
        every = EVERY if job.nbytes >= 16 * MIB else EVERY_OF_A_TINY_RUN
        steps = CHECKPOINTS * every + every // 2

        def train() -> JobSample:
            trainer = models.in_training(job.shards[0], job.out, steps, every if saves else None)
            clock = _Clock(every)
            trainer.add_callback(clock.callback)
            cpu, began = time.process_time(), time.perf_counter()
            trainer.train()
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            return JobSample(clock.stall(), seconds, cpu=cpu, lost=clock.lost(began + seconds))

        return train

    return prepare


@contextlib.contextmanager
def _installed_asynchronously() -> Iterator[None]:
    import fastshard

    with models.quiet():
        fastshard.install(asynchronous=True)  # type: ignore[call-arg,unused-ignore]
        try:
            yield
        finally:
            fastshard.uninstall()


def _if_asynchronous(job: Job) -> Callable[[], JobSample]:
    import fastshard

    require("install")
    accepts(fastshard.install, asynchronous=True)
    return _training(True)(job)


def _rival(name: str, about: str, prepare: Prepare, **fields: Any) -> Rival:
    return Rival(
        f"training-{name}",
        f"a Trainer, {about}",
        prepare,
        modes=(STALL,),
        own=True,
        trains=True,
        footprint=3.0,  # the weights, their gradients and moments; checkpoints
        **fields,
    )


TRAINING = (
    _rival(
        "async",
        "install(asynchronous=True)",
        _if_asynchronous,
        within=_installed_asynchronously,
        detail=detail,
    ),
    _rival("installed", "install()", _training(True), within=installed, detail=detail),
    _rival("unpatched", "as it comes", _training(True), within=models.quiet),
    _rival("no-save", "without checkpoints", _training(False), within=models.quiet, writes=None),
)
