# SPDX-License-Identifier: Apache-2.0
"""What runs in place of a replaced function; ``patching.TABLE`` says which one.

Each is called as ``implementation(original, *arguments)`` and has the parameters of what it stands in for and
no others, so that nobody comes to depend on ours through somebody else's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import saving
from .planning import PathLike, StateDict


def save_file(
    original: Callable[..., Any],
    tensors: StateDict,
    filename: PathLike,
    metadata: dict[str, str] | None = None,
) -> None:
    """``safetensors.torch.save_file``"""
    saving.save_file(tensors, filename, metadata)


def save(original: Callable[..., Any], tensors: StateDict, metadata: dict[str, str] | None = None) -> bytes:
    """``safetensors.torch.save``"""
    return saving.save(tensors, metadata)


def save_model(
    original: Callable[..., Any],
    model: torch.nn.Module,
    filename: PathLike,
    metadata: dict[str, str] | None = None,
    force_contiguous: bool = True,
) -> None:
    """``safetensors.torch.save_model``"""
    saving.save_model(model, filename, metadata, force_contiguous)
