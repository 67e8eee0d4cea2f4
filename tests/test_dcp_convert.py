# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of torch.distributed.checkpoint become the files that one process would have saved, whoever has written
them; what is broken in them or meant badly is named, and nothing of it is executed."""

from __future__ import annotations

import ctypes
import enum
import json
import os
import pickle
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from helpers import DTYPES, FLOAT4, filled, saved_by_torch, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import fastshard
from fastshard.cli import command as cli
from fastshard.formats import dcp_metadata
from fastshard.formats.inert_pickle import read_pickle
from fastshard.formats.torch_items import find_tensor
from fastshard.tools import stored_boxes
from fastshard.tools.dcp_folders import convert_dcp
from fastshard.tools.stored_boxes import Box, Gathered, Target, complete

checkpoint = pytest.importorskip("torch.distributed.checkpoint")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed")

MODEL = {
    "embed.weight": filled((50, 8)),
    "half": filled((7,), torch.bfloat16, 1),
    "count": torch.tensor(5),
    "flags": filled((3, 5), torch.bool, 3),
    "turned": filled((6, 9), torch.int16, 2).t(),
    "part": filled((100,))[10:20],
    "empty": torch.empty(0, 3),
}


def save(state: dict[str, Any], folder: Path, **options: Any) -> Path:
    checkpoint.save(state, checkpoint_id=folder, no_dist=True, **options)
    return folder


def reference(state: dict[str, torch.Tensor], folder: Path, **options: Any) -> dict[str, bytes]:
    folder.mkdir()
    fastshard.save_torch_state_dict({name: t.clone() for name, t in state.items()}, folder, **options)
    return snapshot(folder)


@pytest.mark.parametrize("dtype", [None, "bf16", "fp8_e4m3"])
@pytest.mark.parametrize("size", [200, "5GB"])
def test_what_one_process_would_have_saved(tmp_path: Path, size: int | str, dtype: str | None) -> None:
    source = save({"model": MODEL, "optimizer": {"state": {0: {"exp_avg": filled((9,))}}}}, tmp_path / "dcp")
    done = convert_dcp(source, tmp_path / "out", max_shard_size=size, dtype=dtype, verify=True)
    expected = reference(MODEL, tmp_path / "expected", max_shard_size=size, dtype=dtype)
    assert snapshot(tmp_path / "out") == expected
    assert (done.tensors, done.left_out, done.objects) == (len(MODEL), {"optimizer": 1}, [])
    weights = [name for name in expected if name.endswith(".safetensors")]
    assert done.nbytes == sum(len(expected[name]) for name in weights)
    if dtype is None:
        fastshard.save_file(MODEL, tmp_path / "one", {"format": "pt"}, allow_strided=True)
        convert_dcp(source, tmp_path / "one.safetensors")
        assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "one").read_bytes()


def test_every_dtype(tmp_path: Path) -> None:
    state = {str(dtype): filled((4, 6), dtype) for dtype in DTYPES if saved_by_torch(dtype)}
    assert len(state) > 15
    convert_dcp(save(state, tmp_path / "dcp"), tmp_path / "out")
    assert snapshot(tmp_path / "out") == reference(state, tmp_path / "expected")


def test_dtypes_that_safetensors_does_not_have(tmp_path: Path) -> None:
    source = save({"a": torch.ones(3, dtype=torch.complex128)}, tmp_path / "dcp")
    with pytest.raises(ValueError, match=r"tensor 'a' is torch\.complex128, which safetensors does not have"):
        convert_dcp(source, tmp_path / "out")
    if FLOAT4 is not None and saved_by_torch(FLOAT4):
        source = save({"four": filled((4, 6), FLOAT4)}, tmp_path / "four")
        with pytest.raises(ValueError, match="'four' is .*float4.* which torch does not cast"):
            convert_dcp(source, tmp_path / "out", dtype="fp32")
    assert not (tmp_path / "out").exists()


# Which tensors are meant ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "key", "names"),
    [
        ({"a": 1, "b": 2}, None, "a b"),
        ({"model": {"a": 1}, "optimizer": {"a": 1}}, None, "a"),
        ({"model": {"a": 1}, "optimizer": {"state": {"a": {"m": 1}}}}, "optimizer", "state.a.m"),
        ({"model": {"a": 1}, "optimizer": {"state": {"a": {"m": 1}}}}, "optimizer.state", "a.m"),
        ({"app": {"model": {"a.w": 1, "b": 1}, "optim": {"a": 1}}}, None, "a.w b"),
        ({"app": {"model": {"a": 1}, "ema": {"b": 1}}}, "app.ema", "b"),
        ({"anything": {"a": 1}}, None, "a"),
        ({"a": 1, "optimizer": {"b": 1}}, None, "a"),
        ({"state_dict": {"a": 1}, "ema": {"b": 1}, "step": 7.5}, None, "a"),
        ({"ema": {"layers": [{"a": 1}, {"b": 1}]}}, "ema", "layers.0.a layers.1.b"),
    ],
)
def test_the_entry(tmp_path: Path, state: dict[str, Any], key: str | None, names: str) -> None:
    done = convert_dcp(save(_with_tensors(state), tmp_path / "dcp"), tmp_path / "m.safetensors", key=key)
    assert [*load_file(tmp_path / "m.safetensors")] == names.split()
    assert done.tensors == len(names.split())


@pytest.mark.parametrize(
    ("state", "key", "reason"),
    [
        ({"optimizer": {"a": 1}}, None, "not clear; --key takes those of an entry: 'optimizer'"),
        ({"one": {"a": 1}, "two": {"a": 1}}, None, "not clear; --key takes .*: 'one', 'two'"),
        (
            {"app": {"one": {"a": 1}, "two": {"a": 1}}},
            None,
            "not clear; --key takes .*: 'app.one', 'app.two'",
        ),
        ({"model": {"a": 1}}, "ema", "it has no entry 'ema', but 'model'"),
        ({"step": 7.5}, None, "no tensors in it"),
    ],
)
def test_no_entry(tmp_path: Path, state: dict[str, Any], key: str | None, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        convert_dcp(save(_with_tensors(state), tmp_path / "dcp"), tmp_path / "out", key=key)
    assert not (tmp_path / "out").exists()


def test_without_a_planner_that_flattens(tmp_path: Path) -> None:
    """Only names are known."""
    planner = checkpoint.DefaultSavePlanner(flatten_state_dict=False)
    source = save(
        {"model.a": filled((3,)), "model.b": filled((2,)), "x": filled((1,))},
        tmp_path / "dcp",
        planner=planner,
    )
    convert_dcp(source, tmp_path / "all.safetensors")
    convert_dcp(source, tmp_path / "some.safetensors", key="model")
    assert [*load_file(tmp_path / "all.safetensors")] == ["model.a", "model.b", "x"]
    assert [*load_file(tmp_path / "some.safetensors")] == ["a", "b"]


def _with_tensors(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: _with_tensors(value) for name, value in state.items()}
    if isinstance(state, list):
        return [_with_tensors(value) for value in state]
    return filled((state, 2)) if isinstance(state, int) else state


# From many ranks ------------------------------------------------------------------------------------------

WHOLE = {
    "rows": filled((11, 6), torch.bfloat16),
    "columns": filled((5, 13), torch.int32, 1),
    "grid": filled((9, 7, 3), torch.float32, 2),
    "middle": filled((4, 6, 2), torch.uint8, 3),
    "short": filled((3, 5), torch.bool, 4),
    "same": filled((6,), torch.float64, 5),
    "plain": filled((2, 3), torch.float16, 6),
}


def _distributed(size: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    line = init_device_mesh("cpu", (size,))
    plane = init_device_mesh("cpu", (2, size // 2))
    placed = {
        "rows": (line, [Shard(0)]),
        "columns": (line, [Shard(1)]),
        "grid": (plane, [Shard(1), Shard(0)]),
        "middle": (plane, [Shard(1), Replicate()]),
        "short": (line, [Shard(0)]),
        "same": (line, [Replicate()]),
    }
    found: dict[str, Any] = {
        name: distribute_tensor(WHOLE[name], *how, src_data_rank=None) for name, how in placed.items()
    }
    return {**found, "plain": WHOLE["plain"]}


def _save_by_ranks(folder: str, kind: str) -> None:
    from torch import distributed

    state = _distributed(distributed.get_world_size())
    if kind == "distcp":
        checkpoint.save({"model": state, "step": 3}, checkpoint_id=folder)
    elif kind == "alone":
        checkpoint.save({"model": state, "step": 3}, checkpoint_id=folder, use_collectives=False)
    elif kind == "hf":
        writer = checkpoint.HuggingFaceStorageWriter(folder, save_distributed=True)
        checkpoint.save(state, storage_writer=writer)
    else:
        from fastshard.dcp import FastshardWriter

        checkpoint.save(state, storage_writer=FastshardWriter(folder, save_distributed=True))


@pytest.mark.parametrize("kind", ["distcp", "alone", "hf", "ours"])
@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_parts_of_four_ranks(tmp_path: Path, kind: str, dtype: str | None) -> None:
    ranks.run(4, _save_by_ranks, str(tmp_path / "dcp"), kind)
    (tmp_path / "dcp" / "config.json").write_text("{}")
    for size in (150, "5GB"):
        out = tmp_path / f"out-{size}"
        done = convert_dcp(tmp_path / "dcp", out, max_shard_size=size, dtype=dtype, verify=True)
        assert done.objects == ([] if kind in ("hf", "ours") else ["step"])
        assert (out / "config.json").read_text() == "{}"
        (out / "config.json").unlink()
        found = {name: t for path in out.glob("*.safetensors") for name, t in load_file(path).items()}
        assert found.keys() == WHOLE.keys()
        for name, tensor in WHOLE.items():
            wanted = tensor.to(torch.float32) if dtype and tensor.is_floating_point() else tensor
            assert found[name].dtype == wanted.dtype and torch.equal(found[name], wanted), name
        if size == "5GB" or kind in ("distcp", "alone"):  # files of ranks do not say the order of the dict
            expected = tmp_path / f"expected-{size}"
            assert snapshot(out) == reference(WHOLE, expected, max_shard_size=size, dtype=dtype)


def test_in_the_folder_itself(tmp_path: Path) -> None:
    ranks.run(2, _save_by_ranks, str(tmp_path), "hf")
    before = snapshot(tmp_path)
    convert_dcp(tmp_path, tmp_path)
    after = snapshot(tmp_path)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"model.safetensors"}
    assert load_file(tmp_path / "model.safetensors").keys() == WHOLE.keys()
    with pytest.raises(FileExistsError, match="--force replaces it"):
        convert_dcp(tmp_path, tmp_path)
    convert_dcp(tmp_path, tmp_path, force=True)  # the result is not taken for a part
    assert snapshot(tmp_path) == after


def test_strided_parts(tmp_path: Path) -> None:
    """Columns whose parts are stored transposed."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    whole = filled((6, 10), torch.int16)
    parts = {(0, 0): whole[:, :4].t().contiguous().t(), (0, 4): whole[:, 4:].clone()}
    source = _hand_made(tmp_path / "dcp", "w", whole, parts, ChunkStorageMetadata)
    convert_dcp(source, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w"], whole)
    convert_dcp(source, tmp_path / "half", dtype="fp32")
    assert torch.equal(load_file(tmp_path / "half" / "model.safetensors")["w"], whole)


def _hand_made(
    folder: Path, name: str, whole: torch.Tensor, parts: dict[tuple[int, ...], torch.Tensor], chunk: Any
) -> Path:
    from torch.distributed.checkpoint import filesystem, metadata

    folder.mkdir()
    told = metadata.Metadata({}, storage_data={})
    chunks = []
    with open(folder / "__0_0.distcp", "wb") as file:
        for offsets, part in parts.items():
            begin = file.tell()
            torch.save(part, file)
            place = filesystem._StorageInfo("__0_0.distcp", begin, file.tell() - begin)
            told.storage_data[metadata.MetadataIndex(name, torch.Size(offsets))] = place
            chunks.append(chunk(torch.Size(offsets), part.shape))
    properties = metadata.TensorProperties(whole.dtype)
    told.state_dict_metadata[name] = metadata.TensorStorageMetadata(properties, whole.shape, chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(told))
    return folder


@pytest.mark.parametrize(
    ("offsets", "reason"),
    [
        ([(0, 0)], "30 of its 60 elements are not in any file"),
        ([(0, 0), (0, 4)], r"the parts at \[0, 0\] and \[0, 4\] overlap"),
        ([(0, 0), (0, 6)], r"a part of \[6, 5\] at \[0, 6\] leaves \[6, 10\]"),
    ],
)
def test_parts_that_do_not_fit(tmp_path: Path, offsets: list[tuple[int, int]], reason: str) -> None:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    whole = filled((6, 10), torch.int16)
    parts = {at: whole[:, :5].contiguous() for at in offsets}
    source = _hand_made(tmp_path / "dcp", "w", whole, parts, ChunkStorageMetadata)
    with pytest.raises(ValueError, match=f"tensor 'w': {reason}"):
        convert_dcp(source, tmp_path / "out")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_boxes_of_any_kind(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any cuts of any shape, read in any pieces."""
    shape = tuple(data.draw(st.lists(st.integers(1, 7), max_size=4)))
    dtype = data.draw(st.sampled_from([torch.uint8, torch.float32, torch.float16]))
    whole = filled(shape, dtype)
    path = tmp_path_factory.mktemp("boxes") / "file"
    boxes, stored = [], b""
    todo = [((0,) * len(shape), shape)]
    while todo:
        offsets, sizes = todo.pop()
        dims = [dim for dim, size in enumerate(sizes) if size > 1]
        if dims and len(todo) + len(boxes) < 6 and data.draw(st.booleans()):
            dim = data.draw(st.sampled_from(dims))
            cut = data.draw(st.integers(1, sizes[dim] - 1))
            rest = tuple(o + cut * (d == dim) for d, o in enumerate(offsets))
            todo.append((offsets, tuple(cut if d == dim else s for d, s in enumerate(sizes))))
            todo.append((rest, tuple(s - cut * (d == dim) for d, s in enumerate(sizes))))
            continue
        part = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))].contiguous()
        boxes.append(Box(offsets, sizes, str(path), len(stored)))
        stored += part.view(-1).view(torch.uint8).numpy().tobytes()
    path.write_bytes(stored)
    found = complete(shape, random.Random(len(boxes)).sample([*boxes, boxes[0]], len(boxes) + 1))
    assert sorted(found) == sorted(boxes)
    if len(boxes) > 1:
        with pytest.raises(ValueError, match="elements are not in any file"):
            complete(shape, boxes[1:])
    gathered = Gathered((0,) * len(shape), shape, found, Target(dtype, dtype, "F32"))
    expected = whole.view(-1).view(torch.uint8).numpy().tobytes()
    done = 0
    while done < len(expected):
        count = min(len(expected) - done, dtype.itemsize * data.draw(st.integers(1, 50)))
        memory = ctypes.create_string_buffer(count)
        gathered.fetch(done, count, ctypes.addressof(memory))
        assert memory.raw == expected[done : done + count]
        done += count


def test_no_more_is_read_at_once_than_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And every byte once."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    whole = filled((4096, 1024), torch.float16)
    parts = {(0, at): whole[:, at : at + 256].contiguous() for at in range(0, 1024, 256)}
    source = _hand_made(tmp_path / "dcp", "w", whole, parts, ChunkStorageMetadata)
    reads: list[int] = []
    original = stored_boxes._read

    def read(path: str, offset: int, nbytes: int) -> bytearray:
        reads.append(nbytes)
        return original(path, offset, nbytes)

    monkeypatch.setattr(stored_boxes, "_read", read)
    options = fastshard.Options(memory_budget=2 << 20)
    convert_dcp(source, tmp_path / "out", engine=options)
    assert sum(reads) == whole.nbytes
    assert max(reads) <= 1 << 20
    loaded = load_file(tmp_path / "out" / "model.safetensors")["w"]
    assert torch.equal(loaded.view(torch.int16), whole.view(torch.int16))


# Damage and malice ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return snapshot(save({"model": MODEL, "step": 3}, tmp_path_factory.mktemp("good") / "dcp"))


def written(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir()
    for name, contents in files.items():
        (folder / name).write_bytes(contents)
    return folder


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_mutations(
    good: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever is changed: the result is there, or an error that names the folder, and the target is as it was."""
    files = dict(good)
    name = data.draw(st.sampled_from(sorted(files)))
    contents = bytearray(files[name])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(contents) - 1))
        kind = data.draw(st.sampled_from(["cut", "flip", "insert", "remove", "big"]))
        if kind == "cut":
            del contents[at + 1 :]
        elif kind == "flip":
            contents[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            contents[at:at] = data.draw(st.binary(max_size=8))
        elif kind == "remove" and len(contents) > 1:
            del contents[at]
        else:
            contents[at : at + 4] = b"\xff\xff\xff\x7f"
    files[name] = bytes(contents)
    tmp_path = tmp_path_factory.mktemp("mutated")
    source = written(files, tmp_path / "dcp")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"old")
    try:
        convert_dcp(source, tmp_path / "out", force=True, verify=True)
    except (ValueError, OSError) as error:
        assert str(source) in str(error)
        assert snapshot(tmp_path / "out") == {"model.safetensors": b"old"}
    else:
        assert load_file(tmp_path / "out" / "model.safetensors")
    assert ranks.leftovers(tmp_path) == []


def test_damage_is_named(good: dict[str, bytes], tmp_path: Path) -> None:
    stored = filled((50, 8)).numpy().tobytes()
    at = good["__0_0.distcp"].index(stored)
    data = bytearray(good["__0_0.distcp"])
    data[at + 7] ^= 1
    source = written({**good, "__0_0.distcp": bytes(data)}, tmp_path / "dcp")
    where = rf"{source / '__0_0.distcp'}: tensor 'model\.embed\.weight', part at \[0, 0\]: "
    convert_dcp(source, tmp_path / "unseen")
    with pytest.raises(ValueError, match=f"{where}its CRC-32 is .* it is damaged"):
        convert_dcp(source, tmp_path / "out", verify=True)
    (source / "__0_0.distcp").write_bytes(good["__0_0.distcp"][: at + 100])
    with pytest.raises(ValueError, match=r"__0_0\.distcp: tensor '.*: it has been cut"):
        convert_dcp(source, tmp_path / "out")
    (source / "__0_0.distcp").unlink()
    with pytest.raises(FileNotFoundError, match=r"__0_0\.distcp"):
        convert_dcp(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_nothing_is_executed(good: dict[str, bytes], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    source = written({**good, ".metadata": pickle.dumps(Evil(str(mark)))}, tmp_path / "one")
    with pytest.raises(ValueError, match=r"\.metadata: the pickle has a posix\.mkdir in it"):
        convert_dcp(source, tmp_path / "out")
    # In a tensor's archive, whose records are found by the directory at its end.
    source = written(good, tmp_path / "two")
    told = dcp_metadata.read_metadata(str(source))
    assert told is not None
    chunk = told.tensors["model.half"].chunks[0]
    data = bytearray(good["__0_0.distcp"])
    item = bytes(data[chunk.begin : chunk.begin + chunk.nbytes])
    with zipfile.ZipFile(source / "__0_0.distcp", "w") as archive:  # as large, so that .metadata stay right
        archive.writestr("archive/data.pkl", pickle.dumps(Evil(str(mark)), protocol=2))
    evil = (source / "__0_0.distcp").read_bytes()
    data[chunk.begin : chunk.begin + chunk.nbytes] = b"\0" * (len(item) - len(evil)) + evil
    (source / "__0_0.distcp").write_bytes(data)
    with pytest.raises(ValueError, match=r"tensor 'model\.half'"):
        convert_dcp(source, tmp_path / "out")
    assert not mark.exists() and not (tmp_path / "out").exists()


class _ByName(pickle.Pickler):
    """Pickles members of enumerations as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, found: Any) -> Any:
        return (getattr, (type(found), found.name)) if isinstance(found, enum.Enum) else NotImplemented


def test_members_of_enumerations_by_name(tmp_path: Path) -> None:
    source = save(MODEL, tmp_path / "dcp")
    as_it_was = dcp_metadata.read_metadata(str(source))
    told = pickle.loads((source / ".metadata").read_bytes())
    with (source / ".metadata").open("wb") as file:
        _ByName(file, protocol=4).dump(told)
    assert b"getattr" in (source / ".metadata").read_bytes()
    assert dcp_metadata.read_metadata(str(source)) == as_it_was
    convert_dcp(source, tmp_path / "out")
    assert snapshot(tmp_path / "out") == reference(MODEL, tmp_path / "expected")


@pytest.mark.parametrize(
    "arguments",
    [(os._Environ, "keys"), (torch.Size, 3), (torch.Size([1]), "numel"), (torch.Size, "numel", None)],
    ids=str,
)
def test_nothing_else_is_got_by_name(arguments: tuple[Any, ...]) -> None:
    class Got:
        def __reduce__(self) -> tuple[Any, ...]:
            return getattr, arguments

    with pytest.raises(ValueError, match=r"the pickle has a (os\._Environ|builtins\.getattr) in it"):
        read_pickle(pickle.dumps(Got()), {"torch.Size"})


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x.distcp", "", ".", "a/b", "x\0y", 7], ids=lambda name: repr(name)
)
def test_files_outside_are_not_read(tmp_path: Path, name: Any) -> None:
    source = save(MODEL, tmp_path / "dcp")
    told = pickle.loads((source / ".metadata").read_bytes())
    for place in told.storage_data.values():
        place.relative_path = name
    (source / ".metadata").write_bytes(pickle.dumps(told))
    with pytest.raises(ValueError, match=r"\.metadata: tensor 'embed\.weight': it cannot lie in"):
        convert_dcp(source, tmp_path / "out")


def test_bombs(tmp_path: Path) -> None:
    """Small files that ask for much."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    expanded = torch.ones(1).expand(1 << 20, 1 << 20)
    source = _hand_made(tmp_path / "dcp", "w", expanded, {(0, 0): expanded}, ChunkStorageMetadata)
    with pytest.raises(ValueError, match="tensor 'w', part at .*: its 4 bytes are too few"):
        convert_dcp(source, tmp_path / "out")
    known = {"collections.OrderedDict"}
    deep = b"\x80\x04}(" + b"))" + b"\x86" * 1 + b"2" + b"\x86."
    for data, reason in [
        (b"\x80\x04Nr\xff\xff\xff\x7f.", None),  # a memo of two billion places
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.", "damaged"),
        (b"\x80\x04\x96" + struct.pack("<Q", 1 << 40) + b"x.", "operation 0x96"),
        (b"\x80\x04}))\x86Ns.", "tuple as a key"),
        (deep, "operation|damaged"),
        (b"", "damaged"),
        (b"\x80\x04", "damaged"),
        (b"\x80\x04cos\nsystem\n.", r"has a os\.system in it"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", r"has a os\.system in it"),
        (b"\x80\x04K\x01)R.", "damaged"),
    ]:
        if reason is None:
            assert read_pickle(data, known) is None
        else:
            with pytest.raises(ValueError, match=reason):
                read_pickle(data, known)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_no_archive(data: bytes) -> None:
    with pytest.raises(ValueError):
        find_tensor(lambda offset, nbytes: data[offset : offset + nbytes], len(data))


def test_sharding_info_that_is_none(tmp_path: Path) -> None:
    for text, reason in [
        ("[]", "is wanted|object"),
        ('{"a": {}}', "does not say where tensor 'a' lies"),
        ('{"a": {"saved_offsets": [-1]}}', "does not say where tensor 'a' lies"),
        ('{"a": {"saved_offsets": [0, 0]}}', r"tensor 'a' of shape \[3\] cannot lie at \[0, 0\]"),
        ('{"a": {"saved_offsets": [4]}}', "tensor 'a': 4 of its 7 elements are not in any file"),
    ]:
        fastshard.save_file({"a": filled((3,))}, tmp_path / "shard.safetensors", {"DCP_SHARDING_INFO": text})
        with pytest.raises(ValueError, match=reason) as caught:
            convert_dcp(tmp_path, tmp_path / "out")
        assert str(tmp_path) in str(caught.value)


def test_properties_with_strides(tmp_path: Path) -> None:
    """As torch 2.15 pickles them: six values instead of five."""
    source = save(MODEL, tmp_path / "dcp")
    from torch.distributed.checkpoint.metadata import TensorProperties

    original = TensorProperties.__getstate__
    told = pickle.loads((source / ".metadata").read_bytes())
    try:
        TensorProperties.__getstate__ = lambda self: (*original(self), (3, 1))  # type: ignore[method-assign]
        (source / ".metadata").write_bytes(pickle.dumps(told, protocol=5))
    finally:
        TensorProperties.__getstate__ = original  # type: ignore[method-assign]
    convert_dcp(source, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == MODEL.keys()


# The command ----------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"model": {"a": filled((10, 10))}, "optimizer": {"m": filled((3,))}, "step": 3}
    source = str(save(state, tmp_path / "dcp"))
    out = tmp_path / "out"
    assert (
        cli.main(["convert", source, str(out), "--dtype", "bf16", "--verify", "--max-shard-size", "1KB"]) == 0
    )
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: 1 tensor, 304 B",
        "optimizer is left out: 1 tensor; --key takes them",
        "no tensors, and left out: step",
    ]
    assert load_file(out / "model.safetensors")["a"].dtype == torch.bfloat16
    assert cli.main(["convert", source, str(out)]) == 1
    assert (
        capsys.readouterr().err
        == f"fastshard: {out / 'model.safetensors'}: it exists already; --force replaces it\n"
    )
    assert cli.main(["convert", source, str(tmp_path / "m.pt")]) == 1
    assert "can only become .safetensors files" in capsys.readouterr().err
    assert cli.main(["convert", str(tmp_path), str(out)]) == 1
    file = str(out / "model.safetensors")
    assert cli.main(["convert", file, str(tmp_path / "m.safetensors"), "--verify"]) == 1
    assert "--verify is only for checkpoints of torch.distributed.checkpoint" in capsys.readouterr().err


def test_a_save_that_has_not_ended(tmp_path: Path) -> None:
    source = save(MODEL, tmp_path / "dcp")
    (source / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"\.distcp files without \.metadata: the save has not ended"):
        convert_dcp(source, tmp_path / "out")
    save(MODEL, tmp_path / "run" / "pytorch_model_fsdp_0")
    with pytest.raises(ValueError, match="not a checkpoint .*, but pytorch_model_fsdp_0 in it may be"):
        convert_dcp(tmp_path / "run", tmp_path / "out")


def test_the_index(tmp_path: Path) -> None:
    convert_dcp(save(MODEL, tmp_path / "dcp"), tmp_path / "out", max_shard_size=400)
    told = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert told["weight_map"].keys() == MODEL.keys()
