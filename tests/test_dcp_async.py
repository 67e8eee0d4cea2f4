# SPDX-License-Identifier: Apache-2.0
"""Our stager for ``dcp.async_save``: what it copies, where to, and when that memory is used again."""

import collections
import copy
import dataclasses
import multiprocessing
import pickle
import time
from collections.abc import Iterator
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed.checkpoint as dcp
from conftest import assert_same
from simcuda import SimCuda
from test_cuda_path import NewEngine, Uploader, filled
from test_cuda_path import current_streams as current_streams
from test_cuda_path import upload as upload
from test_dcp import same, values

from fastshard import Options
from fastshard.dcp import FastshardStager, FastshardWriter
from fastshard.engine.arena import Block
from fastshard.engine.engine import Engine

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
KINDS = ["thread", "process"]
MIB = 1 << 20


@dataclasses.dataclass
class Progress:
    mean: torch.Tensor
    step: int


def state() -> dict[str, Any]:
    base = values(1000)
    layer = torch.nn.Linear(3, 2)
    marked = values(3)
    marked.tensor_parallel = True  # type: ignore[attr-defined]
    return {
        "model": collections.OrderedDict(layer.state_dict()),
        "parameters": dict(layer.named_parameters()),
        "optim": {"state": {0: {"step": torch.tensor(7.0)}}, "groups": [{"lr": 0.5, "betas": (0.9, 0.99)}]},
        "view": base[10:20],
        "again": base[10:20],
        "transposed": values(12).view(3, 4).t(),
        "strided": values(40).view(5, 8)[::2, 1::3],
        "ninth": values(512).view(*[2] * 9).transpose(0, 8),
        "conjugate": torch.complex(values(2), values(2)).conj(),
        "wide": torch.ones(3, dtype=torch.complex128),
        "fp8": values(8).to(torch.float8_e4m3fn),
        "empty": torch.empty(0, 3),
        "sparse": torch.eye(3).to_sparse(),
        "progress": Progress(values(4), 3),
        "marked": marked,
        "pair": (values(2), "text"),
        "names": {"a", "b"},
    }


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors_of(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors_of(one)


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype is other.dtype and torch.equal(one.to_dense().cfloat(), other.to_dense().cfloat())
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, Progress):
        return alike(vars(one), vars(other))
    return bool(one == other)


@pytest.fixture(params=[False, True], ids=KINDS)
def process(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def stager(process: bool) -> Iterator[FastshardStager]:
    made = FastshardStager(process=process)
    yield made
    made.close()


# What is staged.


def test_structure_and_values(stager: FastshardStager) -> None:
    before = state()
    staged = stager.stage(before)
    assert alike(before, staged)
    assert type(staged["model"]) is collections.OrderedDict
    assert staged["optim"]["groups"] is not before["optim"]["groups"]
    assert type(staged["parameters"]["weight"]) is torch.Tensor
    assert staged["marked"].tensor_parallel
    for tensor in tensors_of(before):
        if tensor.layout is torch.strided and not tensor.requires_grad:
            tensor.zero_()
    again = state()
    del again["model"], again["parameters"], before["model"], before["parameters"]
    assert alike(again, {key: staged[key] for key in again})


def test_each_tensor_has_a_storage_of_its_own_size(stager: FastshardStager) -> None:
    """What saves whole storages saves no more than the tensors."""
    base = torch.zeros(MIB)
    tied = torch.ones(7)
    staged = stager.stage({"view": base[5:9], "one": tied.view(7), "other": tied.view(7), "half": tied[:3]})
    assert [tensor.untyped_storage().nbytes() for tensor in tensors_of(staged)] == [16, 28, 28, 12]
    assert staged["one"].data_ptr() == staged["other"].data_ptr()
    assert stager.nbytes < MIB


def test_what_is_asked_for_later(stager: FastshardStager, process: bool) -> None:
    later = FastshardStager(process=process, asynchronous=True)
    future = later.stage({"w": values(100_000), "n": 3})
    later.synchronize_staging()
    assert torch.equal(future.result(300)["w"], values(100_000))
    assert later.stage({"n": 3}).result(300) == {"n": 3}
    later.close()


def test_freed_tensors_are_refused(stager: FastshardStager) -> None:
    freed = torch.ones(100)
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="no memory"):
        stager.stage({"w": freed})


def test_stagers_are_what_async_save_asks_for() -> None:
    from torch.distributed.checkpoint.staging import AsyncStager

    assert isinstance(FastshardStager(), AsyncStager)


# Where it lies.


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all mappings that are made."""
    sizes: list[int] = []
    original = Block.map
    monkeypatch.setattr(Block, "map", lambda self: (sizes.append(self.nbytes), original(self))[1])
    return sizes


def test_memory_is_used_again_when_the_last_tensor_has_died(
    stager: FastshardStager, mapped: list[int]
) -> None:
    tensors = {"a": torch.zeros(MIB), "b": torch.zeros(10)}
    first = stager.stage(tensors)
    tensors["a"].fill_(1)
    second = stager.stage(tensors)
    assert mapped == [6 * MIB, 6 * MIB]
    assert (first["a"] == 0).all()
    assert (second["a"] == 1).all()
    places = {first["a"].data_ptr(), second["a"].data_ptr()}
    held = first["b"][2:]
    del first, second
    for count in range(3):
        staged = stager.stage(tensors)
        assert staged["a"].data_ptr() in places
        assert len(mapped) == 2, count
        del staged
    assert (held == 0).all()


def test_all_tensors_are_copied_by_one_call(
    stager: FastshardStager, mapped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    submit = Engine.submit
    monkeypatch.setattr(
        Engine,
        "submit",
        lambda self, files, **more: (calls.append(len(files[0].items)), submit(self, files, **more))[1],
    )
    tensors = {f"layer.{number}": values(number % 7 + 1) + number for number in range(20_000)}
    for _ in range(2):
        staged = stager.stage(tensors)
        assert same(tensors, staged)
        del staged
    assert calls == [20_000, 20_000]
    assert len(mapped) == 1


def test_what_has_no_room_gets_memory_once(
    process: bool, mapped: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    stager = FastshardStager(process=process, engine=Options(snapshot_budget=2 * MIB))
    for _ in range(2):
        staged = stager.stage({"w": torch.ones(MIB)})
        assert (staged["w"] == 1).all()
        assert stager.nbytes == 0
    assert mapped == [4 * MIB] * 2
    assert "more than the snapshot_budget" in caplog.text
    stager.close()


def test_memory_of_a_closed_stager_goes_with_its_last_tensor(process: bool) -> None:
    stager = FastshardStager(process=process)
    staged = stager.stage({"w": torch.ones(MIB)})
    arena = stager._arena
    stager.close()
    assert (staged["w"] == 1).all()
    assert arena.nbytes == 4 * MIB
    del staged
    assert arena.nbytes == 0
    assert (stager.stage({"w": torch.ones(3)})["w"] == 1).all()
    stager.close()


def test_one_registration_for_all_tensors_of_all_saves(
    sim: SimCuda,
    upload: Uploader,
    current_streams: dict[int, int],
    new_engine: NewEngine,
    process: bool,
) -> None:
    stager = FastshardStager(process=process, engine=new_engine())
    original = {f"w{number}": filled((300, 70), seed=number) for number in range(20)}
    original["transposed"] = filled((64, 32)).t()
    tensors = upload.all(original)
    for _ in range(3):
        staged = stager.stage(tensors)
        for name, tensor in original.items():
            found = staged[name].as_subclass(torch.Tensor)
            assert_same(bytes(found.numpy().tobytes()), bytes(tensor.contiguous().numpy().tobytes()))
            del found
        del staged
    ours, *engines = sim.registered()
    assert ours == stager.nbytes
    assert len(engines) <= 1  # its staging memory
    live = sim.live()["registrations"]
    stager.close()
    assert sim.live()["registrations"] == live - 1


# Into another process.


def test_one_descriptor_for_all_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    stager = FastshardStager(process=True)
    staged = stager.stage({"a": {str(number): values(5) + number for number in range(1000)}, "n": 3})
    sent: list[int] = []
    original = reduction.DupFd
    monkeypatch.setattr(reduction, "DupFd", lambda fd: (sent.append(fd), original(fd))[1])
    pickled = bytes(reduction.ForkingPickler.dumps(staged))
    assert len(sent) == 1
    assert len(pickled) < 100_000
    arrived = pickle.loads(pickled)
    assert type(arrived) is dict
    assert same(dict(staged), arrived)
    assert arrived["a"]["7"].untyped_storage().nbytes() == 20
    staged["a"]["7"].zero_()
    assert (arrived["a"]["7"] == 0).all()  # the same memory
    stager.close()


# Whole saves.


class Gated(FastshardWriter):
    """Writes when a file exists."""

    gate: str = ""

    def write_data(self, plan: Any, planner: Any) -> Any:
        while self.gate and not Path(self.gate).exists():
            time.sleep(0.01)
        return super().write_data(plan, planner)


class Failing(FastshardWriter):
    def write_data(self, plan: Any, planner: Any) -> Any:
        raise OSError("no disk")


def distributed_state(first: int) -> dict[str, Any]:
    from torch.distributed import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = DeviceMesh("cpu", list(range(torch.distributed.get_world_size())))
    whole = values(60, first=first).view(10, 6)
    return {
        "rows": distribute_tensor(whole.clone(), mesh, [Shard(0)]),
        "columns": torch.nn.Parameter(distribute_tensor(whole.clone(), mesh, [Shard(1)])),
        "all": distribute_tensor(whole.clone(), mesh, [Replicate()]),
        "nested": {"w": whole.t(), "n": first},
    }


def blank_state() -> dict[str, Any]:
    found = {name: torch.zeros(10, 6) for name in ("rows", "columns", "all")}
    return {**found, "nested": {"w": torch.zeros(6, 10), "n": -1}}


def holds(folder: Path, first: int, reader: Any = None) -> bool:
    found = blank_state()
    dcp.load(found, checkpoint_id=folder, storage_reader=reader)
    whole = values(60, first=first).view(10, 6)
    right = all(torch.equal(found[name], whole) for name in ("rows", "columns", "all"))
    return right and torch.equal(found["nested"]["w"], whole.t()) and found["nested"]["n"] == first


def reader(folder: Path) -> Any:
    from fastshard.dcp import FastshardReader

    return FastshardReader(folder)


def of_kind(kind: str) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    if kind == "process":
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined] # has a child
    return {"async_checkpointer_type": AsyncCheckpointerType(kind)}


def change(tensors: dict[str, Any]) -> None:
    with torch.no_grad():
        for tensor in tensors_of(tensors):
            tensor.zero_()


def upload_of(answer: Any) -> Any:
    return getattr(answer, "upload_completion", answer)


def finish(stager: FastshardStager, futures: list[Any], gates: list[str]) -> None:
    """Lets saves write, and waits until they have ended and torch's threads have let go of what was staged."""
    for gate in gates:
        Path(gate).touch()
    while futures:
        futures.pop().result(300)
    deadline = time.monotonic() + 300
    while any(not block.idle for block in stager._arena._blocks) and time.monotonic() < deadline:
        time.sleep(0.01)


def save_while_changing(folder: Path, kind: str, asynchronous: bool) -> tuple[int, int]:
    """The tensors have changed before anything is written. Two saves are in flight in one process, and only one where
    those of torch would mix: collectives of several threads, and answers of the process that saves."""
    maps: list[int] = []
    original = Block.map
    Block.map = lambda self: (maps.append(self.nbytes), original(self))[1]  # type: ignore[method-assign]
    stager = FastshardStager(process=kind == "process", asynchronous=asynchronous)
    options = of_kind(kind)
    for lap in range(2):
        answers: list[Any] = []
        gates: list[str] = []
        for count in range(2):
            writer = Gated(folder / f"{lap}.{count}")
            writer.gate = str(folder / f"gate {lap}.{count}.{torch.distributed.get_rank()}")
            gates.append(writer.gate)
            tensors = distributed_state(100 * lap + count)
            answer = dcp.async_save(tensors, storage_writer=writer, async_stager=stager, **options)
            if asynchronous:
                answer.staging_completion.result(300)
            change(tensors)
            answers.append(upload_of(answer))
            del answer
            if kind == "process" or torch.distributed.get_world_size() > 1:
                finish(stager, answers, gates)
        finish(stager, answers, gates)
        torch.distributed.barrier()
    stager.close()
    return len(maps), stager.nbytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_what_was_there_at_the_call_is_saved(
    tmp_path: Path, kind: str, asynchronous: bool, size: int
) -> None:
    for maps, nbytes in ranks.run(size, save_while_changing, tmp_path, kind, asynchronous):
        assert maps == (2 if kind == "thread" and size == 1 else 1)  # one for each save in flight
        assert nbytes == 0
    for lap in range(2):
        for count in range(2):
            folder = tmp_path / f"{lap}.{count}"
            assert holds(folder, 100 * lap + count, reader(folder))


def save_and_fail(folder: Path, kind: str) -> list[Any]:
    stager, options = FastshardStager(process=kind == "process"), of_kind(kind)
    found: list[Any] = []
    for kind_of_writer in (FastshardWriter, Failing, Failing, FastshardWriter):
        answer = dcp.async_save(
            distributed_state(len(found)),
            storage_writer=kind_of_writer(folder),
            async_stager=stager,
            **options,
        )
        error = answer.exception(60)
        found.append("" if error is None else f"{type(error).__name__}: {error}")
        del answer, error
    found.append(stager._arena.peak)
    stager.close()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_save_gives_its_memory_back(tmp_path: Path, kind: str) -> None:
    """At the latest when its error has gone, and until then the next save has memory of its own."""
    for first, second, third, last, peak in ranks.run(2, save_and_fail, tmp_path, kind):
        assert (first, last) == ("", "")
        assert "CheckpointException" in second
        assert "no disk" in second
        assert "no disk" in third
        assert peak <= 3 * 4096
    assert holds(tmp_path, 3, reader(tmp_path))


def save_stock(folder: Path, kind: str) -> None:
    made = FastshardStager(process=kind == "thread")
    answer = dcp.async_save(
        distributed_state(5),
        storage_writer=dcp.FileSystemWriter(folder),
        async_stager=made,
        **of_kind(kind),
    )
    answer.result(300)
    made.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stock_writer_and_the_other_kind_of_stager(tmp_path: Path, kind: str) -> None:
    """A stager that is made for the other way of saving serves this one all the same."""
    ranks.run(2, save_stock, tmp_path, kind)
    assert holds(tmp_path, 5)


class OwnStaging(dcp.FileSystemWriter):
    def stage(self, state_dict: Any) -> Any:
        return copy.deepcopy(state_dict)


def save_installed(folder: Path, kind: str) -> list[int]:
    """Returns how often our stager has been asked, after each of some saves."""
    import fastshard

    asked: list[int] = []
    counts: list[int] = []
    original = FastshardStager.stage

    def stage(self: FastshardStager, state_dict: Any, **more: Any) -> Any:
        asked.append(1)
        return original(self, state_dict, **more)

    FastshardStager.stage = stage  # type: ignore[method-assign]
    options = of_kind(kind)
    ours = FastshardStager(process=kind == "process")
    with fastshard.installed():
        for count, more in enumerate(
            (
                {},
                {"storage_writer": dcp.FileSystemWriter(folder / "1")},
                {"storage_writer": FastshardWriter(folder / "2")},
                {"storage_writer": OwnStaging(folder / "3")},
                {"async_stager": ours},
            )
        ):
            place = {} if "storage_writer" in more else {"checkpoint_id": folder / str(count)}
            saved = distributed_state(count)
            answer = dcp.async_save(saved, **place, **more, **options)
            change(saved)
            answer.result(300)
            counts.append(len(asked))
    ours.close()
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_installed_it_is_the_stager_of_those_who_have_none(tmp_path: Path, kind: str) -> None:
    for counts in ranks.run(2, save_installed, tmp_path, kind):
        assert counts == [1, 2, 3, 3, 4]
    for count in (0, 1, 3, 4):
        assert holds(tmp_path / str(count), count)
    assert holds(tmp_path / "2", 2, reader(tmp_path / "2"))


def stage_sharded(process: bool) -> None:
    from torch.distributed._shard import sharded_tensor
    from torch.distributed._shard.sharding_spec import ChunkShardingSpec

    rank = torch.distributed.get_rank()
    spec = ChunkShardingSpec(dim=0, placements=["rank:0/cpu", "rank:1/cpu"])
    tensor = sharded_tensor.ones(spec, 6, 4)
    tensor.local_shards()[0].tensor.fill_(rank + 1)
    stager = FastshardStager(process=process)
    staged = stager.stage({"w": tensor})["w"]
    tensor.local_shards()[0].tensor.zero_()
    assert type(staged) is type(tensor)
    assert staged.size() == torch.Size([6, 4])
    (shard,) = staged.local_shards()
    assert (shard.tensor == rank + 1).all()
    assert shard.metadata.shard_offsets == tensor.local_shards()[0].metadata.shard_offsets
    stager.close()


def test_sharded_tensors(process: bool) -> None:
    ranks.run(2, stage_sharded, process)
