# SPDX-License-Identifier: Apache-2.0
"""``Accelerator.save_model``: accelerate's own code writes into a hidden directory, so its results are its
own.

:func:`fastshard.install` replaces accelerate's functions with these. Each gets the original as its first
argument.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

import torch

from ..base.activity import count_left
from ..engine.pipeline import How
from ..publish.staged import current, staged
from . import patching
from .offload import offloaded_state_dict
from .overrides import bound, on_the_spot, overridden, wrapped

_CALL: Final = "Accelerator.save_model"


def save_model(
    original: Callable[..., Any],
    accelerator: Any,
    model: torch.nn.Module,
    save_directory: str | os.PathLike[str],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Saves shards and index as one save: the shards in parallel, and the directory all at once.

    On the main process, shards and indexes of an earlier save are removed in the same moment.
    """
    reason = _why_left(accelerator)
    if reason is not None:
        count_left(_CALL, reason)
        with on_the_spot(_CALL, reason):
            return original(accelerator, model, save_directory, *args, **kwargs)
    if os.path.isfile(save_directory):
        return original(accelerator, model, save_directory, *args, **kwargs)
    stale = None if accelerator.is_main_process else _nothing
    directory = os.fspath(save_directory)
    with staged(
        directory,
        stale,
        How(manifest=patching.manifest()),
        call=_CALL,
        create=True,
        loggers=("accelerate.accelerator",),
    ) as stage:
        result = original(accelerator, model, stage.path, *args, **kwargs)
        if (
            not stage.weights() and stage.path != directory
        ):  # another process writes them, and with them the index that all have made
            for name in os.listdir(stage.path):
                os.unlink(os.path.join(stage.path, name))
    return result


def _why_left(accelerator: Any) -> str | None:
    if wrapped(bound("accelerate.utils.other", "safe_save_file"), bound("torch", "save")):
        return "somebody else's save_file or torch.save is in place"
    own = overridden(accelerator, "save")
    return f"{own} is not accelerate's own" if own else None


def _nothing(name: str) -> bool:
    return False


def get_state_dict_offloaded_model(
    original: Callable[..., Any], model: torch.nn.Module
) -> dict[str, torch.Tensor]:
    """While a model is being saved, maps its offloaded weights from their files. Accelerate reads them into
    memory."""
    stage = current()
    return original(model) if stage is None else offloaded_state_dict(model, stage.hidden)
