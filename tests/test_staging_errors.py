# SPDX-License-Identifier: Apache-2.0
"""Single system calls that fail while a directory changes: nothing is left behind, read wrongly, or said that is not so."""

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import names, snapshot

from fastshard.api.hub import save_torch_state_dict
from fastshard.integrations.vllm_save import copy_metadata
from fastshard.publish import staging
from fastshard.publish.directory import replacing
from fastshard.publish.folder import open_folder


def failing_once(call: Any, only: Any = lambda *given: True) -> Any:
    """``call``, which fails the first time that ``only`` holds for its arguments."""
    failed: list[bool] = []

    def instead(*given: Any, **named: Any) -> Any:
        if not failed and only(*given):
            failed.append(True)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call(*given, **named)

    return instead


def save(directory: Path, text: str = "new") -> None:
    with replacing(str(directory), lambda name: name == "stale") as hidden:
        Path(hidden, "file").write_text(text)


def test_a_list_begins_with_the_first_entry_whoever_has_read_before(tmp_path: Path) -> None:
    (tmp_path / "one").touch()
    with open_folder(str(tmp_path)) as folder:
        unfinished = os.scandir(folder.fd)
        next(unfinished)
        assert folder.entries() == [("one", False)]
        unfinished.close()


def test_a_list_that_cannot_begin_anew_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stale").touch()
    before = snapshot(tmp_path)
    monkeypatch.setattr(os, "lseek", failing_once(os.lseek))
    with pytest.raises(OSError) as raised:
        save(tmp_path)
    assert (raised.value.errno, raised.value.filename) == (errno.EIO, str(tmp_path))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("check", ["is_ours", "_lock"])
def test_a_hidden_folder_that_cannot_be_held_goes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    monkeypatch.setattr(staging, check, failing_once(getattr(staging, check)))
    with pytest.raises(OSError) as raised:
        save(tmp_path)
    assert raised.value.errno == errno.EIO
    assert os.listdir(tmp_path) == []


def test_a_folder_whose_descriptor_closes_with_an_error_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = os.close

    def closes_with_error(fd: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(fd).st_mode)
        close(fd)
        if is_folder:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "close", closes_with_error)
    save(tmp_path)
    assert names(tmp_path) == ["file"]


def test_a_file_that_stands_in_the_hidden_directory_is_not_said_to_be_in_place(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised, replacing(str(tmp_path)) as hidden:
        text = "Input/output error; the new file is in place, but not known to be on stable storage"
        error = OSError(errno.EIO, text, os.path.join(hidden, "file"))
        error.published = True  # type: ignore[attr-defined]
        raise error
    assert raised.value.published is False  # type: ignore[attr-defined]
    assert str(raised.value) == f"[Errno {errno.EIO}] {os.strerror(errno.EIO)}: '{tmp_path}/file'"


def test_the_name_of_an_error_may_be_a_descriptor(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised, replacing(str(tmp_path)):
        raise OSError(errno.EIO, os.strerror(errno.EIO), 7)
    assert raised.value.filename == str(tmp_path)


def test_a_folder_of_the_pattern_that_cannot_be_looked_at_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inner").mkdir()
    inner = str(tmp_path / "inner")
    monkeypatch.setattr(os, "stat", failing_once(os.stat, lambda path, *_: path == inner))
    with pytest.raises(OSError) as raised:
        save_torch_state_dict({"a": torch.ones(2)}, tmp_path, filename_pattern="inner{suffix}/w.safetensors")
    assert raised.value.errno == errno.EIO


def test_metadata_that_cannot_be_looked_at_is_not_copied_as_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model/inner", "copy"):
        (tmp_path / name).mkdir(parents=True)
    inner = str(tmp_path / "model/inner")
    monkeypatch.setattr(os, "stat", failing_once(os.stat, lambda path, *_: path == inner))
    with pytest.raises(OSError) as raised:
        copy_metadata(str(tmp_path / "model"), str(tmp_path / "copy"))
    assert raised.value.errno == errno.EIO


def test_older_files_that_hide_the_new_ones_are_looked_for_while_nothing_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the new files stand there is nothing left to fail."""
    (tmp_path / "model.safetensors").touch()
    before = snapshot(tmp_path)
    listed: list[object] = []

    def last_fails(path: Any) -> list[str]:
        listed.append(path)
        if len(listed) == count:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return listdir(path)

    listdir, count = os.listdir, 0
    monkeypatch.setattr(os, "listdir", last_fails)
    save_torch_state_dict({"a": torch.ones(2)}, tmp_path / "..", safe_serialization=False)
    count, listed[:] = len(listed), []
    with pytest.raises(OSError) as raised:
        save_torch_state_dict({"a": torch.ones(2)}, tmp_path, safe_serialization=False)
    assert raised.value.errno == errno.EIO
    assert snapshot(tmp_path) == before
