# SPDX-License-Identifier: Apache-2.0
"""Whole runs of a transformers Trainer that saves a checkpoint every few steps, or none."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
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

    def stall(self, first: int = 0) -> float:
        """Mean seconds from the end of a step to the beginning of the next one, where a checkpoint comes in between.
        The ``first`` ones are left out."""
        every = self._every
        return statistics.mean(
            self._begun[step] - self._ended[step - 1]
            for step in range(every * (first + 1), len(self._begun), every)
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


FROZEN = 0.9
"""The share of the weights that is frozen in a fine-tuning."""
FROZEN_CHECKPOINTS = 10


def _fine_tuning(saves: bool) -> Prepare:
    def prepare(job: Job) -> Callable[[], JobSample]:
        def train() -> JobSample:
            steps = FROZEN_CHECKPOINTS + 1
            trainer = models.in_training(job.shards[0], job.out, steps, 1 if saves else None, FROZEN)
            clock = _Clock(1)
            trainer.add_callback(clock.callback)
            cpu, began = time.process_time(), time.perf_counter()
            trainer.train()
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            _occupied["files"] = _of_checkpoints(job.out)
            return JobSample(clock.stall(1), seconds, cpu=cpu)

        return train

    return prepare


_occupied: dict[str, dict[str, int]] = {}
"""Of the newest run."""


def _of_checkpoints(run: Path) -> dict[str, int]:
    """Bytes that files take: of all checkpoints, and of the first one. A linked file counts once."""
    found = {
        name: {(one.st_dev, one.st_ino): one.st_blocks * 512 for one in map(Path.stat, files)}
        for name, files in (
            ("all", [path for path in run.rglob("*") if path.is_file()]),
            ("first", [path for path in (run / "checkpoint-1").rglob("*") if path.is_file()]),
            ("weights", list(run.rglob("*.safetensors"))),
            ("first weights", list((run / "checkpoint-1").rglob("*.safetensors"))),
        )
    }
    return {name: sum(sizes.values()) for name, sizes in found.items()}


def _fine_tuned(name: str, about: str, saves: bool = True, **fields: Any) -> Rival:
    def prepare(job: Job) -> Callable[[], JobSample]:
        if name == "incremental":
            import fastshard

            require("install")
            accepts(fastshard.install, incremental=True)
        return _fine_tuning(saves)(job)

    return Rival(
        f"frozen-{name}",
        f"a Trainer, 90 % frozen, ten checkpoints, {about}",
        prepare,
        modes=(STALL,),
        own=True,
        trains=True,
        footprint=4.0,
        detail=lambda: dict(_occupied),
        **{"writes": "frozen", **fields},
    )


@contextlib.contextmanager
def _installed_incrementally() -> Iterator[None]:
    import fastshard

    with models.quiet(), fastshard.installed(incremental=True):  # type: ignore[call-arg,unused-ignore]
        yield


FINE_TUNING = (
    _fine_tuned("incremental", "install(incremental=True)", within=_installed_incrementally),
    _fine_tuned("installed", "install()", within=installed),
    _fine_tuned("unpatched", "as it comes", within=models.quiet),
    _fine_tuned("no-save", "without checkpoints", False, within=models.quiet, writes=None),
)

TRAINING = (
    *FINE_TUNING,
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
