# SPDX-License-Identifier: Apache-2.0
"""Modes, owners, access control lists and extended attributes: of new files, of replaced ones, and while they are written."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import preload, run_engine

from fastshard import prepare, save_file, save_files
from fastshard.engine.engine import engine_for
from fastshard.engine.plan import FETCHED, FilePlan, TensorView

ACL, DEFAULT_ACL = "system.posix_acl_access", "system.posix_acl_default"
USER_OBJ, USER, GROUP_OBJ, MASK, OTHER = 1, 2, 4, 16, 32
TENSORS = {"a": torch.arange(1000, dtype=torch.float32)}


def acl(user: int, named: int, group: int, mask: int, other: int) -> bytes:
    """A list with an entry for user 1234."""
    entries = [(USER_OBJ, user), (USER, named), (GROUP_OBJ, group), (MASK, mask), (OTHER, other)]
    return struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, rights, 1234 if tag == USER else 0xFFFFFFFF) for tag, rights in entries
    )


def set_or_skip(path: Path, name: str, value: bytes) -> None:
    try:
        os.setxattr(path, name, value)
    except OSError as error:
        pytest.skip(f"{name}: {error.strerror}")


def attributes(path: Path) -> dict[str, bytes]:
    return {name: os.getxattr(path, name) for name in os.listxattr(path) if name != "security.selinux"}


def save_prepared(path: Path) -> None:
    with prepare(TENSORS, path) as prepared:
        for _ in range(3):
            prepared.save()


SAVERS: dict[str, Callable[[Path], None]] = {
    "save_file": lambda path: save_file(TENSORS, path),
    "save_file, durable": lambda path: save_file(TENSORS, path, durable=True),
    "save_files": lambda path: save_files({path: TENSORS, path.with_name("other"): TENSORS}),
    "prepare": save_prepared,
}

MODES = """
import json, stat
found = {}
def look():
    for name in os.listdir(sys.argv[1]):
        mode = stat.S_IMODE(os.stat(f"{sys.argv[1]}/{name}").st_mode)
        if name.startswith("."):
            found["staged"] = mode
os.umask(0o022)
while_writing(sys.argv[1] + "/m", look)
found["final"] = stat.S_IMODE(os.stat(sys.argv[1] + "/m").st_mode)
print(json.dumps(found))
"""


@pytest.mark.parametrize("mode", [None, 0o600, 0o640, 0o664, 0o400])
def test_nobody_can_read_what_is_staged(tmp_path: Path, preloaded: Path, mode: int | None) -> None:
    if mode is not None:
        (tmp_path / "m").write_bytes(b"old")
        (tmp_path / "m").chmod(mode)
    done = run_engine(MODES, tmp_path, env=preload(preloaded, "tmpfile"))
    assert json.loads(done.stdout) == {"staged": 0o600, "final": 0o644 if mode is None else mode}, done.stderr


@pytest.mark.parametrize("refuse", ["", "tmpfile"])
def test_a_new_file_follows_the_default_list_of_its_folder(
    tmp_path: Path, preloaded: Path, refuse: str
) -> None:
    set_or_skip(tmp_path, DEFAULT_ACL, acl(7, 6, 5, 7, 0))
    (tmp_path / "theirs").touch(0o666)
    done = run_engine("save(sys.argv[1])", tmp_path / "ours", env=preload(preloaded, refuse))
    assert done.returncode == 0, done.stderr
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert ours.stat().st_mode == theirs.stat().st_mode
    assert attributes(ours) == attributes(theirs) != {}


@pytest.mark.parametrize("saver", SAVERS)
def test_a_replaced_file_keeps_its_attributes(tmp_path: Path, saver: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    set_or_skip(path, "user.origin", b"run 17")
    set_or_skip(path, "user.empty", b"")
    set_or_skip(path, ACL, acl(6, 4, 4, 4, 0))
    expected, mode = attributes(path), path.stat().st_mode
    SAVERS[saver](path)
    assert (attributes(path), path.stat().st_mode) == (expected, mode)


@pytest.mark.parametrize("saver", SAVERS)
def test_a_replaced_file_gets_no_list_of_its_folder(tmp_path: Path, saver: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    path.chmod(0o604)
    set_or_skip(tmp_path, DEFAULT_ACL, acl(7, 7, 7, 7, 7))
    SAVERS[saver](path)
    assert attributes(path) == {} and stat.S_IMODE(path.stat().st_mode) == 0o604


def test_what_is_changed_while_a_file_is_written_counts(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"old")
    path.chmod(0o644)

    def change(*_: int) -> None:
        path.chmod(0o600)

    plan = FilePlan(os.fsencode(path), b"new", [TensorView(0, 1 << 16, FETCHED)])
    engine_for(None).submit([plan], keep_alive=None, fetch=change).result()
    assert path.read_bytes().startswith(b"new") and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_between_the_saves_of_a_prepared_one(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with prepare(TENSORS, path) as prepared:
        for mode in (0o600, 0o640, 0o604):
            prepared.save()
            path.chmod(mode)
            for _ in range(3):
                prepared.save()
                assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("refuse", ["xattr:28", "chmod:1"])
def test_what_is_refused_is_named(tmp_path: Path, preloaded: Path, refuse: str) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"old")
    path.chmod(0o640)
    set_or_skip(path, "user.origin", b"run 17")
    done = run_engine("print(save(sys.argv[1]).fallbacks)", path, env=preload(preloaded, refuse))
    what = "the extended attribute user.origin" if "xattr" in refuse else "fchmod"
    assert done.returncode == 0, done.stderr
    assert f"{what} refused: {os.strerror(int(refuse.split(':')[1]))}" in done.stdout
    assert path.read_bytes() == b"new contents"
    assert stat.S_IMODE(path.stat().st_mode) == (0o640 if "xattr" in refuse else 0o600)


def test_a_mode_that_cannot_be_stored_is_an_error(tmp_path: Path, preloaded: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"old")
    path.chmod(0o640)
    done = run_engine(
        "print(save(sys.argv[1]).fallbacks)", path, env=preload(preloaded, f"chmod:{errno.EIO}")
    )
    assert done.returncode == 1
    assert f'{os.strerror(errno.EIO)} (os error {errno.EIO}): "{path}"' in done.stderr
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's file")
@pytest.mark.parametrize(
    ("mode", "becomes"), [(0o4755, 0o755), (0o2755, 0o755), (0o660, 0o600), (0o664, 0o644), (0o640, 0o600)]
)
def test_rights_of_another_owner_and_group_are_left_out(public: Path, mode: int, becomes: int) -> None:
    folder = public / "open"
    folder.mkdir()
    folder.chmod(0o777)
    path = folder / "m"
    path.write_bytes(b"old")
    os.chown(path, 1234, 5678)
    path.chmod(mode)
    script = """
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    print(save(sys.argv[1]).fallbacks)
    """
    done = run_engine(script, path)
    assert done.returncode == 0, done.stderr
    assert "fchown refused" in done.stdout
    found = path.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (becomes, 65534, 65534)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_root_keeps_everything(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"old")
    os.chown(path, 1234, 5678)
    path.chmod(0o6755)
    save_file(TENSORS, path)
    found = path.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o6755, 1234, 5678)
