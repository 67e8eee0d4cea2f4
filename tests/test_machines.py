# SPDX-License-Identifier: Apache-2.0
"""Folders on filesystems that machines share, where none sees the others' locks.

Threads, and children that are killed, stand for machines here. ``tests/two_nodes.py`` has a mount for each.
"""

import errno
import fcntl
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_directory import killed_at, write
from test_switching import hidden, seen

from fastshard.distributed.unseen_files import UnseenFiles
from fastshard.formats.naming import MANIFEST_NAME
from fastshard.publish import directory, machines, staging, switching
from fastshard.publish.directory import Replacement, replacing
from fastshard.publish.folder import Folder, open_folder
from fastshard.publish.hidden_names import STAGING, hidden_name
from fastshard.publish.manifests import recorder

HOURS = 2 * machines.UNTOUCHED_SECONDS


@pytest.fixture(autouse=True)
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every save finds all locks free."""
    monkeypatch.setattr(Folder, "shared", True)
    monkeypatch.setattr(staging, "_lock", lambda fd, fresh: True)


def save(place: Path, files: dict[str, str], **options: Any) -> None:
    with replacing(str(place), **options) as stage:
        write(stage, files)


def files_of(machine: str, count: int, text: str) -> dict[str, str]:
    return {f"{machine}-{i}.safetensors": text for i in range(count)}


def age(top: Path, seconds: float) -> None:
    """Lets all that is hidden there have been untouched for so long."""
    for left in top.glob(".fastshard-*"):
        for place, folders, files in os.walk(left, topdown=False):
            for path in (*(os.path.join(place, name) for name in (*folders, *files)), place):
                then = os.lstat(path).st_mtime - seconds
                os.utime(path, (then, then), follow_symlinks=False)


def test_a_save_leaves_alone_what_another_machine_is_saving(tmp_path: Path) -> None:
    first, second = files_of("a", 3, "first"), files_of("b", 3, "second")
    change = Replacement(str(tmp_path))
    write(change.path, first)
    save(tmp_path, second)
    assert seen(tmp_path) == second
    change.publish()
    change.close()
    assert seen(tmp_path) == first | second
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("manifest", [False, True])
def test_machines_save_into_one_folder_at_once(tmp_path: Path, manifest: bool) -> None:
    errors = []

    def work(machine: str) -> None:
        for number in range(10):
            try:
                save(
                    tmp_path,
                    files_of(machine, 2 + number % 3, f"{machine} {number}"),
                    record=recorder("sha256" if manifest else False, True),
                )
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=(machine,)) for machine in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    found = seen(tmp_path)
    sums = found.pop("SHA256SUMS", None)
    assert (found.pop(MANIFEST_NAME, None) is not None) == manifest
    # The last save of each has two files; what the ones before had more stays.
    want = {f"{m}-{i}.safetensors": f"{m} {number}" for m in "abc" for i, number in enumerate((9, 9, 8, 8))}
    assert found == want
    assert len((sums or "").splitlines()) == (len(want) + 1 if manifest else 0)  # the manifest, too
    assert hidden(tmp_path) == []


def test_what_a_killed_save_has_left_goes_when_nobody_has_touched_it_for_an_hour(tmp_path: Path) -> None:
    write(Replacement(str(tmp_path)).path, {"lost": "."})
    save(tmp_path, {"new": "1", "newer": "1"})
    assert len(hidden(tmp_path)) == 1
    age(tmp_path, 0.9 * machines.UNTOUCHED_SECONDS)
    save(tmp_path, {"new": "2", "newer": "2"})
    assert len(hidden(tmp_path)) == 1
    age(tmp_path, HOURS)
    save(tmp_path, {"new": "3", "newer": "3"})
    assert hidden(tmp_path) == []
    assert seen(tmp_path) == {"new": "3", "newer": "3"}


def test_what_a_killed_save_has_left_beside_a_folder_goes_too(tmp_path: Path) -> None:
    target = tmp_path / "model"
    write(Replacement(str(target), create=True).path, {"lost": "."})
    save(target, {"new": "1"}, create=True)
    assert len(hidden(tmp_path)) == 1
    age(tmp_path, HOURS)
    save(target, {"new": "2", "newer": "2"})
    assert hidden(tmp_path) == []
    assert seen(target) == {"new": "2", "newer": "2"}


def test_what_is_left_goes_where_there_are_no_locks_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.undo()
    monkeypatch.setattr(Folder, "shared", True)
    monkeypatch.setattr(fcntl, "flock", refused)
    write(Replacement(str(tmp_path)).path, {"lost": "."})
    save(tmp_path, {"new": "1", "newer": "1"})
    assert len(hidden(tmp_path)) == 1
    age(tmp_path, HOURS)
    save(tmp_path, {"new": "2", "newer": "2"})
    assert hidden(tmp_path) == []


def test_a_file_that_is_being_written_keeps_its_folder(tmp_path: Path) -> None:
    change = Replacement(str(tmp_path))
    write(change.path, {"file": "."})
    age(tmp_path, HOURS)
    Path(change.path, "file").write_text("more")
    save(tmp_path, {"new": "1", "newer": "1"})
    assert Path(change.path, "file").exists()


def test_one_of_two_machines_removes_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = Path(Replacement(str(tmp_path)).path).parent
    real = machines._last_change
    for taken in ("now", "before, by one that was killed, too", "again"):
        age(tmp_path, HOURS)

        def late(folder: Folder) -> float:
            """Another machine takes it between two looks of this one."""
            found = real(folder)
            monkeypatch.setattr(machines, "_last_change", real)
            with open_folder(str(left)) as same:
                assert machines.claim(same)
            return found

        monkeypatch.setattr(machines, "_last_change", late)
        save(tmp_path, {"new": taken, "newer": taken})
        assert left.exists()
        assert len(os.listdir(left)) == 2
    age(tmp_path, HOURS)
    save(tmp_path, {"new": "1", "newer": "1"})
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("call", range(1, 40, 3))
def test_a_machine_is_killed_while_it_puts_files_in_place(
    tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = files_of("x", 3, "old"), files_of("x", 3, "new")
    save(tmp_path, old)
    killed = killed_at(call, tmp_path, new, save)
    before = seen(tmp_path)
    assert before in (old, new)
    monkeypatch.setattr(switching, "_TURN_SECONDS", 0.05)
    monkeypatch.setattr(directory, "_WAIT_SECONDS", 0.05)
    # Whether the other machine is still at it cannot be told yet. Where it had not come to names, nothing is in the way.
    try:
        save(tmp_path, {"other": "1", "others": "1"})
    except OSError as error:
        assert error.errno == errno.EBUSY
        assert "an hour" in str(error)
    assert {name: text for name, text in seen(tmp_path).items() if name in old} == before
    age(tmp_path, HOURS)
    save(tmp_path, {"other": "2", "others": "2"})
    assert seen(tmp_path) == before | {"other": "2", "others": "2"}
    assert hidden(tmp_path) == []
    assert killed or before == new


def test_a_turn_is_given_up_by_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What removes a folder under a name that others wait for could, where paths count, remove theirs."""
    gone = []
    real = Folder.rmdir
    monkeypatch.setattr(Folder, "rmdir", lambda folder, name: (gone.append(name), real(folder, name))[1])
    for text in ("1", "2"):  # new names, and the same names again
        save(tmp_path, {"one": text, "two": text})
    with open_folder(str(tmp_path)) as folder:
        waited_for = {*switching.turn_names(folder), hidden_name("in")}
    removed = [name for name in gone if STAGING.fullmatch(name)]
    assert len(removed) >= 2
    assert not waited_for & {*removed}


def test_the_folder_of_another_rank_goes_with_the_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def nothing(name: str) -> bool:
        return False

    first = UnseenFiles(str(tmp_path), 0, publishes=True, durable=False, stale=nothing)
    other = UnseenFiles(str(tmp_path), 1, publishes=False, durable=False, stale=nothing)
    write(other.path, {"file": "of another"})
    first.publish({"file": other.made("file")})
    assert hidden(tmp_path) == []
    other.close()
    assert seen(tmp_path) == {"file": "of another"}
    assert caplog.messages == []


def test_a_folder_that_another_machine_has_removed_is_not_said_to_be_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """This machine remembers its name for a while."""
    change = Replacement(str(tmp_path))
    inside = Path(change.path)
    inside.rmdir()
    inside.parent.rmdir()
    monkeypatch.setattr(staging.Hidden, "is_in_place", lambda hidden: True)
    change.close()
    assert caplog.messages == []


def test_owners_and_modes_are_what_the_mount_makes_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fstat

    def fstat(fd: int) -> SimpleNamespace:
        found = real(fd)
        fields = {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}
        return SimpleNamespace(**fields | {"st_mode": found.st_mode | 0o777, "st_uid": found.st_uid + 1})

    monkeypatch.setattr(machines, "_owners", {})
    monkeypatch.setattr(os, "fstat", fstat)
    for text in ("1", "2"):
        save(tmp_path, {"one": text, "two": text})
        assert seen(tmp_path) == {"one": text, "two": text}
        assert hidden(tmp_path) == []


def test_a_folder_of_another_user_is_not_ours_there_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = Path(Replacement(str(tmp_path)).path).parent
    monkeypatch.setattr(machines, "_owners", {})
    with open_folder(str(tmp_path)) as folder:
        values = list(os.stat(left))
        assert staging.is_ours(os.stat_result(values), folder)
        values[4] += 1
        assert not staging.is_ours(os.stat_result(values), folder)
        assert os.listdir(tmp_path) == [left.name]
