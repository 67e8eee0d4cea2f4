# SPDX-License-Identifier: Apache-2.0
"""The storage for Meta's ``torch_checkpointing``, beneath its own manager."""

import array
import errno
import gc
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from fastshard import Options

released = pytest.importorskip(
    "torch_checkpointing", reason="torch_checkpointing (torch 2.11) is not installed"
)
from safetensors.torch import load_file  # noqa: E402
from safetensors.torch import save as reference  # noqa: E402
from torch_checkpointing import CheckpointManager, ItemSpec, SyncCheckpointSaverConfig  # noqa: E402
from torch_checkpointing.checkpoint_layout import LayoutInfo, SafetensorsSerialization  # noqa: E402
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig  # noqa: E402

from fastshard.torch_checkpointing import FastshardStorage, FastshardStorageConfig  # noqa: E402

MIB = 1 << 20


def synced_paths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What Python syncs from now on."""
    found: list[str] = []
    original = os.fsync

    def sync(fd: int) -> None:
        found.append(os.readlink(f"/proc/self/fd/{fd}"))
        original(fd)

    monkeypatch.setattr(os, "fsync", sync)
    return found


@pytest.fixture
def storage() -> Any:
    return FastshardStorageConfig().create_storage()


def state() -> dict[str, Any]:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 40)).sum().backward()
    optimizer.step()
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return {"model": weights, "optim": optimizer.state_dict(), "step": 7}


def zeros(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: zeros(one) for key, one in value.items()}
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) else value


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


LAYOUT = LayoutInfo("weights-{rank}.safetensors", SafetensorsSerialization({"format": "pt"}))


def manager(asynchronous: bool, storage_config: Any) -> CheckpointManager:
    more: dict[str, Any] = {} if asynchronous else {"save": SyncCheckpointSaverConfig()}
    return CheckpointManager.Config(
        items={"model": ItemSpec(layout=LAYOUT)}, storage_config=storage_config, **more
    ).build()


# Its own storage.


def test_its_own_default_cannot_write_here(tmp_path: Path) -> None:
    """The reason for this one. A filesystem that takes unaligned direct writes is no place to see it."""
    try:
        LocalFileSystemStorageConfig().create_storage().write(tmp_path / "x", b"x" * 10)
    except OSError as error:
        assert error.errno == errno.EINVAL
    else:
        pytest.skip("this filesystem takes unaligned direct writes")
    ours = FastshardStorageConfig(options=Options(write_path="direct")).create_storage()
    for nbytes in (0, 10, MIB + 3):
        ours.write(tmp_path / "x", os.urandom(nbytes))
        assert ours.getsize(tmp_path / "x") == nbytes


# The manager.


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("durable", [False, True])
def test_save_and_load(tmp_path: Path, asynchronous: bool, durable: bool) -> None:
    made, saved = manager(asynchronous, FastshardStorageConfig(durable=durable)), state()
    future = made.save(str(tmp_path / "c"), saved)
    if future is not None:
        future.result(300)
    found = made.load(str(tmp_path / "c"), zeros(saved))
    made.close()
    assert same(saved, dict(found))
    assert os.listdir(tmp_path) == ["c"]
    file = tmp_path / "c" / "weights-0.safetensors"
    assert same(load_file(file), saved["model"])
    assert file.read_bytes() == reference(saved["model"], {"format": "pt"})
    assert ranks.leftovers(tmp_path) == []


def test_its_own_storage_reads_ours(tmp_path: Path) -> None:
    saved = state()
    made = manager(False, FastshardStorageConfig())
    made.save(str(tmp_path / "c"), saved)
    made.close()
    other = manager(False, LocalFileSystemStorageConfig(use_direct_io=False))
    assert same(saved, dict(other.load(str(tmp_path / "c"), zeros(saved))))
    other.close()


def test_items_are_written_out_of_their_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are made of neither; what is small and no tensor is written as bytes."""
    import safetensors.torch

    monkeypatch.setattr(safetensors.torch, "save", lambda *_, **__: pytest.fail("the whole file in memory"))
    monkeypatch.setattr(FastshardStorage, "stream_write", lambda *_: pytest.fail("a stream"))
    made, saved = manager(False, FastshardStorageConfig()), state()
    made.save(str(tmp_path / "c"), saved)
    assert same(saved, dict(made.load(str(tmp_path / "c"), zeros(saved))))
    made.close()


def test_a_durable_checkpoint_is_synced_with_its_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = synced_paths(monkeypatch)
    made = manager(False, FastshardStorageConfig(durable=True))
    made.save(str(tmp_path / "a" / "c"), state())
    made.close()
    assert synced[-1] == str(tmp_path / "a")
    assert {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "tmp_c")} <= set(synced)
    synced.clear()
    made = manager(False, FastshardStorageConfig())
    made.save(str(tmp_path / "a" / "d"), state())
    made.close()
    assert synced == []


def test_a_committed_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    made = manager(False, FastshardStorageConfig())
    made.save(str(tmp_path / "c"), state())
    with pytest.raises(OSError, match="occupied"):
        made.save(str(tmp_path / "c"), zeros(state()))
    assert same(state(), dict(made.load(str(tmp_path / "c"), zeros(state()))))
    made.close()


# The storage by itself.


@pytest.mark.parametrize("write_path", ["buffered", "direct", "auto"])
@pytest.mark.parametrize("nbytes", [0, 1, 4096, 3 * MIB + 5])
def test_buffers_are_written(tmp_path: Path, write_path: str, nbytes: int) -> None:
    made = FastshardStorageConfig(options=Options(write_path=write_path)).create_storage()
    data = os.urandom(nbytes)
    backwards = memoryview(data[::-1])[::-1]
    for buffer in (data, bytearray(data), memoryview(data), memoryview(bytearray(data)), backwards):
        made.write(tmp_path / "x", buffer)
        assert made.read(tmp_path / "x") == data
    made.write(tmp_path / "x", array.array("d", [1.0, 2.0]))
    assert (tmp_path / "x").read_bytes() == array.array("d", [1.0, 2.0]).tobytes()
    assert os.listdir(tmp_path) == ["x"]


def test_streams_appear_complete_or_not_at_all(tmp_path: Path, storage: Any) -> None:
    path = tmp_path / "x"
    with storage.stream_write(path) as stream:
        torch.save({"w": torch.arange(5)}, stream)
        assert not path.exists()
    assert torch.equal(torch.load(path)["w"], torch.arange(5))
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), storage.get_write_stream(path, None) as stream:
        stream.write(b"half")
        1 / 0  # noqa: B018
    forgotten = storage.stream_write(path)
    forgotten.write(b"half")
    del forgotten
    gc.collect()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x"]
    with pytest.raises(OSError, match=r"No such file"):
        storage.write(tmp_path / "missing" / "x", b"1")


def tree(top: Path, kind: str) -> Path:
    path = top / kind
    if kind == "file":
        path.write_bytes(b"old")
    elif kind != "absent":
        path.mkdir()
        if kind == "populated":
            (path / "old").write_bytes(b"old")
    return path


RENAMES = [
    ("directory", "absent", True),
    ("directory", "empty", True),
    ("directory", "populated", False),
    ("directory", "file", False),
    ("file", "absent", True),
    ("file", "file", True),
    ("file", "empty", False),
    ("file", "populated", False),
]


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize(("source", "target", "allowed"), RENAMES)
def test_its_table_of_renames(tmp_path: Path, durable: bool, source: str, target: str, allowed: bool) -> None:
    made = FastshardStorageConfig(durable=durable).create_storage()
    src, dst = tmp_path / "src", tree(tmp_path, target)
    if source == "directory":
        made.mkdir(src / "deep" / "er")
        made.write(src / "deep" / "er" / "new", b"new")
    else:
        made.write(src, b"new")
    if allowed:
        made.rename(src, dst, is_directory=source == "directory")
        assert not src.exists()
        landed = dst / "deep" / "er" / "new" if source == "directory" else dst
        assert landed.read_bytes() == b"new"
    else:
        with pytest.raises(OSError, match=r"."):
            made.rename(src, dst, is_directory=source == "directory")
        assert src.exists()
        old = dst / "old" if target == "populated" else dst
        assert old.is_dir() or old.read_bytes() == b"old"


def test_the_other_methods(tmp_path: Path, storage: Any) -> None:
    storage.mkdir(tmp_path / "a" / "b")
    storage.mkdir(tmp_path / "a" / "b")
    storage.write(tmp_path / "a" / "x", b"12345")
    assert sorted(storage.ls(tmp_path / "a")) == ["b", "x"]
    assert storage.exists(tmp_path / "a")
    assert storage.isdir(tmp_path / "a")
    assert storage.getsize(tmp_path / "a" / "x") == 5
    assert storage.glob(str(tmp_path / "a" / "x*")) == [str(tmp_path / "a" / "x")]
    with storage.stream_read(tmp_path / "a" / "x") as stream:
        assert stream.read(2) == b"12"
    assert storage.remap_path(tmp_path) == str(tmp_path)
    storage.delete(tmp_path / "a" / "x")
    assert not storage.exists(tmp_path / "a" / "x")
    storage.rmdir(tmp_path / "a")
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileExistsError):
        storage.mkdir(tmp_path, recursive=False)


def test_configurations_travel_to_the_saving_process() -> None:
    made = FastshardStorageConfig(durable=True, options=Options(write_path="direct"))
    assert pickle.loads(pickle.dumps(made)) == made
