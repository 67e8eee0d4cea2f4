# SPDX-License-Identifier: Apache-2.0
"""A rank: a process that does what it is told by lines of JSON, and answers each with one. ``bench/save.py --rank``.

It stays for all rounds of a case: one group for all sides, tensors made once, and each side prepared once.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from .ceilings import CEILINGS
from .harness import text_of
from .job import Rival, Unavailable, finish
from .rank_job import RankJob, distributed_tensor, parts, touch, whole_model
from .rivals_ranks import RANK_RIVALS
from .samples import DURABLE, MIB

GROUP_SECONDS = 600


@dataclass(frozen=True)
class Spec:
    """What a rank must know from the start."""

    rank: int
    size: int
    port: int
    """Of the store, which is the parent's, as that of ``torchrun`` is the agent's."""
    memory: int
    """File descriptor of the shared memory."""
    nbytes: int
    """The size that was asked for."""
    shards: int
    out: str
    sources: str
    preallocate: bool


def rival_named(name: str) -> Rival:
    return RANK_RIVALS.get(name) or CEILINGS[name]


def _job(spec: Spec) -> RankJob:
    memory = mmap.mmap(spec.memory, 0)
    whole, part = whole_model(memory, spec.nbytes), parts(memory, spec.nbytes, spec.rank, spec.size)
    mesh = distributed.device_mesh.init_device_mesh("cpu", (spec.size,))
    state = {n: distributed_tensor(part[n], mesh, 0, whole[n].shape) for n in whole}
    return RankJob(
        [part],
        Path(spec.out),
        durable=False,
        preallocate=spec.preallocate,
        rank=spec.rank,
        size=spec.size,
        state=state,
        whole=whole,
        sources=Path(spec.sources),
        most=-(-sum(t.nbytes for t in whole.values()) // spec.shards),
    )


class _Rank:
    """All sides of a case, as one rank runs them."""

    def __init__(self, spec: Spec) -> None:
        self._job = _job(spec)
        self._calls: dict[tuple[str, bool], Callable[[], Any]] = {}

    def obey(self, told: dict[str, Any]) -> dict[str, Any]:
        what: Callable[..., dict[str, Any]] = getattr(self, f"_{told.pop('do')}")
        return what(**told)

    def _prepare(self, side: str, mode: str, warm_up: bool) -> dict[str, Any]:
        """Makes ready what is not timed; what a process pays only once is paid here, with a small save."""
        rival, durable = rival_named(side), mode == DURABLE
        job = replace(self._job, durable=durable)
        if warm_up:
            small = rival.prepare(job.smallest())
            self._timed(rival, small)
            _close(small)
        self._calls[side, durable] = rival.prepare(job)
        distributed.barrier()
        return {}

    def _settle(self) -> dict[str, Any]:
        """Ready to be measured by who looks at the memory of this process."""
        touch(self._job.whole)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        return {}

    def _run(self, side: str, mode: str) -> dict[str, Any]:
        rival = rival_named(side)
        call = self._calls[side, mode == DURABLE]
        if self._job.nbytes >= 16 * MIB:
            gc.collect()
        answer: dict[str, Any] = self._timed(rival, call)
        detail = rival.detail or getattr(call, "detail", None)
        return {**answer, "detail": detail() if detail else None}

    def _timed(self, rival: Rival, call: Callable[[], Any]) -> dict[str, float]:
        """By a clock that all processes share."""
        with rival.within():
            distributed.barrier()
            cpu, began = time.process_time(), time.perf_counter()
            made = call()
            ended = time.perf_counter()
            finish(made)
            stood, cpu = time.perf_counter(), time.process_time() - cpu
            del made
        distributed.barrier()
        return {"began": began, "ended": ended, "stood": stood, "cpu": cpu}

    def _check(self, side: str, mode: str) -> dict[str, Any]:
        """Of what was filled in this process."""
        call: Any = self._calls[side, mode == DURABLE]
        return {"wrong": call.wrong()}

    def close(self) -> None:
        for call in self._calls.values():
            _close(call)


def _close(call: Callable[[], Any]) -> None:
    getattr(call, "close", lambda: None)()


def main(text: str) -> int:
    spec = Spec(**json.loads(text))
    # What libraries print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # as torchrun does
    store = distributed.TCPStore("127.0.0.1", spec.port, spec.size, is_master=False)  # type: ignore[attr-defined]
    distributed.init_process_group(
        "cpu:gloo",
        store=store,
        rank=spec.rank,
        world_size=spec.size,
        timeout=timedelta(seconds=GROUP_SECONDS),
    )
    rank = _Rank(spec)
    for line in sys.stdin:
        try:
            answer = rank.obey(json.loads(line))
        except BaseException as error:  # of a side, whatever it raises (CheckpointException is no Exception)
            answer = {"error": text_of(error), "absent": isinstance(error, Unavailable)}
        print(json.dumps(answer, default=str), file=answers, flush=True)
    rank.close()
    distributed.destroy_process_group()
    return 0


def command(spec: Spec) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("save.py")), "--rank", json.dumps(asdict(spec))]
