# SPDX-License-Identifier: Apache-2.0
"""The engine as Python sees it: options, saves under way, and the default engine of the functions.

The native module is loaded by the first engine, never by an import. Torch is not needed here.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from .errors import SaveError, rewritten
from .plan import FilePlan
from .settings import flag

if TYPE_CHECKING:
    from . import _native

PROGRESS_VARIABLE: Final = "FASTSHARD_PROGRESS"
IO_URING_VARIABLE: Final = "FASTSHARD_IO_URING"
Amend = Callable[[list[list[int]]], list[tuple[int, int, bytes]]]
_POLL_SECONDS: Final = 0.1
"""How long Ctrl-C or the progress bar may have to wait."""


def usable_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True, kw_only=True)
class Options:
    """Limits of an engine."""

    memory_budget: int = 128 << 20
    """Bytes of staging memory, all saves of the engine together; at least 1 MiB. Contiguous host tensors
    that are not cast need none of it."""
    threads: int | None = None
    """Writer threads; ``None``: one for each CPU this process may use, at most 16."""
    write_path: str = "auto"
    """``"buffered"`` (pwrite into the page cache), ``"direct"`` (past it, from staging memory), ``"mapped"``
    (stores into the mapped file), ``"registered"`` (as mapped, with devices copying straight into page-locked
    windows), or ``"auto"``: what suits save and filesystem (``fastshard env PATH`` tells)."""
    device_scratch: int = 64 << 20
    """Bytes of each CUDA device's memory that strided, cast and small tensors may be packed in on their way out;
    taken when first needed, kept until the engine is closed. 0, or where the device has none to give: none."""

    @property
    def writers(self) -> int:
        """Writer threads, decided."""
        return min(16, usable_cpus()) if self.threads is None else self.threads


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What one save did. ``*_seconds`` of the stages are thread-seconds: they add up over the writers."""

    files: int
    nbytes: int
    """Bytes of the finished files."""
    seconds: float
    """From the call of the function to the finished files."""
    plan_seconds: float
    """Checking the tensors, laying out the files."""
    copy_seconds: float
    """Packing, and waiting for copies from devices."""
    write_seconds: float
    """In pwrite, waiting for direct writes, or populating mapped pages."""
    sync_seconds: float
    """In fsync and rename."""
    write_path: str
    """``"buffered"``, ``"direct"``, ``"mapped"``, ``"registered"``, ``"standing"`` (a prepared save) or
    ``"memory"``."""
    staging: str
    """``"none"`` (written from the tensors' own memory), ``"in place"`` (devices copied into the target itself),
    ``"pageable"`` or ``"pinned"``."""
    staging_nbytes: int
    """Most bytes staged at once."""
    device_scratch_nbytes: int
    """Device memory that tensors were packed in, all devices together."""
    fallbacks: tuple[str, ...]
    """What filesystem, kernel or a device refused; something else was done instead."""
    checksums: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """File -> tensor -> CRC-32 of its bytes in the file, as ``zlib.crc32`` has it; empty unless asked for."""


@contextlib.contextmanager
def _save_errors() -> Iterator[None]:
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
    ) -> None:
        self._native = native
        self._kept = kept
        self._fetch = fetch
        self._amend = amend
        self._plan_seconds = plan_seconds
        self._description = description
        self._pid = os.getpid()
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
        if os.getpid() != self._pid:
            raise RuntimeError("this save belongs to the parent process")
        bar: Any = self._bar() if progress else contextlib.nullcontext()
        try:
            with bar:
                while not self._wait():
                    self._serve()
                    if progress:
                        bar.update(self._native.nbytes_written - bar.n)
                if progress:
                    bar.update(self._native.nbytes - bar.n)
        except BaseException:
            self._stop()
            raise
        finally:
            self._settled = True
            self._kept.clear()
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

    def _wait(self) -> bool:
        """Whether the save is finished, after a while. Raises what it failed with."""
        with _save_errors():
            return self._native.wait(_POLL_SECONDS)

    def _serve(self) -> None:
        """Brings the bytes only Python can bring, and those that are known last."""
        while request := self._native.fetch():
            ticket, *what = request
            assert self._fetch is not None
            self._fetch(*what)
            self._native.fetched(ticket)
        if self._amend is not None and self._native.take_amendment():
            self._native.amend(self._amend(self.checksums()))

    def _stop(self) -> None:
        """Cancels, and waits until nothing touches the tensors or the files any more."""
        self._native.cancel()
        self._native.disown_fetches()  # of this thread: an exception has ended what it was bringing
        while not self._native.finished():
            with contextlib.suppress(BaseException):
                self._native.wait(_POLL_SECONDS)

    def _bar(self) -> Any:
        from tqdm.auto import tqdm

        return tqdm(total=self._native.nbytes, unit="B", unit_scale=True, desc=self._description)

    def __del__(self) -> None:
        # Dropped without waiting: the tensors must not go while they are being read.
        if not getattr(self, "_settled", True) and os.getpid() == self._pid:
            with contextlib.suppress(BaseException):
                self.result()


class Engine:
    """Writer threads, staging memory and devices, shared by all saves given to it; thread-safe.

    A context manager: leaving it waits for its saves. In a forked child an engine starts anew by itself.
    Raises ``ValueError`` for options that cannot work.
    """

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self._lock = threading.Lock()
        self._closed = False
        self._saves: weakref.WeakSet[SaveFuture] = weakref.WeakSet()
        self._prepared: weakref.WeakSet[_native.Prepared] = weakref.WeakSet()
        self._native: _native.Engine | None = self._start()
        _engines.add(self)

    def _start(self) -> _native.Engine:
        from . import _native

        options = self.options
        if options.writers < 1 or options.memory_budget < 1:
            raise ValueError("threads and memory_budget must be positive")
        if options.device_scratch < 0:
            raise ValueError("device_scratch must not be negative")
        return _native.Engine(
            options.memory_budget,
            options.writers,
            options.write_path,
            options.device_scratch,
            io_uring_allowed(),
        )

    def submit(
        self,
        files: Sequence[FilePlan],
        *,
        keep_alive: object,
        streams: Mapping[int, int] | None = None,
        durable: bool = False,
        keep_cached: bool = True,
        checksums: bool = False,
        follow_links: bool = False,
        fetch: Callable[[int, int, int, int, int], None] | None = None,
        amend: Amend | None = None,
        plan_seconds: float = 0.0,
        description: str = "Saving",
    ) -> SaveFuture:
        """Starts a save of these files: all of them become visible, or none.

        ``streams``: by CUDA ordinal, the stream behind whose present work the copies are ordered. ``fetch``:
        called as ``fetch(file, item, first_byte, nbytes, address)`` by :meth:`SaveFuture.result` for views on
        ``plan.FETCHED``; until then such a save occupies a writer. ``amend``: called by :meth:`SaveFuture.result`
        with the checksums (of each file, of each view), once all is written; what it returns, ``(file, offset,
        bytes)`` each, is written over that before the files are synced and appear. ``follow_links``: where a path
        is a symbolic link, the file that it leads to is replaced, and not the link. Raises :class:`SaveError`
        (no space, no directory, ...) before the first copy.
        """
        native = self._running()
        kept = [keep_alive, self]
        with _save_errors():
            save = native.submit(
                list(files),
                dict(streams or {}),
                durable,
                keep_cached,
                checksums,
                amend is not None,
                kept,
                follow_links,
            )
        future = SaveFuture(
            save, kept=kept, fetch=fetch, amend=amend, plan_seconds=plan_seconds, description=description
        )
        self._saves.add(future)
        return future

    def prepare(self, file: FilePlan, generations: int) -> _native.Prepared:
        """Makes the standing files of a prepared save (:func:`fastshard.prepare`). Raises as :meth:`submit`,
        and ``ValueError`` for less than two generations."""
        native = self._running()
        with _save_errors():
            prepared = native.prepare(file, generations)
        self._prepared.add(prepared)
        return prepared

    def submit_prepared(
        self,
        prepared: _native.Prepared,
        *,
        keep_alive: object,
        streams: Mapping[int, int],
        durable: bool,
        checksums: bool = False,
        fetch: Callable[[int, int, int, int, int], None] | None,
        description: str,
    ) -> SaveFuture:
        """Starts filling the next generation of a prepared save; as :meth:`submit`."""
        self._running()
        kept = [keep_alive, prepared, self]
        with _save_errors():
            save = prepared.submit(dict(streams), durable, checksums, kept)
        future = SaveFuture(save, kept=kept, fetch=fetch, plan_seconds=0.0, description=description)
        self._saves.add(future)
        return future

    def _running(self) -> _native.Engine:
        with self._lock:
            if self._closed:
                raise RuntimeError("the engine is closed")
            if self._native is None:
                self._native = self._start()
            return self._native

    def close(self) -> None:
        """Waits for the saves under way and releases threads and staging memory. May be called twice."""
        with self._lock:
            self._closed = True
        for future in list(self._saves):
            if not future.done():
                with contextlib.suppress(Exception):
                    future.result()
        for prepared in list(self._prepared):
            prepared.close()
        if self._native is not None:
            self._native.close()
            self._native = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _abandon(self) -> None:
        """In a forked child: the threads are the parent's, and so are the files they write."""
        from . import _native

        self._lock = threading.Lock()
        for future in list(self._saves):
            _native.leak(future._native)
        for prepared in list(self._prepared):
            _native.leak(prepared)
        self._saves, self._prepared = weakref.WeakSet(), weakref.WeakSet()
        if self._native is not None:
            _native.leak(self._native)
            self._native = None


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_kept: dict[Options, Engine] = {}
_kept_lock = threading.Lock()


def engine_for(engine: Engine | Options | None) -> Engine:
    """The engine itself, or the one kept for these options; ``None`` stands for the default options."""
    if isinstance(engine, Engine):
        return engine
    if engine is not None and not isinstance(engine, Options):
        raise TypeError(f"engine must be an Engine or Options, not {type(engine).__name__}")
    options = engine or Options()
    with _kept_lock:
        if options not in _kept:
            _kept[options] = Engine(options)
        return _kept[options]


def progress_wanted(progress: bool | None) -> bool:
    """An argument that was given, else the environment's answer."""
    if progress is None:
        return flag(PROGRESS_VARIABLE)
    return progress


def io_uring_allowed() -> bool:
    """Whether direct writes may use io_uring where the kernel lets them; ``FASTSHARD_IO_URING=0``: threads."""
    return flag(IO_URING_VARIABLE, True)


@atexit.register
def _close_all() -> None:
    for engine in list(_engines):
        engine.close()


def _after_fork() -> None:
    global _kept_lock
    _kept_lock = threading.Lock()
    for engine in list(_engines):
        engine._abandon()


os.register_at_fork(after_in_child=_after_fork)
