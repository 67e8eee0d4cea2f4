# SPDX-License-Identifier: Apache-2.0
"""The pack kernel itself, thread by thread on the CPU, beside the CPU pack: any view, cut anywhere.

``tests/simulated_driver/device.cc`` compiles the production source of the kernels as C++ and checks every access
they make.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import simcuda
from conftest import CACHE_VARIABLE
from hypothesis import given, settings
from hypothesis import strategies as st

SCRATCH = 256 << 10
"""Of a staging slot: what a table may take."""
SLOT = 16 << 20
MAX_OPS = 1024
POISON = 0xDB
RAW, F64, F32, F16, BF16, F8_E4M3, F8_E5M2, F8_E4M3_SAT = range(8)
ITEMSIZE = {F64: 8, F32: 4, F16: 2, BF16: 2, F8_E4M3: 1, F8_E5M2: 1, F8_E4M3_SAT: 1}
CASTS = [
    (source, target)
    for source in (F64, F32, F16, BF16, F8_E4M3, F8_E5M2)
    for target in (F32, F16, BF16, F8_E4M3, F8_E5M2, F8_E4M3_SAT)
    if source != target
]


class SimOp(ctypes.Structure):
    """As in tests/simulated_driver/pack.cc."""

    _fields_ = [
        ("data", ctypes.c_uint64),
        ("begin", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("itemsize", ctypes.c_uint32),
        ("ndim", ctypes.c_uint32),
        ("shape", ctypes.c_int64 * 16),
        ("strides", ctypes.c_int64 * 16),
        ("source", ctypes.c_uint8),
        ("target", ctypes.c_uint8),
        ("offset", ctypes.c_uint32),
        ("first_byte", ctypes.c_uint64),
        ("nbytes", ctypes.c_uint64),
        ("taken", ctypes.c_uint32),
    ]


@dataclass
class View:
    """A strided view of random bytes; strides in elements."""

    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    lead: int = 0
    """Bytes of the memory before it."""
    cast: tuple[int, int] = (RAW, RAW)
    memory: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))
        nbytes = self.lead + extent * self.itemsize
        memory = np.random.default_rng([nbytes, *self.shape]).integers(0, 256, nbytes + 64, dtype=np.uint8)
        self.memory = memory[-memory.ctypes.data % 64 :][:nbytes]

    @property
    def out_itemsize(self) -> int:
        return ITEMSIZE.get(self.cast[1], self.itemsize)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.out_itemsize

    def op(self, first_byte: int, nbytes: int, offset: int) -> SimOp:
        begin = self.memory.ctypes.data
        return SimOp(
            begin + self.lead,
            begin,
            begin + self.memory.nbytes,
            self.itemsize,
            len(self.shape),
            (ctypes.c_int64 * 16)(*self.shape),
            (ctypes.c_int64 * 16)(*self.strides),
            *self.cast,
            offset,
            first_byte,
            nbytes,
        )


def cast_view(pair: tuple[int, int], shape: tuple[int, ...], strides: tuple[int, ...]) -> View:
    return View(ITEMSIZE[pair[0]], shape, strides, cast=pair)


@functools.cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(simcuda.build(os.environ[CACHE_VARIABLE])))


def run(ops: Sequence[SimOp], lead: int = 0, grid: int = 3, backwards: bool = False) -> tuple[int, int]:
    """Packs and compares; the sizes of the table. `lead`: where in 64 bytes the target begins."""
    nbytes = max((op.offset + op.nbytes for op in ops), default=0)
    memory = np.full(nbytes + lead + 128, POISON, np.uint8)
    out = memory[-memory.ctypes.data % 64 + lead :][:nbytes]
    expected = np.full(nbytes, POISON, np.uint8)
    array = (SimOp * len(ops))(*ops)
    sizes = (ctypes.c_uint32 * 2)()
    error = ctypes.create_string_buffer(256)
    result = library().sim_pack(
        array,
        ctypes.c_size_t(len(ops)),
        ctypes.c_void_p(out.ctypes.data),
        ctypes.c_size_t(nbytes),
        ctypes.c_size_t(SCRATCH),
        ctypes.c_uint(grid),
        int(backwards),
        sizes,
        error,
        ctypes.c_size_t(len(error)),
    )
    assert result == 0, error.value
    for op in array:
        assert op.taken
        library().sim_pack_reference(ctypes.byref(op), ctypes.c_void_p(expected.ctypes.data + op.offset))
    wrong = np.flatnonzero(out != expected)
    assert wrong.size == 0, f"{wrong.size} of {nbytes} bytes differ, from {wrong[0]} on"
    return sizes[0], sizes[1]


def whole(view: View, **options: int) -> tuple[int, int]:
    return run([view.op(0, view.nbytes, 0)], **options)


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def permuted(base: tuple[int, ...], order: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    strides = contiguous(base)
    return tuple(base[i] for i in order), tuple(strides[i] for i in order)


SHAPES = {
    "contiguous": ((150_000,), (1,)),
    "column half": ((190, 160), (320, 1)),
    "odd columns": ((91, 13), (57, 1)),
    "every other": ((20_003,), (2,)),
    "transposed": permuted((190, 161), (1, 0)),
    "transposed large": permuted((256, 512), (1, 0)),
    "transposed narrow": permuted((5000, 5), (1, 0)),
    "transposed flat": permuted((5, 5000), (1, 0)),
    "transposed slice": ((100, 120), (1, 131)),
    "channels last": permuted((3, 18, 20, 40), (0, 3, 1, 2)),
    "channels last, 3 by 3": permuted((20, 3, 3, 96), (0, 3, 1, 2)),
    "reversed": permuted((17, 30, 40), (2, 1, 0)),
    "middle last": permuted((17, 30, 40), (0, 2, 1)),
    "turned": permuted((50, 8, 9, 20), (3, 1, 0, 2)),
    "far apart": permuted((13, 70, 6, 50), (3, 0, 1, 2)),
    "expanded in front": ((9, 700), (0, 1)),
    "expanded behind": ((700, 33), (1, 0)),
    "expanded within": ((40, 5, 70), (70, 0, 1)),
    "windows": ((400, 31), (1, 1)),
    "eight dimensions": ((3, 2, 4, 2, 3, 2, 5, 2), (4000, 1900, 450, 200, 61, 29, 5, 2)),
    "eight dimensions, turned": permuted((3, 2, 4, 2, 3, 2, 5, 4), (7, 3, 5, 1, 6, 2, 4, 0)),
    "scalar": ((), ()),
}


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("kind", SHAPES)
def test_shapes(kind: str, itemsize: int) -> None:
    view = View(itemsize, *SHAPES[kind], lead=itemsize)
    whole(view)
    whole(view, grid=40, lead=min(itemsize, 8), backwards=True)


@pytest.mark.parametrize("pair", CASTS, ids=str)
def test_casts(pair: tuple[int, int]) -> None:
    for kind in ("contiguous", "column half", "transposed", "channels last, 3 by 3", "every other", "turned"):
        whole(cast_view(pair, *SHAPES[kind]), lead=ITEMSIZE[pair[1]])


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(
    ("base", "order"),
    [
        ((256, 512), (1, 0)),
        ((3, 18, 20, 40), (0, 3, 1, 2)),
        ((80, 9, 70), (2, 1, 0)),
        ((70, 6, 5, 80), (3, 1, 2, 0)),
    ],
)
def test_transposed_views_go_through_tiles(
    base: tuple[int, ...], order: tuple[int, ...], itemsize: int
) -> None:
    """Which their tables show: three dimensions an entry."""
    entries, dims = whole(View(itemsize, *permuted(base, order)))
    assert dims == 3 * entries


def test_an_entry_does_not_pass_the_end_of_what_32_bits_count() -> None:
    """Huge sizes: the kernel looks at a small part only."""
    first = (1 << 33) * 3 + 12345
    for shape, strides in [
        ((1 << 20, 1 << 33), (0, 0)),
        ((5, 1 << 33, 3), (1, 0, 1)),
        (((1 << 20) + 1, (1 << 20) + 3, 7), (0, 0, 1)),
        ((1 << 31, 5), (0, 1)),
        ((1 << 40,), (0,)),
        ((3, 1 << 31, 1 << 2), (1, 0, 0)),
    ]:
        view = View(2, shape, strides)
        for start in (0, 2 * first, 2 * (1 << 33) - 40_000, 2 * (1 << 31) - 40_000):
            nbytes = min(200_002, view.nbytes - start)
            if nbytes > 0:
                run([view.op(start, nbytes, 0)])


@pytest.mark.parametrize("count", [1000, 5000])
def test_tables_of_thousands_of_entries(count: int) -> None:
    rng = np.random.default_rng(count)
    ops, offset = [], 0
    for i in range(count):
        view = View(1, (int(rng.integers(1, 90)),), (1,), lead=i % 17)
        ops.append(view.op(0, view.nbytes, offset))
        offset += view.nbytes
        VIEWS.append(view)
    assert run(ops, grid=7) == (count, 0)
    VIEWS.clear()


VIEWS: list[View] = []
"""What ops point into."""


def test_any_chunk_has_room_for_its_table() -> None:
    """The most ops a chunk may have, strided in every dimension, and all of a slot's bytes."""
    shape, strides = SHAPES["eight dimensions"]
    view, rest = View(2, shape, strides), View(4, (SLOT // 4,), (1,))
    ops = [view.op(0, 100, 100 * i) for i in range(800)]
    offset = 100 * len(ops)
    for _ in range(MAX_OPS - len(ops) - 1):
        ops.append(rest.op(0, 4, offset))
        offset += 4
    ops.append(rest.op(0, SLOT - offset, offset))
    run(ops)


def test_a_full_table_says_so() -> None:
    shape, strides = SHAPES["eight dimensions"]
    view = View(2, shape, strides)
    ops = (SimOp * 2000)(*[view.op(0, 64, 64 * i) for i in range(2000)])
    out = np.zeros(64 * 2000, np.uint8)
    sizes, error = (ctypes.c_uint32 * 2)(), ctypes.create_string_buffer(256)
    arguments = [ctypes.c_size_t(out.nbytes), ctypes.c_size_t(SCRATCH), ctypes.c_uint(3), 0]
    result = library().sim_pack(
        ops,
        ctypes.c_size_t(2000),
        ctypes.c_void_p(out.ctypes.data),
        *arguments,
        sizes,
        error,
        ctypes.c_size_t(256),
    )
    assert result == 0, error.value
    taken = sum(op.taken for op in ops)
    assert 1024 <= taken == sizes[0] < 2000
    assert all(op.taken for op in ops[:taken])


@st.composite
def views(draw: st.DrawFn) -> View:
    """Up to eight dimensions that lie in any order, with gaps, or upon each other."""
    rank = draw(st.integers(1, 8))
    largest = {1: 6000, 2: 300, 3: 40, 4: 14}.get(rank, 5)
    shape = [draw(st.integers(1, largest)) for _ in range(rank)]
    strides, extent = [0] * rank, 1
    for dim in draw(st.permutations(range(rank))):
        if draw(st.integers(0, 9)) == 0:
            continue  # expanded
        strides[dim] = extent + (draw(st.integers(0, 9)) if draw(st.booleans()) else 0)
        extent = strides[dim] * shape[dim]
        if extent > 1 << 20:
            shape[dim], extent = 1, strides[dim]
    pair = draw(st.one_of(st.just((RAW, RAW)), st.sampled_from(CASTS)))
    itemsize = ITEMSIZE.get(pair[0]) or draw(st.sampled_from([1, 2, 4, 8, 16]))
    lead = draw(st.integers(0, 40)) * (itemsize if pair[0] else draw(st.sampled_from([1, itemsize])))
    return View(itemsize, tuple(shape), tuple(strides), lead, pair)


@settings(max_examples=150, deadline=None)
@given(
    views(),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 40),
    st.integers(0, 16),
    st.integers(1, 9),
    st.booleans(),
)
def test_any_view_cut_anywhere(
    view: View, begin: float, end: float, offset: int, lead: int, grid: int, backwards: bool
) -> None:
    unit = view.out_itemsize if view.cast[1] else 1  # no chunk cuts an element that is cast
    first, last = sorted(round(cut * view.nbytes / unit) * unit for cut in (begin, end))
    if first < last:
        run([view.op(first, last - first, offset * unit)], lead * unit, grid, backwards)
