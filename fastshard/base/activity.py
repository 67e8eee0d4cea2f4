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
_planned: dict[str, list[None]] = {}
_compacting = threading.Lock()
"""A thread only tries to take this lock and never waits for it."""


class _OfThisThread(threading.local):
    save: one_save | None = None


_this_thread = _OfThisThread()


class one_save:  # noqa: N801 (used as a function is)
    """Counts what this thread saves in the ``with`` block as one save of one public function.

    However many files it takes, it is counted and logged once, at the end of the block. Nothing is counted if
    the block ends with an exception or has saved nothing.
    """

    __slots__ = ("_began", "_call", "_files", "_nbytes", "_outer", "_place")

    def __init__(self, call: str, place: object) -> None:
        self._call = call
        self._place = place
        self._files = self._nbytes = 0

    def __enter__(self) -> None:
        self._began = time.perf_counter()
        self._outer = _this_thread.save
        _this_thread.save = self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _this_thread.save = self._outer
        if kind is None and self._files:
            seconds = time.perf_counter() - self._began
            count_saved(self._call, self._place, self._files, self._nbytes, seconds)

    @staticmethod
    def around() -> tuple[str, object] | None:
        """Returns the public function and the place of the outermost block that this thread is in."""
        save = _this_thread.save
        while save is not None and save._outer is not None:
            save = save._outer
        return None if save is None else (save._call, save._place)

    def add(self, files: int, nbytes: int) -> None:
        self._files += files
        self._nbytes += nbytes


def count_saved(call: str, place: object, files: int, nbytes: int, seconds: float) -> None:
    """Counts a save of the engine under the public function that made it, and logs one line (INFO).

    ``call`` is the function, as ``"save_file"``, and ``place`` the file or folder. ``nbytes`` are the bytes
    of all files, ``seconds`` the time of the whole save. Within :class:`one_save` it is added to that save.
    """
    if _this_thread.save is not None:
        _this_thread.save.add(files, nbytes)
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


def count_planned(why_in_python: str) -> None:
    """Counts a file whose tensors were laid out natively, or in Python for a reason.

    A reason is one of few texts, without names of tensors. It is logged when it is seen for the first time.
    """
    seen = _planned.setdefault(why_in_python, [])
    seen.append(None)
    if len(seen) == 1 and why_in_python:
        _LOGGER.info("a file is laid out in Python, which takes longer: %s", why_in_python)


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
    found: dict[str, dict[str, int]] = {}
    for (call, reason), seen in _left.copy().items():
        found.setdefault(call, {})[reason] = len(seen)
    return found


def _forget() -> None:
    """Starts the counts of a forked child at zero."""
    _saved.clear()
    _left.clear()
    _planned.clear()


os.register_at_fork(after_in_child=_forget)
