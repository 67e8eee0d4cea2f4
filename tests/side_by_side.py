# SPDX-License-Identifier: Apache-2.0
"""What a library writes without fastshard, beside what it writes with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastshard


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def both(tmp_path: Path, act: Callable[[Path], object]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """What is written without fastshard, and with it."""
    (tmp_path / "plain").mkdir(exist_ok=True)
    (tmp_path / "ours").mkdir(exist_ok=True)
    act(tmp_path / "plain")
    with fastshard.installed():
        act(tmp_path / "ours")
    return files_of(tmp_path / "plain"), files_of(tmp_path / "ours")


def same_weights(one: Any, other: Any) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
