# SPDX-License-Identifier: Apache-2.0
"""Which tensors have memory in common, against the plain truth: the set of addresses each one has."""

from __future__ import annotations

import itertools

import pytest
import safetensors.torch as reference
import torch
from helpers import DTYPES, filled
from hypothesis import given, settings
from hypothesis import strategies as st

import fastshard
from fastshard.engine.sharing import by_storage, overlapping, shared_names

deterministic = settings(derandomize=True, deadline=None, max_examples=500)


def shared(tensors: dict[str, torch.Tensor]) -> set[frozenset[str]]:
    return {frozenset(names) for names in shared_names(tensors, by_storage(tensors))}


def pieces(*tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip("abcdefgh", tensors))


def addresses(tensor: torch.Tensor) -> set[int]:
    """Of every byte of every element."""
    places = itertools.product(*map(range, tensor.shape))
    offsets = (sum(i * stride for i, stride in zip(place, tensor.stride())) for place in places)
    size = tensor.element_size()
    return {tensor.data_ptr() + offset * size + byte for offset in offsets for byte in range(size)}


def truly_shared(tensors: dict[str, torch.Tensor]) -> set[frozenset[str]]:
    """Sets of names connected by common addresses."""
    groups: list[tuple[set[str], set[int]]] = []
    for name, tensor in tensors.items():
        names, memory = {name}, addresses(tensor)
        met = [group for group in groups if group[1] & memory]
        groups = [group for group in groups if group not in met]
        groups.append((names.union(*(g[0] for g in met)), memory.union(*(g[1] for g in met))))
    return {frozenset(names) for names, _ in groups if len(names) > 1}


def group_of(name: str, groups: set[frozenset[str]]) -> frozenset[str]:
    return next((group for group in groups if name in group), frozenset({name}))


# Address ranges ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spans", "answer"),
    [
        ([], False),
        ([(0, 8)], False),
        ([(8, 16), (0, 8)], False),
        ([(0, 9), (8, 16)], True),
        ([(0, 8), (0, 8)], True),
        ([(0, 100), (10, 20), (30, 40)], True),
        ([(0, 0), (0, 0), (0, 8)], False),
        ([(8, 8), (0, 8), (8, 16)], False),
    ],
)
def test_overlapping(spans, answer):
    assert overlapping(spans) is answer


@deterministic
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=6))
def test_overlapping_is_two_ranges_with_a_common_address(found):
    spans = [(begin, begin + size) for begin, size in found]
    pairs = itertools.combinations([set(range(*span)) for span in spans], 2)
    assert overlapping(spans) == any(one & other for one, other in pairs)


# Storages ------------------------------------------------------------------------------------------------


def test_by_storage_groups_views_and_leaves_out_what_has_no_memory():
    base, other = filled((6,)), filled((6,), seed=1)
    tensors = {
        "a": base,
        "x": other[1:],
        "b": base[2:],
        "empty": base[:0],
        "nothing": torch.empty(0),
        "meta": torch.empty(3, device="meta"),
        "c": base.view(torch.int16),
    }
    assert by_storage(tensors) == [["a", "b", "c"], ["x"]]


def test_equal_tensors_in_storages_of_their_own_are_not_shared():
    assert shared(pieces(filled((4,)), filled((4,)))) == set()


# Shapes of sharing ---------------------------------------------------------------------------------------

LINE = filled((64,))
MATRIX = LINE.view(8, 8)
CUBE = LINE.view(4, 4, 4)

DISJOINT = {
    "halves": pieces(LINE[:32], LINE[32:]),
    "rows": pieces(MATRIX[:3], MATRIX[3:5], MATRIX[5:]),
    "one row and the rest": pieces(MATRIX[0], MATRIX[1:]),
    "column halves": pieces(MATRIX[:, :4], MATRIX[:, 4:]),
    "three column parts": pieces(MATRIX[:, :1], MATRIX[:, 1:7], MATRIX[:, 7:]),
    "single columns": pieces(*(MATRIX[:, number] for number in range(8))),
    "quadrants": pieces(MATRIX[:4, :4], MATRIX[:4, 4:], MATRIX[4:, :4], MATRIX[4:, 4:]),
    "boxes of a cube": pieces(CUBE[:, :2, :2], CUBE[:, 2:, :2], CUBE[:, :, 2:]),
    "columns, turned": pieces(MATRIX[:, :4].t(), MATRIX[:, 4:].t()),
    "fused q, k, v": pieces(*MATRIX.view(8, 2, 4).unbind(1)),
    "interleaved steps": pieces(LINE[::2], LINE[1::2]),
    "three interleaved": pieces(LINE[::3], LINE[1::3], LINE[2::3]),
    "interleaved columns": pieces(MATRIX[:, ::2], MATRIX[:, 1::2]),
    "interleaved columns, an odd number": pieces(LINE[:63].view(9, 7)[:, ::2], LINE[:63].view(9, 7)[:, 1::2]),
    "a column and the others": pieces(MATRIX[:, 0], MATRIX[:, 1:]),
    "fused q and k, v": pieces(CUBE[:, 0], CUBE[:, 1:3], CUBE[:, 3]),
    "other dtypes, apart": pieces(LINE[:32].view(torch.int16), LINE[32:]),
    "other dtypes, columns": pieces(MATRIX[:, :4].view(torch.int16), MATRIX[:, 4:]),
    "interleaved rows": pieces(MATRIX[::2], MATRIX[1::2]),
    "empty inside": pieces(LINE, LINE[10:10]),
}


@pytest.mark.parametrize("tensors", DISJOINT.values(), ids=DISJOINT.keys())
def test_disjoint_slices_are_not_shared(tensors):
    assert truly_shared(tensors) == set()
    assert shared(tensors) == set()


OVERLAPPING = {
    "the same": pieces(LINE, LINE),
    "a view": pieces(LINE, MATRIX),
    "one element": pieces(LINE[:33], LINE[32:]),
    "turned": pieces(MATRIX, MATRIX.t()),
    "column halves that meet": pieces(MATRIX[:, :5], MATRIX[:, 4:]),
    "boxes that meet in a corner": pieces(MATRIX[:5, :5], MATRIX[4:, 4:]),
    "boxes that meet in the other corner": pieces(MATRIX[:5, 4:], MATRIX[4:, :5]),
    "a part of a row and of a column": pieces(MATRIX[1:2, 0:2], MATRIX[0:2, 1:2]),
    "a row and a column": pieces(MATRIX[3], MATRIX[:, 3]),
    "steps that meet": pieces(LINE[::2], LINE[::3]),
    "the same step, apart": pieces(LINE[::2], LINE[10::2]),
    "other dtypes": pieces(LINE.view(torch.int16), LINE.view(torch.int64)),
    "other dtype, a part": pieces(LINE, LINE.view(torch.uint8)[7:8]),
    "real and imaginary": pieces(LINE.view(torch.complex64), torch.view_as_real(LINE.view(torch.complex64))),
    "expanded": pieces(LINE[5:6].expand(4), LINE[5]),
    "a row that runs on into the next": pieces(
        LINE.as_strided((3, 6), (10, 1)), LINE.as_strided((2, 6), (10, 1), 8)
    ),
    "rows of reshaped slices": pieces(LINE[:30].view(3, 10)[:, :6], LINE[8:28].view(2, 10)[:, :6]),
    "windows": pieces(LINE.unfold(0, 8, 4), LINE[4:9]),
}


@pytest.mark.parametrize("tensors", OVERLAPPING.values(), ids=OVERLAPPING.keys())
def test_overlapping_views_are_shared(tensors):
    assert truly_shared(tensors) == {frozenset("ab")}
    assert shared(tensors) == {frozenset("ab")}


def test_nested_ranges_are_all_found():
    """The reference compares each range with the one before it only, and misses the second small one."""
    assert shared(pieces(LINE, LINE[8:16], LINE[32:40])) == {frozenset("abc")}
    assert shared(pieces(LINE[:40], LINE[4:8], LINE[16:20], LINE[36:44], LINE[44:])) == {frozenset("abcd")}


def test_connected_by_a_third():
    assert shared(pieces(LINE[:20], LINE[30:50], LINE[10:40], LINE[50:])) == {frozenset("abc")}


def test_each_storage_has_sets_of_its_own():
    tensors = {"a": LINE, "x": (other := filled((4,), seed=2)), "b": LINE[3:4], "y": other.view(2, 2)}
    assert shared(tensors) == {frozenset("ab"), frozenset("xy")}


def check_that_nothing_is_missed(tensors: dict[str, torch.Tensor]) -> None:
    answer = shared(tensors)
    for names in truly_shared(tensors):
        assert names <= group_of(min(names), answer)


# Anything ------------------------------------------------------------------------------------------------


@st.composite
def windows(draw: st.DrawFn) -> torch.Tensor:
    """Any view of LINE that torch can describe."""
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.int16, torch.uint8]))
    line = LINE.view(dtype)
    shape, strides, last = [], [], 0
    for _ in range(draw(st.integers(0, 3))):
        size, stride = draw(st.integers(1, 5)), draw(st.integers(0, 12))
        if last + (size - 1) * stride < line.numel():
            shape.append(size)
            strides.append(stride)
            last += (size - 1) * stride
    return line.as_strided(shape, strides, draw(st.integers(0, line.numel() - 1 - last)))


@st.composite
def boxes(draw: st.DrawFn, steps: st.SearchStrategy[int]) -> list[torch.Tensor]:
    """Slices of one shape of LINE."""
    base = LINE.view(draw(st.sampled_from([(64,), (8, 8), (4, 16), (16, 4), (4, 4, 4), (2, 8, 4)])))
    found = []
    for _ in range(draw(st.integers(2, 4))):
        cuts = []
        for size in base.shape:
            begin, end = sorted(draw(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1))))
            cuts.append(slice(begin, end + 1, draw(steps)))
        found.append(base[tuple(cuts)])
    return found


@deterministic
@given(st.lists(windows(), min_size=2, max_size=4))
def test_no_overlap_of_views_is_ever_missed(found):
    check_that_nothing_is_missed(pieces(*found))


@deterministic
@given(boxes(st.integers(1, 3)))
def test_no_overlap_of_slices_is_ever_missed(found):
    check_that_nothing_is_missed(pieces(*found))


@deterministic
@given(boxes(st.just(1)))
def test_plain_slices_are_judged_exactly(found):
    tensors = pieces(*found)
    assert shared(tensors) == truly_shared(tensors)


@deterministic
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), min_size=2, max_size=5))
def test_contiguous_slices_are_refused_where_the_reference_refuses_them(spans):
    tensors = pieces(*(LINE[begin : begin + size] for begin, size in spans))
    answer = shared(tensors)
    theirs = [names for names in reference._find_shared_tensors(tensors) if len(names) > 1]
    assert bool(answer) == bool(theirs)
    for names in theirs:
        assert names <= group_of(min(names), answer)
    assert answer == truly_shared(tensors)


# In the public functions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tensors", DISJOINT.values(), ids=DISJOINT.keys())
def test_disjoint_slices_can_be_saved(tensors):
    copies = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert fastshard.save(tensors, allow_strided=True) == reference.save(copies)


@pytest.mark.parametrize("tensors", OVERLAPPING.values(), ids=OVERLAPPING.keys())
@pytest.mark.parametrize("allow_strided", [False, True])
def test_overlapping_views_cannot_be_saved(tensors, allow_strided):
    # An old safetensors does not get as far with numbers that it does not know.
    known = all(tensor.dtype in DTYPES for tensor in tensors.values())
    with pytest.raises(RuntimeError if known else (RuntimeError, KeyError)):
        fastshard.save(tensors, allow_strided=allow_strided)
