# SPDX-License-Identifier: Apache-2.0
"""Savers that return before their files stand: when what was saved may be changed. The call returns a future."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .job import CPU, Job, Prepare, Rival, Unavailable
from .rivals_fastshard import accepts, detail, require
from .samples import MIB, STALL

HUGE_PAGE = 2 * MIB


def snapshot_budget(job: Job) -> int:
    """Bytes that a snapshot by copy is allowed: as many as the file has, in whole huge pages. A case whose header is
    larger than one of them would have no snapshot."""
    return (job.nbytes // HUGE_PAGE + 1) * HUGE_PAGE


def _fastshard(snapshot: str) -> Prepare:
    """Prepares ``save_file_async`` by an engine with a budget for its snapshots."""

    def prepare(job: Job) -> Callable[[], Any]:
        import fastshard

        require("save_file_async")
        options = fastshard.Options(**accepts(fastshard.Options, snapshot_budget=snapshot_budget(job)))
        engine = fastshard.Engine(options)
        save_file_async, (path,), (tensors,) = fastshard.save_file_async, job.paths, job.shards
        return _Call(lambda: save_file_async(tensors, path, snapshot=snapshot, engine=engine), engine.close)

    return prepare


class _Call:
    """A call that holds what has to be closed after its last time."""

    def __init__(self, call: Callable[[], Any], close: Callable[[], None]) -> None:
        self._call, self.close = call, close

    def __call__(self) -> Any:
        return self._call()


def _told(snapshot: str) -> Callable[[], dict[str, Any]]:
    """Says what the newest save fell back to. Another snapshot than the one that was asked for is one of these."""

    def told() -> dict[str, Any]:
        found = detail()
        used = found.get("snapshot", snapshot)
        if used != snapshot:
            found["fallbacks"] = (f"snapshot {used!r}", *found.get("fallbacks", ()))
        return found

    return told


def _torch_save_thread(job: Job) -> Callable[[], Any]:
    """What people write by hand: a copy of everything, and a thread that saves it."""
    pool = ThreadPoolExecutor(1)

    def save() -> Any:
        (path,), (tensors,) = job.paths, job.shards
        copies = {name: tensor.detach().to(CPU, copy=True) for name, tensor in tensors.items()}
        return pool.submit(torch.save, copies, path.with_suffix(".pt"))

    return _Call(save, pool.shutdown)


def _dcp(kept: bool) -> Prepare:
    """Prepares ``async_save`` by a thread: with its own default stager, or with one that is kept, and its copies too.
    Then the call has returned when the staging is complete."""

    def prepare(job: Job) -> Callable[[], Any]:
        from torch.distributed import checkpoint

        if not hasattr(checkpoint, "async_save"):
            raise Unavailable("this torch has no async_save")
        stager: Any = None
        if kept:
            from torch.distributed.checkpoint import staging

            if not hasattr(staging, "DefaultStager"):
                raise Unavailable("this torch has no DefaultStager")
            stager = staging.DefaultStager(staging.StagingOptions(False, False, True, False))
        known = inspect.signature(checkpoint.async_save).parameters
        keywords: dict[str, Any] = {"no_dist": True} if "no_dist" in known else {}
        if stager is not None:
            keywords["async_stager"] = stager

        def save() -> Any:
            # A storage writer of DCP's would be its own stager: the default one is asked for by a path.
            response: Any = checkpoint.async_save(job.merged(), checkpoint_id=job.out, **keywords)
            if not hasattr(response, "staging_completion"):
                return response
            response.staging_completion.result()
            return response.upload_completion

        return _Call(save, stager.close if stager is not None else lambda: None)

    return prepare


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """DCP's thread warns that there is no process group, which is intended, and that it writes over the last round."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _asynchronous(name: str, about: str, prepare: Prepare, **fields: Any) -> Rival:
    return Rival(name, about, prepare, modes=(STALL,), own=True, **fields)


ASYNC = (
    _asynchronous(
        "async-copy",
        'fastshard.save_file_async, snapshot="copy": into memory that is kept',
        _fastshard("copy"),
        detail=_told("copy"),
        one_file_only=True,
        budget=snapshot_budget,
    ),
    _asynchronous(
        "async-fork",
        'fastshard.save_file_async, snapshot="fork": pages are copied when they are changed',
        _fastshard("fork"),
        detail=_told("fork"),
        one_file_only=True,
        devices=(CPU,),
        footprint=2.0,
    ),
    _asynchronous(
        "async-none",
        'fastshard.save_file_async, snapshot="none": the steps wait until the file stands',
        _fastshard("none"),
        detail=_told("none"),
        one_file_only=True,
        unchanged=True,
    ),
    _asynchronous(
        "torch-save-thread",
        "every tensor cloned, then torch.save in a thread",
        _torch_save_thread,
        writes="torch",
        one_file_only=True,
        footprint=2.0,
        slow=True,
    ),
    _asynchronous(
        "dcp-async",
        "DCP async_save (thread, default stager)",
        _dcp(kept=False),
        writes="dcp",
        within=_without_warnings,
        footprint=2.0,
        slow=True,
    ),
    _asynchronous(
        "dcp-async-kept",
        "the same with a stager that is kept, its copies too; until staging_completion",
        _dcp(kept=True),
        writes="dcp",
        within=_without_warnings,
        slow=True,
    ),
)
