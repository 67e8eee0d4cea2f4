# SPDX-License-Identifier: Apache-2.0
"""Saves whose callers go on while the files are written.

A save by way of a copy is two saves: one packs the tensors into memory of the arena, and one writes the files from
there. The second is made first, so that what stops it is known before anything is copied: its files exist and their
space is reserved. It is held until the first has ended.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..base.loading import load
from . import background
from .arena import Arena, Block
from .background import Wanted
from .copies import Copy, copied, nbytes_of, part_of, with_part
from .future import Amend, Background, SaveFuture, Served
from .options import Options
from .plan import FilePlan, SaveOptions, WriteItem
from .relief import FOLLOWED

if TYPE_CHECKING:
    from .. import _native


class Starter(Protocol):
    """An engine, as far as it is needed here."""

    options: Options
    arena: Arena

    def start(
        self,
        files: Sequence[FilePlan],
        asked: SaveOptions,
        keep_alive: object,
        served: Served,
        settled: Callable[[SaveFuture], None] | None = None,
        background: Background | None = None,
    ) -> SaveFuture: ...

    def in_flight(self) -> list[SaveFuture]: ...

    def _with_native(self, call: Callable[[Any], Any]) -> Any: ...


def start_behind(
    engine: Starter,
    wanted: Wanted,
    files: Sequence[FilePlan],
    asked: SaveOptions,
    keep_alive: object,
    served: Served,
) -> SaveFuture:
    """Starts a save behind a snapshot. The other parts are those of :meth:`Engine.submit`."""
    while len(in_flight := _to_wait_for(engine)) >= engine.options.max_in_flight:
        in_flight[0].wait()
    save = _Parts(engine, wanted, files, asked, keep_alive, served, [])
    if wanted.snapshot == "fork":
        return _by_fork(save) or _by_copy(save)
    return _by_copy(save) if wanted.snapshot == "copy" else _as_it_is(save, "none")


class _Parts(NamedTuple):
    """What is known of a save that is to be made behind a snapshot."""

    engine: Starter
    wanted: Wanted
    files: Sequence[FilePlan]
    asked: SaveOptions
    keep_alive: object
    served: Served
    refused: list[str]
    """What was tried and was not possible."""

    def block(self, nbytes: int) -> Block | None:
        found = self.engine.arena.take(nbytes, lambda: _await_snapshot(self.engine))
        if isinstance(found, Block):
            return found
        self.refused.append(f"no snapshot: {found}")
        return None

    def packing(self, plans: Copy) -> SaveFuture:
        """Returns the save, held, that packs tensors into memory."""
        return self.engine.start(
            plans.packing,
            SaveOptions(self.asked.streams, held=True),
            self.keep_alive,
            Served(
                plans.fetch, steps=() if self.wanted.unchanged is None else [lambda _: _check(self.wanted)]
            ),
        )

    def start(self, background_: Background, block: Block | None = None) -> SaveFuture:
        """Starts the save itself."""
        return background.watch(
            self.engine.start(
                self.files,
                self.asked,
                self.keep_alive,
                self.served,
                functools.partial(_ended, block),
                background_._replace(paths=self.wanted.paths, refused=tuple(self.refused)),
            )
        )

    def await_earlier(self) -> None:
        """Waits for earlier saves of the same files: what has no copy cannot be held back."""
        for one in background.conflicting(self.wanted.paths):
            one.wait()


def _by_copy(save: _Parts) -> SaveFuture:
    nbytes = nbytes_of(save.files)
    earlier = background.conflicting(save.wanted.paths)
    for one in earlier:
        one.relief.take_over(FOLLOWED)
    if nbytes == 0:
        held = save._replace(asked=save.asked._replace(held=bool(earlier)))
        return held.start(Background("copy", None, earlier))
    # So that the writers need no copy of their own. Not what devices fill: they copy to whole blocks.
    wide = 0 if _ordinals(save.files) else nbytes_of(save.files, as_in_file=True)
    as_in_file = 0 < wide <= save.engine.arena.budget
    block = save.block(wide if as_in_file else nbytes)
    if block is None:
        return _as_it_is(save, "written")
    packing = None
    try:
        locked = _lock(save.engine, block, save.files, save.refused)
        plans = copied(save.files, block.address, save.served.fetch, save.asked.checksums, locked, as_in_file)
        packing = save.packing(plans)
        future = save._replace(
            files=plans.files,
            keep_alive=None,
            served=save.served._replace(fetch=None),
            asked=save.asked._replace(streams={}, held=True, gives_way=True, past_cache=True),
        ).start(Background("copy", packing, earlier), block)
    except BaseException:
        if packing is not None:
            packing.cancel()
        block.give_back()
        raise
    packing.begin()
    return future


def _by_fork(save: _Parts) -> SaveFuture | None:
    """Returns ``None`` if that is not possible."""
    save.await_earlier()
    if _ordinals(save.files):
        # Into page-locked memory, which no child inherits.
        save.refused.append("no snapshot by a forked process: tensors of devices are copied anyway")
        return None
    native = load("fastshard._native")
    copied_first: list[list[int]] = native.not_forkable(list(save.files))
    try:
        try:
            return _forked(save, copied_first)
        except native.NotForked as error:
            if not any(error.items):
                raise
            # Memory that a child does not inherit, which only the child tells.
            more = [sorted({*one, *other}) for one, other in zip(copied_first, error.items)]
            return _forked(save, more)
    except native.NotForked as error:
        save.refused.append(f"no snapshot by a forked process: {error}")
        return None


def _forked(save: _Parts, copied_first: Sequence[Sequence[int]]) -> SaveFuture | None:
    """Returns the save, by a forked process, of which these items of each file go by way of the arena; ``None`` if
    there is no room for them."""
    part = part_of(save.files, copied_first)
    block = None
    try:
        if nbytes := nbytes_of(part.files):
            block = save.block(nbytes)
            if block is None:
                return None
            block.unlock()  # of an earlier save out of devices: the process has to have it
            plans = with_part(save.files, part, block.address, save.served.fetch)
            packing = save.packing(plans)
            packing.begin()
            packing.result()
            served = save.served._replace(fetch=None)
            asked = save.asked._replace(streams={})
            save = save._replace(files=plans.files, served=served, asked=asked)
        forked = save._replace(asked=save.asked._replace(forked=True))
        return forked.start(Background("fork"), block)
    except BaseException:
        if block is not None:
            block.give_back()
        raise


def _as_it_is(save: _Parts, kind: str) -> SaveFuture:
    """Starts a save of the tensors' own memory, which must not change before it has ended, or is written."""
    save.await_earlier()
    if save.wanted.unchanged is not None:
        served = save.served._replace(amend=_checked(save.wanted.unchanged, save.served.amend))
        save = save._replace(served=served, asked=save.asked._replace(amended=True))
    asked = save.asked._replace(tells_read=kind == "written", gives_way=kind == "none")
    return save._replace(asked=asked).start(Background(kind))


def start_after(
    engine: Starter, saves: Sequence[SaveFuture], paths: frozenset[str], served: Served
) -> SaveFuture:
    """Starts a save without files of its own. Its steps change ``paths`` when all these saves have ended, and
    earlier ones of these paths."""
    after = [*saves, *background.conflicting(paths)]
    asked = SaveOptions({}, held=bool(after))
    future = engine.start(
        [], asked, None, served, functools.partial(_ended, None), Background("none", None, after, paths)
    )
    background.watch(future)
    return future


def _lock(
    engine: Starter, block: Block, files: Sequence[FilePlan], refused: list[str]
) -> _native.PageLock | None:
    """Page-locks the memory of a snapshot if a device is to copy into it. What is refused is added to ``refused``."""
    ordinals = _ordinals(files)
    if not ordinals:
        return None
    locked: _native.PageLock | None = engine._with_native(lambda native: block.lock(native, ordinals[0]))
    if locked is None:
        refused.append(f"page-locking the snapshot's memory refused by the driver: {block.locked}")
    return locked


def _ordinals(files: Sequence[FilePlan]) -> list[int]:
    """Returns the numbers of the CUDA devices that tensors are on."""
    return sorted({ordinal for file in files for ordinal in _devices(file) if ordinal >= 0})


def _devices(file: FilePlan) -> set[int]:
    items = file.items
    if not isinstance(items, Sequence):
        return items.devices()
    return {(item.source if isinstance(item, WriteItem) else item).device for item in items}


def _to_wait_for(engine: Starter) -> list[SaveFuture]:
    """Returns the saves in flight that this thread can wait for: a signal handler cannot for one that it has
    interrupted."""
    return [future for future in engine.in_flight() if not future.is_served_here()]


def _await_snapshot(engine: Starter) -> bool:
    """Waits until a save has ended that uses memory of the arena. Returns whether there was one."""
    for future in _to_wait_for(engine):
        if future.background is not None and future.background.kind in ("copy", "fork"):
            future.wait()
            return True
    return False


def _check(wanted: Wanted) -> None:
    if wanted.unchanged is not None:
        wanted.unchanged()


def _checked(unchanged: Callable[[], None], amend: Amend | None) -> Amend:
    """Returns an amendment that first makes sure that the tensors are what they were."""

    def amend_checked(checksums: list[list[int]]) -> list[tuple[int, int, bytes]]:
        unchanged()
        return [] if amend is None else amend(checksums)

    return amend_checked


def _ended(block: Block | None, future: SaveFuture) -> None:
    if block is not None:
        block.give_back()
    background.ended(future)
