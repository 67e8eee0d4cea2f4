# SPDX-License-Identifier: Apache-2.0
"""The files are those of the installed safetensors, byte for byte, whatever the tensors, names and options."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch as reference
import torch
from conftest import BUDGET, SLOT
from helpers import DTYPES, FLOAT4, filled, parsed, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

import fastshard
from fastshard import Options

KIB, MIB = 1 << 10, 1 << 20
PAGE = 4096
ENGINES = [
    Options(memory_budget=BUDGET, threads=threads, write_path=write_path)
    for threads in (1, 3)
    for write_path in ("buffered", "mapped")
]
DIRECT = [Options(memory_budget=BUDGET, threads=threads, write_path="direct") for threads in (1, 3)]

deterministic = settings(derandomize=True, deadline=None, max_examples=300)

NASTY = [
    "",
    '"',
    "\\",
    "/",
    "\b\f\n\r\t",
    "\0\x1f\x7f",
    "\u2028\u2029",
    "\U0001f600",
    "\uffff",
    "é漢",
    " ",
    "{}",
    "a.b",
]
TEXTS = st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NAMES = TEXTS.filter(lambda name: name != "__metadata__")
METADATA = st.none() | st.dictionaries(TEXTS, TEXTS, max_size=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """For hypothesis, whose examples share it."""
    return tmp_path_factory.mktemp("files")


def written(save: Callable[..., None], what: Any, path: Path, *metadata: Any, **options: Any) -> bytes:
    """Contents of the file that ``save_file`` or ``save_model`` makes."""
    save(what, path, *metadata, **options)
    data = path.read_bytes()
    path.unlink()
    return data


# Contiguous tensors --------------------------------------------------------------------------------------


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def parameter(tensor: torch.Tensor) -> torch.Tensor:
    """With a gradient where the dtype can have one."""
    differentiable = tensor.dtype.is_floating_point or tensor.dtype.is_complex
    result = torch.nn.Parameter(tensor, requires_grad=differentiable)
    if differentiable:
        result.grad = tensor.clone()
    return result


def unit_dims_with_odd_strides(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous all the same: strides of dimensions of one element mean nothing."""
    return tensor.as_strided((1, *tensor.shape, 1), (17, *tensor.stride(), 5))


def inside_a_larger_storage(tensor: torch.Tensor) -> torch.Tensor:
    larger = filled((tensor.numel() + 5,), tensor.dtype, 3)
    return larger[2 : 2 + tensor.numel()].view(tensor.shape)


@st.composite
def contiguous_tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 5), min_size=1 if dtype is FLOAT4 else 0, max_size=4)))
    tensor = filled(shape, dtype, draw(st.integers(0, 9)))
    return draw(st.sampled_from([plain, parameter, unit_dims_with_odd_strides, inside_a_larger_storage]))(
        tensor
    )


@st.composite
def disjoint_slices(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Parts of one storage, empty ones too, named in any order."""
    base = filled((24,), draw(st.sampled_from(DTYPES)), 4)
    cuts = [0, *sorted(draw(st.lists(st.integers(0, 24), max_size=4))), 24]
    names = draw(st.lists(NAMES, min_size=len(cuts) - 1, max_size=len(cuts) - 1, unique=True))
    return {name: base[begin:end] for name, begin, end in zip(names, cuts, cuts[1:])}


STATE_DICTS = st.builds(
    lambda first, second: {**first, **second},
    st.dictionaries(NAMES, contiguous_tensors(), max_size=6),
    st.just({}) | disjoint_slices(),
)


@deterministic
@given(STATE_DICTS, METADATA)
def test_same_bytes(folder, tensors, metadata):
    if not tensors and metadata == {}:
        return  # see test_nothing_with_empty_metadata
    path = folder / "model.safetensors"
    expected = written(reference.save_file, tensors, path, metadata)
    assert reference.save(tensors, metadata) == expected
    assert fastshard.save(tensors, metadata) == expected
    assert written(fastshard.save_file, tensors, path, metadata) == expected


def test_every_dtype_in_one_file():
    tensors = {str(dtype): filled((2, 3), dtype, seed) for seed, dtype in enumerate(DTYPES)}
    for order in (tensors, dict(reversed(tensors.items()))):
        assert fastshard.save(order) == reference.save(order)


def test_names_sort_by_their_bytes():
    names = ["a", "B", "", "aa", "a.", "é", "\uffff", "\U00010000", "\u2028", "\x7f", "a\0"]
    tensors = {name: filled((2,), torch.int8, seed) for seed, name in enumerate(names)}
    assert fastshard.save(tensors) == reference.save(tensors)


def test_nothing_with_empty_metadata():
    """Here the reference writes what is no JSON."""
    data = fastshard.save({}, {})
    assert parsed(data) == ({"__metadata__": {}}, b"")
    assert len(data) % 8 == 0
    assert fastshard.load(data) == {}


@deterministic
@given(st.dictionaries(TEXTS, TEXTS, min_size=2, max_size=5))
def test_several_metadata_keys_keep_their_order(metadata):
    """In the reference their order is random; all else is the same."""
    tensors = {"a": filled((3,)), "b": filled((2, 2), torch.int8)}
    data = fastshard.save(tensors, metadata)
    assert parsed(data) == parsed(reference.save(tensors, metadata))
    assert list(parsed(data)[0]["__metadata__"].items()) == list(metadata.items())


# Strided tensors -----------------------------------------------------------------------------------------


def sliced(draw: st.DrawFn, tensor: torch.Tensor) -> torch.Tensor:
    bounds = [sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in tensor.shape]
    return tensor[tuple(slice(begin, end, draw(st.integers(1, 3))) for begin, end in bounds)]


def permuted(draw: st.DrawFn, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(draw(st.permutations(range(tensor.dim()))))


def expanded(draw: st.DrawFn, tensor: torch.Tensor) -> torch.Tensor:
    position = draw(st.integers(0, tensor.dim()))
    shape = [*tensor.shape[:position], draw(st.integers(1, 3)), *tensor.shape[position:]]
    return tensor.unsqueeze(position).expand(shape)


def selected(draw: st.DrawFn, tensor: torch.Tensor) -> torch.Tensor:
    dims = [dim for dim, size in enumerate(tensor.shape) if size]
    if not dims:
        return tensor
    dim = draw(st.sampled_from(dims))
    return tensor.select(dim, draw(st.integers(0, tensor.shape[dim] - 1)))


def restrided(draw: st.DrawFn, tensor: torch.Tensor) -> torch.Tensor:
    """A window into memory with strides of any kind: overlapping, zero, padded."""
    base = filled((400,), tensor.dtype, 8)
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    strides = [draw(st.integers(0, 30)) for _ in shape]
    view = base.as_strided(shape, strides, draw(st.integers(0, 30)))
    dim = draw(st.integers(0, len(shape) - 1))
    return view.narrow(dim, 0, draw(st.integers(0, shape[dim])))


@st.composite
def strided_tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    tensor = filled(
        tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))), dtype, draw(st.integers(0, 9))
    )
    for change in draw(
        st.lists(st.sampled_from([sliced, permuted, expanded, selected, restrided]), max_size=3)
    ):
        tensor = change(draw, tensor)
    return tensor.unsqueeze(0) if dtype is FLOAT4 and tensor.dim() == 0 else tensor


def contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def check_strided(folder: Path, tensors: dict[str, torch.Tensor], engines: list[Options] = ENGINES) -> None:
    """Same bytes as the reference writes for contiguous copies, through every engine, to files and to memory."""
    expected = reference.save(contiguous(tensors))
    path = folder / "strided.safetensors"
    for engine in engines:
        options = {"allow_strided": True, "engine": engine}
        assert fastshard.save(tensors, **options) == expected, engine
        assert written(fastshard.save_file, tensors, path, **options) == expected, engine


@deterministic
@given(st.dictionaries(NAMES, strided_tensors(), min_size=1, max_size=4))
def test_strided_tensors(folder, tensors):
    check_strided(folder, tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_in_every_dtype(folder, dtype):
    base = filled((33, 35), dtype)
    check_strided(folder, {"columns": base[:, 3:20:2], "turned": filled((40, 37), dtype, 1).t()})


def test_channels_last(folder):
    images = filled((2, 3, 17, 19)).to(memory_format=torch.channels_last)
    volumes = filled((2, 3, 5, 7, 4), torch.bfloat16).to(memory_format=torch.channels_last_3d)
    assert not images.is_contiguous() and not volumes.is_contiguous()
    check_strided(folder, {"images": images, "volumes": volumes})


def test_more_dims_than_a_view_can_describe(folder):
    every_second = filled((4,) * 5)[(slice(None, None, 2),) * 5]
    twelve = filled((2,) * 12, torch.int16, 1).permute(*range(11, -1, -1))
    sixteen = filled((2,) * 16, torch.int8, 2)[..., ::2].permute(*range(14, -1, -1), 15)
    check_strided(folder, {"5": every_second, "12": twelve, "16": sixteen})


def test_column_halves_of_one_matrix(folder):
    matrix = filled((64, 96), torch.bfloat16)
    check_strided(folder, {"left": matrix[:, :48], "right": matrix[:, 48:]})


EDGES = [0, 1, PAGE - 1, PAGE, PAGE + 1, SLOT - 1, SLOT, SLOT + 1, 2 * SLOT + PAGE - 1, 3 * MIB + 1]


@pytest.mark.parametrize("nbytes", EDGES)
def test_sizes_at_the_edges_of_pages_and_slots(folder, nbytes):
    """Contiguous, and in runs of one byte; small tensors on both sides put everything off its alignment."""
    check_strided(
        folder,
        {
            "a": filled((3,), torch.int8),
            "contiguous": filled((nbytes,), torch.uint8, 1),
            "every second": filled((2 * nbytes,), torch.uint8, 2)[::2],
            "z": filled((5,), torch.bool, 3),
        },
    )


@pytest.mark.parametrize("run", [1, 8, 24, PAGE - 1, PAGE, PAGE + 1, SLOT + 3])
def test_rows_of_every_length(folder, run):
    """Parts of rows, a few more bytes than a slot holds; from a page on they are written from where they lie."""
    rows = SLOT // run + 3
    check_strided(folder, {"part": filled((rows, run + 16), torch.uint8)[:, 7 : 7 + run]}, ENGINES[:2])


def test_more_small_tensors_than_one_call_takes(folder):
    check_strided(folder, {f"layers.{n}": filled((n % 7,), torch.int16, n) for n in range(3000)}, ENGINES[:2])


def test_more_long_rows_than_one_call_takes(folder):
    rows = filled((1100, PAGE + 64), torch.uint8)[:, :PAGE]
    check_strided(folder, {"rows": rows, "small": filled((3,), torch.float64, 1)}, ENGINES[:1])


def test_small_and_large_strided_and_not_in_one_file(folder):
    sizes = [1, 100, PAGE, 70 * KIB, SLOT - 5, SLOT + 5, MIB + 3, 2]
    tensors = {}
    for number, (size, dtype) in enumerate(
        itertools.product(sizes, [torch.float64, torch.int16, torch.uint8])
    ):
        items = math.ceil(size / dtype.itemsize)
        whole = filled((items, 2), dtype, number)
        tensors[f"{number:02}"] = whole[:, 0] if number % 2 else whole.view(-1)[:items]
    check_strided(folder, tensors, ENGINES[1:3])


def test_default_engine_takes_strided_tensors_too(folder):
    tensors = {"t": filled((300, 500), torch.float16).t()}
    expected = reference.save(contiguous(tensors))
    assert written(fastshard.save_file, tensors, folder / "default", allow_strided=True) == expected


# Many files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [None, *ENGINES, *DIRECT], ids=str)
def test_save_files(tmp_path, engine):
    shards = {
        tmp_path / f"model-{number}.safetensors": {
            "w": filled((number * 1000, 7), torch.bfloat16, number),
            "b": filled((number,), torch.float32, number),
        }
        for number in range(5)
    }
    fastshard.save_files(
        {str(path): tensors for path, tensors in shards.items()}, {"format": "pt"}, engine=engine
    )
    expected = {path.name: reference.save(tensors, {"format": "pt"}) for path, tensors in shards.items()}
    assert snapshot(tmp_path) == expected
    stats = fastshard.stats()
    assert (stats.files, stats.nbytes) == (5, sum(map(len, expected.values())))


def test_save_files_of_tensors_in_one_storage(tmp_path):
    """Files do not know of each other: the same tensor may stand in two of them."""
    base = filled((100,))
    shards = {tmp_path / "a": {"x": base[:60]}, tmp_path / "b": {"x": base[40:]}, tmp_path / "c": {}}
    fastshard.save_files(shards)
    assert snapshot(tmp_path) == {path.name: reference.save(tensors) for path, tensors in shards.items()}


# Models --------------------------------------------------------------------------------------------------


class Tied(torch.nn.Module):
    """A language model in small: the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(8, 4)
        self.body = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("empty", torch.zeros(0, 4))


class Turned(torch.nn.Module):
    """Parameters that are not contiguous, in storages of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = torch.nn.Parameter(filled((6, 4)).t())
        self.conv = torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)


def saved_models(
    tmp_path: Path, model: torch.nn.Module, metadata: dict[str, str] | None, **options: Any
) -> list:
    """What each library's save_model does: (contents of the file, metadata afterwards)."""
    results = []
    for library in (reference, fastshard):
        given = None if metadata is None else dict(metadata)
        data = written(library.save_model, model, tmp_path / "model", given, **options)
        results.append((data, given))
    return results


@pytest.mark.parametrize("metadata", [None, {}], ids=str)
@pytest.mark.parametrize("force_contiguous", [True, False])
def test_tied_weights_are_saved_once(tmp_path, metadata, force_contiguous):
    theirs, ours = saved_models(tmp_path, Tied(), metadata, force_contiguous=force_contiguous)
    assert ours == theirs
    assert parsed(ours[0])[0]["__metadata__"] == {"head.weight": "embedding.weight"}


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {"head.weight": "mine", "format": "pt"}], ids=str)
def test_metadata_of_a_tied_model_is_the_callers_dict(tmp_path, metadata):
    theirs, ours = saved_models(tmp_path, Tied(), metadata)
    assert parsed(ours[0]) == parsed(theirs[0])
    assert list(ours[1].items()) == list(theirs[1].items())
    assert ours[1]["head.weight"] == metadata.get("head.weight", "embedding.weight")


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}], ids=str)
def test_model_without_ties(tmp_path, metadata):
    theirs, ours = saved_models(tmp_path, torch.nn.Linear(3, 5), metadata)
    assert ours == theirs


def test_non_contiguous_parameters_of_a_model(tmp_path):
    model, path = Turned(), tmp_path / "model"
    theirs, ours = saved_models(tmp_path, model, None)
    assert ours == theirs
    errors = []
    for library in (reference, fastshard):
        with pytest.raises(ValueError) as raised:
            library.save_model(model, path, force_contiguous=False)
        errors.append(str(raised.value))
    assert errors[0] == errors[1]
    assert errors[0].endswith(
        " Or use save_model(..., force_contiguous=True), read the docs for potential caveats."
    )
    assert snapshot(tmp_path) == {}
    strided = written(fastshard.save_model, model, path, force_contiguous=False, allow_strided=True)
    assert strided == theirs[0]


def test_model_is_left_as_it_was(tmp_path):
    model = Turned()
    strides = {name: tensor.stride() for name, tensor in model.state_dict().items()}
    fastshard.save_model(model, tmp_path / "model")
    assert {name: tensor.stride() for name, tensor in model.state_dict().items()} == strides


# Loading -------------------------------------------------------------------------------------------------


def test_loaders_are_those_of_safetensors():
    assert fastshard.safe_open is safetensors.safe_open
    for name in ("load", "load_model"):  # load_file can compare digests first
        assert getattr(fastshard, name) is getattr(reference, name)


def test_round_trip(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {
        "w": filled((5, 7), torch.int16),
        "scalar": filled((), torch.float64, 1),
        "none": filled((0, 3)),
    }
    metadata = {"format": "pt", "k": "v", "json": json.dumps({"a": [1, 2]})}
    fastshard.save_file(tensors, path, metadata)
    for loaded in (fastshard.load_file(path), fastshard.load(fastshard.save(tensors, metadata))):
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)
    with fastshard.safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(tensors)
        assert file.metadata() == metadata
        assert torch.equal(file.get_slice("w")[1:3], tensors["w"][1:3])


@pytest.mark.parametrize("kind", [Tied, Turned])
def test_model_round_trip(tmp_path, kind):
    model, other = kind(), kind()
    fastshard.save_model(model, tmp_path / "model")
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.zero_()
    assert tuple(map(list, fastshard.load_model(other, tmp_path / "model"))) == ([], [])
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
