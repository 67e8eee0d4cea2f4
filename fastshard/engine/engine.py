# SPDX-License-Identifier: Apache-2.0
"""The engine as Python sees it, and the default engine of the public functions.

The native module is loaded by the first engine, never by an import. Torch is not needed here.

No lock is taken here. Signal handlers, finalizers and callbacks of weak references interrupt a thread between
any two steps, and may save. So whatever calls share is changed in single steps of the interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

from ..base.living import Living
from ..base.loading import load
from ..base.settings import flag
from ..errors import save_errors
from . import background, limits, snapshots
from .arena import Arena
from .background import Wanted as Wanted
from .future import Amend as Amend
from .future import Fetch as Fetch
from .future import SaveFuture as SaveFuture
from .future import Step as Step
from .options import Options as Options
from .options import Stats as Stats
from .options import usable_cpus as usable_cpus
from .parts import Background, Linked, Served
from .plan import FilePlan, SaveOptions

if TYPE_CHECKING:
    import torch

    from .. import _native

PROGRESS_VARIABLE: Final = "FASTSHARD_PROGRESS"
IO_URING_VARIABLE: Final = "FASTSHARD_IO_URING"
T = TypeVar("T")
F = TypeVar("F", bound="SaveFuture | None")


class Engine:
    """Writer threads, staging memory and devices, shared by all saves that are submitted to it; thread-safe.

    Used as a context manager, it waits for its saves at the end. In a forked child an engine starts anew by
    itself. Raises ``ValueError`` for options that cannot work.
    """

    def __init__(self, options: Options | None = None) -> None:
        if options is not None and not isinstance(options, Options):
            raise TypeError(f"options must be Options, not {type(options).__name__}")
        self.options = options or Options()
        self._closed = False
        self._saves: Living[SaveFuture] = Living()
        self._prepared: Living[_native.Prepared] = Living()
        self._spares: Living[_native.Engine] = Living()
        self.arena = Arena(self.options.snapshot_budget)
        """The memory of snapshots."""
        self.arenas: Living[Arena] = Living()
        """It, and those of others. What of them is idle is unmapped when the engine rests."""
        self.arenas.add(self.arena)
        self._submitting: list[int] = []
        """Threads that are in the middle of submitting a save."""
        self._natives: dict[None, _native.Engine] = {None: self._start()}
        """The native engine. There is none in a forked child and after :meth:`_rest`, until the next save."""
        _engines.add(self)

    def _start(self) -> _native.Engine:
        options = self.options
        native: _native.Engine = load("fastshard._native").Engine(
            options.memory_budget,
            options.writers,
            options.write_path,
            options.device_scratch,
            io_uring_allowed(),
        )
        return native

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
        fetch: Fetch | None = None,
        amend: Amend | None = None,
        steps: Sequence[Step] = (),
        undo: Callable[[], None] | None = None,
        explain: Callable[[BaseException], BaseException | None] | None = None,
        tensor_names: Mapping[str, Sequence[str]] | None = None,
        plan_seconds: float = 0.0,
        linked: Linked | None = None,
        serve: bool = True,
        wanted: Wanted | None = None,
    ) -> SaveFuture:
        """Starts a save of these files: all of them become visible, or none.

        Args:
            files: the plans. Their targets are described in :mod:`fastshard.engine.plan`.
            keep_alive: what the views point into; it is kept until the save has ended.
            streams: for each CUDA ordinal, the handle of a stream. The copies run behind what it holds now.
            durable, keep_cached, checksums: as for :func:`fastshard.save_file`.
            follow_links: if a path is a symbolic link, the file that it leads to is replaced, and not the link.
            fetch: called as ``fetch(file, item, first_byte, nbytes, address)`` to bring bytes of views on
                ``plan.FETCHED``. Until then such a save occupies a writer.
            amend: called with the checksums (of each view of each file) when everything is written. It returns
                ``(file, offset, bytes)`` for bytes to write over that before the files are synced and appear.
            steps: called one after the other with the figures of the save when the files stand, until one raises. The save ends
                with the last one.
            undo: called at the end of a save that was started, however it ends.
            explain: changes what an error of the save says or names, before anybody sees it, or returns another
                error in its place.
            tensor_names: of each file, for ``Stats.checksums``.
            plan_seconds, linked: how long planning has taken, and what need not be written, for ``Stats``.
            serve: a thread of the engine calls these functions. Otherwise whoever waits for the save does.
            wanted: for a save whose caller goes on while its files are written. It is to be served as soon as its
                caller does not wait for the snapshot any more.

        Raises:
            SaveError: there is no space, no directory, ...; raised before the first copy.
        """
        limits.require_room(files)
        asked = SaveOptions(
            streams=dict(streams or {}),
            durable=durable,
            keep_cached=keep_cached,
            checksums=checksums,
            amended=amend is not None,
            follow_links=follow_links,
        )
        served = Served(
            fetch=fetch,
            amend=amend,
            steps=steps,
            undo=undo,
            explain=explain,
            tensor_names=tensor_names,
            plan_seconds=plan_seconds,
            linked=linked,
        )
        if wanted is not None:
            return snapshots.start_behind(self, wanted, files, asked, keep_alive, served)
        future = self.start(files, asked, keep_alive, served)
        if serve and (fetch or amend or steps or undo):
            future.serve()
        return future

    def start(
        self,
        files: Sequence[FilePlan],
        asked: SaveOptions,
        keep_alive: object,
        served: Served,
        settled: Callable[[SaveFuture], None] | None = None,
        background: Background | None = None,
    ) -> SaveFuture:
        """Starts a save. Its parts are those of :meth:`submit`, which says what they are."""

        def start(native: _native.Engine) -> SaveFuture:
            kept = [keep_alive, self, native]
            began = time.time()
            save = native.submit(list(files), asked, kept)
            return SaveFuture(save, kept=kept, served=served, settled=end, background=background, began=began)

        def end(future: SaveFuture) -> None:
            if settled is not None:
                settled(future)
            _rest_at_exit()

        try:
            return self._submit(start)
        except BaseException:
            keep_alive = background = settled = None  # the error's traceback has `start`, and with it these
            served = Served()
            raise

    def in_flight(self) -> list[SaveFuture]:
        """Returns the asynchronous saves of this engine that have not ended, the oldest first."""
        mine = self._saves.all()
        return [future for future in background.in_flight() if any(future is one for one in mine)]

    def prepare(self, file: FilePlan, generations: int, tag: object = None) -> _native.Prepared:
        """Makes the files of a prepared save (:func:`fastshard.prepare`), ``generations`` of them.

        ``tag`` identifies what is bound by this. Raises as :meth:`submit`, and ``ValueError`` for fewer than
        two generations.
        """
        limits.require_room([file], generations)
        with save_errors():
            prepared = self._with_native(lambda native: native.prepare(file, generations, tag))
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
        changed: bool = False,
        fetch: Fetch | None,
        tensor_names: Mapping[str, Sequence[str]] | None = None,
        steps: Sequence[Step] = (),
        tag: object = None,
        paths: frozenset[str] | None = None,
    ) -> SaveFuture | None:
        """Starts filling the next generation of a prepared save. Whoever waits serves it.

        A save of it that this call has interrupted is cancelled. With another tag than that of what is bound nothing is
        done, and ``None`` returned. ``paths``: its caller goes on. For the others see :meth:`submit` and ``prepare``.
        """
        behind = None if paths is None else Background("written", paths=paths)
        asked = SaveOptions(dict(streams), durable=durable, checksums=checksums, tells_read=paths is not None)

        def start(native: _native.Engine) -> SaveFuture | None:
            kept = [keep_alive, prepared, self, native]
            save = prepared.submit(asked, tag, kept, changed)
            if save is None:
                return None
            served = Served(fetch=fetch, steps=steps, tensor_names=tensor_names)
            return SaveFuture(save, kept=kept, served=served, settled=end, background=behind)

        def end(future: SaveFuture) -> None:
            background.ended(future)
            _rest_at_exit()

        future = self._submit(start)
        return future if future is None or behind is None else background.watch(future)

    def _submit(self, start: Callable[[_native.Engine], F]) -> F:
        thread = threading.get_ident()
        interrupted = thread in self._submitting or any(save.needs(thread) for save in self._saves.all())
        self._submitting.append(thread)
        try:
            with save_errors():
                if interrupted:
                    # This thread owes a save its bytes, which the writers wait for. Others, for this time.
                    spare = self._start()
                    self._spares.add(spare)
                    future = start(spare)
                else:
                    future = self._with_native(start)
            if future is not None:
                self._saves.add(future)
        finally:
            self._submitting.remove(thread)
        return future

    def _with_native(self, call: Callable[[_native.Engine], T]) -> T:
        while True:
            if self._closed:
                raise RuntimeError("the engine is closed")
            native = self._natives.get(None) or self._natives.setdefault(None, self._start())
            try:
                return call(native)
            except RuntimeError:
                if self._closed or not native.closed:
                    raise  # else it has been put to rest by another thread

    def warm_up(self, device: torch.device | str | int) -> None:
        """Makes ready what saves from a CUDA device share, so that none of it is made beside a running job.

        Kernels are loaded, device scratch is allocated, and the staging memory is populated and page-locked, as
        far as that has not been done. For the CPU and for other accelerators there is nothing to do. A forked
        child, whose engine starts anew, has to ask for itself.

        Args:
            device: a number is that of a CUDA device, and ``"cuda"`` is the current one.

        Raises:
            RuntimeError: there is no such device, or no driver.
        """
        ordinal = device if isinstance(device, int) else _ordinal_of(device)
        if ordinal is not None:
            with save_errors():
                self._with_native(lambda native: native.warm_up(ordinal))

    def close(self) -> None:
        """Waits for the saves under way and releases threads and staging memory. May be called twice."""
        self._closed = True
        self._rest()

    def _rest(self) -> None:
        """Does what :meth:`close` does, but the next save starts the engine again."""
        for future in self._saves.all():
            if not future.done():
                with contextlib.suppress(Exception):
                    future.wait()
        if any(not future.done() for future in self._saves.all()):
            return  # one that this call has interrupted; what it uses goes with it
        for prepared in self._prepared.all():
            prepared.close()
        for arena in self.arenas.all():
            arena.release()
        native = self._natives.pop(None, None)
        if native is not None:
            native.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _abandon(self) -> None:
        """Gives up, in a forked child, the threads and the files that they write, which are the parent's."""
        leak = load("fastshard._native").leak
        for future in self._saves.all():
            leak(future._native)
        for native in (*self._prepared.all(), *self._spares.all(), *self._natives.values()):
            leak(native)
        for arena in self.arenas.all():
            for locked in arena.abandon():
                leak(locked)
        self._saves, self._prepared, self._spares = Living(), Living(), Living()
        self._submitting.clear()
        self._natives.clear()


def _ordinal_of(device: torch.device | str) -> int | None:
    """Returns the number of a CUDA device, and ``None`` for all others."""
    import torch

    from .tensors import device_number

    named = torch.device(device)
    if named.type == "cuda" and named.index is None:
        named = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    number = device_number(named)
    return number if number >= 0 else None


_engines: Living[Engine] = Living()
_kept: dict[object, Engine] = {}
_exiting = False
"""Whether the interpreter is about to end. Exit hooks, finalizers and daemon threads may still save, but
nothing is kept for the next save."""


def engine_for(engine: Engine | Options | None) -> Engine:
    """Returns the engine itself, or the one that is kept for these options; ``None`` stands for the default
    options."""
    if isinstance(engine, Engine):
        return engine
    if engine is not None and not isinstance(engine, Options):
        raise TypeError(f"engine must be an Engine or Options, not {type(engine).__name__}")
    options = engine or _DEFAULT
    # Should two calls make one at the same moment, both get the first; the other goes, having started nothing.
    return _kept.get(options.key) or _kept.setdefault(options.key, Engine(options))


_DEFAULT: Final = Options()


def progress_wanted(progress: bool | None) -> bool:
    """Returns the argument if it was given, and otherwise what the environment says."""
    if progress is None:
        return flag(PROGRESS_VARIABLE)
    return progress


def io_uring_allowed() -> bool:
    """Returns whether direct writes may use io_uring, if the kernel allows it. ``FASTSHARD_IO_URING=0``
    forbids it."""
    return flag(IO_URING_VARIABLE, True)


def _rest_at_exit(_: object = None) -> None:
    if _exiting:
        for engine in _engines.all():
            engine._rest()


@atexit.register
def _at_exit() -> None:
    global _exiting
    _exiting = True
    _rest_at_exit()
    if background.report_lost():
        background.fail_at_exit(_at_exit)


def _after_fork() -> None:
    for engine in _engines.all():
        engine._abandon()


os.register_at_fork(after_in_child=_after_fork)
