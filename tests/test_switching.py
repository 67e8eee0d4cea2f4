# SPDX-License-Identifier: Apache-2.0
"""Names of a directory that come and go: killed anywhere, failing anywhere, in the way of others."""

import contextlib
import errno
import itertools
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import names
from safetensors import safe_open
from test_directory import killed_at, write

from fastshard.publish import exchanging, hidden_names, staging, switching
from fastshard.publish.directory import replacing
from fastshard.publish.folder import Folder, open_folder

Files = dict[str, str]
OLD = {f"part-{i}.safetensors": f"old {i}" for i in range(4)} | {"manifest": "old"}
FEWER = {f"part-{i}.safetensors": f"new {i}" for i in range(2)} | {"manifest": "new"}
MORE = {f"part-{i}.safetensors": f"new {i}" for i in range(6)} | {"manifest": "new"}
FOLDERS = {f"rank-{i}/part-0.safetensors": f"new {i}" for i in range(2)} | {"manifest": "new"}
KEPT = {"config": "kept", ".hidden": "kept"}


def parts(name: str) -> bool:
    return os.path.basename(name).startswith("part-")


def save(directory: Path, files: Files, **options: Any) -> None:
    with replacing(str(directory), parts, **options) as stage:
        write(stage, files)


def seen(directory: Path) -> dict[str, str | None]:
    """What a reader finds, by names that are not fastshard's; ``None`` for one that leads nowhere."""
    found: dict[str, str | None] = {}
    for place, folders, files in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".fastshard-")]
        for name in files:
            path = Path(place, name)
            found[str(path.relative_to(directory))] = path.read_text() if path.exists() else None
    return found


def hidden(top: Path) -> list[str]:
    return [name for _, folders, files in os.walk(top) for name in (*folders, *files) if "fastshard-" in name]


@pytest.mark.parametrize(
    ("old", "new", "durable"),
    [
        (OLD, FEWER, True),
        (OLD, MORE, False),
        ({}, MORE, False),
        (KEPT, MORE, False),
        (KEPT | OLD, FEWER, False),
        (KEPT, FOLDERS, True),
        (OLD, {}, False),
    ],
    ids=["fewer", "more", "empty folder", "other files", "fewer and others", "folders", "none"],
)
def test_killed_anywhere_all_names_are_the_old_ones_or_the_new_ones(
    tmp_path: Path, old: Files, new: Files, durable: bool
) -> None:
    before = dict(old)
    after = {name: text for name, text in old.items() if not parts(name)} | new
    states = []
    for count in range(200):
        folder = tmp_path / str(count) / "folder"
        folder.mkdir(parents=True)
        write(folder, old)
        killed = killed_at(count, folder, new, lambda place, files: save(place, files, durable=durable))
        found = seen(folder)
        assert found in (before, after)
        states.append(found == after)
        save(folder, new)
        assert seen(folder) == after
        assert hidden(folder.parent) == []
        if not killed:
            break
    assert states == sorted(states)
    assert not states[0]
    assert states[-1]


def test_killed_anywhere_in_a_folder_that_cannot_be_exchanged_shards_can_be_opened(tmp_path: Path) -> None:
    """There is a folder of somebody else's in it. What matches the pattern is a file for whoever opens it."""
    states = []
    for count in range(300):
        folder = tmp_path / str(count)
        (folder / "other").mkdir(parents=True)
        write(folder / "other", {"log": "kept"})
        write(folder, OLD)
        killed = killed_at(count, folder, FEWER, save)
        found = seen(folder)
        for name in filter(parts, found):
            assert found[name] is not None
            if name not in FEWER and found["manifest"] == "new":
                with safe_open(folder / name, "pt") as file:
                    assert list(file.keys()) == []
        assert {name: found[name] for name in FEWER} in ({n: OLD[n] for n in FEWER}, FEWER)
        states.append(found["manifest"] == "new")
        save(folder, FEWER)
        assert seen(folder) == {**FEWER, "other/log": "kept"}
        assert hidden(folder) == []
        if not killed:
            break
    assert states == sorted(states)
    assert {*states} == {False, True}
    assert count > 20


@pytest.mark.parametrize("depth", [1, 3])
def test_killed_anywhere_a_new_directory_is_not_there_or_complete(tmp_path: Path, depth: int) -> None:
    for count in range(100):
        top = tmp_path / str(count)
        top.mkdir()
        place = top.joinpath(*"abc"[:depth])
        killed = killed_at(count, place, MORE, lambda where, files: save(where, files, create=True))
        assert not (top / "a").exists() or seen(place) == MORE
        save(place, MORE, create=True)
        assert seen(place) == MORE
        assert hidden(top) == []
        if not killed:
            break
    assert count > 3


def test_ranks_make_one_directory_together(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    read, written = os.pipe()
    pids = []
    for rank in range(6):
        pid = os.fork()
        if pid == 0:
            try:
                os.read(read, 1)
                for mark in range(5):
                    with replacing(str(place), lambda n, r=rank: n.startswith(f"{r}-"), create=True) as stage:
                        write(stage, {f"{rank}-{i}": f"{mark}" for i in range(1 + (mark + rank) % 3)})
                os._exit(0)
            finally:
                os._exit(1)
        pids.append(pid)
    os.write(written, b"x" * 6)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 6
    assert seen(place) == {f"{rank}-{i}": "4" for rank in range(6) for i in range(1 + (4 + rank) % 3)}
    assert hidden(tmp_path) == []
    os.close(read)
    os.close(written)


def test_what_others_change_while_the_folder_is_exchanged_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {**OLD, "replaced": "kept", "removed": "kept", "touched": "kept"})
    exchange = exchanging._exchange_names

    def others_come_first(*names: Any) -> None:
        write(tmp_path, {"added": "theirs", "next": "theirs"})
        os.replace(tmp_path / "next", tmp_path / "replaced")
        os.unlink(tmp_path / "removed")
        exchange(*names)

    monkeypatch.setattr(exchanging, "_exchange_names", others_come_first)
    before = os.stat(tmp_path)
    save(tmp_path, FEWER)
    assert os.stat(tmp_path).st_ino != before.st_ino
    assert seen(tmp_path) == {**FEWER, "replaced": "theirs", "touched": "kept", "added": "theirs"}


def test_the_directory_that_is_exchanged_keeps_what_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder, OLD)
    os.chmod(folder, 0o2751)
    if os.getuid() == 0:
        os.chown(folder, 1234, 2345)
        os.chmod(folder, 0o2751)
    with contextlib.suppress(OSError):
        os.setxattr(folder, "user.note", b"mine")
    before, attributes = os.stat(folder), os.listxattr(folder)
    save(folder, MORE)
    after = os.stat(folder)
    assert before.st_ino != after.st_ino
    assert (before.st_mode, before.st_uid, before.st_gid) == (after.st_mode, after.st_uid, after.st_gid)
    assert os.listxattr(folder) == attributes


def test_the_working_directory_is_not_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, OLD)
    monkeypatch.chdir(tmp_path)
    for place in (Path(), tmp_path):
        save(place, MORE)
        assert seen(Path()) == MORE == seen(tmp_path)
        save(place, FEWER)
        assert seen(Path()) == FEWER == seen(tmp_path)


@contextlib.contextmanager
def failing(
    monkeypatch: pytest.MonkeyPatch, calls: tuple[str, ...], at: int, code: int
) -> Iterator[Callable[[], bool]]:
    """The call of that number fails, once; whether there was one."""
    count = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                raise OSError(code, os.strerror(code), *args[:1])
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in calls:
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(exchanging, "_exchange_names", counted(exchanging._exchange_names))
        yield lambda: count >= at


@pytest.mark.parametrize("new", [FEWER, {name: "new" for name in OLD}], ids=["exchanged", "by links"])
@pytest.mark.parametrize(
    ("calls", "code"),
    [
        (("scandir", "listdir"), errno.EIO),
        (("stat", "lstat", "fstat"), errno.EIO),
        (("readlink",), errno.EIO),
        (("open",), errno.EMFILE),
        (("scandir", "dup"), errno.EMFILE),
        (("unlink", "rmdir"), errno.EIO),
        (("rename",), errno.EIO),
        (("link", "symlink", "mkdir"), errno.ENOSPC),
        (("chmod", "fchmod"), errno.EIO),
        (("fsync",), errno.EIO),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_one_call_that_fails_is_an_error_or_makes_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: tuple[str, ...], code: int, new: Files
) -> None:
    tried = 0
    for at in range(1, 400):
        folder = tmp_path / str(at)
        folder.mkdir()
        write(folder, OLD)
        error = None
        with failing(monkeypatch, calls, at, code) as came:
            try:
                save(folder, new, durable=True)
            except OSError as caught:
                error = caught
        found = seen(folder)
        if error is None:
            assert found == new
        elif getattr(error, "published", False):
            assert found == new
            assert "is in place, but not known to be on stable storage" in str(error)
        else:
            assert found == OLD
        if error is not None:
            assert error.errno == code
            assert str(error.filename).startswith(str(tmp_path)) and "fastshard-" not in str(error)
            assert " -> " not in str(error)
        save(folder, new)
        assert seen(folder) == new
        assert hidden(tmp_path) == []
        if not came():
            break
        tried += 1
    else:
        pytest.fail("always another call that can fail")
    assert tried > 0


def test_an_error_after_publication_says_that_the_files_are_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"model": "old"})
    sync = os.fsync
    synced = []

    def failing_last(fd: int) -> None:
        synced.append(os.fstat(fd).st_ino)
        if (tmp_path / "model").read_text() == "new":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(fd)

    monkeypatch.setattr(os, "fsync", failing_last)
    with pytest.raises(OSError, match="is in place, but not known to be on stable storage") as caught:
        save(tmp_path, {"model": "new"}, durable=True)
    assert caught.value.published  # type: ignore[attr-defined]
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(tmp_path))
    assert seen(tmp_path) == {"model": "new"}


def as_user(user: int, work: Callable[[], None]) -> None:
    """Runs it in a forked process of another user."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be other users")


@needs_root
@pytest.mark.parametrize("kind", ["files", "for the victim", "links"])
def test_hidden_folders_that_others_plant_are_left_alone(public: Path, kind: str) -> None:
    """Whatever is in them; and they do not keep anybody from saving."""
    shared, home = public / "shared", public / "home"
    shared.mkdir()
    shared.chmod(0o1777)
    home.mkdir()
    write(home, {"key": "secret"})
    folder = os.open(shared, os.O_RDONLY)
    opened = Folder(str(shared), folder)
    from fastshard.publish.switching import turn_names

    wanted = [
        *itertools.islice(turn_names(opened), 2),
        hidden_names.hidden_name("in"),
        hidden_names.hidden_name("in", 1),
    ]
    opened.close()
    if kind == "for the victim":
        wanted = wanted[:1]

    def plant() -> None:
        os.umask(0)
        for name in (*wanted, ".fastshard-0123456789abcdef.staging"):
            if kind == "links":
                os.symlink(home, shared / name)
                continue
            (shared / name / ".new" / "mine").mkdir(parents=True)
            (shared / name / ".old").mkdir()
            (shared / name / ".now").symlink_to("../fake")
            (shared / name / ".new" / "mine" / "key").write_text("planted")
        (shared / "mine").mkdir()
        (shared / "fake").mkdir()
        (shared / "fake" / "mine").symlink_to(home)
        (shared / "mine" / "key").symlink_to(f"../{wanted[0]}/.now/mine/key")

    as_user(54321, plant)
    planted = sorted(name for name in os.listdir(shared) if name.startswith(".fastshard-"))
    for files in (OLD, MORE, FEWER):
        save(shared, files)
        assert {name: (shared / name).read_text() for name in files} == files
    assert (home / "key").read_text() == "secret"
    assert names(home) == ["key"]
    assert sorted(name for name in os.listdir(shared) if name.startswith(".fastshard-")) == planted
    if kind != "links":
        assert (shared / planted[0] / ".new" / "mine" / "key").read_text() == "planted"


@needs_root
def test_nobody_else_looks_into_what_is_staged(tmp_path: Path) -> None:
    """Others can neither read it nor lock it, while the folder it is in is open to all."""
    tmp_path.chmod(0o755)
    write(tmp_path, {"model": "old", "config": "old"})
    for name in ("model", "config"):
        (tmp_path / name).chmod(0o600)
    with replacing(str(tmp_path)) as stage:
        write(stage, {"model": "new", "config": "new"})
        top = Path(hidden_names.STAGING.search(stage).group()) if hidden_names.STAGING.search(stage) else None
        assert top is not None
        assert stat.S_IMODE((tmp_path / top).stat().st_mode) == 0o700
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("model", "config")} == {0o600}


@pytest.mark.parametrize("target", ["same folder", "other folder"])
def test_a_signal_handler_that_saves_meanwhile(tmp_path: Path, target: str) -> None:
    """At each line of the save that it interrupts. Both saves are complete; the handler's is the later one."""
    import sys

    write(tmp_path, {"a": "old", "b": "old", "c": "old"})
    place = tmp_path if target == "same folder" else tmp_path / "other"
    total = None
    for at in range(0, 2000, 37):
        lines = 0

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal lines
            if "fastshard" not in frame.f_code.co_filename:
                return None
            if event == "line":
                lines += 1
                if lines == at:  # noqa: B023 - called in this round only
                    sys.settrace(None)
                    save(place, {"a": "handler", "b": "handler"}, create=True)
                    sys.settrace(trace)
            return trace

        for name in ("a", "b", "c"):
            (tmp_path / name).write_text("old")
        began = time.monotonic()
        sys.settrace(trace)
        try:
            save(tmp_path, {"a": "outer", "b": "outer", "c": "outer"})
        finally:
            sys.settrace(None)
        assert time.monotonic() - began < 20
        found = seen(tmp_path)
        assert found["c"] == "outer"
        assert found["a"] == found["b"]
        assert hidden(tmp_path) == []
        total = lines
        if at > lines:
            break
    assert total


def test_a_turn_that_another_save_takes_meanwhile_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has it when it is looked for, and somebody has it a moment later. Two turns at once would lose entries of
    manifests."""
    taken: list[staging.Hidden] = []
    waited: list[float] = []

    def adopt(parent: Folder, name: str) -> staging.Hidden | None:
        found = staging.adopt(parent, name)
        if not waited and not taken:
            assert found is None
            other = staging.adopt(parent, name, make=True)
            assert other is not None
            taken.append(other)
        return found

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        taken[0].remove([])
        taken[0].close()

    monkeypatch.setattr(switching, "adopt", adopt)
    monkeypatch.setattr(switching.time, "sleep", sleep)
    with contextlib.closing(open_folder(str(tmp_path))) as folder:
        turn = next(switching.turn_names(folder))
        assert switching.wait_for_turn(folder, turn, [], time.monotonic() + 60)
    assert len(waited) == 1
    assert os.listdir(tmp_path) == []
