# SPDX-License-Identifier: Apache-2.0
"""Counts what this process has saved through the engine, how it was planned, and what was left to the replaced function
and why.

:func:`fastshard.status` and the lines of the logger ``fastshard`` show it. A signal handler may save at any
moment, so nothing here takes a lock: each count is a list that is appended to, which is atomic.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, NamedTuple

_LOGGER: Final = logging.getLogger("fastshard")


class Saved(NamedTuple):
    """The saves that the engine has made for one public function."""

    saves: int
    files: int
    nbytes: int
    seconds: float


_MOST_KEPT: Final = 1024
_saved: dict[str, list[Saved]] = {}
_left: dict[tuple[str, str], list[None]] = {}
_on_the_spot: dict[tuple[str, str], list[None]] = {}
_planned: dict[str, list[None]] = {}
_taken_over: dict[str, list[None]] = {}
_compacting = threading.Lock()
"""A thread only tries to take this lock and never waits for it."""


class _OfThisThread(threading.local):
    save: one_save | None = None


_this_thread = _OfThisThread()


class one_save:  # noqa: N801 (used as a function is)
    """Counts what this thread saves in the ``with`` block as one save of one public function.

    However many files it takes, it is counted and logged once: when the block has ended and all saves that
    were started in it are complete, whichever thread that is on. Nothing is counted if the block ends with an
    exception, if one of the saves fails, or if nothing was saved.
    """

    __slots__ = ("_awaited", "_began", "_call", "_claim", "_ended", "_outer", "_parts", "_place")

    def __init__(self, call: str, place: object) -> None:
        self._call = call
        self._place = place
        self._parts: list[tuple[int, int]] = []
        self._awaited: list[None] = []
        self._claim: list[None] = [None]
        """Whoever takes it counts."""
        self._ended = False

    def __enter__(self) -> one_save:
        self._began = time.perf_counter()
        self._outer = _this_thread.save
        if self._outer is not None:
            self._outer.expect()
        _this_thread.save = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _this_thread.save = self._outer
        if kind is None:
            self._ended = True
            self._count_if_complete()
        elif self._outer is not None:
            self._outer.done()

    def expect(self) -> Callable[..., None]:
        """Says that something has been started. It is complete when :meth:`done`, which is returned, is
        called."""
        self._awaited.append(None)
        return self.done

    def add(self, files: int, nbytes: int) -> None:
        """Adds what was saved."""
        self._parts.append((files, nbytes))

    def done(self, _: object = None) -> None:
        """Says that something that was started is complete. It may be a step of a save."""
        self._awaited.pop()
        self._count_if_complete()

    def _count_if_complete(self) -> None:
        if not self._ended or self._awaited:
            return
        try:
            self._claim.pop()
        except IndexError:
            return
        files, nbytes = (sum(numbers) for numbers in zip((0, 0), *self._parts))
        if files:
            seconds = time.perf_counter() - self._began
            count_saved(self._call, self._place, files, nbytes, seconds, self._outer)
        if self._outer is not None:
            self._outer.done()


def counting() -> one_save | None:
    """Returns the block in which this thread counts what it saves as one save."""
    return _this_thread.save


def count_saved(
    call: str, place: object, files: int, nbytes: int, seconds: float, within: one_save | None
) -> None:
    """Counts a save of the engine under the public function that made it, and logs one line (INFO).

    ``call`` is the function, as ``"save_file"``, and ``place`` the file or folder. ``nbytes`` are the bytes
    of all files, ``seconds`` the time of the whole save. If it was made ``within`` another save, it is added
    to that one.
    """
    if within is not None:
        within.add(files, nbytes)
        return
    saves = _saved.setdefault(call, [])
    saves.append(Saved(1, files, nbytes, seconds))
    if len(saves) > _MOST_KEPT and _compacting.acquire(blocking=False):
        try:
            saves[:_MOST_KEPT] = [_total(saves[:_MOST_KEPT])]
        finally:
            _compacting.release()
    if _LOGGER.isEnabledFor(logging.INFO):
        rate = nbytes / seconds / 2**30 if seconds else 0.0
        _LOGGER.info(
            "%s: %s, %d file(s), %d bytes in %.3f s (%.2f GiB/s)", call, place, files, nbytes, seconds, rate
        )


def count_left(call: str, reason: str, *, level: int = logging.INFO) -> None:
    """Counts a call that was left to the replaced function. A reason is logged when it is seen for the first
    time.

    ``reason`` is one of few texts, without names of files, as ``"a file-like object (BytesIO)"``.
    """
    seen = _left.setdefault((call, reason), [])
    seen.append(None)
    if len(seen) == 1:
        _LOGGER.log(level, "%s is left to the original: %s", call, reason)


def count_on_the_spot(call: str, reason: str) -> None:
    """Counts a call that was to be asynchronous and is not: its files stand when it returns. A reason is
    logged when it is seen for the first time.

    ``reason`` is one of few texts, as for :func:`count_left`.
    """
    seen = _on_the_spot.setdefault((call, reason), [])
    seen.append(None)
    if len(seen) == 1:
        _LOGGER.info("%s finishes on the spot: %s", call, reason)


def count_planned(why_in_python: str) -> None:
    """Counts a file whose tensors were laid out natively, or in Python for a reason.

    A reason is one of few texts, without names of tensors. It is logged when it is seen for the first time.
    """
    seen = _planned.setdefault(why_in_python, [])
    seen.append(None)
    if len(seen) == 1 and why_in_python:
        _LOGGER.info("a file is laid out in Python, which takes longer: %s", why_in_python)


def count_taken_over(why: str) -> None:
    """Counts an asynchronous save whose writers were relieved by others of normal priority. ``why`` is one of few
    texts."""
    _taken_over.setdefault(why, []).append(None)


def taken_over() -> dict[str, int]:
    """Returns how many asynchronous saves were taken over by writers of normal priority, by reason."""
    return {why: len(seen) for why, seen in _taken_over.copy().items()}


def planned() -> dict[str, int]:
    """Returns how many files were laid out natively (under the empty text), or in Python, by reason."""
    return {reason: len(seen) for reason, seen in _planned.copy().items()}


def saved() -> dict[str, Saved]:
    """Returns what was saved, by public function."""
    return {call: _total(saves[:]) for call, saves in _saved.copy().items()}


def _total(saves: list[Saved]) -> Saved:
    return Saved(
        sum(save.saves for save in saves),
        sum(save.files for save in saves),
        sum(save.nbytes for save in saves),
        sum(save.seconds for save in saves),
    )


def left() -> dict[str, dict[str, int]]:
    """Returns how often each call was left to the replaced function, by call and reason."""
    return _by_call(_left)


def on_the_spot() -> dict[str, dict[str, int]]:
    """Returns how often each call was finished on the spot, though it was to be asynchronous, by call and
    reason."""
    return _by_call(_on_the_spot)


def _by_call(counts: dict[tuple[str, str], list[None]]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for (call, reason), seen in counts.copy().items():
        found.setdefault(call, {})[reason] = len(seen)
    return found


def _forget() -> None:
    """Starts the counts of a forked child at zero."""
    _saved.clear()
    _left.clear()
    _on_the_spot.clear()
    _planned.clear()
    _taken_over.clear()


os.register_at_fork(after_in_child=_forget)
