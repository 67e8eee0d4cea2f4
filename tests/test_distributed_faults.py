# SPDX-License-Identifier: Apache-2.0
"""A rank dies, fails or hangs while many save together: the old checkpoint stays, or the new one stands complete.

Every other rank is told which rank it was, and why if that rank could say so. The next save removes what was left.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from conftest import without_mounts
from ranks import Ended, kill_self
from safetensors.torch import load_file
from torch import distributed

import fastshard
from fastshard.distributed import group, rank_files, rank_save
from fastshard.distributed.group import Group

SECONDS = 3.0
"""That one rank may keep the others waiting."""
SIZE = 3
SHARD = 1500
OLD, NEW = 1.0, 2.0


def full_state(value: float) -> dict[str, torch.Tensor]:
    """A few KiB, or as many MiB as a test asks for."""
    rows = 1 << 15 if "LARGE" in os.environ else 32
    return {
        name: torch.full(shape, value)
        for name, shape in (("rows", (rows, 8)), ("columns", (8, rows)), ("all", (9, 9)))
    }


def save(folder: Path, value: float = NEW, fault: Callable[[], None] | None = None, victim: int = -1) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    full = full_state(value)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    state: dict[str, Any] = {
        "rows": distribute_tensor(full["rows"], mesh, [Shard(0)]),
        "columns": distribute_tensor(full["columns"], mesh, [Shard(1)]),
        "all": full["all"],
    }
    if fault is not None and distributed.get_rank() == victim:
        fault()
    fastshard.save_distributed(state, folder, max_shard_size=SHARD, timeout=SECONDS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With an old checkpoint, and a file that belongs to no checkpoint."""
    return with_old(tmp_path / "model")


def with_old(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    fastshard.save_torch_state_dict(full_state(OLD), folder, max_shard_size=SHARD)
    (folder / "config.json").write_text("{}")
    return folder


def loaded(folder: Path) -> float:
    """The one value that all tensors of the checkpoint have."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {name: load_file(folder / file)[name] for name, file in index["weight_map"].items()}
    assert found.keys() == full_state(OLD).keys() and (folder / "config.json").read_text() == "{}"
    (value,) = {value for tensor in found.values() for value in tensor.flatten().tolist()}
    return float(value)


def assert_told(ended: list[Ended], victim: int, reason: str = "") -> None:
    """Every other rank has an error that names the victim, and no rank waited for long."""
    for rank, end in enumerate(ended):
        if rank != victim:
            assert isinstance(end.error, RuntimeError), (rank, end)
            assert f"rank {victim}" in str(end.error) and reason in str(end.error), (rank, end.error)


def assert_next_save_cleans_up(folder: Path) -> None:
    """One by a single process, which is enough: what is left is found by the folder's name."""
    fastshard.save_distributed(full_state(7.0), folder, max_shard_size=SHARD)
    assert loaded(folder) == 7.0 and ranks.leftovers(folder.parent) == []


def in_plan() -> None:
    rank_save.told_of = lambda *_: kill_self()  # type: ignore[assignment]


def in_decision() -> None:
    rank_save.plan_of = lambda *_: kill_self()  # type: ignore[assignment]


def when_files_are_made() -> None:
    make = rank_files.RankFiles.make

    def made(self: rank_files.RankFiles, *args: Any) -> None:
        make(self, *args)
        kill_self()

    rank_files.RankFiles.make = made  # type: ignore[method-assign]


def in_write() -> None:
    start = rank_save.start

    def started(*args: Any, **options: Any) -> None:
        start(*args, **options)
        kill_self()

    rank_save.start = started  # type: ignore[assignment]


def when_written() -> None:
    finish = rank_save.finish

    def finished(*args: Any) -> None:
        finish(*args)
        kill_self()

    rank_save.finish = finished  # type: ignore[assignment]


def before_publication() -> None:
    Group.from_first = lambda *_: kill_self()  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("victim", [0, SIZE - 1])
@pytest.mark.parametrize("phase", [in_plan, in_write, when_written])
def test_a_rank_is_killed(folder: Path, phase: Callable[[], None], victim: int) -> None:
    ended = ranks.outcomes(SIZE, save, folder, NEW, phase, victim)
    assert ended[victim].signal == signal.SIGKILL
    assert_told(ended, victim)
    assert loaded(folder) == OLD
    assert_next_save_cleans_up(folder)


@pytest.mark.parametrize("phase", [in_decision, when_files_are_made, before_publication])
def test_the_first_rank_is_killed_while_the_others_wait_for_it(
    folder: Path, phase: Callable[[], None]
) -> None:
    ended = ranks.outcomes(SIZE, save, folder, NEW, phase, 0)
    assert ended[0].signal == signal.SIGKILL
    assert_told(ended, 0)
    assert loaded(folder) == OLD
    assert_next_save_cleans_up(folder)


def test_a_rank_is_killed_when_it_has_reported(folder: Path) -> None:
    """The others do not need it any more."""
    ended = ranks.outcomes(SIZE, save, folder, NEW, before_publication, SIZE - 1)
    assert [end.error for end in ended] == [None] * SIZE and ended[-1].signal == signal.SIGKILL
    assert loaded(folder) == NEW and ranks.leftovers(folder.parent) == []


def after_renames(count: int) -> None:
    """The first rank dies when it has changed so many names for the publication."""
    publish = rank_files.RankFiles.publish

    def publishing(self: rank_files.RankFiles, *args: Any) -> None:
        left = count

        def counted(call: Callable[..., None]) -> Callable[..., None]:
            def change(*args: Any, **options: Any) -> None:
                nonlocal left
                if left == 0:
                    kill_self()
                left -= 1
                call(*args, **options)

            return change

        for name in ("rename", "link", "symlink", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        publish(self, *args)
        (Path(os.environ["COMPLETE"])).touch()

    rank_files.RankFiles.publish = publishing  # type: ignore[method-assign]


def save_and_die_after(folder: Path, count: int) -> None:
    save(folder, NEW, lambda: after_renames(count), 0)


def test_the_first_rank_is_killed_in_publication(folder: Path) -> None:
    """After each change of a name: either checkpoint, complete. Whoever waits is told that the outcome is not known."""
    complete, values = folder.parent / "complete", []
    for count in range(0, 60, 9):
        with_old(folder)
        ended = ranks.outcomes(2, save_and_die_after, folder, count, environment={"COMPLETE": str(complete)})
        values.append(loaded(folder))
        if complete.exists():
            break
        assert ended[0].signal == signal.SIGKILL
        assert_told(ended, 0)
        assert_next_save_cleans_up(folder)
    assert complete.exists() and values[0] == OLD and values[-1] == NEW and values == sorted(values)


def full_disk() -> None:
    """Somebody else fills the disk when the files are made, in space that tmpfs does not reserve for them."""
    start = rank_save.start

    def started(plans: Any, *args: Any, **options: Any) -> Any:
        with open(os.environ["FILLER"], "wb", buffering=0) as filler:
            try:
                while filler.write(bytes(4096)):
                    pass
            except OSError:
                pass
        return start(plans, *args, **options)

    rank_save.start = started


def no_larger_file() -> None:
    """The rank may not write beyond a size, as with a quota of its own."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    start = rank_save.start

    def started(*args: Any, **options: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (256, resource.RLIM_INFINITY))
        return start(*args, **options)

    rank_save.start = started


def read_only() -> None:
    """Only this rank sees the folder on a read-only mount."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, private, bind, remount = 0x20000, 0x40000 | 0x4000, 0x1000, 0x20 | 0x1
    mount = os.environ["FOLDER"].encode()
    assert libc.unshare(new_namespace) == 0 and libc.mount(b"none", b"/", None, private, None) == 0
    assert libc.mount(mount, mount, None, bind, None) == 0
    assert libc.mount(mount, mount, None, bind | remount, None) == 0


def not_there() -> None:
    """Another machine, so to speak, which does not share the folder."""
    write = rank_save._Save._write

    def elsewhere(self: Any, task: Any) -> None:
        write(self, task._replace(path=task.path.replace("model", "elsewhere")))

    rank_save._Save._write = elsewhere  # type: ignore[method-assign]


def wrong_tensor() -> None:
    told_of = rank_save.told_of
    rank_save.told_of = lambda state, dtype: told_of({**state, "odd": "text"}, dtype)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (no_larger_file, "File too large"),
        (not_there, "No such file"),
        (wrong_tensor, "Key `odd` is invalid"),
    ],
)
@pytest.mark.parametrize("victim", [0, SIZE - 1])
def test_a_rank_fails(folder: Path, fault: Callable[[], None], reason: str, victim: int) -> None:
    ended = ranks.outcomes(SIZE, save, folder, NEW, fault, victim)
    assert reason in str(ended[victim].error)
    assert ".fastshard" not in str(ended[victim].error) and ".ranks" not in str(ended[victim].error)
    assert_told(ended, victim, reason)
    assert loaded(folder) == OLD and ranks.leftovers(folder.parent) == []


@pytest.mark.parametrize("victim", [0, SIZE - 1])
def test_the_folder_is_read_only_for_one_rank(folder: Path, victim: int) -> None:
    if (
        os.geteuid() != 0
        or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0
    ):
        without_mounts("no mount namespace can be made here")
    ended = ranks.outcomes(SIZE, save, folder, NEW, read_only, victim, environment={"FOLDER": str(folder)})
    assert "Read-only file system" in str(ended[victim].error)
    assert_told(ended, victim, "Read-only file system")
    assert loaded(folder) == OLD and ranks.leftovers(folder.parent) == []


@pytest.mark.parametrize("small_disk", ["tmpfs"], indirect=True)
@pytest.mark.parametrize("victim", [0, SIZE - 1])
def test_the_disk_is_full_when_one_rank_writes(
    small_disk: Path, victim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LARGE", "1")
    folder, filler = with_old(small_disk / "model"), small_disk / "filler"
    environment = {"FILLER": str(filler), "LARGE": "1"}
    ended = ranks.outcomes(SIZE, save, folder, NEW, full_disk, victim, environment=environment)
    failed = [rank for rank, end in enumerate(ended) if "No space left" in str(end.error)]
    assert failed == [0, 1, 2] and loaded(folder) == OLD
    assert ranks.leftovers(small_disk) == []


def hanging() -> None:
    """The rank does not come back, but is alive."""
    rank_save.start = lambda *_, **__: time.sleep(3600)  # type: ignore[assignment]


def stopped_for_a_while() -> None:
    """The rank is stopped, and goes on when the others have given it up and another save has been made."""
    start = rank_save.start

    def started(*args: Any, **options: Any) -> Any:
        waits = f"until [ -e {shlex.quote(os.environ['GO'])} ]; do sleep 0.1; done; kill -CONT {os.getpid()}"
        subprocess.Popen(["sh", "-c", waits])
        os.kill(os.getpid(), signal.SIGSTOP)
        return start(*args, **options)

    rank_save.start = started


def save_and_tell(folder: Path, fault: Callable[[], None], victim: int, given_up: Path) -> None:
    """Leaves a file when the save has failed on this rank."""
    try:
        save(folder, NEW, fault, victim)
    except BaseException:
        (given_up / os.environ["RANK"]).touch()
        raise


@pytest.mark.parametrize("victim", [0, SIZE - 1])
def test_a_rank_hangs(folder: Path, victim: int) -> None:
    ended = ranks.outcomes(SIZE, save, folder, NEW, hanging, victim, hangs=victim)
    assert_told(ended, victim, "within")
    assert loaded(folder) == OLD
    assert_next_save_cleans_up(folder)


@pytest.mark.parametrize("victim", [0, SIZE - 1])
def test_a_rank_that_goes_on_after_the_others_have_given_it_up_spoils_nothing(
    folder: Path, victim: int
) -> None:
    ended: list[Ended] = []
    given_up, go = folder.parent / "given_up", folder.parent / "go"
    given_up.mkdir()
    arguments = (folder, stopped_for_a_while, victim, given_up)
    job = threading.Thread(
        target=lambda: ended.extend(
            ranks.outcomes(SIZE, save_and_tell, *arguments, environment={"GO": str(go)})
        )
    )
    job.start()
    while job.is_alive() and len(list(given_up.iterdir())) < SIZE - 1:
        time.sleep(0.05)
    fastshard.save_distributed(full_state(7.0), folder, max_shard_size=SHARD)
    go.touch()
    job.join()
    assert_told(ended, victim)
    assert ended[victim].error is not None  # of itself, or as its files are gone
    assert loaded(folder) == 7.0
    assert_next_save_cleans_up(folder)


def save_often(folder: Path, value: float, count: int) -> None:
    for _ in range(count):
        save(folder, value)


def test_two_jobs_save_into_one_folder(folder: Path) -> None:
    values, jobs = (
        set[float](),
        [threading.Thread(target=ranks.run, args=(2, save_often, folder, value, 8)) for value in (NEW, 3.0)],
    )
    for job in jobs:
        job.start()
    while any(job.is_alive() for job in jobs):
        values |= values_in(folder)
        time.sleep(0.02)
    assert values <= {OLD, NEW, 3.0} and loaded(folder) in (NEW, 3.0)
    assert ranks.leftovers(folder.parent) == []


def values_in(folder: Path) -> set[float]:
    """Those of the files, each of which is complete whenever it is opened. (The folder may change between two.)"""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        names = [f"/proc/self/fd/{fd}/model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
        found = [tensor for name in names for tensor in load_file(name).values()]
    finally:
        os.close(fd)
    return {value for tensor in found for value in tensor.flatten().tolist()}


class _Vanishing:
    """A store in which the heartbeat of the first rank is removed right after somebody has asked whether it is there."""

    def __init__(self) -> None:
        self._store = distributed.HashStore()
        self._store.set_timeout(timedelta(seconds=20))

    def check(self, keys: list[str]) -> bool:
        found: bool = self._store.check(keys)
        if found and keys[0].endswith("alive/0"):
            self._store.delete_key(keys[0])
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_a_rank_that_leaves_while_another_looks_for_it_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reading a key that is gone would wait for the store's own timeout, and blame the store."""
    store = _Vanishing()
    monkeypatch.setattr(group, "_ranks_and_store", lambda _: (1, 2, store))
    with Group(timeout=0.2) as second:
        store.add("fastshard/1/alive/0", 1)
        with pytest.raises(RuntimeError, match=r"^rank 0 has not come to this step of the save within"):
            second.gather(None)
    assert not store.check(["fastshard/1/alive/0"])
