# SPDX-License-Identifier: Apache-2.0
"""The handle of a save, which everybody holds who has started one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any, Final, NamedTuple

from .options import Stats
from .parts import Amend as Amend
from .parts import Background as Background
from .parts import Fetch as Fetch
from .parts import Served as Served
from .parts import Step as Step
from .serving import ServedSave
from .staged_event import StagedEvent


class Progress(NamedTuple):
    """How much of a save is done, in bytes of its files."""

    nbytes_written: int
    nbytes: int


class SaveFuture(ServedSave):
    """A save under way, with the methods of ``concurrent.futures.Future``. Any thread may use it.

    It keeps the tensors alive. Whoever started the save must not change them before :meth:`staged` is true. Where
    there is no snapshot, that is the case when all bytes are written.
    """

    def running(self) -> bool:
        """Returns whether the save is under way."""
        return not self.done()

    def cancelled(self) -> bool:
        """Returns whether the save was stopped, by :meth:`cancel` or by an exception in a waiting thread."""
        return self.done() and self.wait() and isinstance(self._error, CancelledError)

    def staged(self) -> bool:
        """Returns whether the tensors may be changed: the file will have what they were at the call."""
        return self._is_staged or self.done() or (self.background is not None and self._read())

    def wait_staged(self, timeout: float | None = None) -> bool:
        """Waits until the tensors may be changed, at most ``timeout`` seconds, and returns whether they may.

        A save that has no snapshot is staged when all its bytes are written. Raises what the save has failed with
        if that has happened meanwhile, as :meth:`result` does. An exception that arrives meanwhile (Ctrl-C) stops
        the save.
        """
        if not self._is_staged:
            self._wait_for(self.staged, self._staged_gate, timeout)
        if self._error is not None:  # without the snapshot the save will not begin
            self.result()
        return self.staged()

    def staged_event(self) -> StagedEvent:
        """Returns an event for the streams of a job, as a ``torch.cuda.Event``: ``staged_event().wait()`` lets the
        current streams of the devices wait until their tensors are copied, and the host goes on.

        What is enqueued on them afterwards may change these tensors. ``check_unchanged`` finds such changes all the
        same, as torch counts them at once.
        """
        packing = self._packing
        holders = [] if packing is None else [packing._native]
        return StagedEvent(holders, self.staged, self.wait_staged, self._notes.append)

    def is_served_here(self) -> bool:
        """Returns whether this call has interrupted a step of the save, which therefore cannot be waited for."""
        return threading.get_ident() in self._serving

    def result(self, timeout: float | None = None) -> Stats:
        """Waits until the files stand under their names and returns the figures of the save.

        Raises :class:`SaveError` for a failed system call, ``RuntimeError`` for a failed device,
        ``concurrent.futures.CancelledError`` if the save was cancelled, ``TimeoutError`` if it has not ended
        after ``timeout`` seconds (it goes on), and what a step of the save has raised. An exception that
        arrives meanwhile (Ctrl-C) stops the save.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"the save has not ended after {timeout} seconds")
        error = self._handed_out()
        try:
            if error is not None:
                raise error
        finally:
            del error  # its traceback has this frame
        return self.stats

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Waits as :meth:`result` does, and returns what that would raise; ``None`` if the files stand.

        Raises ``CancelledError`` and ``TimeoutError`` as :meth:`result` does.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"the save has not ended after {timeout} seconds")
        error = self._handed_out()
        try:
            if isinstance(error, CancelledError):
                raise error
            return error
        finally:
            del error

    def _handed_out(self) -> BaseException | None:
        """Returns the error, of which the handle then keeps a copy without its traceback.

        The traceback's frames hold the handle, so only a garbage collection would release the frames of the
        failed call.
        """
        self.seen = True
        error = self._error
        if error is not None:
            try:
                self._error = copy.copy(error)
            except Exception:  # it cannot be made with the arguments that it has
                self._error = RuntimeError(f"the save has failed: {error!r}")
        return error

    def add_done_callback(self, function: Callable[[SaveFuture], object]) -> None:
        """Calls ``function(self)`` when the save has ended, in a thread of the engine or one that waits.

        If it has ended already, the function is called at once by the calling thread. What it raises is
        logged.
        """
        self._callbacks.append(function)
        if self._settled:
            self._call_back()
        else:
            self.serve()

    def progress(self) -> Progress:
        """Returns how many bytes of the files are written, and how many there are."""
        return Progress(self._native.nbytes_written, self._native.nbytes)


class _Nothing:
    """Stands where a save has no native part, as everything was done before."""

    nbytes = nbytes_written = 0
    fetches = False

    def finished(self) -> bool:
        return True

    def wait(self, seconds: float) -> bool:
        return True

    def read(self) -> bool:
        return True

    def cancel(self) -> bool:
        return False

    def take_over(self) -> bool:
        return False

    def checksums(self) -> list[list[int]]:
        return []

    def changes(self) -> None:
        return None

    def stats(self) -> dict[str, Any]:
        return _NO_FIGURES.copy()


_NO_FIGURES: Final[dict[str, Any]] = {
    "files": 0,
    "nbytes": 0,
    "seconds": 0.0,
    "copy_seconds": 0.0,
    "write_seconds": 0.0,
    "sync_seconds": 0.0,
    "write_path": "",
    "staging": "none",
    "staging_nbytes": 0,
    "mapped_nbytes": 0,
    "device_scratch_nbytes": 0,
    "fallbacks": (),
}


def ended_save(figures: Stats | None) -> SaveFuture:
    """Returns the handle of a save that had ended when its call returned. ``figures`` are those of the engine, if
    it has made the save."""
    nothing: Any = _Nothing()
    future = SaveFuture(nothing, kept=[], served=Served())
    future._final = figures
    future.wait()
    return future
