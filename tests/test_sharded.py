# SPDX-License-Identifier: Apache-2.0
"""Sharded state: names, split and filter by vLLM's rules, written out; what is refused, and that nothing changed then.

``integration/loaders.py`` compares with vLLM's and SGLang's own classes, which are too large for every run.
"""

import contextlib
import copy
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DTYPES, FLOAT4, filled, names, run, same, snapshot
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_directory import killed_at

from fastshard import SaveError, load_sharded_state, save_sharded_state, stats
from fastshard.api import sharded_load
from fastshard.formats.manifest import read_manifest
from fastshard.formats.naming import Names, Ranks

State = dict[str, torch.Tensor]
MANIFEST = "fastshard-model-rank-0.json"


def part(number: int, rank: int = 0) -> str:
    return f"model-rank-{rank}-part-{number}.safetensors"


def layers(count: int = 5, seed: int = 0) -> State:
    return {f"layers.{i}": filled((10, 10), seed=seed + i) for i in range(count)}  # 400 bytes each


def zeros(state: State) -> State:
    return {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in state.items()}


def assert_equal(found: State, expected: State) -> None:
    for name, tensor in expected.items():
        one, other = (t.contiguous().view(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(one, other), name


def contents(directory: Path) -> dict[str, list[str]]:
    """Names of the tensors in each shard."""
    return {
        name: sorted(load_file(directory / name))
        for name in names(directory)
        if name.endswith(".safetensors")
    }


@pytest.mark.parametrize(
    ("world", "pattern", "expected"),
    [
        ({}, None, "model-rank-0-part-{}.safetensors"),
        ({"tp_rank": 11, "tp_size": 12}, None, "model-rank-11-part-{}.safetensors"),
        ({"pp_rank": 1, "pp_size": 2}, None, "model-pp-1-tp-0-part-{}.safetensors"),
        (
            {"tp_rank": 3, "tp_size": 4, "pp_rank": 1, "pp_size": 2},
            None,
            "model-pp-1-tp-3-part-{}.safetensors",
        ),
        ({"tp_rank": 1, "tp_size": 2}, "draft-{tp_rank:02d}.{part}", "draft-01.{}"),
        ({"dp_rank": 1, "dp_size": 2}, "{{x}}{dp_rank}-{part}.safetensors", "{{x}}1-{}.safetensors"),
    ],
)
def test_names(tmp_path: Path, world: dict[str, int], pattern: str | None, expected: str) -> None:
    state = layers()
    manifest = save_sharded_state(state, tmp_path / "a" / "b", pattern=pattern, max_size=800, **world)
    parts = [expected.format(i) for i in range(3)]
    (beside,) = set(names(tmp_path / "a" / "b")) - set(parts)
    assert names(tmp_path / "a" / "b") == sorted([*parts, beside])
    assert beside.startswith("fastshard-") and beside.endswith(".json")
    assert manifest == read_manifest(tmp_path / "a" / "b" / beside)
    assert manifest.ranks == Ranks(**world)
    found = zeros(state)
    assert load_sharded_state(found, tmp_path / "a" / "b", pattern=pattern, **world) == manifest
    assert_equal(found, state)


@pytest.mark.parametrize(
    ("pattern", "world", "reason"),
    [
        ("model-{part}.safetensors", {"tp_size": 2}, "no {rank}"),
        ("model-{rank}-{part}.safetensors", {"pp_size": 2}, "no {pp_rank}"),
        ("model-{pp_rank}-{part}.safetensors", {"pp_size": 2, "tp_size": 2}, "no {rank}"),
        ("model-{pp_rank}-{rank}-{part}.safetensors", {}, "where pp_size is not 1"),
        ("model-{host}-{part}", {}, "unknown field {host}"),
        ("model-{}-{part}", {}, "unknown field {}"),
        ("model-{rank.real}-{part}", {}, "unknown field {rank.real}"),
        ("model-{rank}{part}", {}, "behind {rank}"),
        ("model-{rank}-1{part}", {}, "before {part}"),
        ("model-{part}1", {}, "behind {part}"),
        ("model-{part}-{part}", {}, "once"),
        ("model-{part:03d}", {}, "once"),
        ("model-{rank:c}-{part}", {}, "other than a number"),
        ("model-{rank!r}-{part}", {}, "other than a number"),
        ("model-{part", {}, "is not a pattern"),
        ("../model-{part}", {}, "has one of"),
        ("[ab]-{part}", {}, "has one of"),
        ("", {}, "is not the name of a file"),
        ("..", {}, "is not the name of a file"),
        ("{part}.json", {}, "take 'fastshard-"),
    ],
)
def test_patterns_that_lose_files_are_refused(
    tmp_path: Path, pattern: str, world: dict[str, int], reason: str
) -> None:
    for call in (save_sharded_state, load_sharded_state):
        with pytest.raises(ValueError, match="pattern") as caught:
            call(layers(), tmp_path / "new", pattern=pattern, **world)
        assert reason in str(caught.value)
    assert names(tmp_path) == []


def test_a_pattern_without_parts_holds_one(tmp_path: Path) -> None:
    save_sharded_state(layers(), tmp_path, pattern="only-{rank}.safetensors")
    assert same(tmp_path / "only-0.safetensors", layers())
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="no {part}"):
        save_sharded_state(layers(), tmp_path, pattern="only-{rank}.safetensors", max_size=400)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "world",
    [
        {"tp_rank": 1},
        {"tp_rank": -1},
        {"pp_size": 0},
        {"dp_rank": 2, "dp_size": 2},
        {"ep_rank": True, "ep_size": 2},
    ],
)
def test_ranks_that_are_none(tmp_path: Path, world: dict[str, Any]) -> None:
    for call in (save_sharded_state, load_sharded_state):
        with pytest.raises(ValueError, match="is not a rank of"):
            call(layers(), tmp_path, **world)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("max_size", "parts"),
    [
        (None, [["a", "b", "c", "d"]]),
        (100, [["a", "b"], ["c"], ["d"]]),  # exactly full, and larger than a part
        (99, [["a"], ["b"], ["c"], ["d"]]),
        (1, [["a"], ["b"], ["c"], ["d"]]),  # vLLM writes an empty part before these
        (341, [["a", "b", "c"], ["d"]]),
    ],
)
def test_the_split_is_greedy(tmp_path: Path, max_size: int | None, parts: list[list[str]]) -> None:
    sizes = {"a": 60, "b": 40, "c": 240, "d": 8}
    state = {name: filled((size,), torch.uint8) for name, size in sizes.items()}
    save_sharded_state(state, tmp_path, max_size=max_size)
    assert contents(tmp_path) == {part(i): tensors for i, tensors in enumerate(parts)}
    reference = tmp_path / "reference"
    for i, tensors in enumerate(parts):
        save_file({name: state[name] for name in tensors}, reference)
        assert (tmp_path / part(i)).read_bytes() == reference.read_bytes()


@pytest.mark.parametrize("max_size", [0, -1])
def test_a_part_has_a_size(tmp_path: Path, max_size: int) -> None:
    with pytest.raises(ValueError, match="max_size"):
        save_sharded_state(layers(), tmp_path, max_size=max_size)


def views() -> State:
    whole, other = filled((8, 4)), filled((12,), seed=3)
    return {
        "second": whole[2:4],  # in "whole"
        "x.other": other,
        "y.other": other,  # the same, a larger name
        "whole": whole,
        "empty": torch.zeros(0, 3),
        "flat": whole.view(-1),  # the same, a smaller name
        "begin": other[:8],
        "bytes": other.view(torch.uint8)[4:10],
        "alone": filled((3,), seed=5),
        "scalar": filled((), seed=6),
    }


KEPT = ["flat", "x.other", "alone", "scalar"]


def test_views_of_others_are_left_out(tmp_path: Path) -> None:
    state = views()
    manifest = save_sharded_state(state, tmp_path, max_size=1)
    # By storage, in the order of first names.
    assert contents(tmp_path) == {part(i): [name] for i, name in enumerate(KEPT)}
    assert {name: alias.tensor for name, alias in manifest.aliases.items()} == {
        "second": "flat",
        "whole": "flat",
        "begin": "x.other",
        "bytes": "x.other",
        "y.other": "x.other",
    }
    found = views()
    for name in KEPT:
        found[name].zero_()
    load_sharded_state(found, tmp_path)
    assert_equal(found, views())


def test_left_out_views_load_where_they_are_alone(tmp_path: Path) -> None:
    """As scales that one engine ties and another one does not (vLLM issue 41174)."""
    save_sharded_state(views(), tmp_path)
    found = zeros(views())
    load_sharded_state(found, tmp_path)
    assert_equal(found, views())


def test_an_alias_of_another_shape_is_missing(tmp_path: Path) -> None:
    save_sharded_state(views(), tmp_path)
    for wrong in (torch.zeros(3, 4), torch.zeros(2, 4, dtype=torch.int32)):
        with pytest.raises(
            ValueError, match="'second' is F32 .2, 4. in 'model-rank-0-part-0.safetensors', expected"
        ):
            load_sharded_state({**zeros(views()), "second": wrong}, tmp_path)


def named(**tensors: torch.Tensor) -> State:
    return tensors


ONE, OTHER = filled((6, 2), seed=1), filled((6, 2), seed=2)
TIES: dict[str, tuple[State, State, bool, str]] = {
    # what is saved, into what, whether the manifest is needed, and what is wrong with it
    "a name more": (named(a=ONE, b=ONE), named(b=ONE), True, ""),
    "a name less": (named(b=ONE), named(a=ONE, b=ONE), False, ""),
    "the kept name less": (named(a=ONE), named(a=ONE, b=ONE), False, ""),
    "other names": (named(b=ONE, c=ONE), named(a=ONE, c=ONE), True, ""),
    "three names": (named(c=ONE), named(a=ONE, b=ONE, c=ONE), False, ""),
    "parts of one": (named(a=ONE[:2], b=ONE[2:]), named(all=ONE, a=ONE[:2], b=ONE[2:]), False, ""),
    "one of parts": (named(all=ONE, a=ONE[:2], b=ONE[2:]), named(a=ONE[:2], b=ONE[2:]), True, ""),
    "one of a part": (named(all=ONE, a=ONE[:2]), named(a=ONE[:2]), True, "'all' in .* is not expected"),
    "a part of one": (named(a=ONE[:2]), named(all=ONE, a=ONE[:2]), False, "'all' is missing"),
    "parts twice": (
        named(a=ONE[:4], b=ONE[2:].clone()),
        named(all=ONE, a=ONE[:4], b=ONE[2:]),
        False,
        "'all' is missing",
    ),
    "two that are one here": (named(a=ONE, b=OTHER), named(a=ONE, b=ONE), False, "'b' in .* is not expected"),
    "two names of neither": (named(b=ONE, c=OTHER), named(a=ONE, b=ONE, c=ONE), False, "is not expected"),
    "another shape": (named(b=ONE.view(3, 4)), named(a=ONE, b=ONE), False, "'b' is U8|'b' is F32"),
}


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("what", TIES)
def test_a_tied_tensor_may_have_other_names(tmp_path: Path, what: str, manifest: bool) -> None:
    saved, target, needed, wrong = TIES[what]
    found = copy.deepcopy(target)  # ties and views stay what they are
    for tensor in found.values():
        tensor.zero_()
    save_sharded_state(saved, tmp_path)
    if not manifest:
        for path in tmp_path.glob("*.json"):
            path.unlink()
    if wrong or (needed and not manifest):
        with pytest.raises(ValueError, match=wrong or "is missing|is not expected"):
            load_sharded_state(found, tmp_path)
        assert not any(tensor.any() for tensor in found.values())
    else:
        load_sharded_state(found, tmp_path)
        assert_equal(found, target)


COMPLEX = torch.complex64 in DTYPES


def strided() -> State:
    square, both = filled((6, 6), seed=1), filled((40,), seed=2)
    return {
        "transposed": filled((4, 9)).t(),
        "columns": filled((6, 8), torch.bfloat16)[:, 2:5],
        "square": square,
        "square.t": square.t(),
        "first": both[:30],
        "last": both[10:],
        "even": both[::2],
        "expanded": filled((1, 5)).expand(3, 5),
        **({"conjugate": torch.arange(6.0).view(3, 2).to(torch.complex64).conj()} if COMPLEX else {}),
        "fp8": filled((5, 7), torch.float8_e4m3fn).t(),
    }


@pytest.mark.parametrize("max_size", [None, 100])
def test_strided_and_overlapping_tensors_are_saved(tmp_path: Path, max_size: int | None) -> None:
    save_sharded_state(strided(), tmp_path, max_size=max_size)
    stored = {}
    for name in contents(tmp_path):
        stored.update(load_file(tmp_path / name))
    assert_equal(stored, {name: tensor.resolve_conj() for name, tensor in strided().items()})


def test_strided_parameters_are_loaded(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in strided().items() if name != "expanded"}
    save_sharded_state(state, tmp_path)
    found = {name: tensor for name, tensor in strided().items() if name != "expanded"}
    for tensor in found.values():
        tensor.zero_()
    load_sharded_state(found, tmp_path)
    assert_equal(
        {n: t.resolve_conj() for n, t in found.items()}, {n: t.resolve_conj() for n, t in state.items()}
    )


def test_every_dtype_goes_and_comes(tmp_path: Path) -> None:
    state = {str(dtype): filled((6, 3), dtype) for dtype in DTYPES}
    state |= {f"{dtype} strided": filled((6, 4), dtype)[::2] for dtype in DTYPES if dtype is not FLOAT4}
    save_sharded_state(state, tmp_path, max_size=64)
    found = {name: torch.empty_like(tensor.expand_as(tensor)) for name, tensor in state.items()}
    load_sharded_state(found, tmp_path)
    assert_equal(found, state)


def test_modules(tmp_path: Path) -> None:
    def make() -> torch.nn.Module:
        model = torch.nn.Sequential(
            torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 9, bias=False)
        )
        model[2].weight = model[0].weight
        return model

    model, other = make(), make()
    manifest = save_sharded_state(model, tmp_path)
    assert list(manifest.aliases) == ["2.weight"]
    load_sharded_state(other, tmp_path)
    assert_equal(other.state_dict(), model.state_dict())
    assert other[0].weight is other[2].weight and other[0].weight.requires_grad


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastshard.engine import reading

    state = {**{f"small.{i}": filled((i % 7 + 1,), seed=i) for i in range(300)}, "large": filled((2000,))}
    save_sharded_state(state, tmp_path, max_size=4000)
    monkeypatch.setattr(reading, "_READ_NBYTES", 1000)
    monkeypatch.setattr(reading, "_MAX_BUFFERS", 10)
    found = zeros(state)
    load_sharded_state(found, tmp_path)
    assert_equal(found, state)


def test_short_reads_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = layers()
    save_sharded_state(state, tmp_path)
    preadv = os.preadv

    def short(fd: int, buffers: list[Any], offset: int) -> int:
        return preadv(fd, [memoryview(buffers[0])[:33]], offset)

    monkeypatch.setattr(os, "preadv", short)
    found = zeros(state)
    load_sharded_state(found, tmp_path)
    assert_equal(found, state)


def test_nothing_is_a_shard_too(tmp_path: Path) -> None:
    save_sharded_state(layers(), tmp_path)
    save_sharded_state({"empty": torch.zeros(0)}, tmp_path)
    assert names(tmp_path) == [MANIFEST]
    load_sharded_state({}, tmp_path)
    with pytest.raises(ValueError, match="'w' is missing"):
        load_sharded_state({"w": torch.zeros(1)}, tmp_path)


def test_parts_of_an_earlier_save_go(tmp_path: Path) -> None:
    save_sharded_state(layers(), tmp_path, max_size=400)
    others = {
        part(0, rank=10): b"another rank's",
        "model-rank-0-part-x.safetensors": b"no part",
        "model-rank-0-part-1.safetensors.bak": b"no part",
        "model-pp-0-tp-0-part-0.safetensors": b"another world's",
        "model.safetensors.index.json": b"{}",
        "config.json": b"{}",
    }
    for name, data in others.items():
        (tmp_path / name).write_bytes(data)
    save_sharded_state(layers(2, seed=7), tmp_path, max_size=400)
    assert names(tmp_path) == sorted([*others, part(0), part(1), MANIFEST])
    assert {name: data for name, data in snapshot(tmp_path).items() if name in others} == others


def test_ranks_save_into_one_directory_at_once(tmp_path: Path) -> None:
    """Processes that know nothing of each other, again and again, over the files of before."""
    ranks, saves = 4, 6
    script = """
    directory, here, ranks, saves = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    sys.path.insert(0, here)
    from helpers import filled
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            for seed in range(saves):
                state = {f"layers.{i}": filled((10, 10), seed=10 * rank + seed + i) for i in range(4)}
                save_sharded_state(state, directory, tp_rank=rank, tp_size=ranks, max_size=400)
                load_sharded_state(state, directory, tp_rank=rank, tp_size=ranks)
            os._exit(0)
        children.append(child)
    print([os.waitpid(child, 0)[1] for child in children])
    """
    done = run(script, tmp_path, Path(__file__).parent, ranks, saves)
    assert done.stdout.strip() == str([0] * ranks), done.stderr
    expected = [part(i, rank) for rank in range(ranks) for i in range(4)]
    manifests = [f"fastshard-model-rank-{rank}.json" for rank in range(ranks)]
    assert names(tmp_path) == sorted([*expected, *manifests])
    for rank in range(ranks):
        found = zeros(layers(4))
        load_sharded_state(found, tmp_path, tp_rank=rank, tp_size=ranks)
        assert_equal(found, layers(4, 10 * rank + saves - 1))


@pytest.mark.parametrize("parts", [1, 3, 5])
def test_a_load_is_of_one_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    """Whose three parts are replaced by fewer, as many or more while it opens them."""
    save_sharded_state(layers(), tmp_path, max_size=800)
    opened = []

    def then_save(path: Any, *arguments: Any) -> Any:
        file = open(path, *arguments)  # noqa: SIM115
        opened.append(path)
        if len(opened) == 1:
            size = {1: 2000, 3: 800, 5: 400}[parts]
            assert len(save_sharded_state(layers(seed=9), tmp_path, max_size=size).files) == parts
        return file

    monkeypatch.setattr(sharded_load, "open", then_save, raising=False)
    found = zeros(layers())
    load_sharded_state(found, tmp_path)
    assert_equal(found, layers(seed=9))


@pytest.mark.parametrize(
    "broken", [torch.zeros(3, dtype=torch.complex128), torch.zeros(3, device="meta"), "text"]
)
def test_a_failed_save_leaves_the_old_shards(tmp_path: Path, broken: Any) -> None:
    save_sharded_state(layers(), tmp_path, max_size=400)
    before = snapshot(tmp_path)
    with pytest.raises((KeyError, NotImplementedError, ValueError)):
        save_sharded_state({**layers(), "broken": broken}, tmp_path)
    with pytest.raises(ValueError, match="module or a dict"):
        save_sharded_state([], tmp_path)  # type: ignore[arg-type]
    assert snapshot(tmp_path) == before and names(tmp_path) == sorted(before)


def test_a_full_disk_leaves_the_old_shards(small_disk: Path) -> None:
    def state(nbytes: int) -> State:
        return {f"t{i}": torch.full((nbytes,), i + 1, dtype=torch.uint8) for i in range(8)}

    save_sharded_state(state(1 << 20), small_disk, max_size=3 << 20)
    before = names(small_disk)
    with pytest.raises(SaveError) as caught:
        save_sharded_state(state(4 << 20), small_disk, max_size=9 << 20)
    assert caught.value.errno == errno.ENOSPC
    assert ".fastshard" not in str(caught.value)
    assert names(small_disk) == before
    found = zeros(state(1 << 20))
    load_sharded_state(found, small_disk)
    assert_equal(found, state(1 << 20))


def test_parts_are_written_by_one_save(tmp_path: Path) -> None:
    save_sharded_state(layers(), tmp_path, max_size=400, durable=True)
    figures = stats()
    assert figures is not None and figures.files == 5


def test_saving_over_the_files_that_the_tensors_are_mapped_from(tmp_path: Path) -> None:
    save_sharded_state(layers(), tmp_path)
    before = snapshot(tmp_path)
    save_sharded_state(load_file(tmp_path / part(0)), tmp_path)
    assert snapshot(tmp_path)[part(0)] == before[part(0)]


# What is refused when loading; the parameters stay as they were.


def refused(
    state: State, path: Path, text: str, error: type[Exception] = ValueError, **arguments: Any
) -> None:
    before = {name: tensor.clone() for name, tensor in state.items()}
    with pytest.raises(error) as caught:
        load_sharded_state(state, path, **arguments)
    assert text in str(caught.value)
    assert_equal(state, before)


def test_what_does_not_fit(tmp_path: Path) -> None:
    save_sharded_state(layers(), tmp_path, max_size=800)
    blank = zeros(layers())
    refused({**blank, "more": torch.zeros(2)}, tmp_path, "'more' is missing")
    refused(zeros(layers(4)), tmp_path, f"'layers.4' in '{part(2)}' is not expected")
    for shape in ((10, 9), (10, 11), (10,), (1, 10, 10), (100,)):  # vLLM fills the first 10 columns of 11
        text = f"'layers.1' is F32 [10, 10] in '{part(0)}', expected F32 {list(shape)}"
        refused({**blank, "layers.1": torch.zeros(shape)}, tmp_path, text)
    refused({**blank, "layers.3": torch.zeros(10, 10, dtype=torch.bfloat16)}, tmp_path, "expected BF16")
    refused({**blank, "layers.3": torch.zeros(1, 10).expand(10, 10)}, tmp_path, "is expanded")
    tied = {**blank, "layers.0": blank["layers.4"]}
    refused(tied, tmp_path, "'layers.4' in", **{})
    refused(tied, tmp_path, "shares memory with 'layers.0'")
    several = {f"w{i}": torch.zeros(1) for i in range(20)}
    refused({**blank, **several}, tmp_path, "'w10' is missing")
    refused({**blank, **several}, tmp_path, "and 10 more")
    with pytest.raises(ValueError, match="no memory"):
        load_sharded_state({**blank, "layers.3": torch.zeros(10, 10, device="meta")}, tmp_path)


def test_nothing_to_load(tmp_path: Path) -> None:
    blank = zeros(layers())
    for path in (tmp_path, tmp_path / "missing"):
        refused(blank, path, "Could not find checkpoint files")
    save_sharded_state(layers(), tmp_path, pp_rank=1, pp_size=2)
    refused(blank, tmp_path, "saved with tp_size=1, pp_size=2, dp_size=1")


def test_another_world_is_refused(tmp_path: Path) -> None:
    save_sharded_state(layers(), tmp_path, tp_size=2, ep_size=2)
    blank = zeros(layers())
    refused(blank, tmp_path, "saved with tp_size=2 and cannot be loaded with tp_size=4", tp_size=4, ep_size=2)
    refused(blank, tmp_path, "saved with tp_size=2, ep_size=2 and cannot be loaded with tp_size=1, ep_size=1")
    refused(blank, tmp_path, "saved with dp_size=1 and", tp_size=2, ep_size=2, dp_size=2)
    refused(blank, tmp_path, "saved with ep_rank=0 and", tp_size=2, ep_size=2, ep_rank=1)
    load_sharded_state(blank, tmp_path, tp_size=2, ep_size=2)


@pytest.mark.parametrize("rank", [0, 1])
def test_data_parallel_ranks_that_would_overwrite_each_other(tmp_path: Path, rank: int) -> None:
    with pytest.raises(ValueError, match="2 data-parallel ranks would overwrite each other"):
        save_sharded_state(layers(), tmp_path, dp_rank=rank, dp_size=2)
    assert names(tmp_path) == []
    pattern = "model-dp-{dp_rank}-rank-{rank}-part-{part}.safetensors"
    save_sharded_state(layers(seed=rank), tmp_path, dp_rank=rank, dp_size=2, pattern=pattern)
    found = zeros(layers())
    load_sharded_state(found, tmp_path, dp_rank=rank, dp_size=2, pattern=pattern)
    assert_equal(found, layers(seed=rank))


def test_data_parallel_ranks_with_the_same_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dp_rank=1 has the weights that dp_rank=0 saves"):
        save_sharded_state(layers(), tmp_path, dp_rank=1, dp_size=2, dp_replicated=True)
    save_sharded_state(layers(), tmp_path, dp_size=2, dp_replicated=True)
    for world in ({"dp_rank": 1, "dp_size": 2}, {"dp_rank": 3, "dp_size": 4}, {}):
        found = zeros(layers())
        load_sharded_state(found, tmp_path, **world)
        assert_equal(found, layers())


def test_processed_weights_are_not_processed_again(tmp_path: Path) -> None:
    blank = zeros(layers())
    here = {"writer": ("vllm", "0.33.0"), "quantization": "fp8"}
    save_sharded_state(layers(), tmp_path, post_processed=True, **here)  # type: ignore[arg-type]
    refused(blank, tmp_path, "would be processed again", post_processed=False)
    refused(blank, tmp_path, "quantization='fp8'", quantization="awq")
    refused(blank, tmp_path, "a layout of its own", reader=("vllm", "0.34.0"), post_processed=True)
    load_sharded_state(blank, tmp_path, reader=("vllm", "0.33.0"), post_processed=True, quantization="fp8")
    save_sharded_state(layers(), tmp_path, post_processed=False, **here)  # type: ignore[arg-type]
    refused(zeros(layers()), tmp_path, "would be processed no more", post_processed=True)
    load_sharded_state(blank, tmp_path, reader=("vllm", "0.34.0"), post_processed=False)
    save_sharded_state(layers(), tmp_path)
    load_sharded_state(blank, tmp_path, reader=("vllm", "0.34.0"), post_processed=True)


def test_files_without_a_manifest(tmp_path: Path) -> None:
    """As vLLM writes them, the empty first part included."""
    state = layers()
    save_file({}, tmp_path / part(0))
    save_file({name: state[name] for name in list(state)[:2]}, tmp_path / part(1))
    save_file({name: state[name] for name in list(state)[2:]}, tmp_path / part(2))
    found = zeros(state)
    assert load_sharded_state(found, tmp_path) is None
    assert_equal(found, state)
    save_file({"layers.0": state["layers.0"]}, tmp_path / part(10))
    with pytest.raises(
        ValueError, match="'layers.0' is in both .*part-1.safetensors' and .*part-10.safetensors'"
    ):
        load_sharded_state(found, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: (path / part(1)).unlink(),
        lambda path: save_file(layers(), path / part(7)),
        lambda path: save_file(layers(2), path / part(0)),
        lambda path: os.rename(path / part(1), path / part(3)),
        lambda path: (path / part(0)).write_bytes((path / part(1)).read_bytes()),
    ],
)
def test_files_of_another_save_beside_the_manifest(tmp_path: Path, change: Callable[[Path], Any]) -> None:
    save_sharded_state(layers(), tmp_path, max_size=1200)
    change(tmp_path)
    blank = zeros(layers())
    with pytest.raises(ValueError, match="does not describe the files beside it|is in both"):
        load_sharded_state(blank, tmp_path)
    assert_equal(blank, zeros(layers()))


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"", lambda data: b"\xff" * 50]
)
def test_files_that_are_none(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    save_sharded_state(layers(), tmp_path)
    (tmp_path / MANIFEST).unlink()
    path = tmp_path / part(0)
    path.write_bytes(damage(path.read_bytes()))
    refused(zeros(layers()), tmp_path, part(0), SafetensorError)


@pytest.mark.parametrize(
    "entry", [{"data_offsets": [0.0, 4]}, {"data_offsets": [0, "4"]}, {"shape": ["1"]}, {"shape": [1.0]}]
)
def test_headers_with_numbers_that_are_none(tmp_path: Path, entry: dict[str, Any]) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **entry}}).encode()
    (tmp_path / part(0)).write_bytes(len(header).to_bytes(8, "little") + header + b"data")
    refused({"w": torch.zeros(1)}, tmp_path, part(0), SafetensorError)


def test_a_header_that_lies_about_sizes(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / part(0)).write_bytes(len(header).to_bytes(8, "little") + header + b"data")
    refused({"w": torch.zeros(2)}, tmp_path, "lies at 0:4, which is not the size of F32", SafetensorError)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ([], None),
        ([], []),
        (["format"], "other"),
        (["version"], 2),
        (["version"], None),
        (["rank"], [0, 1]),
        (["rank", "ranks"], [0, 1]),
        (["rank", "ranks", "tp_rank"], 3),
        (["rank", "ranks", "tp_rank"], True),
        (["rank", "ranks", "sp_size"], 1),
        (["rank", "pattern"], 3),
        (["rank", "pattern"], "{"),
        (["rank", "dp_replicated"], 1),
        (["rank", "writer"], "vllm"),
        (["rank", "writer"], {"name": "vllm"}),
        (["rank", "quantization"], False),
        (["rank", "post_processed"], "yes"),
        (["files"], None),
        (["files", "../" + part(0)], {"size": 16}),
        (["files", "/etc/passwd"], {"size": 16}),
        (["files", part(0, rank=1)], {"size": 16}),
        (["files", part(0)], 16),
        (["files", part(0), "size"], "16"),
        (["files", part(0), "size"], 17),
        (["files", part(0), "size"], 10**6),
        (["files", part(0), "crc32"], 16),
        (["files", part(0), "crc32"], "123"),
        (["files", part(5)], {"size": 16}),
        (["files", part(5)], {"size": 16, "tensors": {"layers.0": [0, 4, None]}}),
        (["files", part(0), "tensors"], {}),
        (["files", part(0), "tensors"], ["layers.0"]),
        (["files", part(0), "tensors", "layers.0"], [0, 4]),
        (["files", part(0), "tensors", "layers.0"], [0, 4, None]),
        (["files", part(0), "tensors", "layers.0"], [-4, 4, None]),
        (["files", part(0), "tensors", "layers.0"], [0, 10**30, None]),
        (["files", part(0), "tensors", "layers.0"], [0, 4.0, None]),
        (["files", part(0), "tensors", "layers.0"], "x"),
        (["files", part(0), "tensors", "other"], [0, 4, None]),
        (["aliases", "tied"], {}),
        (["aliases", "tied", "tensor"], "none"),
        (["aliases", "tied", "tensor"], "tied"),
        (["aliases", "tied", "offset"], -4),
        (["aliases", "tied", "offset"], 10**30),
        (["aliases", "tied", "offset"], 4),
        (["aliases", "tied", "offset"], 1.5),
        (["aliases", "tied", "shape"], [[10], 10]),
        (["aliases", "tied", "shape"], [-10, -10]),
        (["aliases", "tied", "code"], "F31"),
        (["aliases", "layers.0"], {"tensor": "layers.1", "offset": 0, "code": "F32", "shape": [10, 10]}),
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path: Path, where: list[str], value: Any) -> None:
    state = layers()
    save_sharded_state({**state, "tied": state["layers.0"]}, tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    inner = manifest
    for key in where[:-1]:
        inner = inner[key]
    if where:
        inner[where[-1]] = value
    (tmp_path / MANIFEST).write_text(json.dumps(manifest if where else value))
    blank = zeros({**state, "tied": state["layers.0"]})
    with pytest.raises(ValueError) as caught:
        load_sharded_state(blank, tmp_path)
    assert MANIFEST in str(caught.value) or "'tied' is missing" in str(caught.value)
    assert_equal(blank, zeros(blank))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"format": NaN}', b"1" * 5000])
def test_a_manifest_that_is_no_json(tmp_path: Path, data: bytes) -> None:
    save_sharded_state(layers(), tmp_path)
    (tmp_path / MANIFEST).write_bytes(data)
    refused(zeros(layers()), tmp_path, MANIFEST)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / part(0)).mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        load_sharded_state(layers(), tmp_path)
    assert caught.value.filename == str(tmp_path / part(0))


def test_failed_reads_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sharded_state(layers(), tmp_path)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="broken") as caught:
        load_sharded_state(layers(), tmp_path)
    assert caught.value.filename == str(tmp_path / part(0))
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(SafetensorError, match="part-0.* has become shorter"):
        load_sharded_state(layers(), tmp_path)


def test_loaders_do_not_take_the_manifest_for_a_shard() -> None:
    for ranks in (Ranks(), Ranks(pp_rank=1, pp_size=2)):
        found = Names(None, ranks)
        assert not Path(found.manifest).match(found.glob) and not Path(found.manifest).match("*.safetensors")


def test_parameters_on_a_device(tmp_path: Path, real_cuda: torch.device) -> None:
    state = {name: tensor.to(real_cuda) for name, tensor in strided().items()}
    save_sharded_state(state, tmp_path, max_size=100)
    del state["expanded"]
    save_sharded_state(state, tmp_path)
    found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    load_sharded_state(found, tmp_path)
    assert_equal(
        {n: t.resolve_conj() for n, t in found.items()}, {n: t.resolve_conj() for n, t in state.items()}
    )


@pytest.mark.parametrize("how", ["refused", "dead"])
def test_loading_waits_for_no_thread_that_never_comes(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch, no_hang: None
) -> None:
    from fastshard.engine import reading

    def start(*_: object) -> int:
        if how == "refused":
            raise RuntimeError("can't start new thread")
        return 0  # it has died before its first line

    state = {str(i): filled((100, i + 1), seed=i) for i in range(5)}
    save_sharded_state(state, tmp_path, max_size=1)
    monkeypatch.setattr(reading, "usable_cpus", lambda: 8)
    monkeypatch.setattr(reading._thread, "start_new_thread", start)  # type: ignore[attr-defined]
    found = zeros(state)
    load_sharded_state(found, tmp_path)
    assert_equal(found, state)


def test_loading_by_many_threads_raises_the_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hang: None
) -> None:
    from fastshard.engine import reading

    state = {str(i): filled((100, i + 1), seed=i) for i in range(9)}
    save_sharded_state(state, tmp_path, max_size=1)
    monkeypatch.setattr(reading, "usable_cpus", lambda: 8)
    perform, failed = reading.Read.perform, OSError(errno.EIO, "of one")

    def fails(read: Any) -> None:
        if read.file.name.endswith("part-4.safetensors"):
            raise failed
        perform(read)

    monkeypatch.setattr(reading.Read, "perform", fails)
    with pytest.raises(OSError) as raised:
        load_sharded_state(zeros(state), tmp_path)
    assert raised.value is failed


@pytest.mark.parametrize("counts", [(4, 2), (2, 4)], ids=["fewer parts", "more parts"])
def test_killed_anywhere_a_folder_with_others_in_it_can_be_loaded(
    tmp_path: Path, counts: tuple[int, int]
) -> None:
    """By vLLM, too, which opens what matches its pattern. The folder cannot be exchanged: another one is in it."""
    before, after = (layers(2 * count, seed=count) for count in counts)
    loaded = set()
    for count in range(0, 300, 2):
        folder = tmp_path / str(count)
        (folder / "logs").mkdir(parents=True)
        save_sharded_state(before, folder, max_size=800)
        killed = killed_at(count, folder, {}, lambda place, _: save_sharded_state(after, place, max_size=800))
        states = []
        for state in (before, after):
            found = zeros(state)
            with contextlib.suppress(ValueError):
                load_sharded_state(found, folder)
                assert_equal(found, state)
                states.append(len(state))
        tensors = {}
        for path in sorted(folder.glob("model-rank-0-part-*.safetensors")):
            tensors |= load_file(path)
        assert [len(tensors)] == states
        loaded |= set(states)
        if not killed:
            break
    assert loaded == {len(before), len(after)}
