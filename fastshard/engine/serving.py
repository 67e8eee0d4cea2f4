# SPDX-License-Identifier: Apache-2.0
"""How a save is served from Python until it ends.

A save is a list of steps. The native module copies and writes. It asks Python for bytes that only Python has,
and for bytes that are known only when all others are in place. Then the steps of the caller run, of which
publishing a directory is one. A thread of the engine can serve all of this, so that a save ends whether or
not anybody waits for it. Whoever waits serves, too. A save that is waited for at once needs no thread: it
then runs with the caller's current stream and thread-local state, and signals reach it as in any other call.

No lock is held in here that a signal handler could wait for while it interrupts the holder: each change is a
single step of the interpreter.
"""

from __future__ import annotations

import _thread
import collections
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, Final

from ..errors import SaveError, rewritten
from .options import Changed, Stats
from .parts import Background, Served
from .relief import WAITED_FOR, Relief

if TYPE_CHECKING:
    from .. import _native

_POLL_SECONDS: Final = 0.1
"""The longest time until Ctrl-C is noticed."""
_START_SECONDS: Final = 1.0
"""The time that a thread is given to begin."""
_log: Final = logging.getLogger("fastshard")


class ServedSave:
    """A save and what Python does for it. :class:`fastshard.engine.future.SaveFuture` is what users hold."""

    def __init__(
        self,
        native: _native.Save,
        *,
        kept: list[object],
        served: Served,
        settled: Callable[[Any], None] = lambda _: None,
        background: Background | None = None,
        began: float | None = None,
    ) -> None:
        self._native = native
        self._kept = kept
        self._fetch = served.fetch
        self._amend = served.amend
        self._steps = collections.deque(served.steps)
        self._undo = served.undo
        self._explain = served.explain
        self._names = served.tensor_names or {}
        self._plan_seconds = served.plan_seconds
        self._linked = served.linked
        self._on_settled = settled
        self._callbacks: list[Callable[[Any], object]] = []
        self.began: Final = (began or time.time()) - served.plan_seconds
        """When planning began, in seconds since the epoch."""
        self._pid = os.getpid()
        self._starter = threading.get_ident()
        self._only_native = not served.steps and served.undo is None and background is None
        self.background: Final = background
        """``None`` for a save that its caller waits for."""
        self.relief: Final = Relief(native, background.after if background else ())
        self._packing = background.packing if background else None
        self._held = background is not None and (self._packing is not None or bool(background.after))
        self._notes: list[str] = []
        """Why the host has waited where streams were to, for ``Stats.fallbacks``."""
        self._packed: Stats | None = None
        """The figures of the packing."""
        self._is_staged = background is not None and background.kind in ("fork", "none")
        self.seen: bool = False
        """Whether somebody has been told how the save ended."""
        self.staged_seconds = time.time() - self.began if self._is_staged else 0.0
        """Seconds from the beginning until the tensors might be changed."""
        self._serving: list[int] = []
        """Threads that are in the middle of a step."""
        self._claims: dict[str, object] = {}
        """Who does what only one thread may do."""
        self._served_from: float | None = None
        """When a thread was started to serve this save."""
        self._is_served = False
        """Whether that thread has begun to."""
        self._stopped = False
        self._error: BaseException | None = None
        self._final: Stats | None = None
        """Figures that do not change any more."""
        self._settled = False
        # Free once the save is settled. Taken for no more than a moment then, so nobody is interrupted while holding it.
        self._gate = _thread.allocate_lock()
        self._gate.acquire()
        # The same, of the snapshot.
        self._staged_gate = _thread.allocate_lock()
        self._staged_gate.acquire()

    def done(self) -> bool:
        """Returns whether the save has ended: the files stand, or it has failed or was cancelled."""
        return self._settled or (self._only_native and self._native.finished())

    def cancel(self) -> bool:
        """Stops the save, which leaves everything as it was; :meth:`result` then raises ``CancelledError``.

        Returns ``False`` if it is too late, as the save has ended or its files are about to appear.
        """
        if self.done():
            return False
        packing = self._packing
        if packing is not None:
            packing.cancel()
        stopped = self._native.cancel()
        if not self._only_native and self._claims.get("end") is None:
            self._stopped = stopped = True
        if stopped:
            self.seen = True  # nobody else has to be told
        return stopped

    def wait(self, timeout: float | None = None) -> bool:
        """Waits for the end of the save, at most ``timeout`` seconds, and returns whether it has ended.

        An exception that arrives meanwhile (Ctrl-C) stops the save, which leaves nothing behind. Raises
        ``RuntimeError`` in a forked child, and in a signal handler that has interrupted a step of this save.
        """
        if timeout != 0:
            self.relief.take_over(WAITED_FOR)
        self._wait_for(lambda: self._settled, self._gate, timeout)
        return self._settled

    def _wait_for(self, reached: Callable[[], bool], gate: _thread.LockType, timeout: float | None) -> None:
        self._check_process()
        if threading.get_ident() in self._serving:
            raise RuntimeError("this save waits for a call that it has interrupted")
        end = None if timeout is None else time.monotonic() + timeout
        try:
            while not reached():
                self._check_process()  # a handler may have forked
                left = _POLL_SECONDS if end is None else min(_POLL_SECONDS, max(0.0, end - time.monotonic()))
                self._pass(left, gate)
                if end is not None and time.monotonic() >= end:
                    break
        except BaseException:
            if os.getpid() == self._pid:
                self._stop()
                self.seen = True
            raise

    def _read(self) -> bool:
        return not self._held and self._native.read()

    def _say_staged(self) -> None:
        """Lets those go on who wait for the snapshot. Only the first call counts."""
        claim = object()
        if self._claims.setdefault("staged", claim) is claim:
            if not self._is_staged:
                self.staged_seconds = time.time() - self.began
            self._is_staged = True
            self._staged_gate.release()

    def checksums(self) -> list[list[int]]:
        """Returns the CRC-32 of each tensor of each file, in file order.

        The lists are empty unless checksums were asked for, and until everything is written.
        """
        return [values[1:] for values in self._native.checksums()]  # the first is the header's

    def _changed(self) -> Changed | None:
        found = self._native.changes()
        if found is None:
            return None
        compared, items, ranges = found
        names = next(iter(self._names.values()))  # a prepared save has one file
        return Changed(first=not compared, tensors=tuple(names[item] for item in items), ranges=tuple(ranges))

    @property
    def stats(self) -> Stats:
        """Figures of the save. They are final once it is done."""
        if self._final is not None:
            return self._final
        ended = self._native.finished()
        figures = self._native.stats()
        figures["seconds"] += self._plan_seconds
        checksums = {
            file: dict(zip(names, values))
            for (file, names), values in zip(self._names.items(), self.checksums())
        }
        if (background := self.background) is not None:
            figures["fallbacks"] += (*background.refused, *self._notes)
            if self._packed is not None:
                figures["fallbacks"] += self._packed.fallbacks
                figures["copy_seconds"] += self._packed.copy_seconds
                staged = self._packed.staging_nbytes >= figures["staging_nbytes"]
                for name in ("device_scratch_nbytes", *(("staging", "staging_nbytes") if staged else ())):
                    figures[name] = getattr(self._packed, name)
            figures["snapshot"] = background.kind
            figures["staged_seconds"] = self.staged_seconds
            figures["taken_over"] = self.relief.why
        if self._linked is not None:
            figures["linked_files"], figures["linked_nbytes"], refused = self._linked
            figures["fallbacks"] += refused
        figures["changed"] = self._changed() if ended else None
        stats = Stats(plan_seconds=self._plan_seconds, checksums=checksums, **figures)
        if ended:
            self._final = stats
        return stats

    def begin(self) -> None:
        """Begins a save that was submitted held."""
        self._native.begin()

    def serve(self) -> None:
        """Lets a thread of the engine serve this save, so that it ends although nobody waits. Only the first
        call counts.

        If no thread can be started, whoever waits serves it, as without this call.
        """
        claim = object()
        if self._claims.setdefault("thread", claim) is not claim:
            return
        self._served_from = time.monotonic()
        try:
            _thread.start_new_thread(self._serve_until_settled, ())
        except RuntimeError as error:
            self._served_from = None
            _log.warning("a save has to be waited for, as no thread is to be had to serve it: %s", error)

    def needs(self, thread: int) -> bool:
        """Returns whether the save cannot end without that thread, which started it and brings its bytes."""
        packing = self._packing
        return (packing is not None and packing.needs(thread)) or (
            self._starter == thread
            and not self._is_served
            and self._native.fetches
            and not self._native.finished()
        )

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("this save belongs to the parent process")

    def _pass(self, seconds: float, gate: _thread.LockType | None = None) -> None:
        """Waits for so long, and serves the save unless a thread of the engine does.

        ``gate`` is free from when on there is nothing to wait for; without it, that is the end of the save.
        """
        gate = gate or self._gate
        served = self._is_served
        if not served and self._served_from is not None:  # perhaps it had no memory for its first frame
            served = time.monotonic() < self._served_from + _START_SECONDS
        if not served:
            self._advance(seconds)
        elif gate.acquire(timeout=seconds):
            gate.release()

    def _serve_until_settled(self) -> None:
        self._is_served = True
        while not self._settled:
            with contextlib.suppress(BaseException):  # it is the save's, and kept for those who wait
                self._advance(_POLL_SECONDS)

    def _advance(self, seconds: float) -> None:
        """Serves what the save asks for in the next ``seconds``, and ends it when everything is written."""
        if self._held:
            return self._come_to_begin(seconds)
        error = None
        try:
            written = self._native.wait(seconds)
        except Exception as raised:
            if not self._native.finished():
                raise  # a signal handler's
            error, written = raised, True
            if isinstance(error, OSError):
                error = rewritten(error, SaveError)
        if self.background is not None and (written or self._native.read()):
            self._say_staged()
        if not written:
            self.relief.take_over_if_overdue()
            return self._bring()
        try:
            self._end(error, seconds)
        finally:
            del error  # its traceback has this frame

    def _come_to_begin(self, seconds: float) -> None:
        """Waits in the next ``seconds`` for the snapshot and for earlier saves of the same files, and begins when
        they have ended."""
        packing = self._packing
        if packing is not None:
            if not packing._settled:
                packing._pass(seconds)
                return None
            error = packing._error
            if error is not None:
                self._error = self._error or error
                self._native.cancel()
            self._packed = packing.stats
            self._packing = None  # and the tensors
            self._say_staged()
        if self._error is None and not self._stopped:
            for earlier in self.background.after if self.background else ():
                if not earlier._settled:
                    earlier._pass(seconds)
                    return None
        self._native.begin()  # nothing happens if it was cancelled
        self._held = False

    def _bring(self) -> None:
        """Brings the bytes that only Python can bring, and those that are known last."""
        me = threading.get_ident()
        self._serving.append(me)
        try:
            while request := self._native.fetch():
                ticket, *what = request
                assert self._fetch is not None
                self._fetch(*what)
                self._native.fetched(ticket)
            if self._amend is not None and self._native.take_amendment():
                self._native.amend(self._amend(self.checksums()))
        except BaseException as error:
            self._error = self._error or error
            self._native.cancel()
            self._native.disown_fetches()  # of this thread: an exception has ended what it was bringing
        finally:
            self._serving.remove(me)

    def _end(self, error: BaseException | None, seconds: float) -> None:
        """Runs the steps that are left if all went well, and settles the save. Waits if another thread does
        that."""
        me = threading.get_ident()
        self._serving.append(me)
        try:
            # A thread that finds its own claim was interrupted by an exception in here, and goes on.
            if self._claims.setdefault("end", me) != me:
                if self._gate.acquire(timeout=seconds):
                    self._gate.release()
                return
            if self._settled:
                return
            self._error = self._error or error
            try:
                while self._steps and self._error is None:
                    if self._stopped:
                        raise CancelledError("the save was cancelled")
                    self._steps[0](self.stats)
                    self._steps.popleft()
            except BaseException as raised:
                self._error = raised
            undo, self._undo = self._undo, None
            try:
                if undo is not None:
                    undo()
            except BaseException as raised:
                self._error = self._error or raised
            if self._explain is not None and self._error is not None:
                self._error = self._explain(self._error) or self._error
            self._kept.clear()
            self._fetch = self._amend = self._explain = None
            self._settled = True
            self._gate.release()
            self._say_staged()
        finally:
            self._serving.remove(me)
        self._on_settled(self)
        self._call_back()

    def _call_back(self) -> None:
        while self._callbacks:
            with contextlib.suppress(IndexError):  # another thread has taken it
                function = self._callbacks.pop(0)
                try:
                    function(self)
                except Exception:
                    _log.exception("a callback of a save has failed")

    def _stop(self) -> None:
        """Cancels the save, and waits until nothing touches the tensors or the files any more."""
        self._stopped = True
        packing = self._packing
        if packing is not None:
            packing._stop()
        self._native.cancel()
        self._native.disown_fetches()  # of this thread: an exception has ended what it was bringing
        self.relief.take_over(WAITED_FOR)
        while not self._settled:
            with contextlib.suppress(BaseException):
                self._pass(_POLL_SECONDS)

    def __del__(self) -> None:
        # Dropped without waiting: the tensors must not go while they are being read.
        if not getattr(self, "_settled", True) and os.getpid() == self._pid:
            with contextlib.suppress(BaseException):
                self.wait()
