# SPDX-License-Identifier: Apache-2.0
"""Boxes of stored tensors are read exactly, into whatever tensor, and little else is."""

import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from fastshard.distributed import slices
from fastshard.distributed.slices import Box, Figures, read_boxes
from fastshard.distributed.stored import open_checkpoint

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64]


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def of(tensor: torch.Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    return tensor[tuple(slice(o, o + n) for o, n in zip(offsets, sizes))]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    assert one.dtype is other.dtype and one.shape == other.shape
    return torch.equal(
        one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
    )


def drop(path: Path) -> None:
    """Out of the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
    spans = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return shape, tuple(a for a, _ in spans), tuple(b - a for a, b in spans)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(boxes(), st.sampled_from(DTYPES)), min_size=1, max_size=6), st.data())
def test_any_box_is_read_as_torch_slices(tmp_path_factory, parts, data) -> None:
    path = tmp_path_factory.mktemp("boxes") / "a.safetensors"
    whole = {f"t{i}": numbers(shape, dtype, i) for i, ((shape, _, _), dtype) in enumerate(parts)}
    save_file(whole, path)
    wanted: list[tuple[torch.Tensor, torch.Tensor]] = []
    asked = []
    with open_checkpoint(path) as stored:
        for i, ((_, offsets, sizes), dtype) in enumerate(parts):
            into = data.draw(st.sampled_from(["packed", "transposed", "inside", "cast"]))
            if into == "transposed":
                target = torch.zeros(sizes[::-1], dtype=dtype).permute([*reversed(range(len(sizes)))])
            elif into == "inside":
                target = of(torch.zeros([n + 3 for n in sizes], dtype=dtype), (1,) * len(sizes), sizes)
            else:
                target = torch.zeros(sizes, dtype=torch.complex64 if into == "cast" else dtype)
            asked.append(Box(stored.tensor(f"t{i}"), offsets, sizes, target))
            wanted.append((target, of(whole[f"t{i}"], offsets, sizes).to(target.dtype)))
        figures = read_boxes(asked)
    assert all(same(found, expected) for found, expected in wanted)
    nbytes = sum(box.stored.dtype.itemsize * box.destination.numel() for box in asked)
    assert figures.wanted_nbytes == nbytes and nbytes <= figures.read_nbytes <= 1.2 * nbytes


def test_what_surrounds_a_destination_is_left_alone(tmp_path: Path) -> None:
    save_file({"a": torch.ones(64, 64)}, tmp_path / "a.safetensors")
    around = torch.zeros(66, 70)
    with open_checkpoint(tmp_path / "a.safetensors") as stored:
        read_boxes([Box(stored.tensor("a"), (0, 32), (64, 32), around[1:65, 5:37])])
    expected = torch.zeros(66, 70)
    expected[1:65, 5:37] = 1
    assert torch.equal(around, expected)


SHAPES = {
    "long runs": ((64, 40000), (3, 10000), (50, 20000)),
    "short runs": ((3000, 600), (0, 100), (3000, 300)),
    "short gaps": ((500, 1100), (0, 0), (500, 1000)),
    "rows": ((2000, 600), (100, 0), (1500, 600)),
    "blocks": ((30, 40, 50, 20), (3, 10, 20, 0), (20, 20, 20, 20)),
    "single elements": ((3000, 50, 3), (0, 10, 1), (3000, 5, 1)),
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("cached", [True, False])
def test_cached_or_not_the_bytes_are_those_and_few_more_are_read(
    tmp_path: Path, kind: str, cached: bool
) -> None:
    shape, offsets, sizes = SHAPES[kind]
    tensor = torch.randint(0, 1 << 14, shape, dtype=torch.int16)
    path = tmp_path / "a.safetensors"
    save_file({"a": tensor, "b": tensor.flip(0)}, path)
    targets = [torch.zeros(sizes, dtype=torch.int16) for _ in range(2)]
    if not cached:
        drop(path)
    with open_checkpoint(path) as stored:
        figures = read_boxes(
            Box(stored.tensor(name), offsets, sizes, target) for name, target in zip("ab", targets)
        )
    assert torch.equal(targets[0], of(tensor, offsets, sizes))
    assert torch.equal(targets[1], of(tensor.flip(0), offsets, sizes))
    assert figures.wanted_nbytes == 2 * targets[0].nbytes
    assert figures.wanted_nbytes <= figures.read_nbytes <= 1.2 * figures.wanted_nbytes
    assert figures.staged_nbytes == 0


def test_small_tensors_beside_each_other_are_read_together(tmp_path: Path) -> None:
    tensors = {f"t{i:04}": torch.full((100,), i) for i in range(3000)}
    save_file(tensors, tmp_path / "a.safetensors")
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    with open_checkpoint(tmp_path / "a.safetensors") as stored:
        everything = read_boxes(Box(stored.tensor(n), (0,), (100,), t) for n, t in found.items())
        most = [n for i, n in enumerate(found) if i % 8]
        without_some = read_boxes(Box(stored.tensor(n), (0,), (100,), found[n]) for n in most)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert everything.calls <= 4 and everything.read_nbytes == everything.wanted_nbytes
    assert without_some.calls <= 8
    assert without_some.wanted_nbytes < without_some.read_nbytes <= 1.2 * without_some.wanted_nbytes


def test_staging_stays_within_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many buffers as threads, whatever is cast; parts of a tensor follow each other through them."""
    tensor = torch.randn(2000, 3000)
    save_file({"a": tensor}, tmp_path / "a.safetensors")
    made: list[int] = []
    empty = torch.empty

    def counted(*sizes: int, **options: object) -> torch.Tensor:
        made.append(sizes[0])
        return empty(*sizes, **options)

    monkeypatch.setattr(slices.torch, "empty", counted)
    target = torch.zeros(2000, 1500, dtype=torch.bfloat16)
    with open_checkpoint(tmp_path / "a.safetensors") as stored:
        figures = read_boxes([Box(stored.tensor("a"), (0, 700), (2000, 1500), target)], staging=1 << 20)
    assert torch.equal(target, tensor[:, 700:2200].bfloat16())
    assert 0 < sum(made) <= 1 << 20
    assert figures.staged_nbytes == figures.wanted_nbytes == figures.read_nbytes == 2000 * 1500 * 4


def test_a_file_that_was_cut_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1000, 1000)}, path)
    target = torch.zeros(1000, 500)
    with open_checkpoint(path) as stored:
        os.truncate(path, 3_000_000)
        with pytest.raises(SafetensorError, match=r"a\.safetensors' has become shorter"):
            read_boxes([Box(stored.tensor("a"), (0, 0), (1000, 500), target)])
        with pytest.raises(SafetensorError, match=r"a\.safetensors' has become shorter"):
            read_boxes([Box(stored.tensor("a"), (999, 0), (1, 500), target[:1])])


def test_boxes_that_do_not_fit_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4, 6)}, tmp_path / "a.safetensors")
    untouched = torch.zeros(4, 6)
    with open_checkpoint(tmp_path / "a.safetensors") as stored:
        tensor = stored.tensor("a")
        good = Box(tensor, (0, 0), (4, 6), untouched)
        for offsets, sizes in [((0, 1), (4, 6)), ((0, -1), (4, 2)), ((0,), (4,)), ((0, 0, 0), (4, 6, 1))]:
            with pytest.raises(ValueError, match="does not lie in a tensor of shape"):
                read_boxes([good, Box(tensor, offsets, sizes, torch.zeros(sizes))])
        with pytest.raises(ValueError, match=r"a box of \[4, 6\] cannot fill a tensor of \[6, 4\]"):
            read_boxes([good, Box(tensor, (0, 0), (4, 6), torch.zeros(6, 4))])
    assert not untouched.any()
    assert read_boxes([]) == Figures()


def test_no_thread_goes_on_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({f"t{i}": torch.ones(300_000) for i in range(8)}, path)
    before = threading.active_count()
    with open_checkpoint(path) as stored:
        os.truncate(path, 5_000_000)
        with pytest.raises(SafetensorError):
            read_boxes(Box(stored.tensor(f"t{i}"), (0,), (300_000,), torch.zeros(300_000)) for i in range(8))
    assert threading.active_count() == before
