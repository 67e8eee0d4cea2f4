# SPDX-License-Identifier: Apache-2.0
"""Saves of one thread that run at the same time, and are waited for together.

A Trainer's checkpoint is a model and the state of its optimizer, one call after the other. Within :func:`together`
such a call starts its save and goes on; :func:`settle` waits for all of them. In between the tensors must not change.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .engine import SaveFuture, Stats

_running = threading.local()


class _End(NamedTuple):
    finish: Callable[[], object]
    abandon: Callable[[BaseException], object]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block in which :func:`end` waits, until the block ends or :func:`settle` is called.

    When the block, or a save, ends in an exception, the others are cancelled. Blocks may be nested; the outermost counts.
    """
    if _ends() is not None:
        yield
        return
    _running.ends = []
    try:
        yield
        settle()
    except BaseException as error:
        _abandon(error)
        raise
    finally:
        _running.ends = None


def end(
    finish: Callable[[], object], abandon: Callable[[BaseException], object] = lambda error: None
) -> None:
    """Calls ``finish`` now, or in its turn at the end of the block; ``abandon`` if it does not come to that."""
    ends = _ends()
    if ends is None:
        finish()
    else:
        ends.append(_End(finish, abandon))


def end_save(future: SaveFuture, finish: Callable[[], Stats]) -> None:
    """The same for a save that is under way."""

    def abandon(error: BaseException) -> None:
        future.cancel()
        future.result()

    end(finish, abandon)


def settle() -> None:
    """Ends what waits, in order. Raises the first exception, after which the rest is abandoned."""
    ends = _ends() or []
    while ends:
        try:
            ends.pop(0).finish()
        except BaseException as error:
            _abandon(error)
            raise


def _abandon(error: BaseException) -> None:
    ends = _ends() or []
    while ends:
        with contextlib.suppress(BaseException):
            ends.pop(0).abandon(error)


def _ends() -> list[_End] | None:
    return getattr(_running, "ends", None)
