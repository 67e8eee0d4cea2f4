# SPDX-License-Identifier: Apache-2.0
"""What huggingface_hub says while it saves, its patterns that lead into folders, and who calls whom in there."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from helpers import filled
from huggingface_hub.serialization import _torch as theirs

import fastshard
from fastshard.base import activity


@pytest.fixture(autouse=True)
def uninstalled() -> Iterator[None]:
    activity._forget()
    yield
    fastshard.uninstall()


def tensors() -> dict[str, torch.Tensor]:
    made = {f"layer.{i}": filled((64, 16), seed=i) for i in range(6)}
    return made


class Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.heard: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append((record.levelname, record.getMessage()))


def both(tmp_path: Path, act: Callable[[Path], object]) -> list[Any]:
    """What is heard, warned of, raised and found on disk, without fastshard and with it."""
    outcomes = []
    for which in ("plain", "ours"):
        folder = tmp_path / which
        folder.mkdir()
        listener, before = Listener(), theirs.logger.level
        theirs.logger.addHandler(listener)
        theirs.logger.setLevel(logging.DEBUG)
        error = None
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if which == "ours":
                    fastshard.install()
                act(folder)
        except Exception as found:
            error = found
        finally:
            fastshard.uninstall()
            theirs.logger.removeHandler(listener)
            theirs.logger.setLevel(before)
        text = str((listener.heard, [str(w.message) for w in caught])).replace(str(folder), "FOLDER")
        files = {
            str(p.relative_to(tmp_path / which)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
        }
        outcomes.append((text, error, files))
    failed = outcomes[0][1]
    assert (failed is None) == (outcomes[1][1] is None)
    assert failed is None or isinstance(outcomes[1][1], type(failed))
    return [(text, type(failed), files) for text, _, files in outcomes]


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("size", ["5GB", "10KB"])
@pytest.mark.parametrize("old", [None, "4KB", "5GB"])
def test_messages_are_those_of_the_hub(tmp_path, old, size, safe):
    def act(folder: Path) -> None:
        if old is not None:
            huggingface_hub.save_torch_state_dict(
                tensors(), folder, max_shard_size=old, safe_serialization=safe, metadata={"a": "b"}
            )
        huggingface_hub.save_torch_state_dict(tensors(), folder, max_shard_size=size, safe_serialization=safe)

    plain, ours = both(tmp_path, act)
    assert ours == plain
    assert "Model weights successfully saved to FOLDER!" in ours[0]
    assert ("The model is bigger than the maximum size per checkpoint (10KB)" in ours[0]) == (size == "10KB")
    assert ("You are using unsafe serialization" in ours[0]) == (not safe)


def test_nothing_is_said_of_a_save_that_fails(tmp_path):
    def act(folder: Path) -> None:
        huggingface_hub.save_torch_state_dict({"a": torch.ones(2, dtype=torch.complex128)}, folder)

    _, ours = both(tmp_path, act)
    assert "successfully" not in ours[0] and ours[1] is KeyError and ours[2] == {}


@pytest.mark.parametrize("size", ["5GB", "10KB"])
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("make", [True, False])
@pytest.mark.parametrize(
    "pattern",
    ["sub/w{suffix}.{end}", "sub/deeper/w{suffix}.{end}", "./w{suffix}.{end}", "sub/../w{suffix}.{end}"],
)
def test_patterns_that_lead_into_a_folder(tmp_path, pattern, size, safe, make):
    pattern = pattern.replace("{end}", "safetensors" if safe else "bin")

    def act(folder: Path) -> None:
        if make:
            (folder / "sub" / "deeper").mkdir(parents=True)
        for _ in range(2):
            huggingface_hub.save_torch_state_dict(
                tensors(), folder, filename_pattern=pattern, max_shard_size=size, safe_serialization=safe
            )

    plain, ours = both(tmp_path, act)
    assert ours[1:] == plain[1:]
    assert (ours[1] is type(None)) == (make or not pattern.startswith("sub"))


def test_patterns_that_lead_out_of_the_folder(tmp_path):
    def act(folder: Path) -> None:
        inner = folder / "inner"
        inner.mkdir()
        huggingface_hub.save_torch_state_dict(
            tensors(), inner, filename_pattern="../w{suffix}.safetensors", max_shard_size="10KB"
        )

    plain, ours = both(tmp_path, act)
    assert ours == plain and "w.safetensors.index.json" in ours[2]


def test_patterns_with_a_folder_for_each_file(tmp_path):
    def act(folder: Path) -> None:
        for number in (1, 2, 3):
            (folder / f"d-0000{number}-of-00003").mkdir()
        (folder / "d").mkdir()
        huggingface_hub.save_torch_state_dict(
            tensors(), folder, filename_pattern="d{suffix}/w.safetensors", max_shard_size="10KB"
        )

    plain, ours = both(tmp_path, act)
    assert ours[1:] == plain[1:] and len(ours[2]) == 4


def test_an_absolute_pattern(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    before = os.listdir(elsewhere)

    def act(folder: Path) -> None:
        huggingface_hub.save_torch_state_dict(
            tensors(), folder, filename_pattern=f"{elsewhere}/w{{suffix}}.safetensors", max_shard_size="10KB"
        )

    plain, ours = both(tmp_path, act)
    assert ours[1:] == plain[1:] and ours[2] == {} and before != os.listdir(elsewhere)


@pytest.mark.parametrize("when", ["before", "after"])
def test_save_torch_model_reaches_a_replaced_save_torch_state_dict(tmp_path, monkeypatch, when):
    seen: list[Any] = []
    if when == "after":
        fastshard.install()
    monkeypatch.setattr(theirs, "save_torch_state_dict", lambda **given: seen.append(given["save_directory"]))
    if when == "before":
        fastshard.install()
    huggingface_hub.save_torch_model(torch.nn.Linear(2, 2), tmp_path)
    assert seen == [tmp_path] and os.listdir(tmp_path) == []


def test_save_torch_model_is_saved_by_the_engine(tmp_path):
    fastshard.install()
    huggingface_hub.save_torch_model(torch.nn.Linear(2, 2), tmp_path)
    assert fastshard.status().saved["save_torch_state_dict"].files == 1
