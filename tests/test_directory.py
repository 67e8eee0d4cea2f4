# SPDX-License-Identifier: Apache-2.0
"""Directories that change all at once: what a reader finds at every moment, whatever happens."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import names, snapshot

from fastshard import _native
from fastshard.publish import directory as directories
from fastshard.publish.directory import creating, replacing
from fastshard.publish.folder import Folder

OPERATIONS = ("chmod", "link", "mkdir", "rename", "rmdir", "symlink", "unlink")


def checkpoint(mark: str, shards: int = 3, single: bool = False) -> dict[str, str]:
    """Files of a checkpoint that say whose they are."""
    files = {"config.json": mark}
    if single:
        return {**files, "model.safetensors": mark}
    shard = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    index = {"mark": mark, "weight_map": {str(i): name for i, name in enumerate(shard)}}
    return {
        **files,
        **{name: f"{mark} {name}" for name in shard},
        "model.safetensors.index.json": json.dumps(index),
    }


def write(directory: str | os.PathLike[str], files: dict[str, str]) -> None:
    for name, text in files.items():
        path = Path(directory, name)
        with contextlib.suppress(FileExistsError):  # asks nothing that a test lets fail, unlike exist_ok=True
            path.parent.mkdir()
        path.write_text(text)


def found(directory: Path) -> str:
    """Whose checkpoint a loader finds: single file first, then the index and what it names."""
    marks = {(directory / "config.json").read_text()}
    if (directory / "model.safetensors").is_file():
        marks.add((directory / "model.safetensors").read_text())
    else:
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        marks.add(index["mark"])
        for name in index["weight_map"].values():
            mark, said = (directory / name).read_text().split(" ")
            assert said == name
            marks.add(mark)
    (mark,) = marks
    return mark


def weights(name: str) -> bool:
    return name.startswith("model")


def save(directory: Path, files: dict[str, str], **options: Any) -> None:
    with replacing(str(directory), weights, **options) as staging:
        write(staging, files)


SHAPES = {
    "same shards": (checkpoint("old"), checkpoint("new")),
    "other shards": (checkpoint("old", 2), checkpoint("new", 3)),
    "single to shards": (checkpoint("old", single=True), checkpoint("new")),
    "shards to single": (checkpoint("old"), checkpoint("new", single=True)),
    "single": (checkpoint("old", single=True), checkpoint("new", single=True)),
}


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_new_files_stand_and_nothing_else_has_changed(tmp_path: Path, shape: str, durable: bool) -> None:
    old, new = SHAPES[shape]
    other = {"README.md": "kept", "optimizer.pt": "kept"}
    write(tmp_path, {**old, **other})
    save(tmp_path, new, durable=durable)
    assert snapshot(tmp_path) == {name: text.encode() for name, text in {**new, **other}.items()}
    assert names(tmp_path) == sorted({**new, **other})
    assert not any(path.is_symlink() for path in tmp_path.iterdir())


def in_child(action: Callable[[], None]) -> int:
    """Runs it in a forked process; its signal."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


def killed_at(
    count: int, directory: Path, files: dict[str, str], saver: Callable[..., None] | None = None
) -> bool:
    """Whether a save was killed before its ``count``-th change of the filesystem, or ended before that."""

    def action() -> None:
        left = count

        def counting(original: Callable[..., Any]) -> Callable[..., Any]:
            def operation(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return operation

        for name in OPERATIONS:
            setattr(os, name, counting(getattr(os, name)))
        (saver or save)(directory, files)

    return in_child(action) == signal.SIGKILL


@pytest.mark.parametrize("shape", SHAPES)
def test_killed_anywhere_the_checkpoint_is_the_old_one_or_the_new_one(tmp_path: Path, shape: str) -> None:
    old, new = SHAPES[shape]
    seen = []
    for count in range(1000):
        directory = tmp_path / str(count)
        directory.mkdir()
        write(directory, {**old, "README.md": "kept"})
        if not killed_at(count, directory, new):
            break
        seen.append(found(directory))
        assert (directory / "README.md").read_text() == "kept"
        save(directory, checkpoint("next"))  # ends what was begun, and leaves nothing of it
        assert found(directory) == "next"
        assert names(directory) == sorted([*checkpoint("next"), "README.md"])
    assert seen == sorted(seen, reverse=True)  # old up to some moment, new from then on
    assert set(seen) == {"old", "new"}


def test_killed_in_a_new_directory_there_is_no_checkpoint_or_a_whole_one(tmp_path: Path) -> None:
    for count in range(100):
        directory = tmp_path / str(count)
        directory.mkdir()
        killed = killed_at(count, directory, checkpoint("new"))
        if (directory / "model.safetensors.index.json").exists():
            assert found(directory) == "new"
        save(directory, checkpoint("next", 2))
        assert names(directory) == sorted(checkpoint("next", 2))
        if not killed:
            break
    assert count > 5


def test_killed_in_new_folders_there_is_nothing_or_everything(tmp_path: Path) -> None:
    """Of several folders none shows the others: a link decides for them, too."""
    files = {"rank-0/weights": "new", "rank-1/weights": "new", "manifest": "new"}
    seen = []
    for count in range(100):
        directory = tmp_path / str(count)
        directory.mkdir()
        killed = killed_at(count, directory, files)
        stands = {(directory / name).is_file() for name in files}
        assert len(stands) == 1
        seen += stands
        save(directory, {"another": "x"})  # ends what was begun
        assert {(directory / name).exists() for name in files} == stands
        assert not any(path.is_symlink() for path in directory.rglob("*"))
        if not killed:
            break
    assert count > 10
    assert seen == sorted(seen)


@pytest.mark.parametrize("exists", [False, True])
def test_killed_while_a_directory_is_created_there_is_nothing_or_all_of_it(
    tmp_path: Path, exists: bool
) -> None:
    files = {"rank-0/weights": "new", "rank-1/weights": "new", "manifest": "new"}
    seen = []
    for count in range(100):
        place = tmp_path / str(count) / "deep"
        place.parent.mkdir()
        if exists:
            place.mkdir()
            place.chmod(0o750)
        killed = killed_at(count, place, files, create)
        seen.append((place / "manifest").exists())
        assert all((place / name).exists() == seen[-1] for name in files)
        if not seen[-1]:
            create(place, files)
        create(place.parent / "next", files)  # removes what was left
        assert names(place.parent) == ["deep", "next"]
        assert stat.S_IMODE(place.stat().st_mode) == (0o750 if exists else 0o777 & ~current_umask())
        if not killed:
            break
    assert count > 5
    assert seen == sorted(seen)


def create(directory: Path, files: dict[str, str]) -> None:
    with creating(str(directory), durable=True) as staging:
        write(staging, files)


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_directory_that_is_not_created_after_all(tmp_path: Path) -> None:
    with pytest.raises(KeyError), creating(str(tmp_path / "a" / "b")) as staging:
        write(staging, {"x": "y"})
        raise KeyError
    assert names(tmp_path) == []
    with pytest.raises(FileNotFoundError) as caught, creating(str(tmp_path / "a")) as staging:
        Path(staging, "sub", "file").write_text("")
    assert caught.value.filename == str(tmp_path / "a" / "sub" / "file")
    write(tmp_path, {"full/x": "y"})
    with pytest.raises(OSError) as refused, creating(str(tmp_path / "full")) as staging:
        write(staging, {"z": "y"})
    assert refused.value.errno == errno.ENOTEMPTY
    assert snapshot(tmp_path / "full") == {"x": b"y"}
    assert names(tmp_path) == ["full"]


def test_obsolete_files_go_in_the_same_moment(tmp_path: Path) -> None:
    write(tmp_path, {"a/one": "old", "a/two": "old", "b": "old", "c": "kept"})
    with replacing(str(tmp_path), obsolete=["a/one", "a/two", "b", "missing"]) as staging:
        write(staging, {"a/one": "new"})
        assert (tmp_path / "b").read_text() == "old"
    assert (tmp_path / "a/one").read_text() == "new"
    assert names(tmp_path) == ["a", "c"]
    assert names(tmp_path / "a") == ["one"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_a_failure_anywhere_puts_everything_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    put_back = 0
    for count in range(100):
        directory = tmp_path / str(count)
        write(directory, checkpoint("old"))
        left = count

        def counting(original: Callable[..., Any]) -> Callable[..., Any]:
            def operation(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left == -1:
                    raise error
                return original(*args, **kwargs)

            return operation

        with monkeypatch.context() as patch:
            for name in ("link", "mkdir", "rename", "symlink"):
                patch.setattr(os, name, counting(getattr(os, name)))
            with contextlib.suppress(type(error)):
                save(directory, checkpoint("new"))
        if left >= 0:
            break
        if found(directory) == "old":
            put_back += 1
            assert names(directory) == sorted(checkpoint("old"))
            assert not any(path.is_symlink() for path in directory.iterdir())
        save(directory, checkpoint("next"))
        assert names(directory) == sorted(checkpoint("next"))
    assert put_back > 10


def test_an_exception_in_the_block_leaves_everything_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, checkpoint("old"))
    with pytest.raises(KeyError), replacing(str(tmp_path), weights) as staging:
        write(staging, checkpoint("new"))
        raise KeyError("x")
    assert names(tmp_path) == sorted(checkpoint("old"))
    assert found(tmp_path) == "old"


def test_directories_made_for_a_failed_save_go_again(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with pytest.raises(KeyError), replacing(str(target), create=True):
        raise KeyError("x")
    assert names(tmp_path) == []
    with replacing(str(target), create=True) as staging:
        write(staging, {"file": "x"})
    assert snapshot(target) == {"file": b"x"}


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(str(tmp_path / "missing")):
        raise AssertionError
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError), replacing(str(tmp_path / "file")):
        raise AssertionError


def test_a_directory_in_the_place_of_a_file_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, checkpoint("old"))
    (tmp_path / "z").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        save(tmp_path, {**checkpoint("new"), "z": "file"})
    assert caught.value.filename == str(tmp_path / "z")
    assert found(tmp_path) == "old"
    assert names(tmp_path) == sorted([*checkpoint("old"), "z"])


def test_errors_name_the_final_place(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, replacing(str(tmp_path)) as staging:
        Path(staging, "sub", "file").write_text("")
    assert caught.value.filename == str(tmp_path / "sub" / "file")


def test_subdirectories(tmp_path: Path) -> None:
    write(tmp_path, {"adapter/weights": "old", "top": "old"})
    with replacing(str(tmp_path)) as staging:
        write(staging, {"adapter/weights": "new", "other/weights": "new", "top": "new"})
    assert (tmp_path / "adapter/weights").read_text() == "new"
    assert (tmp_path / "other/weights").read_text() == "new"
    assert (tmp_path / "top").read_text() == "new"
    assert names(tmp_path) == ["adapter", "other", "top"]
    assert not (tmp_path / "adapter/weights").is_symlink()


def test_replaced_files_hand_on_their_mode_and_owner(tmp_path: Path) -> None:
    write(tmp_path, {"a": "old"})
    os.chmod(tmp_path / "a", 0o640)
    if os.getuid() == 0:
        os.chown(tmp_path / "a", 1234, 2345)
    save(tmp_path, {"a": "new", "b": "new"})
    status = os.stat(tmp_path / "a")
    assert stat.S_IMODE(status.st_mode) == 0o640
    if os.getuid() == 0:
        assert (status.st_uid, status.st_gid) == (1234, 2345)
    assert (tmp_path / "a").read_text() == "new"


def test_symbolic_links_are_replaced_and_their_destinations_kept(tmp_path: Path) -> None:
    """A folder of the hub's cache is such links: what they lead to belongs to others."""
    folder, blobs = tmp_path / "folder", tmp_path / "blobs"
    folder.mkdir()
    write(blobs, {"one": "old", "two": "old"})
    (folder / "model.safetensors").symlink_to("../blobs/one")
    (folder / "config.json").symlink_to("../blobs/two")
    (folder / "model-dangling").symlink_to("nowhere")
    with pytest.raises(KeyError), replacing(str(folder), weights) as staging:
        write(staging, checkpoint("new", single=True))
        raise KeyError
    assert os.readlink(folder / "config.json") == "../blobs/two"
    save(folder, checkpoint("new", single=True))
    assert names(folder) == ["config.json", "model.safetensors"]
    assert found(folder) == "new"
    assert snapshot(blobs) == {"one": b"old", "two": b"old"}


def test_a_reader_sees_the_old_files_until_all_new_ones_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, checkpoint("old"))
    seen = []

    def looking(original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            finally:
                seen.append(found(tmp_path))

        return operation

    with monkeypatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, looking(getattr(os, name)))
        save(tmp_path, checkpoint("new"))
    assert set(seen) == {"old", "new"}
    assert seen == sorted(seen, reverse=True)


@pytest.mark.parametrize("refused", ["link", "symlink"])
def test_without_links_files_are_renamed_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    write(tmp_path, checkpoint("old", 2))

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    renamed = []
    rename = os.rename
    with monkeypatch.context() as patch:
        patch.setattr(os, refused, refuse)
        patch.setattr("fastshard.publish.exchanging._exchange_names", refuse)

        def renaming(a: str, b: str, **at: int) -> None:
            renamed.append(os.path.basename(b))
            rename(a, b, **at)

        patch.setattr(os, "rename", renaming)
        save(tmp_path, checkpoint("new"))
    assert found(tmp_path) == "new"
    assert names(tmp_path) == sorted(checkpoint("new"))
    assert renamed[-1] == "model.safetensors.index.json"


def test_savers_of_one_directory_do_not_disturb_each_other(tmp_path: Path) -> None:
    write(tmp_path, checkpoint("start"))
    errors = []

    def saver(mark: str) -> None:
        try:
            for _ in range(20):
                save(tmp_path, checkpoint(mark))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=saver, args=(mark,)) for mark in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert found(tmp_path) in "abc"
    assert names(tmp_path) == sorted(checkpoint("a"))


def test_a_save_under_way_is_not_taken_for_an_abandoned_one(tmp_path: Path) -> None:
    with replacing(str(tmp_path)) as slow:
        write(slow, {"slow": "x"})
        assert in_child(lambda: save(tmp_path, {"quick": "x"})) == 0
        assert os.path.exists(os.path.join(slow, "slow"))
    assert snapshot(tmp_path) == {"slow": b"x", "quick": b"x"}


def test_who_may_read_the_directory_cannot_delay_saves(tmp_path: Path) -> None:
    write(tmp_path, checkpoint("old"))
    with locked(tmp_path):
        began = time.monotonic()
        save(tmp_path, checkpoint("new"))
        assert time.monotonic() - began < 5
    assert found(tmp_path) == "new"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """All that can be opened in there is locked by somebody else, hidden folders too as soon as they can be."""
    fd = os.open(directory, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(fd)


def open_files(pid: int | str = "self") -> list[str]:
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


def test_what_was_replaced_is_freed_soon(tmp_path: Path) -> None:
    write(tmp_path, checkpoint("old"))
    save(tmp_path, checkpoint("new"))
    save(tmp_path, checkpoint("other", 2))
    for going in directories._freeing:
        going.closing.wait()
    _native.wait_for_closing()
    assert not [path for path in open_files() if str(tmp_path) in path]


@pytest.mark.parametrize("count", (3, 2))
def test_nothing_that_takes_room_loses_its_last_name_before_it_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """The kernel would free it in that call, and wait for a busy disk: 3 shards replace as many, 2 make one go."""
    if not os.major(tmp_path.stat().st_dev):
        pytest.skip("in memory there is no disk to wait for")
    losing: list[tuple[str, bool]] = []

    def lose(folder: Folder, name: str) -> None:
        found = folder.stat(name)
        if found is None or found.st_nlink > 1 or not found.st_blocks or stat.S_ISDIR(found.st_mode):
            return
        descriptors = map(int, os.listdir("/proc/self/fd"))
        losing.append((name, (found.st_dev, found.st_ino) in set(filter(None, map(_identity, descriptors)))))

    rename, unlink = Folder.rename, Folder.unlink

    def watched_rename(self: Folder, name: str, to: Folder, new: str) -> None:
        lose(to, new)
        rename(self, name, to, new)

    def watched_unlink(self: Folder, name: str) -> None:
        lose(self, name)
        unlink(self, name)

    write(
        tmp_path,
        {f"model-{i:05}-of-a-long-name.safetensors": f"old {i}" for i in range(3)} | {"a.json": "{}"},
    )
    monkeypatch.setattr(Folder, "rename", watched_rename)
    monkeypatch.setattr(Folder, "unlink", watched_unlink)
    new = {f"model-{i:05}-of-a-long-name.safetensors": f"new {i}" for i in range(count)} | {"a.json": "[]"}
    save(tmp_path, new)
    assert snapshot(tmp_path) == {name: text.encode() for name, text in new.items()}
    assert len(losing) >= count and all(held for _, held in losing), losing


def _identity(descriptor: int) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        found = os.fstat(descriptor)
        return found.st_dev, found.st_ino
    return None


def test_a_forked_process_does_not_hold_what_its_parent_is_killed_over(tmp_path: Path) -> None:
    """Workers of a data loader, forked while a checkpoint is saved, live on when the trainer was killed."""
    read, written = os.pipe()

    def trainer() -> None:
        with replacing(str(tmp_path)) as staging:
            write(staging, {"model": "new"})
            worker = os.fork()
            if worker == 0:
                os.write(written, b"%d" % os.getpid())
                signal.pause()
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(trainer) == signal.SIGKILL
    worker = int(os.read(read, 100))
    try:
        save(tmp_path, {"model": "next", "config": "next"})
        assert snapshot(tmp_path) == {"model": b"next", "config": b"next"}
        assert names(tmp_path) == ["config", "model"]
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(read)
        os.close(written)


def test_a_forked_process_that_leaves_the_block_removes_nothing(tmp_path: Path) -> None:
    try:
        with replacing(str(tmp_path)) as staging:
            write(staging, {"model": "new"})
            pid = os.fork()
            if pid == 0:
                raise KeyError
            os.waitpid(pid, 0)
            assert os.path.exists(os.path.join(staging, "model"))
    except KeyError:
        os._exit(0)
    assert snapshot(tmp_path) == {"model": b"new"}
