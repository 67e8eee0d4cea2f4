# SPDX-License-Identifier: Apache-2.0
"""Writers and readers for ``torch.distributed.checkpoint``, against the stock ones, in several ranks."""

import gc
import json
import multiprocessing
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.checkpoint import metadata as stock_metadata
from torch.distributed.checkpoint import planner as stock_planner
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

import fastshard
from fastshard import Options
from fastshard.dcp import FastshardReader, FastshardWriter
from fastshard.engine.tensors import DTYPES

if not hasattr(dcp, "HuggingFaceStorageReader"):
    pytest.skip("torch 2.8 has the writers that these tests compare with", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SHARD = "shard-00001-model-00001-of-00001.safetensors"
OBJECTS = "shard-00001-objects.fastshard"


def values(count: int, dtype: torch.dtype = torch.float32, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + count).to(dtype)


def mixed() -> dict[str, Any]:
    """Tensors of all dtypes, an optimizer's state, and what is no tensor."""
    kinds = [dtype for dtype in DTYPES if dtype.itemsize > 1 and not dtype.is_complex]
    return {
        "model": {str(dtype): values(12, dtype, 3).view(3, 4) for dtype in kinds},
        "bools": torch.tensor([True, False, True]),
        "fp8": values(8).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "optim": {"state": {0: {"step": torch.tensor(7.0), "exp_avg": values(5)}}, "groups": [{"lr": 0.5}]},
        "epoch": 3,
        "text": "grüße",
        "bytes": b"\0\1\2",
    }


def blank(state: Any) -> Any:
    """The same with other values, to be loaded into."""
    if isinstance(state, dict):
        return {key: blank(value) for key, value in state.items()}
    if isinstance(state, list):
        return [blank(value) for value in state]
    if isinstance(state, torch.Tensor):
        return torch.zeros_like(state, memory_format=torch.contiguous_format)
    return type(state)()


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        plain = one.contiguous(), other.contiguous()
        return one.dtype is other.dtype and torch.equal(*(t.view(-1).view(torch.uint8) for t in plain))
    return bool(one == other)


def header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    return dict(json.loads(data[8 : 8 + length]))


def assert_same_file(one: Path, other: Path) -> None:
    """The same but for the order of metadata, which safetensors does not fix."""
    assert header(one) == header(other)
    assert one.stat().st_size == other.stat().st_size
    (length,) = struct.unpack_from("<Q", one.read_bytes())
    assert one.read_bytes()[8 + length :] == other.read_bytes()[8 + length :]


def test_round_trip_of_everything(tmp_path: Path) -> None:
    state = mixed()
    dcp.save(state, storage_writer=FastshardWriter(tmp_path / "new"))
    assert sorted(os.listdir(tmp_path / "new")) == [SHARD, OBJECTS]
    found = blank(state)
    dcp.load(found, storage_reader=FastshardReader(tmp_path / "new"))
    assert same(state, found)
    assert ranks.leftovers(tmp_path) == []


def test_ours_is_what_the_stock_writer_writes(tmp_path: Path) -> None:
    state = {"b": values(6).view(2, 3), "a": values(4, torch.int64), "c": {"x": torch.tensor(1.5)}}
    ours = dcp.save(state, storage_writer=FastshardWriter(tmp_path / "ours"))
    stock = dcp.save(
        state, storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path / "stock"), save_distributed=True)
    )
    assert ours.state_dict_metadata == stock.state_dict_metadata
    assert_same_file(tmp_path / "ours" / SHARD, tmp_path / "stock" / SHARD)
    for folder, reader in (
        ("ours", dcp.HuggingFaceStorageReader),
        ("stock", FastshardReader),
        ("ours", FastshardReader),
    ):
        found = blank(state)
        dcp.load(found, storage_reader=reader(str(tmp_path / folder)))
        assert same(state, found)


def test_the_layout_that_is_not_in_shards(tmp_path: Path) -> None:
    state = {"a": values(4), "b": values(6)}
    mapping = {"a": 1, "b": 2}
    dcp.save(state, storage_writer=FastshardWriter(tmp_path / "ours", mapping, save_distributed=False))
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path / "stock"), mapping))
    names = sorted(os.listdir(tmp_path / "stock"))
    assert sorted(os.listdir(tmp_path / "ours")) == names
    assert len(names) == 3
    for name in names:
        if name.endswith(".json"):
            assert (tmp_path / "ours" / name).read_text() == (tmp_path / "stock" / name).read_text()
        else:
            assert_same_file(tmp_path / "ours" / name, tmp_path / "stock" / name)
    found = blank(state)
    dcp.load(found, storage_reader=FastshardReader(tmp_path / "stock"))
    assert same(state, found)
    dcp.save(
        {"a": values(4), "n": 1}, storage_writer=FastshardWriter(tmp_path / "ours", save_distributed=False)
    )
    assert sorted(os.listdir(tmp_path / "ours")) == [
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "objects.fastshard",
    ]


def test_plain_folders_are_read(tmp_path: Path) -> None:
    save_file({"a": values(4), "b": values(3, torch.bool)}, tmp_path / "model.safetensors")
    found = {"a": torch.zeros(4), "b": torch.zeros(3, dtype=torch.bool)}
    dcp.load(found, storage_reader=FastshardReader(tmp_path))
    assert same(found, {"a": values(4), "b": values(3, torch.bool)})
    index = {"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": values(9)}, tmp_path / "consolidated.safetensors")  # not of the index
    dcp.load(found, storage_reader=FastshardReader(tmp_path))
    assert same(found["a"], values(4))


def test_strides_and_ties(tmp_path: Path) -> None:
    base = values(12).view(3, 4)
    state = {"t": base.t(), "base": base, "again": base, "row": base[1], "spread": values(2).expand(3, 2)}
    dcp.save(state, storage_writer=FastshardWriter(tmp_path))
    found = blank(state)
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)))
    assert same(state, found)


def test_casts_on_the_way(tmp_path: Path) -> None:
    state = {"a": values(4), "n": values(4, torch.int32)}
    dcp.save(state, storage_writer=FastshardWriter(tmp_path, dtype="bf16"))
    with safe_open(tmp_path / SHARD, "pt") as file:
        assert file.get_tensor("a").dtype is torch.bfloat16
        assert file.get_tensor("n").dtype is torch.int32


class TwoChunks(DefaultSavePlanner):
    """A planner of which each rank has two chunks of a tensor, as one of torch 2.14 with ``CheckpointableTensor``."""

    def create_local_plan(self) -> stock_planner.SavePlan:
        whole = torch.Size([4, 3])
        items = [
            stock_planner.WriteItem(
                stock_metadata.MetadataIndex("w", torch.Size([row, 0])),
                stock_planner.WriteItemType.SHARD,
                tensor_data=stock_planner.TensorWriteData(
                    stock_metadata.ChunkStorageMetadata(torch.Size([row, 0]), torch.Size([2, 3])),
                    stock_metadata.TensorProperties(torch.float32),
                    whole,
                ),
            )
            for row in (0, 2)
        ]
        self.plan = stock_planner.SavePlan(items, planner_data={})
        return self.plan

    def lookup_object(self, index: stock_metadata.MetadataIndex) -> Any:
        assert index.offset is not None
        return self.state_dict["w"][index.offset[0] : index.offset[0] + 2]


@pytest.mark.parametrize("reader", [FastshardReader, dcp.HuggingFaceStorageReader])
def test_two_chunks_of_a_tensor_on_a_rank(tmp_path: Path, reader: Any) -> None:
    state = {"w": values(12).view(4, 3)}
    dcp.save(state, storage_writer=FastshardWriter(tmp_path), planner=TwoChunks())
    assert len(os.listdir(tmp_path)) == 2
    found = blank(state)
    dcp.load(found, storage_reader=reader(str(tmp_path)))
    assert same(state, found)


def test_a_second_save_replaces_the_first(tmp_path: Path) -> None:
    writer = FastshardWriter(tmp_path / "x")
    dcp.save({"a": values(3), "n": 1}, storage_writer=writer)
    os.chmod(tmp_path / "x" / SHARD, 0o640)
    (tmp_path / "x" / "notes.txt").write_text("kept")
    dcp.save({"b": values(4)}, storage_writer=writer)
    assert sorted(os.listdir(tmp_path / "x")) == ["notes.txt", SHARD]
    with safe_open(tmp_path / "x" / SHARD, "pt") as file:
        assert list(file.keys()) == ["b"]
    assert (tmp_path / "x" / SHARD).stat().st_mode & 0o777 == 0o640
    dcp.save({"b": values(4)}, storage_writer=writer, checkpoint_id=tmp_path / "y")
    assert os.listdir(tmp_path / "y") == [SHARD]
    assert ranks.leftovers(tmp_path) == []


def test_a_writer_is_pickled_without_its_save(tmp_path: Path) -> None:
    writer = FastshardWriter(tmp_path / "x", {"a": 1}, durable=True, options=Options(threads=1))
    dcp.save({"a": values(3)}, storage_writer=writer)
    writer.set_up_storage_writer(True)  # a save under way
    other = pickle.loads(pickle.dumps(writer))
    dcp.save({"a": values(4)}, storage_writer=other, checkpoint_id=tmp_path / "y")
    assert os.listdir(tmp_path / "y") == [SHARD]
    assert not isinstance(writer, dcp.staging.AsyncStager)


def test_a_save_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    dcp.save({"a": values(3)}, storage_writer=FastshardWriter(tmp_path))
    before = (tmp_path / SHARD).read_bytes()
    with pytest.raises(BaseException, match="CheckpointException"):
        dcp.save({"a": torch.empty(3, device="meta")}, storage_writer=FastshardWriter(tmp_path))
    assert (tmp_path / SHARD).read_bytes() == before
    assert os.listdir(tmp_path) == [SHARD]


def test_an_error_names_the_final_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BaseException) as caught:
        dcp.save({"a": values(3)}, storage_writer=FastshardWriter(tmp_path / "file" / "x"))
    assert ".staging" not in str(caught.value)
    assert str(tmp_path / "file") in str(caught.value)


# Several ranks


def sharded(size: int, shape: tuple[int, ...] = (10, 6), placements: Any = None, mesh: Any = None) -> Any:
    """A tensor of this shape that is spread over the ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = mesh or init_device_mesh("cpu", (size,))
    count = 1
    for length in shape:
        count *= length
    return distribute_tensor(values(count).view(shape), mesh, placements or [Shard(0)])


def state_of_ranks(size: int) -> dict[str, Any]:
    """What a job of FSDP2 and TP has, with uneven and empty parts, replicated tensors, and objects."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    state = {
        "rows": sharded(size),
        "columns": sharded(size, placements=[Shard(1)]),
        "few": sharded(size, (3, 2)),
        "all": sharded(size, placements=[Replicate()]),
        "plain": values(7),
        "flags": torch.tensor([True, False]),
        "step": 11,
        "rank": {f"only_on_{distributed.get_rank()}": values(3) + distributed.get_rank()},
    }
    if size == 4:
        mesh = init_device_mesh("cpu", (2, 2))
        state["grid"] = sharded(size, placements=[Shard(0), Shard(1)], mesh=mesh)
        state["hybrid"] = sharded(size, placements=[Replicate(), Shard(0)], mesh=mesh)
    return state


def zeroed(state: Any) -> Any:
    from torch.distributed.tensor import DTensor

    if isinstance(state, dict):
        return {key: zeroed(value) for key, value in state.items()}
    if isinstance(state, DTensor):
        return DTensor.from_local(
            torch.zeros_like(state.to_local()),
            state.device_mesh,
            state.placements,
            shape=state.shape,
            stride=state.stride(),
        )
    return blank(state)


def local(state: Any) -> Any:
    from torch.distributed.tensor import DTensor

    if isinstance(state, dict):
        return {key: local(value) for key, value in state.items()}
    return state.to_local() if isinstance(state, DTensor) else state


def save_and_load(folder: Path, size: int, options: dict[str, Any]) -> list[str]:
    state = state_of_ranks(size)
    dcp.save(state, storage_writer=FastshardWriter(folder, **options))
    distributed.barrier()
    found = zeroed(state)
    dcp.load(found, storage_reader=FastshardReader(folder))
    assert same(local(state), local(found))
    tensors = {key: value for key, value in state.items() if key != "step"}
    found = zeroed(tensors)
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    assert same(local(tensors), local(found))
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_save_and_load(tmp_path: Path, size: int) -> None:
    for names in ranks.run(size, save_and_load, tmp_path / "x", size, {"durable": size == 2}):
        shards = [name for name in names if name.endswith(".safetensors")]
        assert shards == [f"shard-{n + 1:05d}-model-00001-of-00001.safetensors" for n in range(size)]
        (objects,) = (name for name in names if name not in shards)  # of whichever rank
        assert objects.endswith("-objects.fastshard")
    assert ranks.leftovers(tmp_path) == []
    # Another number of ranks reads it, and whole.
    found = (
        {"rows": torch.zeros(10, 6), "grid": torch.zeros(10, 6)}
        if size == 4
        else {"rows": torch.zeros(10, 6)}
    )
    dcp.load(found, storage_reader=FastshardReader(tmp_path / "x"))
    assert all(torch.equal(tensor, values(60).view(10, 6)) for tensor in found.values())


def save_stock_and_ours(folder: Path) -> None:
    state = {key: value for key, value in state_of_ranks(2).items() if key != "step"}
    dcp.save(
        state, storage_writer=FastshardWriter(folder / "ours", {"plain": 2, **dict.fromkeys(_fqns(state), 1)})
    )
    mapping = {"plain": 2, **dict.fromkeys(_fqns(state), 1)}
    dcp.save(
        state,
        storage_writer=dcp.HuggingFaceStorageWriter(str(folder / "stock"), mapping, save_distributed=True),
    )


def _fqns(state: dict[str, Any]) -> list[str]:
    names = [name for name in state if name not in ("rank", "plain")]
    return [*names, "rank.only_on_0", "rank.only_on_1"]


def test_ranks_write_what_the_stock_writer_writes(tmp_path: Path) -> None:
    ranks.run(2, save_stock_and_ours, tmp_path)
    names = sorted(os.listdir(tmp_path / "stock"))
    assert sorted(os.listdir(tmp_path / "ours")) == names
    assert len(names) >= 3
    for name in names:
        assert_same_file(tmp_path / "ours" / name, tmp_path / "stock" / name)


def save_in_turn(folder: Path, size: int) -> None:
    dcp.save({"w": sharded(size), "n": size}, storage_writer=FastshardWriter(folder))


def test_fewer_ranks_leave_no_shards_of_more(tmp_path: Path) -> None:
    for size in (3, 2):
        ranks.run(size, save_in_turn, tmp_path / "x", size)
        assert len([name for name in os.listdir(tmp_path / "x") if name.endswith("safetensors")]) == size
    found = {"w": torch.zeros(10, 6), "n": 0}
    dcp.load(found, storage_reader=FastshardReader(tmp_path / "x"))
    assert found["n"] == 2
    assert ranks.leftovers(tmp_path) == []


def save_with_cached_plans(folder: Path) -> list[float]:
    found = []
    writer = FastshardWriter(folder / "0")
    for count in range(4):
        state = {"w": sharded(2) + count, "plain": values(3) + count, "n": count}
        planner = DefaultSavePlanner(enable_plan_caching=True)
        dcp.save(state, storage_writer=writer, checkpoint_id=folder / str(count), planner=planner)
        other = FastshardWriter(folder / str(count))  # cached plans outlive writers
        dcp.save(state, storage_writer=other, planner=DefaultSavePlanner(enable_plan_caching=True))
        distributed.barrier()
        read = {"w": zeroed(state["w"]), "plain": torch.zeros(3), "n": -1}
        dcp.load(read, storage_reader=FastshardReader(folder / str(count)))
        assert same(local(state), local(read))
        found.append(read["n"])
    return found


def test_cached_plans(tmp_path: Path) -> None:
    assert ranks.run(2, save_with_cached_plans, tmp_path) == [[0, 1, 2, 3]] * 2
    assert ranks.leftovers(tmp_path) == []


def save_by_itself(folder: Path, options: dict[str, Any]) -> None:
    rank = distributed.get_rank()
    state = {"plain": values(3) + rank, f"of_{rank}": values(2), "n": rank}
    for _ in range(2):
        dcp.save(state, storage_writer=FastshardWriter(folder), **options)
        distributed.barrier()


@pytest.mark.parametrize("options", [{"use_collectives": False}, {"no_dist": True}])
def test_ranks_that_save_by_themselves_do_not_overwrite_each_other(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    ranks.run(3, save_by_itself, tmp_path, options)
    assert len(os.listdir(tmp_path)) == 6
    found = {"of_0": torch.zeros(2), "of_1": torch.zeros(2), "of_2": torch.zeros(2)}
    dcp.load(found, storage_reader=FastshardReader(tmp_path))
    assert all(torch.equal(tensor, values(2)) for tensor in found.values())
    ranks.run(2, save_by_itself, tmp_path, options)
    assert len(os.listdir(tmp_path)) == 4
    assert ranks.leftovers(tmp_path) == []


class Failing(DefaultSavePlanner):
    """A planner that lets the last rank fail, or die, at a moment of a save."""

    def __init__(self, moment: str, action: Callable[[], Any]) -> None:
        super().__init__()
        self.moment, self.action = moment, action
        self.last = distributed.get_rank() == distributed.get_world_size() - 1

    def at(self, moment: str) -> None:
        if self.moment == moment and self.last:
            self.action()

    def create_local_plan(self) -> stock_planner.SavePlan:
        self.at("plan")
        return super().create_local_plan()

    def resolve_data(self, write_item: stock_planner.WriteItem) -> Any:
        self.at("write")
        return super().resolve_data(write_item)


class AfterWriting(FastshardWriter):
    """A writer that acts when its rank has written."""

    action: Callable[[], Any] | None = None

    def write_data(self, plan: Any, planner: Any) -> Any:
        done = super().write_data(plan, planner)
        if self.action is not None:
            self.action()
        return done


def full() -> None:
    raise OSError(28, "No space left on device", "x")


def fail_in_between(folder: Path, moment: str, action: Callable[[], Any]) -> str:
    save_in_turn(folder, 2)
    distributed.barrier()
    writer = AfterWriting(folder)
    if moment == "written" and distributed.get_rank() == 1:
        writer.action = action
    try:
        dcp.save({"w": sharded(2) * 2, "n": 3}, storage_writer=writer, planner=Failing(moment, action))
    except BaseException as error:
        said = f"{type(error).__name__} {error}"
    else:
        said = "saved"
    del writer
    gc.collect()  # the error refers to itself, and to the writer
    return said


@pytest.mark.parametrize("moment", ["plan", "write", "written"])
@pytest.mark.parametrize("action", [full, ranks.kill_self])
def test_a_rank_fails_or_dies(tmp_path: Path, moment: str, action: Callable[[], Any]) -> None:
    folder = tmp_path / "x"
    ended = ranks.outcomes(2, fail_in_between, folder, moment, action)
    if action is full:
        for one in ended:
            assert one.value.startswith("CheckpointException")
            assert "No space left" in one.value
            assert "RANK 1" in one.value
        assert ranks.leftovers(tmp_path) == []
    else:
        assert ended[1].signal == 9
        assert ended[0].value != "saved"
    found = {"w": torch.zeros(10, 6), "n": 0}
    dcp.load(found, storage_reader=FastshardReader(folder))
    assert found["n"] == 2
    assert torch.equal(found["w"], values(60).view(10, 6))
    dcp.save({"w": values(3)}, storage_writer=FastshardWriter(folder))
    assert os.listdir(folder) == [SHARD]
    assert ranks.leftovers(tmp_path) == []


def save_asynchronously(folder: Path, kind: str, stager: bool) -> None:
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined] # has a child of its own
    options: dict[str, Any] = {"async_checkpointer_type": AsyncCheckpointerType(kind)}
    if stager:
        options["async_stager"] = DefaultStager(StagingOptions(False, True, True, False))
    writer = FastshardWriter(folder)
    for count in range(2):
        state = {"w": sharded(2) + count, "n": count}
        answer = dcp.async_save(state, storage_writer=writer, checkpoint_id=folder / str(count), **options)
        getattr(answer, "upload_completion", answer).result()
    if stager:
        options["async_stager"].close()


@pytest.mark.parametrize(("kind", "stager"), [("thread", False), ("thread", True), ("process", True)])
def test_asynchronous_saves(tmp_path: Path, kind: str, stager: bool) -> None:
    ranks.run(2, save_asynchronously, tmp_path, kind, stager)
    for count in range(2):
        found = {"w": torch.zeros(10, 6), "n": -1}
        dcp.load(found, storage_reader=FastshardReader(tmp_path / str(count)))
        assert torch.equal(found["w"], values(60).view(10, 6) + count)
        assert found["n"] == count
    assert ranks.leftovers(tmp_path) == []


def save_final_files(folder: Path, kind: str) -> None:
    state = {key: value for key, value in state_of_ranks(2).items() if key not in ("rank", "step")}
    state["tied"] = state["plain"]
    writer = FastshardWriter(folder / "dcp", final=True, max_shard_size=300)
    planner = Doubled() if kind == "planner" else DefaultSavePlanner(enable_plan_caching=kind == "cached")
    for _ in range(2):
        if kind == "asynchronous":
            dcp.async_save(state, storage_writer=writer).result()
        else:
            dcp.save(state, storage_writer=writer, planner=planner)
    fastshard.save_distributed(state, folder / "same", max_shard_size=300)
    found = zeroed(state)
    dcp.load(found, storage_reader=FastshardReader(folder / "dcp")) if "planner" not in kind else None


class Doubled(DefaultSavePlanner):
    """A planner that changes what is saved."""

    def transform_object(self, write_item: stock_planner.WriteItem, object: Any) -> Any:
        return object + object


@pytest.mark.parametrize("kind", ["plain", "cached", "asynchronous", "planner"])
def test_final_files_at_once(tmp_path: Path, kind: str) -> None:
    ranks.run(2, save_final_files, tmp_path, kind)
    names = sorted(os.listdir(tmp_path / "same"))
    assert len(names) > 2
    if kind == "planner":  # the plan does not say what is tied
        index = json.loads((tmp_path / "dcp" / "model.safetensors.index.json").read_text())
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / "dcp" / file, "pt") as opened:
                found = opened.get_tensor(name)
            whole = {"few": values(6).view(3, 2), "plain": values(7), "tied": values(7)}
            expected = whole.get(name, values(60).view(10, 6)) * 2
            assert same(found, torch.tensor([True, False]) if name == "flags" else expected)
        return
    assert sorted(os.listdir(tmp_path / "dcp")) == names
    for name in names:
        assert (tmp_path / "dcp" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    assert ranks.leftovers(tmp_path) == []


def test_final_files_have_no_place_for_objects(tmp_path: Path) -> None:
    with pytest.raises(BaseException, match="Key `n` is invalid"):
        dcp.save({"w": values(3), "n": 3}, storage_writer=FastshardWriter(tmp_path / "x", final=True))
    assert not (tmp_path / "x").exists()
