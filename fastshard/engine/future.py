# SPDX-License-Identifier: Apache-2.0
"""A save under way, as whoever waits for it sees it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from ..base.loading import load
from ..errors import SaveError, rewritten
from .options import Stats

if TYPE_CHECKING:
    from .. import _native

Amend = Callable[[list[list[int]]], list[tuple[int, int, bytes]]]
_POLL_SECONDS: Final = 0.1
"""How long Ctrl-C or the progress bar may have to wait."""


@contextlib.contextmanager
def save_errors() -> Iterator[None]:
    """Failed system calls of the native module, as :class:`SaveError`."""
    try:
        yield
    except OSError as error:
        raise rewritten(error, SaveError) from None


class SaveFuture:
    """A save under way. Keeps its tensors alive; whoever started it must not change them before the end."""

    def __init__(
        self,
        native: _native.Save,
        *,
        kept: list[object],
        fetch: Callable[[int, int, int, int, int], None] | None,
        amend: Amend | None = None,
        plan_seconds: float,
        description: str,
        settled: Callable[[], None] = lambda: None,
    ) -> None:
        self._native = native
        self._kept = kept
        self._fetch = fetch
        self._amend = amend
        self._plan_seconds = plan_seconds
        self._description = description
        self._on_settled = settled
        self._began = time.time() - plan_seconds
        self._pid = os.getpid()
        self._thread = threading.get_ident()
        self._serving: int | None = None
        self._settled = False

    def done(self) -> bool:
        """Whether the files stand, or the save has failed."""
        return self._native.finished()

    def cancel(self) -> None:
        """Stops the save; :meth:`result` then raises ``concurrent.futures.CancelledError``."""
        self._native.cancel()

    def result(self, progress: bool = False) -> Stats:
        """Waits until the files stand under their names and returns what was done.

        Raises :class:`SaveError` for a failed system call and ``RuntimeError`` for a failed device. An
        exception that arrives meanwhile (Ctrl-C) stops the save, which leaves nothing behind.
        """
        self._check_process()
        if self._serving == threading.get_ident():
            raise RuntimeError("this save waits for the call that has been interrupted by this one")
        bar: Any = self._bar() if progress else contextlib.nullcontext()
        try:
            with bar:
                while not self._wait():
                    self._check_process()  # a handler may have forked
                    self._serve()
                    if progress:
                        bar.update(self._native.nbytes_written - bar.n)
                if progress:
                    bar.update(self._native.nbytes - bar.n)
        except BaseException:
            if os.getpid() == self._pid:
                self._stop()
            raise
        finally:
            if os.getpid() == self._pid:
                self._settled = True
                self._kept.clear()
                self._on_settled()
        return self.stats

    def checksums(self) -> list[list[int]]:
        """Of each file, the CRC-32 of each tensor in file order; none unless asked for, or before all is written."""
        return [values[1:] for values in self._native.checksums()]  # the first is the header's

    @property
    def stats(self) -> Stats:
        """Figures of the save, final once it is done."""
        figures = self._native.stats()
        figures["seconds"] += self._plan_seconds
        return Stats(plan_seconds=self._plan_seconds, **figures)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("this save belongs to the parent process")

    def needs(self, thread: int) -> bool:
        """Whether it cannot end without that thread, which started it and has to bring bytes."""
        return self._thread == thread and self._native.fetches and not self._native.finished()

    def _wait(self) -> bool:
        """Whether the save is finished, after a while. Raises what it failed with."""
        try:
            return self._native.wait(_POLL_SECONDS)
        except OSError as error:
            raise rewritten(error, SaveError) from None

    def _serve(self) -> None:
        """Brings the bytes only Python can bring, and those that are known last."""
        before, self._serving = self._serving, threading.get_ident()
        try:
            while request := self._native.fetch():
                ticket, *what = request
                assert self._fetch is not None
                self._fetch(*what)
                self._native.fetched(ticket)
            if self._amend is not None and self._native.take_amendment():
                self._native.amend(self._amend(self.checksums()))
        finally:
            self._serving = before

    def _stop(self) -> None:
        """Cancels, and waits until nothing touches the tensors or the files any more."""
        self._native.cancel()
        self._native.disown_fetches()  # of this thread: an exception has ended what it was bringing
        while not self._native.finished():
            with contextlib.suppress(BaseException):
                self._native.wait(_POLL_SECONDS)

    def _bar(self) -> Any:
        # No smoothing: the rate is that of the whole save, which began before the bar.
        bar = load("tqdm.auto").tqdm(
            total=self._native.nbytes, unit="B", unit_scale=True, desc=self._description, smoothing=0
        )
        bar.start_t = self._began
        return bar

    def __del__(self) -> None:
        # Dropped without waiting: the tensors must not go while they are being read.
        if not getattr(self, "_settled", True) and os.getpid() == self._pid:
            with contextlib.suppress(BaseException):
                self.result()
