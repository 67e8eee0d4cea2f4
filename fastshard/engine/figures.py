# SPDX-License-Identifier: Apache-2.0
"""The figures of the newest save, which :func:`fastshard.stats` gives."""

from __future__ import annotations

import threading

from ..base.activity import count_saved, counting, one_save
from .future import Step
from .options import Stats


class _Newest:
    """Figures of the newest save of each thread, and of the newest of all."""

    of_thread = threading.local()
    of_all: Stats | None = None


def _of_this_thread() -> list[Stats]:
    """Returns the list in which the figures of this thread's newest save are kept."""
    found: list[Stats] = _Newest.of_thread.__dict__.setdefault("newest", [])
    return found


def stats() -> Stats | None:
    """Returns the figures of the newest save that this thread has made.

    In a thread that has made none, they are those of the newest save of the process; ``None`` before the
    first. A save counts when it is complete.
    """
    return next(iter(_of_this_thread()), _Newest.of_all)


def counted(call: str, place: object) -> Step:
    """Returns the last step of a save of this thread, which counts it as one of the public function
    ``call``."""
    of_starter, within = _of_this_thread(), counting()
    done = None if within is None else within.expect()

    def count(figures: Stats) -> None:
        _keep(call, place, of_starter, figures, within)
        if done is not None:
            done()

    return count


def keep_stats(figures: Stats, call: str, place: object) -> None:
    """Counts a save that this thread has made without the engine."""
    _keep(call, place, _of_this_thread(), figures, counting())


def _keep(call: str, place: object, of_starter: list[Stats], figures: Stats, within: one_save | None) -> None:
    of_starter[:] = [figures]
    _Newest.of_all = figures
    count_saved(call, place, figures.files, figures.nbytes, figures.seconds, within)
