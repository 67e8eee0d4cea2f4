# SPDX-License-Identifier: Apache-2.0
"""Saves whose callers go on while the files are written.

A save by way of a copy is two saves: one packs the tensors into memory of the arena, and one writes the files from
there. The second is made first, so that what stops it is known before anything is copied: its files exist and their
space is reserved. It is held until the first has ended.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from . import background
from .arena import Arena, Block
from .background import Wanted
from .future import Amend, Background, Fetch, SaveFuture, Served
from .options import Options
from .plan import HOST, FilePlan, Link, Memory, SaveOptions, TensorView, WriteItem

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


_FILE_ALIGNMENT: Final = 4096
_ITEM_ALIGNMENT: Final = 16
_STREAMED: Final = 32 << 20
"""A snapshot of so many bytes is stored past the caches of the CPU."""


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
    kind, refused, block = wanted.snapshot, [], None
    if kind == "copy" and (nbytes := nbytes_of(files)):
        found = engine.arena.take(nbytes, lambda: _await_snapshot(engine))
        if isinstance(found, str):
            kind = "written"
            refused.append(f"no snapshot: {found}")
        else:
            block = found
    earlier = background.conflicting(wanted.paths)
    if kind != "copy":
        for one in earlier:
            one.wait()
        earlier = []
    packing = None
    try:
        if block is not None:
            locked = _lock(engine, block, files, refused)
            copy = copied(files, block.address, served.fetch, asked.checksums, locked)
            packing = engine.start(
                copy.packing,
                SaveOptions(asked.streams, held=True),
                keep_alive,
                Served(copy.fetch, steps=() if wanted.unchanged is None else [lambda _: _check(wanted)]),
            )
            files, keep_alive = copy.files, None
            served = served._replace(fetch=None)
            asked = asked._replace(streams={})
        elif wanted.unchanged is not None:
            served = served._replace(amend=_checked(wanted.unchanged, served.amend))
            asked = asked._replace(amended=True)
        future = engine.start(
            files,
            asked._replace(held=packing is not None or bool(earlier), tells_read=kind == "written"),
            keep_alive,
            served,
            functools.partial(_ended, block),
            Background(kind, packing, earlier, wanted.paths, tuple(refused)),
        )
    except BaseException:
        if packing is not None:
            packing.cancel()
        if block is not None:
            block.give_back()
        raise
    background.watch(future)
    if packing is not None:
        packing.begin()
    return future


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
    ordinals = sorted(ordinal for file in files for ordinal in _devices(file) if ordinal >= 0)
    if not ordinals:
        return None
    locked: _native.PageLock | None = engine._with_native(lambda native: block.lock(native, ordinals[0]))
    if locked is None:
        refused.append(f"page-locking the snapshot's memory refused by the driver: {block.locked}")
    return locked


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
        if future.background is not None and future.background.kind == "copy":
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


class Copy(NamedTuple):
    """Two saves in the place of one."""

    packing: list[FilePlan]
    """Tensors into memory. It is empty if there are none."""
    files: list[FilePlan]
    """That memory into the files."""
    fetch: Fetch | None
    """For the packing."""


def nbytes_of(files: Sequence[FilePlan]) -> int:
    """Returns how much memory the tensors of a save take when they are packed."""
    return sum(_aligned(_payload(file)) for file in files)


def copied(
    files: Sequence[FilePlan],
    address: int,
    fetch: Fetch | None,
    by_item: bool,
    locked: _native.PageLock | None = None,
) -> Copy:
    """Returns the plans of a save by way of memory at ``address``, of :func:`nbytes_of` bytes.

    ``by_item``: the items stay apart, as their checksums are wanted one by one. ``locked`` keeps the memory
    page-locked.
    """
    streaming = nbytes_of(files) >= _STREAMED
    packing: list[FilePlan] = []
    written: list[FilePlan] = []
    numbers: list[int] = []
    for number, file in enumerate(files):
        nbytes = _payload(file)
        if nbytes == 0:
            written.append(file)
            continue
        packed, items = _in_memory(file, Memory(address, nbytes, streaming, locked), by_item)
        packing.append(packed)
        numbers.append(number)
        written.append(file._replace(items=items))
        address += _aligned(nbytes)
    return Copy(packing, written, _renumbered(fetch, numbers))


def _payload(file: FilePlan) -> int:
    """Returns how much memory the items of a file take that has any."""
    items = file.items
    if isinstance(file.target, Link):
        return 0
    if not isinstance(items, Sequence):
        return items.nbytes
    if _placed(items):
        return sum(_aligned(item.nbytes, _ITEM_ALIGNMENT) for item in items)
    return sum(item.nbytes for item in items)


def _placed(items: Sequence[TensorView | WriteItem]) -> bool:
    """Returns whether some items have places of their own in the file, where they may be aligned differently."""
    return any(isinstance(item, WriteItem) for item in items)


def _in_memory(
    file: FilePlan, memory: Memory, by_item: bool
) -> tuple[FilePlan, Sequence[TensorView | WriteItem]]:
    """Returns the plan that packs a file's items into memory, and the items of a plan that writes them from there."""
    items, address, nbytes = file.items, memory.address, memory.nbytes
    whole = [TensorView(address, nbytes, HOST)]
    if not isinstance(items, Sequence):
        packed = FilePlan(memory, b"", items)
        if not by_item:
            return packed, whole
        return packed, _one_by_one(address, [items.entry(index)[-1][1] for index in range(len(items))])
    if not _placed(items):
        packed = FilePlan(memory, b"", items)
        return packed, _one_by_one(address, [item.nbytes for item in items]) if by_item else whole
    sources: list[WriteItem] = []
    written: list[TensorView | WriteItem] = []
    offset = 0
    for item in items:
        view = TensorView(address + offset, item.nbytes, HOST)
        if isinstance(item, WriteItem):
            sources.append(WriteItem(item.source, offset))
            written.append(WriteItem(view, item.file_offset))
        else:
            sources.append(WriteItem(item, offset))
            written.append(view)
        offset += _aligned(item.nbytes, _ITEM_ALIGNMENT)
    return FilePlan(memory, b"", sources, nbytes), written


def _one_by_one(address: int, sizes: Iterable[int]) -> list[TensorView]:
    found = []
    for nbytes in sizes:
        found.append(TensorView(address, nbytes, HOST))
        address += nbytes
    return found


def _renumbered(fetch: Fetch | None, numbers: list[int]) -> Fetch | None:
    """Returns what brings the bytes of the files that are packed, which have fewer numbers."""
    if fetch is None:
        return None
    bring = fetch

    def renumbered(file: int, item: int, first: int, nbytes: int, address: int) -> None:
        bring(numbers[file], item, first, nbytes, address)

    return renumbered


def _aligned(nbytes: int, alignment: int = _FILE_ALIGNMENT) -> int:
    return -(-nbytes // alignment) * alignment
