# SPDX-License-Identifier: Apache-2.0
"""Files that torch_save writes over because a new one in their place would not be what others see, and those that it
refuses because torch.save does."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import os
import pickle
import resource
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same, without_mounts
from helpers import filled, names, open_descriptors, preload, run, run_bare

from fastshard import ArchiveError, _native, torch_save
from fastshard.api import archive, archive_by_torch
from fastshard.api.archive_errors import archive_error, why_torch_failed
from fastshard.base import activity
from fastshard.publish import in_place

pytestmark = pytest.mark.usefixtures("no_hang")

SMALL = {"a": torch.arange(20.0), "step": 3}
LARGE = {"a": filled((1 << 20,), torch.uint8), "step": 3}
both = pytest.mark.parametrize("obj", [SMALL, LARGE], ids=["small", "large"])


@pytest.fixture
def reasons(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(archive, "count_left", lambda _, reason: found.append(reason))
    return found


def bytes_of(obj: object, path: Path | str) -> bytes:
    """What torch.save writes to a file of this name."""
    with tempfile.TemporaryDirectory() as folder:
        place = f"{folder}/{os.path.basename(path)}"
        torch.save(obj, place)
        return Path(place).read_bytes()


def in_child(work: Callable[[], object]) -> str:
    """What it returns, or raises, in a forked process; empty if that is killed."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads in the parent
        child = os.fork()
    if not child:
        try:
            said = str(work())
        except BaseException as error:
            said = repr(error)
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def read(descriptor: int) -> bytes:
    return os.pread(descriptor, 1 << 24, 0)


# Who has it open already.


@both
def test_a_named_temporary_file(tmp_path: Path, obj: object, reasons: list[str]) -> None:
    with tempfile.NamedTemporaryFile(dir=tmp_path) as file:
        torch_save(obj, file.name)
        assert_same(read(file.fileno()), bytes_of(obj, file.name))
        file.seek(0)
        assert torch.load(file, weights_only=True)["step"] == 3
        assert names(tmp_path) == [os.path.basename(file.name)]
    assert reasons == ["a file that this process holds open"]


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR | os.O_APPEND])
def test_a_descriptor_of_any_kind(tmp_path: Path, flags: int) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(b"old")
    descriptor = os.open(path, flags)
    more = [os.open(os.devnull, os.O_RDONLY) for _ in range(300)]
    try:
        torch_save(SMALL, path)
        assert_same(read(descriptor), bytes_of(SMALL, path))
    finally:
        for one in (descriptor, *more):
            os.close(one)
    before = path.stat().st_ino
    torch_save(SMALL, path)  # nobody has it open any more
    assert path.stat().st_ino != before


def test_descriptors_of_a_file(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "m.pt", os.O_CREAT | os.O_RDWR)
    others = [os.dup(descriptor), os.open(tmp_path / "m.pt", os.O_RDONLY), os.open(os.devnull, os.O_RDONLY)]
    try:
        assert _native.holders_of(descriptor) == (sorted(others[:2]), True)
    finally:
        for one in (descriptor, *others):
            os.close(one)


def test_the_old_format_held_open(tmp_path: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=tmp_path) as file:
        torch_save(SMALL, file.name, _use_new_zipfile_serialization=False)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=True)["a"], SMALL["a"])


@pytest.mark.parametrize("where", ["/proc/self/fd/{}", "/dev/fd/{}", "{link}", "{link to link}"])
@pytest.mark.parametrize("nameless", ["memfd", "unlinked"])
def test_paths_of_descriptors(tmp_path: Path, where: str, nameless: str) -> None:
    descriptor = (
        os.memfd_create("m") if nameless == "memfd" else os.open(tmp_path, os.O_TMPFILE | os.O_RDWR, 0o600)
    )
    (tmp_path / "link").symlink_to(f"/proc/self/fd/{descriptor}")
    (tmp_path / "again").symlink_to("link")
    here = set(os.listdir("."))
    try:
        if where.startswith("{link"):
            where = str(tmp_path / ("link" if where == "{link}" else "again"))
        torch_save(SMALL, where.format(descriptor))
        assert_same(read(descriptor), bytes_of(SMALL, where.format(descriptor)))
    finally:
        os.close(descriptor)
    assert names(tmp_path) == ["again", "link"] and set(os.listdir(".")) == here


def test_standard_output(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        script = "import torch, fastshard\nfastshard.torch_save({'a': torch.ones(9)}, '/dev/stdout')"
        done = run_bare(script, stdout=out, stderr=None, capture_output=False)
    assert done.returncode == 0
    assert_same((tmp_path / "out").read_bytes(), bytes_of({"a": torch.ones(9)}, "stdout"))
    assert names(tmp_path) == ["out"]


def test_anothers_descriptor(tmp_path: Path, reasons: list[str]) -> None:
    """By way of /proc, even where the file has a name: its holder goes on with the file that it has."""
    (tmp_path / "m.pt").touch()
    with (
        (tmp_path / "m.pt").open() as held,
        subprocess.Popen(["sleep", "60"], pass_fds=[held.fileno()]) as other,
    ):
        number = held.fileno()
        held.close()
        before = (tmp_path / "m.pt").stat().st_ino
        torch_save(SMALL, f"/proc/{other.pid}/fd/{number}")
        other.kill()
    assert (tmp_path / "m.pt").stat().st_ino == before
    assert_same((tmp_path / "m.pt").read_bytes(), bytes_of(SMALL, str(number)))
    assert reasons == ["a path that leads through /proc"]


def test_a_file_that_is_mapped_is_replaced(tmp_path: Path) -> None:
    """Cut under a mapping it would kill who reads it, whoever has it open besides."""
    path = tmp_path / "m.pt"
    torch.save(LARGE, path)
    mapped = torch.load(path, mmap=True, weights_only=True)
    with path.open("rb"):
        torch_save(mapped, path)
    assert torch.equal(mapped["a"], LARGE["a"])
    assert_same(path.read_bytes(), bytes_of(LARGE, path))


def test_the_engines_own_descriptor_is_waited_for(tmp_path: Path, reasons: list[str]) -> None:
    """It has the file open for a moment when the save has returned."""
    path = tmp_path / "m.pt"
    torch_save(LARGE, path)
    before, descriptor = path.stat().st_ino, os.open(path, os.O_RDONLY)
    closing = threading.Timer(0.1, os.close, [descriptor])
    closing.start()
    torch_save(LARGE, path)
    closing.join()
    assert path.stat().st_ino != before and reasons == []


def test_the_engines_own_nameless_descriptor_is_known(tmp_path: Path, reasons: list[str]) -> None:
    path = tmp_path / "m.pt"
    in_place._made.clear()  # the number of a file of another test, which is gone, may be this one's now
    descriptor = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR, 0o600)
    folder = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY)
    try:
        os.link(str(descriptor), path, src_dir_fd=folder, follow_symlinks=True)
        torch_save(SMALL, path)
        assert reasons == ["a file that this process holds open"]  # not the engine's
        in_place.note_made(str(path))
        torch_save(LARGE, path)
        assert len(reasons) == 1 and path.stat().st_ino != os.fstat(descriptor).st_ino
    finally:
        os.close(descriptor)
        os.close(folder)


# What else knows it.


@both
def test_hard_links(tmp_path: Path, obj: object, reasons: list[str]) -> None:
    (tmp_path / "m.pt").write_bytes(b"old")
    os.link(tmp_path / "m.pt", tmp_path / "other.pt")
    torch_save(obj, tmp_path / "m.pt")
    assert_same((tmp_path / "other.pt").read_bytes(), bytes_of(obj, "m.pt"))
    assert reasons == ["a file with several names (hard links)"]


@both
def test_a_mounted_file(tmp_path: Path, obj: object, reasons: list[str]) -> None:
    for name in ("host.pt", "m.pt"):
        (tmp_path / name).touch()
    mount = ["mount", "--bind", tmp_path / "host.pt", tmp_path / "m.pt"]
    if subprocess.run(mount, capture_output=True).returncode:
        without_mounts("mounting a file is not allowed here")
    try:
        torch_save(obj, tmp_path / "m.pt")
    finally:
        subprocess.run(["umount", tmp_path / "m.pt"], check=True)
    assert_same((tmp_path / "host.pt").read_bytes(), bytes_of(obj, "m.pt"))
    assert reasons == ["a file that is a mount point"] and names(tmp_path) == ["host.pt", "m.pt"]


@pytest.mark.parametrize("mounted", [False, True])
def test_a_mount_is_known_without_statx(tmp_path: Path, preloaded: Path, mounted: bool) -> None:
    for name in ("host.pt", "m.pt"):
        (tmp_path / name).touch()
    mount = ["mount", "--bind", tmp_path / "host.pt", tmp_path / "m.pt"]
    if mounted and subprocess.run(mount, capture_output=True).returncode:
        without_mounts("mounting a file is not allowed here")
    script = "from fastshard import _native; print(_native.look_at_file(os.fsencode(sys.argv[1])))"
    try:
        done = run(script, tmp_path / "m.pt", env=preload(preloaded, "statx"))
    finally:
        if mounted:
            subprocess.run(["umount", tmp_path / "m.pt"], check=True)
    expected = ("a file that is a mount point" if mounted else None, False)
    assert done.stdout.strip() == str(expected), done.stderr


@both
@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.EPERM])
def test_what_shows_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obj: object, number: int) -> None:
    path = tmp_path / "m.pt"

    def fail(*_: object) -> None:
        raise ArchiveError(number, os.strerror(number), str(path))

    monkeypatch.setattr(archive, "_write", fail)
    monkeypatch.setattr(archive, "new_file", fail)
    with pytest.raises(ArchiveError):
        torch_save(obj, path)  # there is none that could be written over
    assert names(tmp_path) == []
    path.write_bytes(b"old")
    before = path.stat().st_ino
    torch_save(obj, path)
    assert path.stat().st_ino == before and names(tmp_path) == ["m.pt"]
    assert_same(path.read_bytes(), bytes_of(obj, path))


# Who may write.


def save_as_another(path: Path, format_: str) -> str:
    def work() -> str:
        if not os.getuid():
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        activity._forget()
        try:
            torch_save({"a": torch.ones(5)}, path, _use_new_zipfile_serialization=format_ == "new")
        except OSError as error:
            kinds = isinstance(error, RuntimeError), isinstance(error, PermissionError)
            return f"{kinds} {error.errno} {error.filename}"
        return f"saved: {', '.join(activity.left().get('torch.save', {}))}"

    return in_child(work)


@pytest.fixture
def shared(public: Path) -> Path:
    """A folder that another user reaches."""
    (public / "own").mkdir()
    return public


def given_away(path: Path, mode: int) -> Path:
    if not path.exists():
        path.write_bytes(b"old")
    if not os.getuid():
        os.chown(path, 65534, 65534)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("format_", ["new", "old"])
def test_a_file_that_may_not_be_written_to(shared: Path, format_: str) -> None:
    given_away(shared / "own", 0o755)
    path = given_away(shared / "own" / "m.pt", 0o444)
    assert save_as_another(path, format_) == f"(True, True) {errno.EACCES} {path}"
    assert path.read_bytes() == b"old" and names(shared / "own") == ["m.pt"]


@pytest.mark.parametrize("format_", ["new", "old"])
def test_a_folder_that_may_not_be_written_to(shared: Path, format_: str) -> None:
    path = given_away(shared / "own" / "m.pt", 0o644)
    (shared / "own").chmod(0o555)
    link = shared / "link.pt"
    link.symlink_to(path)
    assert save_as_another(link, format_) == "saved: a folder that may not be written to"
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(5)) and link.is_symlink()


def test_another_users_file_stays_theirs(shared: Path) -> None:
    if os.getuid():
        pytest.skip("needs another user's file")
    given_away(shared / "own", 0o777)
    path = shared / "own" / "m.pt"
    path.write_bytes(b"old")
    path.chmod(0o666)
    assert save_as_another(path, "new") == "saved: another user's or group's file"
    assert path.stat().st_uid == 0 and torch.load(path, weights_only=True)["a"].sum() == 5


@pytest.mark.parametrize("format_", [True, False])
def test_an_immutable_file(tmp_path: Path, format_: bool) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(b"old")
    if not shutil.which("chattr") or subprocess.run(["chattr", "+i", path], capture_output=True).returncode:
        pytest.skip("chattr +i is not possible here")
    try:
        with pytest.raises(ArchiveError) as raised:
            torch_save(SMALL, path, _use_new_zipfile_serialization=format_)
        assert raised.value.errno == errno.EPERM and path.read_bytes() == b"old"
    finally:
        subprocess.run(["chattr", "-i", path], check=True)


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("format_", [True, False])
def test_a_planted_link_in_a_sticky_folder(
    sticky: Path, tmp_path: Path, dangling: bool, format_: bool
) -> None:
    if not dangling:
        (tmp_path / "mine.pt").write_bytes(b"old")
    link = sticky / "link.pt"
    link.symlink_to(tmp_path / "mine.pt")
    os.chown(link, 65534, 65534, follow_symlinks=False)
    with pytest.raises(ArchiveError) as raised:
        torch_save(SMALL, link, _use_new_zipfile_serialization=format_)
    assert raised.value.errno == errno.EACCES and raised.value.filename == str(link)
    assert names(tmp_path) == (["shared"] if dangling else ["mine.pt", "shared"])
    assert dangling or (tmp_path / "mine.pt").read_bytes() == b"old"


# Asked for.


@pytest.mark.parametrize("options", [{}, {"durable": True}, {"keep_cached": False}], ids=str)
@both
def test_in_place(tmp_path: Path, obj: object, options: dict[str, bool], reasons: list[str]) -> None:
    path = tmp_path / "m.pt"
    torch_save(obj, path, in_place=True, **options)
    before = path.stat().st_ino
    torch_save([obj], path, in_place=True, **options)
    assert path.stat().st_ino == before
    assert_same(path.read_bytes(), bytes_of([obj], path))
    assert reasons == ["in_place=True"] * 2
    with pytest.raises(ValueError, match="in_place"):
        torch_save(obj, io.BytesIO(), in_place=True)


def test_no_room_says_what_can_be_done(small_disk: Path) -> None:
    obj = {"a": torch.zeros(14 << 18)}
    torch_save(obj, small_disk / "m.pt")
    for name, known in (("m.pt", True), ("new.pt", False)):
        with pytest.raises(
            ArchiveError, match=r"14,68\d,\d+ bytes are needed, [\d,]+ bytes are free"
        ) as raised:
            torch_save(obj, small_disk / name)
        assert raised.value.errno == errno.ENOSPC and ("in_place=True" in str(raised.value)) == known
        assert ("the old file is kept" in str(raised.value)) == known
    torch_save([obj], small_disk / "m.pt", in_place=True)
    assert len(torch.load(small_disk / "m.pt", weights_only=True)) == 1 and names(small_disk)[-1] == "m.pt"


def test_no_room_for_a_small_one_says_the_same(small_disk: Path) -> None:
    obj = {"a": torch.zeros(200 << 8)}
    torch_save(obj, small_disk / "m.pt")
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(1 << 16)):
            pass
    before = (small_disk / "m.pt").read_bytes()
    with pytest.raises(
        ArchiveError, match=r"at least 20[45],\d+ bytes are needed, [\d,]+ bytes are free"
    ) as raised:
        torch_save([obj], small_disk / "m.pt")
    assert raised.value.errno == errno.ENOSPC and "in_place=True" in str(raised.value)
    assert (small_disk / "m.pt").read_bytes() == before
    assert set(names(small_disk)) - {"lost+found"} == {"filler", "m.pt"}


# The others take the old one's place, with all that it had.


@pytest.mark.parametrize("new_format", [True, False])
@both
def test_attributes_are_carried_over(tmp_path: Path, obj: object, new_format: bool) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(b"old")
    path.chmod(0o640)
    try:
        os.setxattr(path, "user.note", b"kept")
    except OSError:
        pytest.skip("no extended attributes here")
    before = path.stat().st_ino
    torch_save(obj, path, _use_new_zipfile_serialization=new_format)
    assert path.stat().st_ino != before
    assert os.getxattr(path, "user.note") == b"kept" and stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("format_", ["new", "old"])
@pytest.mark.parametrize("how", ["nameless", "named"])
@both
def test_what_a_kill_leaves_the_next_save_removes(
    tmp_path: Path, preloaded: Path, obj: object, format_: str, how: str
) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(b"old")
    script = """
    obj = {"a": torch.arange(20.0), "step": 3}
    torch_save(obj, sys.argv[1], _use_new_zipfile_serialization=sys.argv[2] == "new")
    """
    refuse = "rename:999" + (" tmpfile" if how == "named" else "")
    assert run(script, path, format_, env=preload(preloaded, refuse)).returncode == -9
    assert path.read_bytes() == b"old" and len(names(tmp_path)) == 2
    torch_save(obj, path)
    assert names(tmp_path) == ["m.pt"]


@pytest.mark.parametrize("options", ["", "_use_new_zipfile_serialization=False", "in_place=True"])
def test_an_error_after_publication_says_so(tmp_path: Path, preloaded: Path, options: str) -> None:
    script = f"""
    try:
        torch_save({{"a": 3}}, sys.argv[1], durable=True, {options})
    except ArchiveError as error:
        print(error.errno, error.published, error.filename, error.strerror)
    """
    # Written over by torch, whose bytes Python syncs.
    env = preload(preloaded, f"fsync@2:{errno.EIO}")
    said = run(script, tmp_path / "m.pt", env=env).stdout
    assert said.startswith(f"{errno.EIO} True {tmp_path / 'm.pt'} Input/output error; "), said
    assert "in place, but not known to be on stable storage" in said
    assert torch.load(tmp_path / "m.pt", weights_only=True)["a"] == 3


def test_a_forked_child_leaves_the_parents_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(b"old")
    new = archive_by_torch.new_file(str(path), True, at_once=True)
    os.pwrite(new.descriptor(), b"new", 0)
    assert in_child(new.close) == "None" and len(names(tmp_path)) == 2
    assert new.publish(False) == (3, [])
    assert names(tmp_path) == ["m.pt"] and path.read_bytes() == b"new"


@pytest.mark.parametrize("there", [False, True])
def test_a_umask_that_lets_nobody_write(shared: Path, reasons: list[str], there: bool) -> None:
    """Torch opens the file by name, which its maker then may not."""
    given_away(shared / "own", 0o755)
    path = shared / "own" / "m.pt"
    if there:
        given_away(path, 0o640)

    def work() -> str:
        os.umask(0o277)
        return save_as_another(path, "new")

    assert in_child(work) == "saved: "
    assert stat.S_IMODE(path.stat().st_mode) == (0o640 if there else 0o400)
    assert_same(path.read_bytes(), bytes_of({"a": torch.ones(5)}, path))
    assert names(shared / "own") == ["m.pt"]


@pytest.mark.parametrize("count", [40_000, 400_000])
@pytest.mark.parametrize("format_", ["new", "old"])
def test_a_failed_write_reaches_the_caller(tmp_path: Path, format_: str, count: int) -> None:
    path = tmp_path / "m.pt"
    torch_save({"a": torch.ones(5)}, path)

    def limited() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            torch_save(list(range(count)), path, _use_new_zipfile_serialization=format_ == "new")
        except ArchiveError as error:
            return f"{error.errno} {error.filename}"
        return "saved"

    assert in_child(limited) == f"{errno.EFBIG} {path}"
    assert names(tmp_path) == ["m.pt"]
    assert torch.load(path, weights_only=True)["a"].sum() == 5


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EACCES, PermissionError), (errno.ENOENT, FileNotFoundError), (errno.EISDIR, IsADirectoryError)],
)
def test_classes_of_errors(number: int, kind: type[OSError]) -> None:
    """What torch.save raises, which depends on the format and the name, and what open raises."""
    error = archive_error(number, os.strerror(number), "a/m.pt", published=True)
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert isinstance(one, kind) and isinstance(one, ArchiveError) and isinstance(one, RuntimeError)
        assert (one.errno, one.filename, one.published) == (number, "a/m.pt", True)
        assert str(one) == str(error) and "a/m.pt" in str(one) and type(one).__name__ == "ArchiveError"


def test_everything_left_to_torch_is_counted(tmp_path: Path) -> None:
    def left() -> dict[str, int]:
        return dict(activity.left().get("torch.save", {}))

    before = left()
    with (tmp_path / "open").open("wb") as file:
        torch_save(SMALL, file)
    with tempfile.SpooledTemporaryFile() as spooled:
        torch_save(SMALL, spooled)
    torch_save(SMALL, os.devnull)
    torch_save(SMALL, tmp_path / "old", _use_new_zipfile_serialization=False)
    with contextlib.suppress(RuntimeError):
        torch_save(SMALL, tmp_path / ".pt")
    new = {reason: count - before.get(reason, 0) for reason, count in left().items()}
    assert new == {
        "an open file": 2,
        "a device or a pipe": 1,
        "the old format": 1,
        "a path that torch takes for no file name": 1,
    } | {reason: 0 for reason in before if new[reason] == 0}


# Others in the middle of it.


@pytest.fixture
def foreign_save(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Another library's function in torch.save's place; what it was called for."""
    calls: list[Any] = []
    wrapped: Callable[..., None] = torch.serialization.save

    def foreign(obj: object, f: Any, *arguments: Any, **keywords: Any) -> None:
        calls.append(f)
        wrapped(obj, f, *arguments, **keywords)

    monkeypatch.setattr(torch, "save", foreign)
    monkeypatch.setattr(torch.serialization, "save", foreign)
    return calls


def test_another_librarys_function_hears_nothing_of_ours(tmp_path: Path, foreign_save: list[Any]) -> None:
    expected = tmp_path / "reference" / "m.pt"
    expected.parent.mkdir()
    torch.save(SMALL, expected)
    assert foreign_save == [expected]
    torch_save(SMALL, tmp_path / "m.pt")
    assert_same((tmp_path / "m.pt").read_bytes(), expected.read_bytes())
    torch_save(SMALL, tmp_path / "m.pt", in_place=True)
    assert_same((tmp_path / "m.pt").read_bytes(), expected.read_bytes())
    torch_save(SMALL, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    assert torch.load(tmp_path / "m.pt", weights_only=True)["step"] == 3
    assert foreign_save == [expected]


@pytest.mark.parametrize("when", ["write_record", "_make_hole", "end"])
def test_a_save_in_the_middle_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """By a signal handler or a finalizer: it writes what it would write at any time."""
    from fastshard.api.archive_skeleton import _Writer

    obj = {"a": filled((1 << 20,), torch.uint8), "b": torch.ones(5)}
    real = getattr(_Writer, when)
    inner = []

    def interrupted(self: Any, *arguments: Any) -> None:
        if not inner:
            inner.append(True)
            torch.save(obj, tmp_path / "theirs.pt")
            torch_save(obj, tmp_path / "ours.pt")
        real(self, *arguments)

    monkeypatch.setattr(_Writer, when, interrupted)
    torch_save(obj, tmp_path / "outer.pt")
    monkeypatch.undo()
    assert inner
    for name in ("theirs.pt", "ours.pt", "outer.pt"):
        assert_same((tmp_path / name).read_bytes(), bytes_of(obj, name))


# What cannot be written.


def test_errors_of_torchs_own_stay_what_they_are(tmp_path: Path) -> None:
    """Torch may share pybind11's tables with the native module, which translates errors of its own only."""
    script = """
        import resource, sys, torch
        if sys.argv[2] == "with":
            from fastshard import _native
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        try:
            torch.save(torch.ones(1000), sys.argv[1])
        except Exception as error:
            while error is not None:  # the last one hides the one that tells
                print(type(error), str(error).splitlines()[0])
                error = error.__context__
    """
    without, with_ = (run_bare(script, tmp_path / "m.pt", what).stdout for what in ("without", "with"))
    assert without == with_ != ""


@both
@pytest.mark.parametrize("limit", [100, 1000, 20_000])
def test_memory_that_torch_cannot_write_to(tmp_path: Path, obj: object, limit: int) -> None:
    obj = {"a": obj, "more": [torch.full((2000,), float(i)) for i in range(4)]}

    def save() -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        held = open_descriptors()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            torch_save(obj, tmp_path / "m.pt")
        except ArchiveError as error:
            said = f"{error.errno} {error.filename}"
            traceback.clear_frames(error.__traceback__)
            assert error.__cause__ is not None
            traceback.clear_frames(error.__cause__.__traceback__)
            del error
        assert open_descriptors() == held
        return said

    assert in_child(save) == f"{errno.EFBIG} {tmp_path / 'm.pt'}"
    assert names(tmp_path) == []


def test_why_torch_failed_once(tmp_path: Path) -> None:
    with (tmp_path / "m.pt").open("wb") as file:
        fd = file.fileno()

        def told(text: str) -> ArchiveError | None:
            return why_torch_failed(RuntimeError(text), fd, "/m.pt")

        full = told(f"write(): fd {fd} failed with {os.strerror(errno.ENOSPC)}")
        assert full is not None and (full.errno, full.filename) == (errno.ENOSPC, "/m.pt")
        assert told(f"write(): fd {fd + 1} failed with {os.strerror(errno.ENOSPC)}") is None
        assert told("something else") is None
        libc = ctypes.CDLL(None)
        libc.write(-1, b"", 1)  # EBADF: not of a file that is open
        lost = told("basic_ios::clear: iostream error")
        assert lost is not None and (lost.errno, lost.filename) == (errno.EIO, "/m.pt")
        location = libc.__errno_location
        location.restype = ctypes.POINTER(ctypes.c_int)
        location()[0] = errno.ENOSPC
        full = told("basic_ios::clear: iostream error")
        assert full is not None and full.errno == errno.ENOSPC


def test_a_write_that_fails_once(tmp_path: Path) -> None:
    path = str(tmp_path / "m.pt")

    def write(file: Any) -> None:
        kept = os.dup(file.fileno())
        with open(os.devnull, "rb") as unwritable:
            os.dup2(unwritable.fileno(), file.fileno())
        try:
            file.write(b"x")
            file.flush()
        finally:
            os.dup2(kept, file.fileno())
            os.close(kept)

    with pytest.raises(ArchiveError) as info:
        archive_by_torch.replace_by_torch(write, path, False, False, True)
    assert (info.value.errno, info.value.filename) == (errno.EBADF, path)

    def pickle_wrongly(file: Any) -> None:
        raise own

    own = OSError(errno.EIO, "of an object")
    with pytest.raises(OSError) as raised:
        archive_by_torch.replace_by_torch(pickle_wrongly, path, False, False, True)
    assert raised.value is own and names(tmp_path) == []


def test_the_first_error_is_the_one_that_is_told(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        archive_by_torch.replace_by_torch(lambda file: 1 // 0, str(tmp_path / "m.pt"), False, False, True)
    assert names(tmp_path) == []


def test_descriptors_that_cannot_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = os.stat

    def stat_of(path: Any, *more: Any, **keywords: Any) -> os.stat_result:
        if path == "/proc/self/fd":
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return look(path, *more, **keywords)

    monkeypatch.setattr(os, "stat", stat_of)
    with pytest.raises(ArchiveError) as info:
        torch_save(SMALL, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    assert (info.value.errno, info.value.filename) == (errno.EIO, str(tmp_path / "m.pt"))
