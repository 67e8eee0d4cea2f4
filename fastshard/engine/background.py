# SPDX-License-Identifier: Apache-2.0
"""Saves whose callers go on: who has asked for them, which are in flight, and whose errors nobody has seen yet.

Everything that calls share changes in single steps of the interpreter, as signal handlers may save. The saves in
flight are held here, so they end although nobody else holds them.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Final, NamedTuple

from ..base.loading import load
from ..base.settings import flag
from .future import SaveFuture
from .relief import WAITED_FOR

SNAPSHOTS: Final = ("auto", "copy", "fork", "none")
FAIL_VARIABLE: Final = "FASTSHARD_FAIL_AT_EXIT"
"""Set to yes, a process whose save has failed without anybody having seen it ends with exit code 1."""
_log: Final = logging.getLogger("fastshard")


class Wanted(NamedTuple):
    """How a save is to be made whose caller goes on."""

    snapshot: str
    """One of :data:`SNAPSHOTS`."""
    wait_staged: bool = True
    unchanged: Callable[[], None] | None = None
    """Raises, naming the tensor, if one was changed before the snapshot was complete."""
    paths: frozenset[str] = frozenset()


class asynchronous:  # noqa: N801 (used as a function is)
    """A block in which this thread's saves are asynchronous. Each call returns when its snapshot is complete; its
    files appear later.

    The weights may be changed when a call has returned: the files get what they were at the call. What is left to
    ``torch.save`` and others, and what cannot be written later, is complete when its call returns; so are saves of
    other threads. At the end of the block the saves go on. ``with asynchronous() as saves`` gives an object with the
    saves that were started, ``saves.futures``, and ``saves.wait()``.

    Args:
        snapshot: what files are written from. ``"copy"``: a copy of the tensors in memory that is kept between saves
            (``Options.snapshot_budget``). ``"fork"``: the memory of a forked child, which shares it with this process
            until one of the two is changed: it takes the least time, and afterwards a page fault for each page that
            is changed before it is written; tensors that a child cannot share are copied, and all of them if some are
            on devices. ``"none"``: the tensors themselves, which the caller promises not to change before the save has
            ended. ``"auto"``: ``"copy"``.
            Where there is no room for a copy, the call returns when everything is written, and
            ``stats().fallbacks`` says so.
        wait_staged: with ``False`` a call returns before its snapshot is complete. The tensors must not be changed
            before :meth:`SaveFuture.wait_staged` has returned, or else the file holds a mixture.
        check_unchanged: compare the tensors' version counters when the snapshot is complete. The save then fails, with
            an error that names a tensor which was changed meanwhile by an operation of torch (writes through NumPy,
            ``.data`` and other processes are not counted). Only for savers of dicts of tensors.

    Raises:
        ValueError: there is no such snapshot.
    """

    def __init__(
        self, *, snapshot: str = "auto", wait_staged: bool = True, check_unchanged: bool = False
    ) -> None:
        if snapshot not in SNAPSHOTS:
            raise ValueError(f"snapshot must be one of {', '.join(SNAPSHOTS)}, not {snapshot!r}")
        self.snapshot: Final = "copy" if snapshot == "auto" else snapshot
        self.wait_staged: Final = wait_staged
        self.check_unchanged: Final = check_unchanged
        self.futures: list[SaveFuture] = []
        """The saves that were started in the block, in their order."""
        self.call: int | None = None
        """The frame of the call that the block is for, if it is for one: not for what a signal handler or a finalizer
        saves meanwhile."""

    def __enter__(self) -> asynchronous:
        _scopes().append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _scopes().remove(self)

    def take(self, future: SaveFuture) -> None:
        """Takes over a save that has been started. Returns when its tensors may be changed, if that is to be
        waited for."""
        self.futures.append(future)
        if self.wait_staged or future.background is None or future.background.kind == "written":
            future.wait_staged()
        future.serve()

    def wait(self, timeout: float | None = None) -> None:
        """Waits until all saves of the block have ended. Raises the error of the first that has failed, and
        ``TimeoutError`` if one has not ended after ``timeout`` seconds."""
        _results(self.futures, timeout)

    def done(self) -> bool:
        """Returns whether all saves of the block have ended."""
        return all(future.done() for future in self.futures)


_this_thread = threading.local()
_BETWEEN: Final = ("fastshard", "contextlib", "functools")
"""The modules whose code runs between the asynchronous form of a saver and the place where it starts a save."""


def _scopes() -> list[asynchronous | None]:
    scopes: list[asynchronous | None] = _this_thread.__dict__.setdefault("scopes", [])
    return scopes


def current() -> asynchronous | None:
    """Returns the block that this thread is in; ``None`` if its saves are waited for."""
    scopes = _scopes()
    scope = scopes[-1] if scopes else None
    if scope is None or scope.call is None:
        return scope
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and id(frame) != scope.call:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _BETWEEN:
            return None  # somebody else's code has interrupted the call
        frame = frame.f_back
    return scope


@contextlib.contextmanager
def synchronous() -> Iterator[None]:
    """A block in which saves are complete when their calls return, whatever is around it."""
    scopes = _scopes()
    scopes.append(None)
    try:
        yield
    finally:
        scopes.pop()


_in_flight: dict[int, SaveFuture] = {}
_workers: dict[int, object] = {}
"""This process, if it is a worker of multiprocessing that will wait at its end."""
_lost: list[SaveFuture] = []
"""Saves that have failed, which nobody knows yet."""


def watch(future: SaveFuture) -> SaveFuture:
    """Holds a save until it has ended, and returns it."""
    _in_flight[id(future)] = future
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        _wait_at_end_of_worker()
    return future


def _wait_at_end_of_worker() -> None:
    """Lets a worker of multiprocessing wait for its saves. One that is forked ends without the hooks of atexit."""
    claim = object()
    if _workers.setdefault(os.getpid(), claim) is claim:
        load("multiprocessing.util").Finalize(None, _at_end_of_worker, exitpriority=0)


def _at_end_of_worker() -> None:
    for future in in_flight():
        with contextlib.suppress(Exception):
            future.wait()
    if report_lost():
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1)


def ended(future: SaveFuture) -> None:
    """Lets go of a save that has ended, and keeps its error until somebody has seen it."""
    if future.background is not None and future._error is not None and not future.seen:
        _lost.append(future)
    _in_flight.pop(id(future), None)


def in_flight() -> list[SaveFuture]:
    """Returns the asynchronous saves that have not ended, the oldest first."""
    return list(_in_flight.values())


def conflicting(paths: Iterable[str]) -> list[SaveFuture]:
    """Returns the saves in flight that change one of these files or folders, or something inside of one."""
    if not _in_flight:
        return []
    wanted = frozenset(paths)
    return [future for future in in_flight() if future.background and _meet(future.background.paths, wanted)]


def _meet(some: frozenset[str], others: frozenset[str]) -> bool:
    return any(_is_in(path, others) for path in some) or any(_is_in(path, some) for path in others)


def _is_in(path: str, places: frozenset[str]) -> bool:
    while path not in places:
        parent = os.path.dirname(path)
        if parent == path:
            return False
        path = parent
    return True


def place_of(path: str | os.PathLike[str]) -> str:
    """Returns the one name of a file or folder by which saves of it are told from others."""
    folder, name = os.path.split(os.fspath(path))
    if not name:
        return os.path.realpath(folder)
    return os.path.join(os.path.realpath(folder), name)


def make_way(*paths: str | os.PathLike[str], wait: bool = True) -> None:
    """Comes before a save of these files or folders, of any kind.

    Raises the error of an earlier asynchronous save of one of them that nobody has seen yet. With ``wait``, earlier
    saves that are still in flight are waited for.
    """
    if not _in_flight and not _lost:
        return
    places = frozenset(place_of(path) for path in paths)
    if wait:
        for earlier in conflicting(places):
            earlier.wait()
    for lost in _lost[:]:
        if lost.seen or (lost.background and _meet(lost.background.paths, places)):
            _give_out(lost)


def _give_out(lost: SaveFuture) -> None:
    """Raises the error of a save unless somebody has seen it."""
    with contextlib.suppress(ValueError):  # another thread gives it out
        _lost.remove(lost)
    if not lost.seen:
        lost.result()


def wait_all(timeout: float | None = None) -> None:
    """Waits until all asynchronous saves of this process have ended.

    Raises the error of the first save that has failed and whose error nobody has seen; the errors of others stay for
    the next call. ``TimeoutError`` if a save has not ended after ``timeout`` seconds; it goes on.
    """
    _await(in_flight(), timeout)
    for lost in _lost[:]:
        _give_out(lost)


def _await(futures: Sequence[SaveFuture], timeout: float | None) -> None:
    end = None if timeout is None else time.monotonic() + timeout
    if timeout != 0:
        for future in futures:
            future.relief.take_over(WAITED_FOR)
    for future in futures:
        if not future.wait(None if end is None else max(0.0, end - time.monotonic())):
            raise TimeoutError(f"an asynchronous save has not ended after {timeout} seconds")


def _results(futures: Iterable[SaveFuture], timeout: float | None) -> None:
    first: BaseException | None = None
    _await(list(futures), timeout)
    for future in list(futures):
        try:
            future.result()
        except BaseException as error:
            first = first or error
    try:
        if first is not None:
            raise first
    finally:
        del first


def report_lost() -> bool:
    """Logs, at the end of the process, the errors that nobody has seen. Returns whether the process is to fail."""
    lost = _lost[:]
    _lost.clear()
    for future in lost:
        if not future.seen:
            where = ", ".join(sorted(future.background.paths)[:3]) if future.background else ""
            _log.error(
                "an asynchronous save has failed and was never waited for: %s: %s", where, future._error
            )
    return bool(lost) and flag(FAIL_VARIABLE)


def fail_at_exit(hook: Callable[[], None]) -> None:
    """Ends the process with exit code 1, when all other exit hooks have run. ``hook`` is the one that calls this."""
    atexit.unregister(hook)
    run = getattr(atexit, "_run_exitfuncs", None)
    if run is not None:
        run()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(1)


def _forget() -> None:
    """The saves of a forked child's parent are the parent's."""
    _in_flight.clear()
    _lost.clear()


os.register_at_fork(after_in_child=_forget)
