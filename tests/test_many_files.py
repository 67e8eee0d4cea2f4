# SPDX-License-Identifier: Apache-2.0
"""More files in one save than this process may have open."""

from __future__ import annotations

import ctypes
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch as reference
import torch
from helpers import open_descriptors

import fastshard
from fastshard import Engine, Options, SaveError, _native
from fastshard.engine.plan import HOST, FilePlan, TensorView

LIMIT = 100
COUNT = 150


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def files_in(folder: Path, value: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    return {
        str(folder / f"{i:03}.safetensors"): {"a": torch.full((700,), i * value), "b": torch.ones(3, 2).t()}
        for i in range(COUNT)
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: (folder / entry.name).read_bytes() for entry in os.scandir(folder)}


def expected(files: dict[str, dict[str, torch.Tensor]]) -> dict[str, bytes]:
    return {
        os.path.basename(path): reference.save(
            {name: tensor.contiguous() for name, tensor in tensors.items()}
        )
        for path, tensors in files.items()
    }


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("write_path", ["auto", "buffered", "direct", "mapped"])
def test_all_of_them_are_saved(
    tmp_path: Path, few_descriptors: None, no_hang: None, write_path: str, durable: bool
) -> None:
    for value in (1.0, 2.0):  # new ones, and in the place of others
        files = files_in(tmp_path, value)
        fastshard.save_files(
            files, allow_strided=True, durable=durable, engine=Options(write_path=write_path, threads=3)
        )
        assert contents(tmp_path) == expected(files)


def test_modes_are_those_of_files_that_stay_open(tmp_path: Path, few_descriptors: None) -> None:
    files = files_in(tmp_path)
    replaced = Path(next(iter(files)))
    replaced.write_bytes(b"old")
    replaced.chmod(0o640)
    mask = os.umask(0o027)
    try:
        fastshard.save_files(files, allow_strided=True)
    finally:
        os.umask(mask)
    modes = {stat.S_IMODE(entry.stat().st_mode) for entry in os.scandir(tmp_path)}
    assert modes == {0o640}


def amended(folder: Path, amend: object) -> None:
    memory = ctypes.create_string_buffer(b"x" * 5000, 5000)
    view = TensorView(ctypes.addressof(memory), 5000, HOST)
    plans = [FilePlan(os.fsencode(folder / f"{i}"), b"head", [view]) for i in range(COUNT)]
    with Engine(Options(threads=2)) as engine:
        engine.submit(plans, keep_alive=memory, amend=amend).result()  # type: ignore[arg-type]


def test_what_waits_is_nobodys_leftover_and_nobody_elses_to_read(
    tmp_path: Path, few_descriptors: None, no_hang: None
) -> None:
    seen = []

    def amend(_: object) -> list[tuple[int, int, bytes]]:
        before = os.listdir(tmp_path)
        for i in range(COUNT):
            _native.remove_leftovers(os.fsencode(tmp_path / f"{i}"))  # as another process's save would
        assert sorted(before) == sorted(os.listdir(tmp_path))
        seen.extend(stat.S_IMODE(entry.stat().st_mode) for entry in os.scandir(tmp_path))
        assert len(open_descriptors()) < LIMIT / 2
        return [(0, 0, b"HEAD"), (COUNT - 1, 2, b"AD")]

    amended(tmp_path, amend)
    assert len(seen) == COUNT
    assert set(seen) == {0o600}
    found = contents(tmp_path)
    assert found.keys() == {f"{i}" for i in range(COUNT)}
    assert found["0"][:4] == b"HEAD"
    assert found["1"][:4] == b"head"
    assert found[f"{COUNT - 1}"][:4] == b"heAD"


@pytest.mark.parametrize("left", [0, 1, 2, 3, 6])
def test_close_to_the_limit_it_works_or_changes_nothing(
    tmp_path: Path, few_descriptors: None, no_hang: None, left: int
) -> None:
    files = files_in(tmp_path)
    fastshard.save_files(files, allow_strided=True)
    new = files_in(tmp_path, 3.0)
    taken = []
    try:
        while True:
            try:
                taken.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                break
        for _ in range(left):
            os.close(taken.pop())
        try:
            fastshard.save_files(new, allow_strided=True, engine=Options(threads=2))
            outcome = new
        except SaveError as error:
            assert os.strerror(error.errno) in str(error)
            assert "Too many open files" in str(error)
            outcome = files
    finally:
        for fd in taken:
            os.close(fd)
    assert contents(tmp_path) == expected(outcome)


def test_another_file_under_a_hidden_name_is_not_taken_for_ours(
    tmp_path: Path, few_descriptors: None, no_hang: None
) -> None:
    def amend(_: object) -> list[tuple[int, int, bytes]]:
        for name in os.listdir(tmp_path):
            (tmp_path / name).unlink()
            (tmp_path / name).write_bytes(b"planted")
        return []

    with pytest.raises(SaveError):
        amended(tmp_path, amend)
    assert os.listdir(tmp_path) == []  # nothing of that was published
