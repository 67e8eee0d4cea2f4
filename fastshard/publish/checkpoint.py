# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that several saves and ordinary small files fill, and that appears when all of them are done.

The loops of other libraries write a checkpoint file by file. :func:`checkpoint` gives them a hidden folder of
the same name for that, beside the final place. Saves in it are asynchronous: each has its snapshot when its
call returns, and is written while the job goes on. When all of them have ended, the folder gets its name by
one rename.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from ..base.activity import one_save
from ..engine.engine import SaveFuture, Stats
from ..engine.pipeline import How, start
from .directory import Replacement, final_places

_log: Final = logging.getLogger("fastshard")
_running = threading.local()
_in_flight: list[Checkpoint] = []
"""The checkpoints of this process that have not appeared yet, or whose error nobody has been told."""


class Checkpoint:
    """A folder that does not have its name yet. It is filled by one thread, in :func:`checkpoint`."""

    def __init__(self, directory: str, durable: bool) -> None:
        self.directory = directory
        """Where it will appear."""
        self.future: SaveFuture | None = None
        """After the block: ends when the folder stands under its name, or everything is undone."""
        self.messages = Messages(directory)
        """What other libraries say of its files."""
        self.change = Replacement(directory, create=True, durable=durable, beside=True)
        self.path = self.change.path
        """The hidden folder to write to, of the same name as :attr:`directory`."""
        self._futures: list[SaveFuture] = []
        self._steps: list[Callable[[], object]] = []

    def then(self, step: Callable[[], object]) -> None:
        """Adds what is to be done when the checkpoint stands. An error of it is the save's."""
        self._steps.append(step)

    def holds(self, path: object) -> bool:
        """Returns whether a path is the folder's, or of something in it."""
        found = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
        return isinstance(found, str) and f"{found}{os.sep}".startswith(self.path + os.sep)

    def part(self, directory: str) -> Part:
        """Returns what stands for the change of names of a save that fills this folder, or one in it."""
        os.makedirs(directory, exist_ok=True)
        return Part(self, directory)

    def add(self, future: SaveFuture) -> None:
        """Adds a save that the checkpoint has to wait for."""
        self._futures.append(future)

    def publish(self, count: Callable[[], None]) -> None:
        """Lets the folder appear when the saves in it have ended."""
        steps = [self._await_saves, self.change.publish, self._run_steps, lambda _: count()]
        self.future = start(
            {},
            How(),
            time.perf_counter(),
            steps=steps,
            undo=self.close,
            explain=self.change.explain,
            serve=True,
        )
        _in_flight.append(self)

    def close(self) -> None:
        """Removes the hidden folder. Saves in it that have not ended are stopped."""
        for future in self._futures:
            future.cancel()
        for future in self._futures:
            future.wait()
        self._futures.clear()
        self._steps.clear()
        self.change.close()

    def _await_saves(self, _: Stats) -> None:
        for future in self._futures:
            future.result()

    def _run_steps(self, _: Stats) -> None:
        for step in self._steps:
            step()
        release(self.records)


class Part:
    """A save in a checkpoint, as :class:`fastshard.publish.directory.Replacement` without a change of
    names."""

    def __init__(self, whole: Checkpoint, path: str) -> None:
        self.path = path
        self.messages = whole.messages
        """They are the checkpoint's, which tells them when it stands."""
        self.explain = whole.change.explain

    def publish(self, _: object = None) -> None:
        """Has nothing to do: the files are where they are to be."""

    def close(self) -> None:
        """Has nothing to remove."""

    def end(self, error: BaseException) -> None:
        """Explains what has ended the save."""
        self.explain(error)


@contextlib.contextmanager
def checkpoint(
    directory: str, *, call: str, loggers: tuple[str, ...] = (), durable: bool = False
) -> Iterator[Checkpoint]:
    """A context manager that gives a hidden folder for the checkpoint ``directory``.

    In the block this thread's saves are asynchronous. At its end all snapshots are complete, and the folder
    appears when everything is written: see :attr:`Checkpoint.future`. If ``directory`` is there already,
    files of the same names are replaced then, all at once, and others stay. After an exception in the block
    everything is as it was.

    All saves in it count as one of the public function ``call``. Messages of ``loggers`` about its files are
    held back until these stand, and name the final places.
    """
    outer = current_checkpoint()
    with one_save(call, directory) as counted:
        made = Checkpoint(directory, durable)
        try:
            _running.checkpoint = made
            try:
                with held_back(loggers, made.path, made.records):
                    yield made
            finally:
                _running.checkpoint = outer
            made.publish(counted.expect())
        except BaseException as error:
            made.change.explain(error)
            made.close()
            raise


def current_checkpoint() -> Checkpoint | None:
    """Returns the checkpoint that this thread is filling."""
    return getattr(_running, "checkpoint", None)


def wait_for_earlier() -> None:
    """Waits for the checkpoints of this process that are in flight.

    Raises the error of one that has failed, which nobody has been told yet.
    """
    for made in _in_flight[:]:
        assert made.future is not None
        try:
            made.future.result()
        finally:
            if made.future.done() and made in _in_flight:
                _in_flight.remove(made)


def in_flight() -> tuple[str, ...]:
    """Returns the places of the checkpoints that have not appeared yet."""
    return tuple(made.directory for made in _in_flight[:] if made.future and not made.future.done())


os.register_at_fork(after_in_child=_in_flight.clear)  # they are the parent's
