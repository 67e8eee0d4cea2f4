# SPDX-License-Identifier: Apache-2.0
"""What killed saves leave: the next save of the same path removes it, and nothing that somebody is using."""

from __future__ import annotations

import fcntl
import itertools
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import ENGINE, names, preload, run_engine, same

from fastshard import _native, prepare, save_file, save_files, stats

TENSORS = {"a": torch.arange(1000, dtype=torch.float32)}
NEW = b"new contents"
KILLED = 999  # an error of the preloaded library's: the process ends there


def kill_while_writing(path: Path, library: Path) -> None:
    """Leaves one hidden file, as filesystems without nameless ones do."""
    script = "while_writing(sys.argv[1], lambda: os.kill(os.getpid(), 9))"
    done = run_engine(script, path, env=preload(library, "tmpfile"))
    assert done.returncode == -9, done.stderr


def hidden(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*"))


def save_prepared(path: Path) -> None:
    with prepare(TENSORS, path) as prepared:
        prepared.save()


SAVERS: dict[str, Callable[[Path], None]] = {
    "save_file": lambda path: save_file(TENSORS, path),
    "save_files": lambda path: save_files({path: TENSORS, path.with_name("other"): TENSORS}),
    "prepare": save_prepared,
}


@pytest.mark.parametrize("name", ["model-rank-0-part-0.safetensors", "x" * 255, "é ü"])
@pytest.mark.parametrize("saver", SAVERS)
def test_the_next_save_removes_what_a_kill_left(
    tmp_path: Path, preloaded: Path, saver: str, name: str
) -> None:
    path = tmp_path / name
    kill_while_writing(path, preloaded)
    (left,) = names(tmp_path)
    assert (
        left.startswith(".fastshard-") and left.endswith(".tmp") and name not in left
    )  # no loader's pattern
    assert stat.S_IMODE((tmp_path / left).stat().st_mode) == 0o600
    kill_while_writing(tmp_path / "another", preloaded)
    assert len(hidden(tmp_path)) == 2
    SAVERS[saver](path)
    assert same(path, TENSORS)
    assert len(hidden(tmp_path)) == 1  # the other file's
    save_file(TENSORS, tmp_path / "another")
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(
    ("before", "refuse"),
    [
        *itertools.product(
            ["a file", "a file that may not be written to", "a link"],
            [
                f"exchange@2:{KILLED}",
                f"unlink@1:{KILLED}",
                f"unlink@2:{KILLED}",
                f"tmpfile unlink@1:{KILLED}",
                f"exchange rename@2:{KILLED}",
                f"exchange unlink@1:{KILLED}",
            ],
        ),
        *itertools.product(
            ["nothing"],
            [
                f"tmpfile exchange@3:{KILLED}",
                f"tmpfile exchange link@2:{KILLED}",
                f"tmpfile exchange rename@2:{KILLED}",
            ],
        ),
    ],
)
def test_killed_between_several_files(tmp_path: Path, preloaded: Path, refuse: str, before: str) -> None:
    files = [tmp_path / name for name in "abc"]
    for path in files[:2]:
        if before == "a link":
            path.symlink_to("elsewhere")
        elif before != "nothing":
            path.write_bytes(b"old")
            path.chmod(0o400 if "not" in before else 0o644)
    done = run_engine("save(*sys.argv[1:])", *files, env=preload(preloaded, refuse))
    assert done.returncode == -9, done.stderr
    standing = [path for path in files[:2] if os.path.lexists(path)]
    assert standing == (files[:1] if before == "nothing" else files[:2])
    save_files({path: TENSORS for path in files})
    assert all(same(path, TENSORS) for path in files)
    assert names(tmp_path) == ["a", "b", "c"]


def test_files_in_use_stay(tmp_path: Path, preloaded: Path) -> None:
    path = tmp_path / "m.safetensors"
    script = """
def wait():
    print("writing", flush=True)
    sys.stdin.readline()
while_writing(sys.argv[1], wait)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", ENGINE + script, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=preload(preloaded, "tmpfile"),
        cwd=Path(__file__).parent,
    )
    assert child.stdin is not None and child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    (used,) = hidden(tmp_path)
    for saver in SAVERS.values():
        saver(path)
        assert hidden(tmp_path) == [used] and same(path, TENSORS)
    child.stdin.write(b"\n")
    child.stdin.close()
    assert child.wait(timeout=300) == 0
    child.stdout.close()
    assert hidden(tmp_path) == [] and path.read_bytes().startswith(NEW)


def test_a_prepared_save_keeps_its_buffers(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with prepare(TENSORS, path) as prepared:
        for _ in range(3):
            prepared.save()
        (buffer,) = hidden(tmp_path)
        save_file({"a": torch.zeros(5)}, path)
        assert hidden(tmp_path) == [buffer]
        prepared.save()
        assert same(path, TENSORS)
    assert names(tmp_path) == [path.name]


def read_lock(fd: int) -> None:
    lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    fcntl.fcntl(fd, getattr(fcntl, "F_OFD_SETLK", 37), lock)


@pytest.mark.parametrize("lock", [lambda fd: fcntl.flock(fd, fcntl.LOCK_EX), read_lock])
def test_readers_cannot_delay_a_save(tmp_path: Path, preloaded: Path, lock: Callable[[int], None]) -> None:
    path = tmp_path / "m.safetensors"
    save_file(TENSORS, path)
    kill_while_writing(path, preloaded)
    descriptors = [os.open(name, os.O_RDONLY) for name in (path, *hidden(tmp_path), tmp_path)]
    for descriptor in descriptors[:2]:
        lock(descriptor)
    fcntl.flock(descriptors[2], fcntl.LOCK_EX)
    save_file({"a": torch.zeros(5)}, path)
    assert same(path, {"a": torch.zeros(5)})
    for descriptor in descriptors:
        os.close(descriptor)
    save_file(TENSORS, path)
    assert names(tmp_path) == [path.name]


def test_where_locks_are_refused_everything_stays(tmp_path: Path, preloaded: Path) -> None:
    path = tmp_path / "m.safetensors"
    kill_while_writing(path, preloaded)
    left = hidden(tmp_path)
    script = """
    for _ in range(3):
        print(save(sys.argv[1]).fallbacks)
    """
    done = run_engine(script, path, env=preload(preloaded, "locks:37 tmpfile"))
    assert done.stdout.count("locks refused") == 3, done.stderr
    assert hidden(tmp_path) == left and path.read_bytes() == NEW


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can plant another user's files")
def test_names_that_others_have_taken(public: Path, preloaded: Path) -> None:
    """In a folder as /tmp nobody can remove them: other names are taken."""
    folder = public / "shared"
    folder.mkdir()
    path = folder / "m.safetensors"
    path.write_bytes(b"old")
    for name in _native.temporary_names(os.fsencode(path)):
        Path(os.fsdecode(name)).write_bytes(b"planted")
    planted = hidden(folder)
    os.chown(path, 65534, 65534)
    folder.chmod(0o1777)
    script = """
    os.setgid(65534)
    os.setuid(65534)
    save(sys.argv[1])
    print("saved")
    """
    for refuse in ("", "tmpfile"):
        done = run_engine(script, path, env=preload(preloaded, refuse))
        assert done.stdout.split() == ["saved"], done.stderr
        assert path.read_bytes() == NEW
        assert hidden(folder) == planted and all(file.read_bytes() == b"planted" for file in planted)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may not list a folder")
def test_the_folder_need_not_be_listed(public: Path, preloaded: Path) -> None:
    folder = public / "dark"
    folder.mkdir()
    path = folder / "m.safetensors"
    kill_while_writing(path, preloaded)
    for name in (folder, *hidden(folder)):
        os.chown(name, 65534, 65534)
    folder.chmod(0o300)
    script = """
    os.setgid(65534)
    os.setuid(65534)
    save(sys.argv[1])
    """
    done = run_engine(script, path)
    assert done.returncode == 0, done.stderr
    assert names(folder) == [path.name]


def test_a_leftover_that_cannot_be_removed_is_named(tmp_path: Path, preloaded: Path) -> None:
    path = tmp_path / "m.safetensors"
    kill_while_writing(path, preloaded)
    script = "print(save(sys.argv[1]).fallbacks)"
    done = run_engine(script, path, env=preload(preloaded, "unlink@1:5"))
    assert "killed save" in done.stdout and os.strerror(5) in done.stdout, done.stderr
    save_file(TENSORS, path)
    figures = stats()
    assert figures is not None and figures.fallbacks == () and names(tmp_path) == [path.name]
