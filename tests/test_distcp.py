# SPDX-License-Identifier: Apache-2.0
"""``.distcp`` checkpoints, by our writer and by the stock writers under ``install()``."""

import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed.checkpoint as dcp
from test_dcp import blank, local, same, sharded, state_of_ranks, values, zeroed
from torch import distributed
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

import fastshard
from fastshard.dcp import FastshardFileSystemWriter, FastshardReader

if not hasattr(dcp, "HuggingFaceStorageReader"):
    pytest.skip("torch 2.8 has the writers that these tests compare with", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]


def odd() -> dict[str, Any]:
    """Tensors that are saved in different ways, and what is no tensor."""
    base = values(300 * 400).view(300, 400)
    return {
        "a": values(20).view(4, 5),
        "nested": {"ints": values(3, torch.int64), "n": 7, "s": "text", "list": [1, values(2)]},
        "bool": torch.tensor([True]),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "turned": values(12).view(3, 4).t(),
        "large": base,
        "again": base,
        "large_turned": base.t(),
        "rows": base[3:200],
        "columns": base[:, 2:300],
        "columns_turned": base[:, 2:300].t(),
        "permuted": values(120).view(4, 5, 6).permute(2, 0, 1)[1:3],
        "spread": values(2).expand(3, 2),
        "complex128": values(6, torch.complex128),
        "complex128_columns": values(24, torch.complex128).view(6, 4)[:, 1:],
        "conjugate": values(6, torch.complex64).conj(),
        "negative": values(6, torch.complex64).conj().imag,
        "fp8": values(9).to(torch.float8_e4m3fn),
        "parameter": torch.nn.Parameter(values(3)),
        "huge": values(1 << 20),
        "channels": values(120).view(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "uint16": values(4, torch.uint16),
    }


def assert_same_checkpoint(ours: Path, stock: Path) -> None:
    names = sorted(name for name in os.listdir(stock) if (stock / name).stat().st_size)
    assert sorted(os.listdir(ours)) == names
    for name in names:
        if not name.endswith(".metadata"):
            assert (ours / name).read_bytes() == (stock / name).read_bytes(), name
    mine, theirs = (dcp.FileSystemReader(folder).read_metadata() for folder in (ours, stock))
    for field in ("storage_data", "state_dict_metadata", "planner_data", "version"):
        assert getattr(mine, field) == getattr(theirs, field)


@pytest.mark.parametrize(
    "options", [{}, {"thread_count": 3}, {"single_file_per_rank": False, "sync_files": False}]
)
def test_the_bytes_of_the_stock_writer(tmp_path: Path, options: dict[str, Any]) -> None:
    state = odd()
    dcp.save(state, storage_writer=FastshardFileSystemWriter(tmp_path / "ours", **options))
    dcp.save(state, storage_writer=FileSystemWriter(tmp_path / "stock", **options))
    assert_same_checkpoint(tmp_path / "ours", tmp_path / "stock")
    assert ranks.leftovers(tmp_path) == []


def test_without_checksums(tmp_path: Path) -> None:
    from torch.serialization import set_crc32_options

    set_crc32_options(False)
    try:
        dcp.save(odd(), storage_writer=FastshardFileSystemWriter(tmp_path / "ours"))
        dcp.save(odd(), storage_writer=FileSystemWriter(tmp_path / "stock"))
    finally:
        set_crc32_options(True)
    assert_same_checkpoint(tmp_path / "ours", tmp_path / "stock")


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    state = {str(number): values(4 << 20) for number in range(8)}
    dcp.save(state, storage_writer=FastshardFileSystemWriter(tmp_path))
    figures = fastshard.stats()
    assert figures is not None
    assert figures.nbytes > 128 << 20
    assert figures.staging_nbytes <= 8 << 20


def test_objects_are_read_by_the_stock_reader(tmp_path: Path) -> None:
    state = {"n": 3, "s": "text", "w": values(5), "deep": {"x": [values(2), 4]}}
    dcp.save(state, storage_writer=FastshardFileSystemWriter(tmp_path))
    found = blank(state)
    dcp.load(found, storage_reader=dcp.FileSystemReader(tmp_path))
    assert same(state, found)


def test_a_folder_appears_with_the_checkpoint(tmp_path: Path) -> None:
    writer = FastshardFileSystemWriter(tmp_path / "x", overwrite=False)
    writer.set_up_storage_writer(True, rank=0, use_collectives=True)
    writer.prepare_local_plan(dcp.SavePlan([]))
    assert not (tmp_path / "x").exists()
    dcp.save({"w": values(3)}, storage_writer=writer)
    assert sorted(os.listdir(tmp_path / "x")) == [".metadata", "__0_0.distcp"]
    with pytest.raises(BaseException, match="already exists"):
        dcp.save({"w": values(3)}, storage_writer=writer)
    assert isinstance(writer, FileSystemWriter)
    assert pickle.loads(pickle.dumps(writer)).path == tmp_path / "x"


class Shouting(dcp.filesystem.StreamTransformExtension):
    """An extension that changes bytes."""

    @staticmethod
    def from_descriptor(version: str) -> Any:
        return Shouting()

    @staticmethod
    def registry_name() -> str:
        return "shouting"

    def get_descriptor(self) -> str:
        return "shouting/1"

    def transform_to(self, output: Any) -> Any:
        return output

    def transform_from(self, input: Any) -> Any:
        return input


def test_extensions_are_left_to_the_stock_writer(tmp_path: Path) -> None:
    dcp.save({"w": values(3)}, storage_writer=FastshardFileSystemWriter(tmp_path, _extensions=[Shouting()]))
    (info,) = dcp.FileSystemReader(tmp_path).read_metadata().storage_data.values()
    assert info.transform_descriptors == ["shouting/1"]


class InAFolder(FileSystem):
    """Its files lie in a folder of the one that they are named in."""

    def concat_path(self, path: Any, suffix: str) -> Any:
        return super().concat_path(Path(path, "folder"), suffix)

    def mkdir(self, path: Any) -> None:
        super().mkdir(Path(path, "folder"))


def test_another_file_system_is_left_to_the_stock_writer(tmp_path: Path) -> None:
    writer = FastshardFileSystemWriter(tmp_path)
    writer.fs = InAFolder()
    dcp.save({"w": values(3)}, storage_writer=writer)
    assert os.listdir(tmp_path) == ["folder"]
    assert ".metadata" in os.listdir(tmp_path / "folder")


# Several ranks


def save_both(folder: Path, size: int, options: dict[str, Any]) -> None:
    state = state_of_ranks(size)
    dcp.save(state, storage_writer=FastshardFileSystemWriter(folder / "ours"), **options)
    dcp.save(state, storage_writer=FileSystemWriter(folder / "stock"), **options)
    found = zeroed(state)
    dcp.load(found, storage_reader=dcp.FileSystemReader(folder / "ours"), no_dist=bool(options))
    assert same(local(state), local(found))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_write_the_bytes_of_the_stock_writer(tmp_path: Path, size: int) -> None:
    ranks.run(size, save_both, tmp_path, size, {})
    assert len(os.listdir(tmp_path / "ours")) == size + 1
    assert_same_checkpoint(tmp_path / "ours", tmp_path / "stock")
    assert ranks.leftovers(tmp_path) == []


def save_of_rank(folder: Path, stock: bool) -> None:
    state = {"w": values(3) + distributed.get_rank(), "n": distributed.get_rank()}
    kind = FileSystemWriter if stock else FastshardFileSystemWriter
    dcp.save(state, storage_writer=kind(folder), use_collectives=False)
    found = blank(state)
    dcp.load(found, storage_reader=dcp.FileSystemReader(folder))
    assert same(state, found)


def test_ranks_that_save_by_themselves(tmp_path: Path) -> None:
    dcp.save({"w": values(4)}, storage_writer=FastshardFileSystemWriter(tmp_path / "ours"))
    for size in (3, 2):
        ranks.run(size, save_of_rank, tmp_path / "ours", False)
        ranks.run(size, save_of_rank, tmp_path / f"stock{size}", True)
        assert sorted(os.listdir(tmp_path / "ours")) == sorted(os.listdir(tmp_path / f"stock{size}"))
    for name in os.listdir(tmp_path / "ours"):
        if not name.endswith(".metadata"):
            assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "stock2" / name).read_bytes()
    assert ranks.leftovers(tmp_path) == []


def save_rows(folder: Path, size: int, dies: bool) -> str:
    kind = Dying if dies and distributed.get_rank() == 1 else FastshardFileSystemWriter
    try:
        dcp.save({"w": sharded(size) * size, "n": size}, storage_writer=kind(folder))
    except BaseException as error:
        return str(error)
    return ""


class Dying(FastshardFileSystemWriter):
    def _write_data(self, planner: Any, file_queue: Any) -> Any:
        super()._write_data(planner, file_queue)
        ranks.kill_self()


def test_a_rank_dies(tmp_path: Path) -> None:
    ranks.run(3, save_rows, tmp_path, 3, False)
    first, second = ranks.outcomes(2, save_rows, tmp_path, 2, True)
    assert first.value
    assert second.signal == 9
    found = {"w": torch.zeros(10, 6), "n": 0}
    dcp.load(found, storage_reader=dcp.FileSystemReader(tmp_path))
    assert same(found, {"w": values(60).view(10, 6) * 3, "n": 3})
    ranks.run(2, save_rows, tmp_path, 2, False)
    assert sorted(os.listdir(tmp_path)) == [".metadata", "__0_0.distcp", "__1_0.distcp"]


# Under install()


class OwnFileSystem(FileSystem):
    """As a subclass has it that saves elsewhere."""


class Elsewhere(FileSystemWriter):
    def __init__(self, path: Any) -> None:
        super().__init__(path)
        self.fs = OwnFileSystem()


class WithFinish(FileSystemWriter):
    seen: tuple[str, ...] = ()

    def finish(self, metadata: Any, results: Any) -> None:
        self.seen = tuple(os.listdir(self.path))
        super().finish(metadata, results)


class Named(FileSystemWriter):
    """Nothing of a save is its own."""


@pytest.mark.parametrize(
    ("kind", "ours"),
    [(FileSystemWriter, True), (Named, True), (Elsewhere, False), (WithFinish, False), (None, True)],
)
def test_which_writers_go_through_the_engine(tmp_path: Path, kind: Any, ours: bool) -> None:
    dcp.save(odd(), storage_writer=FileSystemWriter(tmp_path / "stock"))
    before = counted()
    with fastshard.installed():
        if kind is None:  # as Lightning and transformers call it
            dcp.save(odd(), checkpoint_id=tmp_path / "x")
        else:
            writer = kind(tmp_path / "x")
            dcp.save(odd(), storage_writer=writer)
            assert type(writer) is kind
            assert isinstance(writer, FileSystemWriter)
    assert counted() - before == ours
    assert_same_checkpoint(tmp_path / "x", tmp_path / "stock")
    dcp.save(odd(), storage_writer=FileSystemWriter(tmp_path / "y"))
    assert counted() - before == ours
    if kind is WithFinish:
        assert writer.seen == ("__0_0.distcp",)


def counted() -> int:
    saved = fastshard.status().saved
    return saved["dcp.save"].saves if "dcp.save" in saved else 0


def test_the_class_is_as_before_afterwards() -> None:
    names = ("__init__", "set_up_storage_writer", "_write_data", "finish")
    home = FileSystemWriter.__mro__[1]
    before = [vars(home)[name] for name in names]
    with fastshard.installed():
        assert all(vars(home)[name] is not old for name, old in zip(names, before))
    assert [vars(home)[name] for name in names] == before


@pytest.mark.parametrize("distributed_layout", [True, False])
def test_the_writer_of_hugging_face_files(tmp_path: Path, distributed_layout: bool) -> None:
    state = {"a": values(6).view(2, 3), "b": values(4)}
    options = {"save_distributed": distributed_layout}
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path / "stock"), **options))
    before = counted()
    with fastshard.installed():
        dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path / "x"), **options))
        dcp.save(
            {**state, "n": 3, "tied": state["a"].t()},
            storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path / "more"), **options),
        )
        writer = dcp.HuggingFaceStorageWriter(
            str(tmp_path / "whole"), save_distributed=True, enable_consolidation=True
        )
        dcp.save(state, storage_writer=writer)
    assert counted() - before == 3
    assert sorted(os.listdir(tmp_path / "x")) == sorted(os.listdir(tmp_path / "stock"))
    found = {**blank(state), "n": 0, "tied": torch.zeros(3, 2)}
    dcp.load(found, storage_reader=FastshardReader(tmp_path / "more"))
    assert same(found, {**state, "n": 3, "tied": state["a"].t()})
    assert "model.safetensors.index.json" in os.listdir(tmp_path / "whole")


def save_by_themselves_as_hugging_face(folder: Path) -> None:
    rank = distributed.get_rank()
    with fastshard.installed():
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save({f"of_{rank}": values(2)}, storage_writer=writer, use_collectives=False)


def test_ranks_do_not_overwrite_each_other_under_install(tmp_path: Path) -> None:
    ranks.run(2, save_by_themselves_as_hugging_face, tmp_path)
    found = {"of_0": torch.zeros(2), "of_1": torch.zeros(2)}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)))
    assert same(found, {"of_0": values(2), "of_1": values(2)})


def save_in_another_process(folder: Path) -> list[int]:
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined] # has a child of its own
    fastshard.install()
    files = []
    for count in range(2):
        stager = DefaultStager(StagingOptions(False, True, True, False))
        answer = dcp.async_save(
            {"w": sharded(2) + count},
            checkpoint_id=folder,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
            async_stager=stager,
        )
        answer.upload_completion.result()
        stager.close()
        files.append((folder / f"__{distributed.get_rank()}_0.distcp").stat().st_ino)
    return files


def test_a_stock_writer_in_another_process_goes_through_the_engine(tmp_path: Path) -> None:
    for first, second in ranks.run(2, save_in_another_process, tmp_path):
        assert first != second  # the stock writer writes into the old file
    found = {"w": torch.zeros(10, 6)}
    dcp.load(found, storage_reader=dcp.FileSystemReader(tmp_path))
    assert same(found["w"], values(60).view(10, 6) + 1)
    assert ranks.leftovers(tmp_path) == []
