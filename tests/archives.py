# SPDX-License-Identifier: Apache-2.0
"""Archives that are held, or fail, when everything is written and nothing has appeared yet."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastshard.api import archive


def large(value: float = 1.0) -> dict[str, Any]:
    """A checkpoint with a storage that goes through the engine, as torch writes small archives itself."""
    return {"state_dict": {"w": torch.full((300, 300), value)}, "step": 3}


@contextlib.contextmanager
def amended(before: Callable[[], object], times: int = -1) -> Iterator[None]:
    """Archives that are planned in the block call ``before`` when all is written but their checksums: so many of them, or
    all."""
    plan, left = archive.plan, [times]

    def planned(*arguments: Any) -> Any:
        made = plan(*arguments)
        if left[0] == 0:
            return made
        left[0] -= 1
        amend = made.amend
        assert amend is not None

        def late(checksums: Any) -> Any:
            before()
            return amend(checksums)

        return made._replace(amend=late)

    archive.plan = planned
    try:
        yield
    finally:
        archive.plan = plan


@contextlib.contextmanager
def held(times: int = -1) -> Iterator[threading.Event]:
    """Archives that are planned in the block end when the event is set, which the end of the block does."""
    event = threading.Event()

    def wait() -> None:
        if not event.wait(300):
            raise TimeoutError("nobody has let the archive go on")

    with amended(wait, times):
        try:
            yield event
        finally:
            event.set()


def failing(times: int = 1) -> contextlib.AbstractContextManager[None]:
    """Archives that are planned in the block fail."""

    def fail() -> None:
        raise OSError(errno.EIO, "the disk is gone")

    return amended(fail, times)
