# SPDX-License-Identifier: Apache-2.0
"""Properties of the schedule: which bytes of a plan travel together. No address in here is ever read."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastshard import _native
from fastshard.engine.plan import FETCHED, HOST, FilePlan, Memory, TensorView, WriteItem

KIB = 1 << 10
MIB = 1 << 20
PAGE = 4096
RIDE_ALONG_NBYTES = 64 * KIB
ADDRESS = 0x10000
PRODUCTION = {
    "slot_nbytes": 4 * MIB - 256 * KIB,
    "packed_nbytes": MIB,
    "in_place_nbytes": 16 * MIB,
    "max_ops": 1024,
    "in_place": True,
}


class Op(NamedTuple):
    item: int
    chunk_offset: int
    first_byte: int
    nbytes: int


class Chunk(NamedTuple):
    file_offset: int
    nbytes: int
    route: str
    ops: list[Op]


def contiguous(nbytes: int, device: int = HOST) -> TensorView:
    return TensorView(0 if device == FETCHED else ADDRESS, nbytes, device)


def strided(
    itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...], device: int = HOST
) -> TensorView:
    return TensorView(ADDRESS, itemsize * math.prod(shape), device, itemsize, shape, strides)


def schedule(*files: FilePlan, **limits: int) -> list[list[Chunk]]:
    answer = _native.schedule(list(files), **{**PRODUCTION, **limits})
    return [[Chunk(*chunk[:3], [Op(*op) for op in chunk[3]]) for chunk in chunks] for chunks in answer]


def file_of(*views: TensorView, header: bytes = bytes(64)) -> FilePlan:
    return FilePlan(b"file", header, list(views))


def view_of(item: TensorView | WriteItem) -> TensorView:
    return item.source if isinstance(item, WriteItem) else item


def items_of(plan: FilePlan) -> list[TensorView]:
    """As the schedule numbers them: the header is item 0."""
    return [contiguous(len(plan.header)), *map(view_of, plan.items)]


def run_nbytes(view: TensorView) -> int:
    """Bytes that lie together in memory."""
    if view.shape is None:
        return view.nbytes
    run = view.itemsize
    for size, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if size != 1:
            if stride * view.itemsize != run:
                break
            run *= size
    return run


def runs_touched(view: TensorView, op: Op) -> int:
    run = run_nbytes(view)
    return (op.first_byte + op.nbytes - 1) // run - op.first_byte // run + 1


def needs_staging(view: TensorView) -> bool:
    """Whether the bytes cannot be written from where they lie."""
    run = run_nbytes(view)
    return view.device != HOST or (run < view.nbytes and run < PAGE)


def pieces(items: list[TensorView], chunk: Chunk) -> int:
    """What max_ops limits: gathers of a staged chunk, runs of one written in place."""
    if chunk.route != "in_place":
        return len(chunk.ops)
    return sum(runs_touched(items[op.item], op) for op in chunk.ops)


devices = st.sampled_from([HOST, HOST, FETCHED, 0, 1])
sizes = st.one_of(
    st.integers(0, 300), st.integers(0, 5 * PAGE), st.sampled_from([PAGE, 3 * PAGE, 100_000, 200_000])
)


@st.composite
def strided_views(draw: st.DrawFn) -> TensorView:
    """Any order of dimensions, with gaps, repeated (stride 0) or overlapping."""
    itemsize = draw(st.sampled_from([1, 2, 4, 8]))
    shape = draw(st.lists(st.integers(1, 24), min_size=1, max_size=4).map(tuple))
    widest = draw(st.sampled_from([0, 0, 600]))  # some runs are long enough to be written in place
    shape = (*shape[:-1], shape[-1] + widest)
    strides = [0] * len(shape)
    reach = 1
    for dim in draw(
        st.sampled_from([list(reversed(range(len(shape)))), draw(st.permutations(range(len(shape))))])
    ):
        strides[dim] = draw(st.sampled_from([reach, reach, reach + 1, 2 * reach, 0, 1]))
        reach *= shape[dim]
    return strided(itemsize, shape, tuple(strides), draw(st.sampled_from([HOST, HOST, 0, 1])))


@st.composite
def plans(draw: st.DrawFn, *, aligned: bool = False) -> FilePlan:
    """With `aligned` every item's offset is a multiple of its element, as in a safetensors file."""
    views = draw(st.lists(st.one_of(st.builds(contiguous, sizes, devices), strided_views()), max_size=30))
    header = bytes(8 * draw(st.integers(0, 1000)) + (0 if aligned else draw(st.integers(0, 7))))
    if aligned:
        views = [view._replace(nbytes=view.nbytes // 8 * 8) if view.shape is None else view for view in views]
        views.sort(key=lambda view: -view.itemsize if view.shape else -8)
    return file_of(*views, header=header)


limits = st.fixed_dictionaries(
    {
        "slot_nbytes": st.integers(1, 20).map(lambda pages: pages * PAGE),
        "packed_nbytes": st.integers(PAGE, 20 * PAGE),
        "in_place_nbytes": st.integers(PAGE, 40 * PAGE),
        "max_ops": st.integers(1, 40),
        "in_place": st.booleans(),
    }
)


@settings(deadline=None)
@given(plans(), limits)
def test_chunks_tile_the_file_and_ops_tile_the_chunks(plan: FilePlan, limit: dict[str, int]) -> None:
    items = items_of(plan)
    covered = [0] * len(items)
    file_offset = 0
    reached = 0  # in the list of items
    for chunk in schedule(plan, **limit)[0]:
        assert chunk.file_offset == file_offset
        assert chunk.nbytes > 0
        chunk_offset = 0
        for op in chunk.ops:
            assert op.chunk_offset == chunk_offset
            assert op.nbytes > 0
            assert op.item >= reached
            assert op.first_byte == covered[op.item]
            covered[op.item] += op.nbytes
            chunk_offset += op.nbytes
            reached = op.item
        assert chunk.nbytes == chunk_offset
        file_offset += chunk.nbytes
    assert file_offset == plan.nbytes
    assert covered == [view.nbytes for view in items]


@settings(deadline=None)
@given(plans(), limits)
def test_limits_are_respected(plan: FilePlan, limit: dict[str, int]) -> None:
    items = items_of(plan)
    room = {
        "in_place": limit["in_place_nbytes"],
        # Straight into memory, or in a slot.
        "packed": limit["packed_nbytes"]
        if not limit["in_place"]
        else min(limit["packed_nbytes"], limit["slot_nbytes"]),
        "device": limit["slot_nbytes"],
    }
    for chunk in schedule(plan, **limit)[0]:
        assert chunk.nbytes <= room[chunk.route]
        assert pieces(items, chunk) <= limit["max_ops"]
        assert limit["in_place"] or chunk.route != "in_place"


@settings(deadline=None)
@given(plans(), limits)
def test_chunks_end_on_pages(plan: FilePlan, limit: dict[str, int]) -> None:
    """Unless something else ended them: too many pieces, or bytes that go another way."""
    items = items_of(plan)
    for chunk, after in itertools.pairwise(schedule(plan, **limit)[0]):
        full = pieces(items, chunk) >= limit["max_ops"]
        joins = after.route == chunk.route or (chunk.route, after.route) == ("device", "packed")
        assert after.file_offset % PAGE == 0 or full or not joins


@settings(deadline=None)
@given(plans(), limits)
def test_every_item_goes_its_way(plan: FilePlan, limit: dict[str, int]) -> None:
    items = items_of(plan)
    for chunk in schedule(plan, **limit)[0]:
        views = [items[op.item] for op in chunk.ops]
        from_device = any(view.device != HOST for view in views)
        assert from_device == (chunk.route == "device")
        if chunk.route == "in_place":
            assert not any(map(needs_staging, views))


@settings(deadline=None)
@given(plans(), limits.map(lambda limit: {**limit, "in_place": True}))
def test_host_memory_in_long_runs_is_staged_only_along_with_others(
    plan: FilePlan, limit: dict[str, int]
) -> None:
    items = items_of(plan)
    for chunk in schedule(plan, **limit)[0]:
        if chunk.route == "in_place":
            continue
        assert needs_staging(items[chunk.ops[0].item])  # what rides along did not open the chunk
        for op in chunk.ops:
            view = items[op.item]
            if not needs_staging(view):
                assert op.nbytes == view.nbytes < RIDE_ALONG_NBYTES


@settings(deadline=None)
@given(plans(aligned=True), limits)
def test_elements_stay_whole(plan: FilePlan, limit: dict[str, int]) -> None:
    items = items_of(plan)
    for chunk in schedule(plan, **limit)[0]:
        for op in chunk.ops:
            itemsize = items[op.item].itemsize
            assert op.first_byte % itemsize == 0
            assert op.nbytes % itemsize == 0


@settings(max_examples=25, deadline=None)
@given(st.lists(plans(), max_size=4), limits)
def test_files_are_scheduled_by_themselves(files: list[FilePlan], limit: dict[str, int]) -> None:
    assert schedule(*files, **limit) == [schedule(plan, **limit)[0] for plan in files]


# Items that say where they lie.


def spread(plan: FilePlan, gaps: list[int], order: list[int]) -> tuple[FilePlan, list[int]]:
    """The plan's items with a gap before each, in another order, and where each lies; the header is item 0."""
    offset, placed = len(plan.header), []
    for view, gap in zip(map(view_of, plan.items), gaps):
        placed.append(WriteItem(view, offset + gap))
        offset += gap + view.nbytes
    items = [placed[at] for at in order]
    size = offset + gaps[-1]
    return FilePlan(plan.target, plan.header, items, size), [0, *(item.file_offset for item in items)]


@st.composite
def spread_plans(draw: st.DrawFn) -> tuple[FilePlan, list[int]]:
    plan = draw(plans())
    count = len(plan.items)
    gap = st.one_of(st.just(0), st.integers(1, 40), st.integers(1, 3 * PAGE))
    gaps = draw(st.lists(gap, min_size=count + 1, max_size=count + 1))
    return spread(plan, gaps, draw(st.permutations(range(count))))


@settings(deadline=None)
@given(spread_plans(), limits)
def test_chunks_cover_the_items_and_no_gap(spread: tuple[FilePlan, list[int]], limit: dict[str, int]) -> None:
    plan, offsets = spread
    items = items_of(plan)
    covered = [0] * len(items)
    end = 0
    for chunk in schedule(plan, **limit)[0]:
        assert chunk.file_offset >= end and chunk.nbytes > 0
        end = chunk.file_offset
        for op in chunk.ops:
            assert (op.first_byte, op.chunk_offset) == (covered[op.item], end - chunk.file_offset)
            assert end == offsets[op.item] + op.first_byte
            covered[op.item] += op.nbytes
            end += op.nbytes
        assert end == chunk.file_offset + chunk.nbytes <= plan.nbytes
    assert covered == [view.nbytes for view in items]


@settings(deadline=None)
@given(spread_plans(), limits)
def test_limits_are_respected_beside_gaps(spread: tuple[FilePlan, list[int]], limit: dict[str, int]) -> None:
    test_limits_are_respected.hypothesis.inner_test(spread[0], limit)  # type: ignore[attr-defined]


@settings(deadline=None)
@given(plans(), limits, st.data())
def test_offsets_without_gaps_change_nothing(
    plan: FilePlan, limit: dict[str, int], data: st.DataObject
) -> None:
    """However the items are spelled, the file has the same chunks: of the same items in the same order."""
    said, _ = spread(plan, [0] * (len(plan.items) + 1), [*range(len(plan.items))])
    assert schedule(plan, **limit) == schedule(said, **limit) == schedule(said._replace(size=None), **limit)
    order = data.draw(st.permutations(range(len(plan.items))))
    shuffled, _ = spread(plan, [0] * (len(plan.items) + 1), order)

    def shape(chunks: list[Chunk]) -> list[object]:
        return [
            (*chunk[:3], [(op.chunk_offset, op.first_byte, op.nbytes) for op in chunk.ops])
            for chunk in chunks
        ]

    assert shape(schedule(shuffled, **limit)[0]) == shape(schedule(plan, **limit)[0])


def test_items_far_apart_take_a_write_each() -> None:
    items = [WriteItem(contiguous(100), 1000 * i + 64) for i in range(50)]
    (chunks,) = schedule(FilePlan(b"file", bytes(64), items, 50_000))
    assert [(chunk.file_offset, chunk.nbytes) for chunk in chunks] == [
        (0, 164),
        *((1000 * i + 64, 100) for i in range(1, 50)),
    ]


@pytest.mark.parametrize(
    ("items", "size", "what"),
    [
        (
            [contiguous(10), WriteItem(contiguous(10), 80)],
            None,
            "a gap before item 1 of file: nothing is at 74 to 80",
        ),
        ([WriteItem(contiguous(10), 65)], None, "a gap before item 0 of file"),
        ([contiguous(10)], 73, "item 0 of file lies beyond the file's 73 bytes: 10 at 64"),
        ([WriteItem(contiguous(10), (1 << 64) - 5)], 1 << 20, "item 0 of file lies beyond"),
        ([WriteItem(contiguous(0), 101)], 100, "item 0 of file lies beyond"),
        ([], 63, "the header of file lies beyond"),
        ([WriteItem(contiguous(10), 63)], 100, "item 0 of file begins at 63, inside the header of file"),
        (
            [contiguous(10), WriteItem(contiguous(10), 70)],
            100,
            "item 1 of file begins at 70, inside item 0",
        ),
        (
            [WriteItem(contiguous(10), 70), contiguous(3), WriteItem(contiguous(9), 72)],
            100,
            "item 2.*inside item 0",
        ),
        ([WriteItem(contiguous(30), 64), WriteItem(contiguous(10), 64)], 100, "item 1 of file begins at 64"),
        (
            [contiguous(10), WriteItem(contiguous(10), 64)],
            None,
            "item 1 of file begins at 64, inside item 0",
        ),
        ([], (1 << 63), "larger than any file can be"),
    ],
)
def test_items_that_do_not_fit(items: list[TensorView | WriteItem], size: int | None, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        schedule(FilePlan(b"file", bytes(64), items, size))


def test_whole_blocks_have_no_gaps() -> None:
    plan = FilePlan(b"file", bytes(64), [], 100)
    with pytest.raises(ValueError, match="gaps"):
        schedule(plan, in_place=False, packed_nbytes=PRODUCTION["slot_nbytes"], block_nbytes=PAGE)


blocks = st.fixed_dictionaries(
    {
        "slot_nbytes": st.integers(2, 20).map(lambda pages: pages * PAGE),
        "max_ops": st.integers(1, 40),
        "block_nbytes": st.sampled_from([512, PAGE, 2 * PAGE]),
    }
).map(lambda limit: {**limit, "packed_nbytes": limit["slot_nbytes"], "in_place": False})


@settings(deadline=None)
@given(plans(), blocks)
def test_blocks_stay_whole(plan: FilePlan, limit: dict[str, int]) -> None:
    """For direct I/O: however many pieces, whatever their ways."""
    items = items_of(plan)
    chunks = schedule(plan, **limit)[0]
    end = 0
    for chunk in chunks:
        assert chunk.file_offset == end
        assert chunk.file_offset % limit["block_nbytes"] == 0
        end += chunk.nbytes
        assert 0 < chunk.nbytes <= limit["slot_nbytes"]
        from_device = any(items[op.item].device != HOST for op in chunk.ops)
        assert chunk.route == ("device" if from_device else "packed")
        # More than max_ops only to fill the last block.
        if len(chunk.ops) > limit["max_ops"]:
            last = chunk.ops[limit["max_ops"] - 1]
            full = last.chunk_offset + last.nbytes
            assert chunk.nbytes - full < limit["block_nbytes"]
        sizes = [op.nbytes for op in chunk.ops]
        assert [op.chunk_offset for op in chunk.ops] == [0, *itertools.accumulate(sizes[:-1])]
    assert end == plan.nbytes


@settings(deadline=None)
@given(plans(aligned=True), blocks)
def test_elements_stay_whole_in_blocks(plan: FilePlan, limit: dict[str, int]) -> None:
    test_elements_stay_whole.hypothesis.inner_test(plan, limit)  # type: ignore[attr-defined]


def test_blocks_must_fit() -> None:
    plan = file_of(contiguous(100))
    for limit in (
        {"in_place": True},
        {"in_place": False, "packed_nbytes": MIB},
        {"in_place": False, "slot_nbytes": 2 * KIB, "packed_nbytes": 2 * KIB},
    ):
        with pytest.raises(ValueError, match="whole blocks"):
            schedule(plan, **{"block_nbytes": PAGE, **limit})


# What the common cases cost. Calls and launches are counted, not timed.


def test_small_device_tensors_share_chunks() -> None:
    (chunks,) = schedule(file_of(*[contiguous(2 * KIB, device=0)] * 20_000))
    assert len(chunks) == 1 + math.ceil(20_000 / PRODUCTION["max_ops"])


def test_small_host_tensors_share_writes() -> None:
    (chunks,) = schedule(file_of(*[contiguous(2 * KIB)] * 20_000))
    assert {chunk.route for chunk in chunks} == {"in_place"}
    assert len(chunks) == math.ceil(20_001 / PRODUCTION["max_ops"])


@pytest.mark.parametrize("device", [HOST, FETCHED, 0])
def test_large_tensors_take_one_op_a_chunk(device: int) -> None:
    nbytes = 1 << 37
    (chunks,) = schedule(file_of(contiguous(nbytes, device)))
    limit = PRODUCTION["in_place_nbytes" if device == HOST else "slot_nbytes"]
    assert sum(len(chunk.ops) for chunk in chunks) <= 1 + math.ceil(nbytes / (limit - PAGE))


def test_short_runs_do_not_cost_an_op_each() -> None:
    (chunks,) = schedule(file_of(strided(2, (4096, 4096), (1, 4096))))
    assert [len(chunk.ops) for chunk in chunks] == [1] * len(chunks)
    assert len(chunks) <= 2 + 2 * 4096 * 4096 // MIB


def test_column_half_is_written_in_place() -> None:
    (chunks,) = schedule(file_of(strided(2, (4096, 4096), (8192, 1))))
    assert {chunk.route for chunk in chunks} == {"in_place"}


def test_memory_targets_are_packed() -> None:
    (chunks,) = schedule(file_of(contiguous(100), contiguous(3 * MIB)), in_place=False)
    assert {chunk.route for chunk in chunks} == {"packed"}


def test_contiguous_memory_counts_as_such_however_it_is_described() -> None:
    described = strided(4, (3, 1, 5, 7), (35, 1, 7, 1))
    assert schedule(file_of(described)) == schedule(file_of(contiguous(420)))


# Plans that cannot be meant.


@pytest.mark.parametrize(
    ("view", "what"),
    [
        (TensorView(0, 8, HOST), "no address"),
        (TensorView(0, 8, 0), "no address"),
        (strided(1, (4, 4), (-4, 1)), "negative"),
        (TensorView(ADDRESS, 8, HOST, 1, (-8,), (1,)), "negative"),
        (TensorView(ADDRESS, 8, HOST, 1, (2, 4), (4,)), "length"),
        (TensorView(ADDRESS, 9, HOST, 1, (2, 4), (8, 1)), "does not match"),
        (TensorView(ADDRESS, 8, HOST, 1, (0, 4), (8, 1)), "does not match"),
        (strided(1, (2,) * 9, tuple(3**dim for dim in range(9))), "dimensions"),
    ],
)
def test_bad_views(view: TensorView, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        schedule(file_of(view))


def test_memory_target_of_another_size() -> None:
    with pytest.raises(ValueError, match="size"):
        schedule(FilePlan(Memory(ADDRESS, 63), bytes(64), []))


def test_as_many_dimensions_as_there_may_be() -> None:
    shape, strides = (2,) * 8, tuple(3**dim for dim in reversed(range(1, 9)))
    (chunks,) = schedule(file_of(strided(2, shape, strides)))
    assert sum(chunk.nbytes for chunk in chunks) == 64 + 2 * 2**8


def test_empty_files() -> None:
    assert schedule(file_of(header=b""), file_of(contiguous(0), contiguous(0, 0), header=b"")) == [[], []]
    assert schedule() == []
