# SPDX-License-Identifier: Apache-2.0
"""A save passes each file of the package once on its way from the public function to the last system call."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch

import fastshard

ROOT = Path(fastshard.__file__).resolve().parent


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)


STATE = {f"w{i}": torch.ones(300, 300) for i in range(3)}
SAVES: dict[str, Callable[[Path], None]] = {
    "save_file": lambda folder: fastshard.save_file(STATE, folder / "m.safetensors"),
    "save_files": lambda folder: fastshard.save_files({folder / name: {"w": STATE["w0"]} for name in "ab"}),
    "save_model": lambda folder: fastshard.save_model(Model(), folder / "m.safetensors"),
    "torch_save": lambda folder: fastshard.torch_save(STATE, folder / "m.pt"),
    "save_torch_state_dict": lambda folder: fastshard.save_torch_state_dict(
        STATE, folder, max_shard_size="400KB"
    ),
    "save_sharded_state": lambda folder: fastshard.save_sharded_state(Model(), folder / "sharded"),
}


def chains(call: Callable[[], None]) -> set[tuple[str, ...]]:
    """The files of the package that are on the stack, from the outermost to the innermost, at each call."""
    names: dict[str, str | None] = {}
    found: set[tuple[str, ...]] = set()

    def name_of(path: str) -> str | None:
        if path not in names:
            resolved = Path(path).resolve()
            names[path] = str(resolved.relative_to(ROOT)) if resolved.is_relative_to(ROOT) else None
        return names[path]

    def profile(frame: FrameType | None, event: str, _: object) -> None:
        if event != "call":
            return
        chain: list[str] = []
        while frame is not None:
            name = name_of(frame.f_code.co_filename)
            if name is not None and chain[-1:] != [name]:
                chain.append(name)
            frame = frame.f_back
        found.add(tuple(reversed(chain)))

    gc.collect()  # no finalizer is to come in between
    gc.disable()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
        gc.enable()
    return found


@pytest.mark.parametrize("save", SAVES)
def test_no_file_is_entered_twice(tmp_path: Path, save: str) -> None:
    SAVES[save](tmp_path)  # loads and makes what the first save needs
    found = chains(lambda: SAVES[save](tmp_path))
    assert any(len(chain) >= 4 and "engine/future.py" in chain for chain in found)
    assert [chain for chain in found if len(set(chain)) < len(chain)] == []
