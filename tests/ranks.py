# SPDX-License-Identifier: Apache-2.0
"""Functions that run in several processes at once, each of which is a rank of a gloo group on the CPU.

The processes are forked from one that has imported torch and fastshard and has used nothing of them, so a group costs a
fraction of a second. The store through which the ranks find each other is the test's own, as that of torchrun is the agent's: it is
there as long as the test is, whichever rank dies.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

_context = multiprocessing.get_context("forkserver")
_OF_TORCH = ["torch", "torch.distributed.checkpoint", "torch.distributed.tensor"]
_context.set_forkserver_preload(
    [*_OF_TORCH, "fastshard.distributed.rank_save", "fastshard.distributed.rank_load"]
)
GROUP_SECONDS = 300
"""After which a collective fails whose other ranks do not come."""


class Ended(NamedTuple):
    """How a rank has ended."""

    value: Any = None
    """What the function has returned."""
    error: BaseException | None = None
    """What it has raised, with the text of the traceback as a note."""
    signal: int = 0
    """What has killed it."""

    def result(self) -> Any:
        """Returns the value, or raises what has gone wrong."""
        if self.error is not None:
            raise self.error
        assert self.signal == 0, f"the rank was killed by signal {self.signal}"
        return self.value


def outcomes(
    size: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float = 300,
    environment: dict[str, str] | None = None,
    hangs: int | None = None,
) -> list[Ended]:
    """Calls ``function(*arguments)``, which must be at the top of a module, in ``size`` ranks, and returns how each of
    them has ended. A rank that has not ended after ``timeout`` seconds is killed, and the one that ``hangs`` is when
    all others have ended."""
    from torch.distributed import TCPStore

    # Not by libuv, which opens descriptors in forked children of the test's process from then on.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=False)
    started, ends = [], dict[int, Ended]()
    for rank in range(size):
        ours, theirs = _context.Pipe(duplex=False)
        known = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), **(environment or {})}
        process = _context.Process(
            target=_rank, args=(theirs, store.port, known, sys.path, function, arguments), daemon=True
        )
        process.start()
        theirs.close()
        started.append((process, ours))
    deadline = time.monotonic() + timeout
    for rank in sorted(range(size), key=lambda rank: rank == hangs):
        process, ours = started[rank]
        told = None
        if rank == hangs:
            process.kill()
        with contextlib.suppress(EOFError):
            if wait([ours], max(0.0, deadline - time.monotonic())):
                told = ours.recv()
        if told is not None:
            process.join(max(1.0, deadline - time.monotonic()))
        if process.is_alive() and time.monotonic() >= deadline - 1:
            process.kill()
        process.join()
        ours.close()
        code = process.exitcode or 0
        ends[rank] = Ended(*(told or (None, None)), signal=-code if code < 0 else 0)
    return [ends[rank] for rank in range(size)]


def run(size: int, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
    """As :func:`outcomes`, and returns what the ranks return. Raises what the first of them has raised."""
    return [ended.result() for ended in outcomes(size, function, *arguments, **options)]


def kill_self() -> None:
    """Ends this rank as ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def _rank(
    told: Connection,
    port: int,
    known: dict[str, str],
    paths: list[str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(known)
    sys.path[:] = paths
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    rank, size = int(known["RANK"]), int(known["WORLD_SIZE"])
    store = distributed.TCPStore("127.0.0.1", port, size, is_master=False)
    distributed.init_process_group(
        "cpu:gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=GROUP_SECONDS)
    )
    try:
        answer: tuple[Any, BaseException | None] = (function(*arguments), None)
    except BaseException as error:
        error.add_note("".join(traceback.format_exception(error))) if hasattr(error, "add_note") else None
        answer = (None, error.with_traceback(None))
    try:
        told.send(answer)
    except Exception as error:  # what cannot be pickled
        told.send((None, RuntimeError(f"{answer!r} cannot be sent: {error}")))
    told.close()
    if answer[1] is None:
        with contextlib.suppress(Exception):
            distributed.destroy_process_group()


def leftovers(folder: Path) -> list[str]:
    """What of a save is left in a folder: hidden files and folders, at any depth."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".fastshard*"))
