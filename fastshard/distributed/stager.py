# SPDX-License-Identifier: Apache-2.0
"""A stager for ``torch.distributed.checkpoint.async_save``, whose copies lie in memory that is kept between saves."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
from concurrent.futures import Future
from typing import Any, Final

from torch.distributed import checkpoint
from torch.distributed.checkpoint.staging import AsyncStager

from ..engine.arena import Arena, Block
from ..engine.copies import STREAMED
from ..engine.engine import Engine, Options, SaveFuture, engine_for
from ..engine.plan import FETCHED, FilePlan, Memory
from ..engine.tensors import current_streams, fetch, on_current_streams
from .gathering import Gathered
from .staged import Lent, StagedDict

_log: Final = logging.getLogger("fastshard")


class FastshardStager(AsyncStager):
    """Copies state dicts for ``dcp.async_save(..., async_stager=FastshardStager())``, to be kept from save to save.

    All tensors of a state dict go into one piece of memory, by the threads of the engine, and only what is viewed of
    them. It is kept, mapped and page-locked, for the next save. A save's copies are its own as long as anything holds
    one of the tensors: if another save begins earlier, it gets further memory. What is no tensor is deep-copied.

    Args:
        process: for ``AsyncCheckpointerType.PROCESS``: the memory is shared with the process that saves. Without it
            such saves work as well, but torch copies every tensor once more. One save after the other: torch does not
            tell the answers of two from each other, with any stager.
        asynchronous: :meth:`stage` returns a future before the tensors are copied, and ``async_save`` an
            ``AsyncSaveResponse``. The tensors must not change before its ``staging_completion`` is done.
        engine: ``Options(snapshot_budget=...)`` limits the memory that is kept. A state dict for which there is no
            room in it gets memory for this one save.
    """

    def __init__(
        self,
        *,
        process: bool = False,
        asynchronous: bool = False,
        engine: Engine | Options | None = None,
    ) -> None:
        if asynchronous and not hasattr(checkpoint.state_dict_saver, "AsyncSaveResponse"):
            raise ImportError(
                "asynchronous=True needs a later version of torch, whose async_save waits for stagers"
            )
        self._process = process
        self._asynchronous = asynchronous
        self._engine = engine_for(engine)
        self._arena = self._new_arena()
        self._copying: list[SaveFuture] = []

    def _new_arena(self) -> Arena:
        arena = Arena(self._engine.options.snapshot_budget, self._process)
        self._engine.arenas.add(arena)
        return arena

    @property
    def nbytes(self) -> int:
        """Bytes of memory that are kept now."""
        return self._arena.nbytes

    def stage(self, state_dict: Any, **_: Any) -> Any:
        """Returns a copy of the state dict, with the same structure, in host memory; or its future. Raises
        ``MemoryError`` if there is no memory for it."""
        gathered = Gathered(state_dict)
        if gathered.nbytes == 0:
            return self._answer(gathered.staged(_no_tensor), None)
        lent = self._lend(gathered.nbytes)
        copying = self._copy(gathered, lent)
        try:
            staged = gathered.staged(lent.tensor)
            if self._process and isinstance(staged, dict):
                staged = StagedDict(staged, lent)
            return self._answer(staged, copying)
        except BaseException:
            copying.cancel()
            raise

    def _answer(self, staged: Any, copying: SaveFuture | None) -> Any:
        if not self._asynchronous:
            if copying is not None:
                copying.result()
            return staged
        answer: Future[Any] = Future()
        answer.set_running_or_notify_cancel()
        if copying is None:
            answer.set_result(staged)
        else:
            self._copying = [one for one in self._copying if not one.done()] + [copying]
            copying.add_done_callback(functools.partial(_settle, answer, staged))
        return answer

    def _lend(self, nbytes: int) -> Lent:
        collected: list[int] = []

        def collect() -> bool:
            """Frees what a save that has failed holds by its own traceback. Returns ``False`` at the second time."""
            if not collected:
                collected.append(gc.collect())
                return True
            return False

        found = self._arena.take(nbytes, collect)
        if isinstance(found, Block):
            return Lent(found, nbytes, self._arena.give_back)
        _log.warning("fastshard: memory for a single state dict of %d bytes: %s", nbytes, found)
        block = Block(nbytes, self, self._process)
        try:
            block.map()
        except OSError as error:
            raise MemoryError(f"there is no memory for {nbytes} bytes of staged tensors: {error}") from error
        return Lent(block, nbytes, Block.unmap)

    def _copy(self, gathered: Gathered, lent: Lent) -> SaveFuture:
        """Starts copying. Until that has ended, it holds the tensors and the memory."""
        block, sources, devices = lent.block, gathered.sources, gathered.devices
        ordinals = sorted(device for device in devices if device >= 0)
        locked = None
        if ordinals:
            locked = self._engine._with_native(lambda native: block.lock(native, ordinals[0]))
        memory = Memory(block.address, gathered.nbytes, gathered.nbytes >= STREAMED, locked)
        fetched = [source for source, item in zip(sources, gathered.items) if item.source.device == FETCHED]
        on_stream = on_current_streams({source.device for source in fetched})

        def bring(_: int, item: int, first: int, nbytes: int, address: int) -> None:
            with on_stream(sources[item].device):
                fetch(sources[item], first, nbytes, address)

        return self._engine.submit(
            [FilePlan(memory, b"", gathered.items, gathered.nbytes)],
            keep_alive=(sources, lent.memory),
            streams=current_streams(devices),
            fetch=bring if fetched else None,
        )

    def synchronize_staging(self) -> None:
        """Waits until the tensors of all state dicts have been copied. What has failed, ``async_save`` reports."""
        copying, self._copying = self._copying, []
        for one in copying:
            with contextlib.suppress(Exception):
                one.result()

    def close(self) -> None:
        """Unmaps the memory: that of saves in flight, when they have ended. A stager that is used again takes new
        memory."""
        self.synchronize_staging()
        self._arena.close()
        self._arena = self._new_arena()


def _settle(answer: Future[Any], staged: Any, copying: SaveFuture) -> None:
    error = copying.exception()
    if error is None:
        answer.set_result(staged)
    else:
        answer.set_exception(error)


def _no_tensor(*_: Any) -> Any:
    raise AssertionError("there are no tensors with bytes")
