# SPDX-License-Identifier: Apache-2.0
"""Saves that are waited for together: their order, and what becomes of them when one fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import filled, names, same

import fastshard
from fastshard.staged import staged
from fastshard.together import end, settle, together


@pytest.fixture
def seen() -> list[object]:
    return []


def test_outside_of_a_block_everything_ends_at_once(seen: list[object]) -> None:
    end(lambda: seen.append("a"))
    assert seen == ["a"]
    settle()


def test_ends_are_in_order_and_settled_once(seen: list[object]) -> None:
    with together():
        with together():
            end(lambda: seen.append("a"))
        end(lambda: seen.append("b"))
        assert seen == []
        settle()
        assert seen == ["a", "b"]
        end(lambda: seen.append("c"))
    assert seen == ["a", "b", "c"]


def failing() -> None:
    raise KeyError("finish")


@pytest.mark.parametrize("where", ["block", "finish"])
def test_after_an_exception_the_rest_is_abandoned(seen: list[object], where: str) -> None:
    with pytest.raises(KeyError, match=where), together():
        end(lambda: seen.append("a"), lambda error: seen.append(f"a abandoned: {error}"))
        if where == "finish":
            end(failing)
        end(lambda: seen.append("b"), lambda error: seen.append(f"b abandoned: {error}"))
        if where == "block":
            raise KeyError("block")
    expected = ["a"] if where == "finish" else ["a abandoned: 'block'"]
    assert seen == [*expected, f"b abandoned: '{where}'"]
    end(lambda: seen.append("after"))
    assert seen[-1] == "after"


def test_a_block_is_one_thread_s(seen: list[object]) -> None:
    with together():
        thread = threading.Thread(target=lambda: end(lambda: seen.append("other")))
        thread.start()
        thread.join()
        assert seen == ["other"]


def save_both(tmp_path: Path, then: Callable[[], None]) -> None:
    with together():
        how = fastshard.saving.How()
        with staged(str(tmp_path), lambda name: name == "old", how) as stage:
            stage.add({"a": filled((1000,))}, f"{stage.path}/a.safetensors", None)
        fastshard.torch_save({"b": filled((1000,))}, tmp_path / "b.pt")
        assert "a.safetensors" not in names(tmp_path) and "old" in names(tmp_path)
        then()


def test_saves_under_way_end_with_the_block(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("")
    save_both(tmp_path, lambda: None)
    assert names(tmp_path) == ["a.safetensors", "b.pt"]
    assert same(tmp_path / "a.safetensors", {"a": filled((1000,))})
    assert torch.equal(torch.load(tmp_path / "b.pt")["b"], filled((1000,)))


def test_saves_under_way_are_undone_when_the_block_fails(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("")

    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        save_both(tmp_path, fail)
    assert "a.safetensors" not in names(tmp_path) and "old" in names(tmp_path)
    assert not [name for name in names(tmp_path) if name.startswith(".")]
