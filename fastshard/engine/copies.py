# SPDX-License-Identifier: Apache-2.0
"""The plans of a save by way of memory: one that packs tensors into it, and one that writes the files from there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from .parts import Fetch
from .plan import HOST, FilePlan, Link, Memory, TensorView, WriteItem

if TYPE_CHECKING:
    from .. import _native

_FILE_ALIGNMENT: Final = 4096
_ITEM_ALIGNMENT: Final = 16
STREAMED: Final = 32 << 20
"""A snapshot of so many bytes is stored past the caches of the CPU."""


class Copy(NamedTuple):
    """Two saves in the place of one."""

    packing: list[FilePlan]
    """Tensors into memory. It is empty if there are none."""
    files: list[FilePlan]
    """That memory into the files."""
    fetch: Fetch | None
    """For the packing."""


def nbytes_of(files: Sequence[FilePlan], as_in_file: bool = False) -> int:
    """Returns how much memory the tensors of a save take when they are packed.

    ``as_in_file``: they lie as far behind a page there as they do in their files.
    """
    payloads = ((file, _payload(file)) for file in files)
    return sum(_aligned(_lead(file, as_in_file) + nbytes) for file, nbytes in payloads if nbytes)


def _lead(file: FilePlan, as_in_file: bool) -> int:
    return len(file.header) % _FILE_ALIGNMENT if as_in_file else 0


def copied(
    files: Sequence[FilePlan],
    address: int,
    fetch: Fetch | None,
    by_item: bool,
    locked: _native.PageLock | None = None,
    as_in_file: bool = False,
) -> Copy:
    """Returns the plans of a save by way of memory at ``address``, of :func:`nbytes_of` bytes.

    ``by_item``: the items stay apart, as their checksums are wanted one by one. ``locked`` keeps the memory
    page-locked. ``as_in_file``: whole blocks of the files can be written past the page cache from where they lie.
    """
    streaming = nbytes_of(files) >= STREAMED
    packing: list[FilePlan] = []
    written: list[FilePlan] = []
    numbers: list[int] = []
    for number, file in enumerate(files):
        nbytes = _payload(file)
        if nbytes == 0:
            written.append(file)
            continue
        lead = _lead(file, as_in_file)
        packed, items = _in_memory(file, Memory(address, lead + nbytes, streaming, locked), lead, by_item)
        packing.append(packed)
        numbers.append(number)
        written.append(file._replace(items=items))
        address += _aligned(lead + nbytes)
    return Copy(packing, written, _renumbered(fetch, numbers))


class Part(NamedTuple):
    """Those items of a save's files that are to be copied, while the others are not."""

    files: list[FilePlan]
    """Plans of those only: for :func:`nbytes_of` and :func:`copied`."""
    places: list[list[int]]
    """Of each of these files, the positions of its items in its whole plan."""
    numbers: list[int]
    """The number of each of these files in the whole save."""


def part_of(files: Sequence[FilePlan], chosen: Sequence[Sequence[int]]) -> Part:
    """Returns the items at these positions of each file."""
    part = Part([], [], [])
    for number, (file, places) in enumerate(zip(files, chosen)):
        if places:
            items = _items(file)
            sources = [WriteItem(_source(items[place]), place) for place in places]
            part.files.append(file._replace(items=sources))
            part.places.append(list(places))
            part.numbers.append(number)
    return part


def with_part(files: Sequence[FilePlan], part: Part, address: int, fetch: Fetch | None) -> Copy:
    """Returns the plans of a save of which this part goes by way of memory at ``address``."""
    copy = copied(part.files, address, _of_part(fetch, part), True)
    written = list(files)
    for number, places, replaced in zip(part.numbers, part.places, copy.files):
        items = _items(files[number])
        for place, packed in zip(places, _items(replaced)):
            item, view = items[place], _source(packed)
            items[place] = item._replace(source=view) if isinstance(item, WriteItem) else view
        written[number] = files[number]._replace(items=items)
    return Copy(copy.packing, written, copy.fetch)


def _items(file: FilePlan) -> list[TensorView | WriteItem]:
    items = file.items
    return list(items) if isinstance(items, Sequence) else [TensorView(*view) for view in items.views()]


def _source(item: TensorView | WriteItem) -> TensorView:
    return item.source if isinstance(item, WriteItem) else item


def _of_part(fetch: Fetch | None, part: Part) -> Fetch | None:
    """Returns what brings the bytes of a part, whose files and items have other numbers."""
    if fetch is None:
        return None
    bring = fetch

    def of_part(file: int, item: int, first: int, nbytes: int, address: int) -> None:
        bring(part.numbers[file], part.places[file][item], first, nbytes, address)

    return of_part


def _payload(file: FilePlan) -> int:
    """Returns how much memory the items of a file take that has any."""
    items = file.items
    if isinstance(file.target, Link):
        return 0
    if not isinstance(items, Sequence):
        return items.nbytes
    if _placed(items) and not _is_whole(file, items):
        return sum(_aligned(item.nbytes, _ITEM_ALIGNMENT) for item in items)
    return sum(item.nbytes for item in items)


def _is_whole(file: FilePlan, items: Sequence[TensorView | WriteItem]) -> bool:
    """Returns whether each item begins in the file where the one before it ends."""
    end = len(file.header)
    for item in items:
        if isinstance(item, WriteItem) and item.file_offset != end:
            return False
        end += item.nbytes
    return True


def _placed(items: Sequence[TensorView | WriteItem]) -> bool:
    """Returns whether some items have places of their own in the file, where they may be aligned differently."""
    return any(isinstance(item, WriteItem) for item in items)


def _in_memory(
    file: FilePlan, memory: Memory, lead: int, by_item: bool
) -> tuple[FilePlan, Sequence[TensorView | WriteItem]]:
    """Returns the plan that packs a file's items into memory, from its byte ``lead`` on, and the items of a plan that
    writes them from there."""
    items, address, nbytes = file.items, memory.address + lead, memory.nbytes - lead
    whole = [TensorView(address, nbytes, HOST)]
    if not isinstance(items, Sequence):
        packed = FilePlan(memory, bytes(lead), items)
        if not by_item:
            return packed, whole
        return packed, _one_by_one(address, [view[1] for view in items.views()])
    if not _placed(items):
        packed = FilePlan(memory, bytes(lead), items)
        return packed, _one_by_one(address, [item.nbytes for item in items]) if by_item else whole
    unit = 1 if _is_whole(file, items) else _ITEM_ALIGNMENT
    sources: list[WriteItem] = []
    written: list[TensorView | WriteItem] = []
    offset = 0
    for item in items:
        view = TensorView(address + offset, item.nbytes, HOST)
        if isinstance(item, WriteItem):
            sources.append(WriteItem(item.source, lead + offset))
            written.append(WriteItem(view, item.file_offset))
        else:
            sources.append(WriteItem(item, lead + offset))
            written.append(view)
        offset += _aligned(item.nbytes, unit)
    return FilePlan(memory, b"", sources, lead + nbytes), written


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
