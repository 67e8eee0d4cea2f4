# SPDX-License-Identifier: Apache-2.0
"""The functions for huggingface_hub against the originals: files, errors, what happens to the caller's dicts."""

import copy
import errno
import inspect
import json
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from helpers import filled, names, parsed, release, said_now, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

import fastshard
from fastshard import SaveError, save_torch_model, save_torch_state_dict
from fastshard.engine.pipeline import How
from fastshard.engine.tensors import each_alone
from fastshard.integrations.adapters import _save_file as save_file_or_stage
from fastshard.publish import staged


def assert_same_files(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """To the byte, but for the order of several metadata entries, which is random there."""
    assert sorted(found) == sorted(expected)
    for name, data in expected.items():
        if (
            name.endswith(".safetensors")
            and data not in (STALE.encode(), b"kept")
            and len(parsed(data)[0].get("__metadata__", {})) > 1
        ):
            assert parsed(found[name]) == parsed(data)
        else:
            assert found[name] == data, name


STALE = "a file of an earlier save"


def both(
    tmp_path: Path,
    make: Callable[[], dict[str, torch.Tensor]],
    before: dict[str, str] | None = None,
    **arguments: Any,
) -> dict[str, bytes]:
    """Saves with both, compares, and returns the files."""
    known = inspect.signature(huggingface_hub.save_torch_state_dict).parameters
    new = [
        name
        for name in ("is_main_process", "shared_tensors_to_discard")
        if name in arguments and name not in known
    ]
    if new:
        pytest.skip(f"this huggingface_hub has no {new[0]}")
    outcomes = []
    for which, save in (("hub", huggingface_hub.save_torch_state_dict), ("ours", save_torch_state_dict)):
        directory = tmp_path / which
        directory.mkdir(parents=True)
        for name, text in (before or {}).items():
            (directory / name).write_text(text)
        state_dict = make()
        given = copy.deepcopy(arguments)
        error = None
        try:
            save(state_dict, directory, **given)
        except Exception as caught:
            error = type(caught), said_now(str(caught))
        outcomes.append((snapshot(directory), list(state_dict), given, error))
    hub, ours = outcomes
    assert ours[1:] == hub[1:]
    if hub[3] is None:
        assert_same_files(ours[0], hub[0])
    else:
        assert ours[0] == {name: text.encode() for name, text in (before or {}).items()}
    return ours[0]


def plain() -> dict[str, torch.Tensor]:
    return {f"layer.{i}": filled((64, 16), seed=i) for i in range(10)}  # 4 KiB each


def tied() -> dict[str, torch.Tensor]:
    tensors = plain()
    tensors["head"] = tensors["layer.0"]
    tensors["tail"] = tensors["layer.3"]
    return tensors


def strided() -> dict[str, torch.Tensor]:
    whole = filled((128, 64))
    return {
        "transposed": filled((32, 96)).t(),
        "column": filled((64, 96))[:, :10],
        "expanded": filled((1, 16)).expand(8, 16),
        "crossed": whole[::2],  # with "other" in one storage
        "other": whole[1::2],
        "plain": filled((16,)),
    }


def zoo() -> dict[str, torch.Tensor]:
    whole = filled((100,))
    return {
        "scalar": filled(()),
        "none": filled((0, 4)),
        "nothing": filled((0,)),
        "bf16": filled((33, 3), torch.bfloat16),
        "bool": filled((77,), torch.bool),
        "fp8": filled((50,), torch.float8_e4m3fn),
        "parameter": torch.nn.Parameter(filled((5, 5))),
        "all": whole,
        "part": whole[:50],
        "ünicode": filled((3,)),
    }


def disjoint() -> dict[str, torch.Tensor]:
    whole = filled((10,))
    return {"a": whole[:5], "b": whole[5:]}


@pytest.mark.parametrize("size", ["5GB", "10KB", 4096, 100, "0.012MB"])
@pytest.mark.parametrize("make", [plain, tied, strided, zoo, disjoint, dict, lambda: OrderedDict(tied())])
def test_files_are_those_of_the_hub(
    tmp_path: Path, make: Callable[[], dict[str, torch.Tensor]], size: int | str
) -> None:
    both(tmp_path, make, max_shard_size=size)


@pytest.mark.parametrize("size", ["5GB", "10KB"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"metadata": {"key": "value"}},
        {"metadata": {"format": "mine", "head": "mine"}},
        {"filename_pattern": "weights{suffix}.bin.safetensors"},
        {"filename_pattern": "adapter{suffix}.safetensors", "is_main_process": False},
        {"force_contiguous": False},
        {"shared_tensors_to_discard": ["layer.0"]},
        {"max_shard_size": "5GiB"},
        {"metadata": {"key": 1}},
        {"metadata": []},
    ],
)
@pytest.mark.parametrize("make", [tied, strided])
def test_arguments_are_those_of_the_hub(
    tmp_path: Path, make: Callable[[], dict[str, torch.Tensor]], size: str, arguments: dict[str, Any]
) -> None:
    both(tmp_path, make, **{"max_shard_size": size, **arguments})


def _resized() -> torch.Tensor:
    tensor = filled((4,))
    tensor.untyped_storage().resize_(0)  # as FSDP frees memory
    return tensor


@pytest.mark.parametrize(
    ("make", "answer"),
    [
        (lambda: {}, True),
        (plain, True),
        (lambda: {"parameter": torch.nn.Parameter(filled((5, 5))), "scalar": filled(())}, True),
        (lambda: {"bf16": filled((3, 3), torch.bfloat16), "bool": filled((7,), torch.bool)}, True),
        (tied, False),
        (disjoint, False),
        (lambda: {"part": filled((4,))[:2]}, False),
        (lambda: {"end": filled((4,))[2:]}, False),
        (lambda: {"bytes": filled((4,)).view(torch.uint8)[:4]}, False),
        (lambda: {"transposed": filled((3, 2)).t()}, False),
        (lambda: {"expanded": filled((1, 4)).expand(2, 4)}, False),
        (lambda: {"empty": filled((0, 4))}, False),
        (lambda: {"meta": torch.empty(4, device="meta")}, False),
        (lambda: {"sparse": torch.eye(2).to_sparse()}, False),
        (lambda: {"freed": _resized()}, False),
        (lambda: {"lazy": torch.nn.UninitializedParameter()}, False),
        (lambda: {"complex128": torch.zeros(2, dtype=torch.complex128)}, False),
        (lambda: {"subclass": filled((4,)).as_subclass(type("Mine", (torch.Tensor,), {}))}, False),
        (lambda: {"text": "of bitsandbytes"}, False),
    ],
)
def test_which_tensors_are_each_alone(make: Callable[[], dict[str, Any]], answer: bool) -> None:
    assert each_alone(make()) is answer
    if len(make()):  # one that is not spoils them all
        assert each_alone({"first": filled((2,)), **make(), "last": filled((3,))}) is answer


@pytest.mark.parametrize("size", ["5GB", "10KB"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "searched"),
    [
        (plain, False),
        (lambda: OrderedDict(plain()), False),
        (tied, True),
        (lambda: {"turned": filled((32, 96)).t()}, True),
    ],
)
def test_shared_memory_is_searched_for_only_where_there_may_be_some(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], dict[str, torch.Tensor]],
    searched: bool,
    dtype: torch.dtype | None,
    size: str,
) -> None:
    from huggingface_hub.serialization import _torch as theirs

    cast = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in plain().items()}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "ours").mkdir()
    huggingface_hub.save_torch_state_dict(cast, tmp_path / "theirs", max_shard_size=size)
    calls = []

    def noted(name: str) -> Callable[..., Any]:
        original = getattr(theirs, name)
        return lambda *args, **kwargs: calls.append(name) or original(*args, **kwargs)

    for name in ("_clean_state_dict_for_safetensors", "split_torch_state_dict_into_shards"):
        monkeypatch.setattr(theirs, name, noted(name))
    save_torch_state_dict(make(), tmp_path / "ours", max_shard_size=size, dtype=dtype)
    assert len(calls) == (2 if searched else 0)
    if not searched:
        assert_same_files(snapshot(tmp_path / "ours"), snapshot(tmp_path / "theirs"))


@pytest.mark.parametrize("size", ["5GB", "10KB"])
@pytest.mark.parametrize("make", [plain, tied, strided])
def test_pickled_shards(tmp_path: Path, make: Callable[[], dict[str, torch.Tensor]], size: str) -> None:
    files = both(tmp_path, make, max_shard_size=size, safe_serialization=False)
    assert all(name.startswith("pytorch_model") for name in files)


BEFORE = {
    "model.safetensors": STALE,
    "model.safetensors.index.json": STALE,
    "model-00001-of-00002.safetensors": STALE,
    "model-00002-of-00002.safetensors": STALE,
    "model.fp16.safetensors": "kept",
    "model-rank-0-part-0.safetensors": "kept",
    "model.safetensors.bak": "kept",
    "model.safetensors.index.json.bak": "kept",
    "config.json": "kept",
}


@pytest.mark.parametrize("main", [True, False])
@pytest.mark.parametrize("size", ["5GB", "10KB"])
@pytest.mark.parametrize("make", [plain, dict])
def test_files_of_earlier_saves(
    tmp_path: Path, make: Callable[[], dict[str, torch.Tensor]], size: str, main: bool
) -> None:
    before = BEFORE
    if release("huggingface_hub") < (1,):  # which removes whatever begins as a shard's name does
        before = {name: text for name, text in BEFORE.items() if not name.endswith(".bak")}
    files = both(tmp_path, make, before, max_shard_size=size, is_main_process=main)
    assert {name for name, data in files.items() if data == b"kept"} == {
        name for name, text in before.items() if text == "kept"
    }
    assert (STALE.encode() in files.values()) == (not main)


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(20, 8)
        self.head = torch.nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(3))


@pytest.mark.parametrize("arguments", [{}, {"shared_tensors_to_discard": ["embed.weight"]}])
def test_models(tmp_path: Path, arguments: dict[str, Any]) -> None:
    model = Tied()
    if not arguments.keys() <= inspect.signature(huggingface_hub.save_torch_model).parameters.keys():
        pytest.skip("this huggingface_hub has no such argument")
    for which, save in (("hub", huggingface_hub.save_torch_model), ("ours", save_torch_model)):
        (tmp_path / which).mkdir()
        save(model, tmp_path / which, **arguments)
    assert_same_files(snapshot(tmp_path / "ours"), snapshot(tmp_path / "hub"))
    other = Tied()
    if not hasattr(huggingface_hub, "load_torch_model"):
        return
    huggingface_hub.load_torch_model(other, tmp_path / "ours", strict=False)
    assert torch.equal(other.embed.weight, model.embed.weight)


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 40), max_size=12),
    shared=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=4),
    limit=st.integers(1, 400),
)
def test_splits_are_those_of_the_hub(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    shared: list[tuple[int, int]],
    limit: int,
) -> None:
    def make() -> dict[str, torch.Tensor]:
        tensors = {f"t{i}": filled((size,), seed=i) for i, size in enumerate(sizes)}
        for one, other in shared:
            if one < len(sizes) and other < len(sizes) and sizes[one]:
                tensors[f"t{other}x{one}"] = tensors[f"t{one}"].view(1, -1)
        return tensors

    both(tmp_path_factory.mktemp("split"), make, max_shard_size=limit)


def loaded(directory: Path) -> dict[str, torch.Tensor]:
    """As a reader of sharded checkpoints does."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return fastshard.load_file(directory / "model.safetensors")
    tensors = {}
    for name in set(json.loads(index.read_text())["weight_map"].values()):
        tensors.update(fastshard.load_file(directory / name))
    return tensors


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path, size: str) -> None:
    save_torch_state_dict(plain(), tmp_path, max_shard_size="10KB")
    before = snapshot(tmp_path)
    for broken in (torch.zeros(3, dtype=torch.complex128), torch.zeros(3, device="meta"), "text", None):
        with pytest.raises((KeyError, NotImplementedError, AttributeError)):
            save_torch_state_dict({**plain(), "broken": broken}, tmp_path, max_shard_size=size)  # type: ignore[dict-item]
        assert snapshot(tmp_path) == before
        assert names(tmp_path) == sorted(before)


def test_a_full_disk_leaves_the_old_checkpoint(small_disk: Path) -> None:
    old = {f"t{i}": filled((1 << 20,), torch.uint8, seed=i) for i in range(8)}
    save_torch_state_dict(old, small_disk, max_shard_size="3MB")
    before = names(small_disk)
    new = {f"t{i}": filled((4 << 20,), torch.uint8, seed=i) for i in range(8)}
    with pytest.raises(SaveError) as caught:
        save_torch_state_dict(new, small_disk, max_shard_size="9MB")
    assert caught.value.errno == errno.ENOSPC
    assert ".fastshard" not in str(caught.value)
    assert names(small_disk) == before
    found = loaded(small_disk)
    assert all(torch.equal(found[name], tensor) for name, tensor in old.items())


def test_a_missing_directory(tmp_path: Path) -> None:
    for save in (huggingface_hub.save_torch_state_dict, save_torch_state_dict):
        with pytest.raises(FileNotFoundError):
            save(plain(), tmp_path / "missing")


def test_saving_over_the_files_that_the_tensors_are_mapped_from(tmp_path: Path) -> None:
    save_torch_state_dict(plain(), tmp_path, max_shard_size="10KB")
    before = snapshot(tmp_path)
    mapped = loaded(tmp_path)
    save_torch_state_dict({name: mapped[name] for name in plain()}, tmp_path, max_shard_size="10KB")
    assert snapshot(tmp_path) == before


def test_shards_are_written_by_one_save(tmp_path: Path) -> None:
    save_torch_state_dict(plain(), tmp_path, max_shard_size="10KB", durable=True, progress=True)
    figures = fastshard.stats()
    assert figures is not None
    assert figures.files == len([name for name in names(tmp_path) if name.endswith(".safetensors")]) == 5


def test_only_files_of_the_stage_are_collected(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    with staged.staged(str(tmp_path / "checkpoint"), lambda name: False, How()) as stage:
        save_file_or_stage(plain(), os.path.join(stage.path, "a.safetensors"))
        save_file_or_stage(plain(), tmp_path / "b.safetensors")
        assert names(Path(stage.path)) == []
        assert names(tmp_path) == ["b.safetensors", "checkpoint"]
    assert names(tmp_path / "checkpoint") == ["a.safetensors"]
    save_file_or_stage(plain(), tmp_path / "checkpoint" / "c.safetensors")
    assert names(tmp_path / "checkpoint") == ["a.safetensors", "c.safetensors"]
