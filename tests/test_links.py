# SPDX-License-Identifier: Apache-2.0
"""Symbolic links as targets: replaced, as safetensors does, or followed on request, as far as the kernel lets them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import names, preload, run_engine, same

from fastshard import SaveError, prepare, save_file, save_files, save_model
from fastshard.engine.engine import engine_for
from fastshard.engine.plan import FilePlan

TENSORS = {"a": torch.arange(1000, dtype=torch.float32)}


def save_prepared(path: Path) -> None:
    with prepare(TENSORS, path) as prepared:
        prepared.save()
        prepared.save()


SAVERS: dict[str, Callable[[Path], None]] = {
    "save_file": lambda path: save_file(TENSORS, path),
    "save_files": lambda path: save_files({path: TENSORS, path.with_name("other"): TENSORS}),
    "save_model": lambda path: save_model(torch.nn.ParameterDict(TENSORS), path),
    "prepare": save_prepared,
}


def follow(path: Path, data: bytes = b"new contents") -> None:
    """Saves these bytes to the file that the link leads to."""
    plan = FilePlan(os.fsencode(path), data, [])
    try:
        engine_for(None).submit([plan], keep_alive=None, follow_links=True).result()
    except SaveError as error:
        assert error.filename == os.fspath(path)
        raise


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("leads_to", ["a file", "nothing", "a link", "a folder", "itself"])
@pytest.mark.parametrize("saver", SAVERS)
def test_links_are_replaced(tmp_path: Path, saver: str, leads_to: str, absolute: bool) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    blob, path = blobs / "1234", folder / "m.safetensors"
    if leads_to == "a file":
        blob.write_bytes(b"of others")
    elif leads_to == "a link":
        (blobs / "real").write_bytes(b"of others")
        blob.symlink_to("real")
    elif leads_to == "a folder":
        blob.mkdir()
    path.symlink_to(
        path if leads_to == "itself" else blob if absolute else Path("..") / blob.relative_to(tmp_path)
    )
    before = {name: os.lstat(blobs / name) for name in names(blobs)}
    SAVERS[saver](path)
    assert not path.is_symlink() and same(path, TENSORS)
    assert {name: os.lstat(blobs / name) for name in names(blobs)} == before
    assert names(folder) == (["m.safetensors", "other"] if saver == "save_files" else ["m.safetensors"])


def test_a_link_and_the_file_it_leads_to_are_two_files(tmp_path: Path) -> None:
    path, link = tmp_path / "m.safetensors", tmp_path / "link.safetensors"
    link.symlink_to(path.name)
    others = {"b": torch.ones(3)}
    save_files({path: TENSORS, link: others})
    assert same(path, TENSORS) and same(link, others) and not link.is_symlink()


@pytest.mark.parametrize("refuse", ["exchange@2:5", "tmpfile exchange@2:5", "exchange rename@2:5"])
def test_links_come_back_when_several_files_fail(tmp_path: Path, preloaded: Path, refuse: str) -> None:
    for name in "ab":
        (tmp_path / name).symlink_to(f"real-{name}")
    script = """
    try:
        save(f"{sys.argv[1]}/a", f"{sys.argv[1]}/b")
    except SaveError as error:
        print(error.errno)
    """
    done = run_engine(script, tmp_path, env=preload(preloaded, refuse))
    assert done.stdout.split() == ["5"], done.stderr
    assert {name: os.readlink(tmp_path / name) for name in names(tmp_path)} == {"a": "real-a", "b": "real-b"}


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("dangling", [True, False])
def test_links_are_followed_on_request(tmp_path: Path, absolute: bool, dangling: bool) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    blob, first, second = blobs / "1234", tmp_path / "first", tmp_path / "second"
    if not dangling:
        blob.write_bytes(b"old")
        blob.chmod(0o640)
    first.symlink_to(blob if absolute else Path("blobs") / "1234")
    second.symlink_to(first.name)
    follow(second)
    assert first.is_symlink() and second.is_symlink() and not blob.is_symlink()
    assert blob.read_bytes() == b"new contents"
    assert dangling or blob.stat().st_mode & 0o777 == 0o640
    assert names(blobs) == ["1234"] and names(tmp_path) == ["blobs", "first", "second"]
    follow(blob, b"without a link")
    assert blob.read_bytes() == b"without a link"


def test_what_cannot_be_followed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"old")
    memory = os.memfd_create("nowhere")
    cases = {
        "loop": errno.ELOOP,
        "folder": errno.EISDIR,
        "/dev/null": errno.EINVAL,
        "missing/m": errno.ENOENT,
        "file/m": errno.ENOTDIR,
        f"/proc/self/fd/{memory}": errno.ENOENT,
    }
    for number, (destination, code) in enumerate(cases.items()):
        link = tmp_path / ("loop" if destination == "loop" else f"link{number}")
        link.symlink_to(destination)
        before = names(tmp_path)
        with pytest.raises(SaveError) as raised:
            follow(link)
        assert raised.value.errno == code, destination
        assert names(tmp_path) == before and link.is_symlink()
    os.close(memory)
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("through_own_link", [True, False])
def test_other_users_links_in_sticky_folders_are_refused(
    sticky: Path, tmp_path: Path, exists: bool, through_own_link: bool
) -> None:
    victim, planted = tmp_path / "victim", sticky / "m.pt"
    if exists:
        victim.write_bytes(b"precious")
    planted.symlink_to(victim)
    os.lchown(planted, 54321, 54321)
    path = planted
    if through_own_link:
        path = tmp_path / "own"
        path.symlink_to(planted)
    with pytest.raises(SaveError) as raised:
        follow(path)
    assert raised.value.errno == errno.EACCES
    assert victim.read_bytes() == b"precious" if exists else not victim.exists()
    assert planted.is_symlink()
    save_file(TENSORS, planted)  # replaced, it harms nobody
    assert same(planted, TENSORS) and (not exists or victim.read_bytes() == b"precious")


def test_own_links_in_sticky_folders_are_followed(sticky: Path, tmp_path: Path) -> None:
    for name in ("there", "missing"):
        (sticky / name).symlink_to(tmp_path / name)
    (tmp_path / "there").write_bytes(b"old")
    for name in ("there", "missing"):
        follow(sticky / name)
        assert (tmp_path / name).read_bytes() == b"new contents"


@pytest.mark.parametrize("decided", [".old", ".new"])
def test_a_link_of_a_folder_that_is_being_changed_stands_for_a_file(tmp_path: Path, decided: str) -> None:
    """What is written through it would go with the hidden folder that it leads into."""
    hidden = tmp_path / ".fastshard-0123456789abcdef.staging"
    for inner in (".old", ".new"):
        (hidden / inner).mkdir(parents=True)
        (hidden / inner / "m").write_bytes(b"of another save")
    (hidden / ".now").symlink_to(decided)
    path = tmp_path / "m"
    path.symlink_to(f"{hidden.name}/.now/m")
    follow(path)
    assert path.read_bytes() == b"new contents" and not path.is_symlink()
    assert [(hidden / inner / "m").read_bytes() for inner in (".old", ".new")] == [b"of another save"] * 2
    assert names(tmp_path) == sorted([hidden.name, "m"])
