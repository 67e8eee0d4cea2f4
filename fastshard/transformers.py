# SPDX-License-Identifier: Apache-2.0
"""``PreTrainedModel.save_pretrained``: transformers' own code, run into a stage, so that every quirk is its own.

:func:`fastshard.install` puts these functions in the place of transformers'. Each gets the original first.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .offload import follow_weights, held_in_memory, offloaded_tensor
from .saving import How
from .staged import current, staged

_LOGGERS: Final = (
    "transformers.modeling_utils",
    "transformers.configuration_utils",
    "transformers.generation.configuration_utils",
)


def save_pretrained(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Saves configuration, shards and index as one: shards in parallel, and the directory all or nothing.

    What is pushed to the hub, and distributed checkpoints, are written as transformers does, file by file.
    """
    from transformers.utils import logging

    given = inspect.signature(original).bind(model, *args, **kwargs)
    given.apply_defaults()
    directory = given.arguments["save_directory"]
    if (
        given.arguments.get("push_to_hub")
        or given.arguments.get("distributed_checkpoint")
        or os.path.isfile(directory)
    ):
        return original(model, *args, **kwargs)
    directory = os.fspath(directory)
    how = How(progress=logging.is_progress_bar_enabled())
    with staged(directory, None, how, create=True, loggers=_LOGGERS) as stage:
        stage.lasting = _storages(model.parameters(), model.buffers())
        if hasattr(model, "hf_device_map"):
            stage.lasting |= _storages(held_in_memory(model))
        if given.arguments.get("state_dict"):
            stage.lasting |= _storages(given.arguments["state_dict"].values())
        given.arguments["save_directory"] = stage.path
        result = original(*given.args, **given.kwargs)
    if hasattr(model, "hf_device_map"):
        follow_weights(model, directory)
    # The original waits for the writing rank before there is anything: once more.
    barrier = getattr(model, "barrier_after_gathered_checkpoint_save", None)
    if barrier is not None:
        barrier(getattr(model.config, "distributed_config", None))
    return result


def load_offloaded_parameter(original: Callable[..., Any], model: Any, param_name: str) -> torch.Tensor:
    """While a model is saved, its offloaded weights are mapped from their files, not read into memory."""
    stage = current()
    return (
        original(model, param_name) if stage is None else offloaded_tensor(model, param_name, stage.scratch)
    )


def progress_bar(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """While a model is saved, the only bar is that of the bytes written; transformers' own would count shards that
    are not written yet."""
    if current() is None:
        return original(*args, **kwargs)
    from transformers.utils import logging

    return logging.EmptyTqdm(*args[1:], **kwargs)  # type: ignore[no-untyped-call]


def _storages(*groups: Iterable[object]) -> set[int]:
    """Addresses of the memory of these tensors."""
    return {
        value.untyped_storage().data_ptr()
        for group in groups
        for value in group
        if isinstance(value, torch.Tensor) and not is_traceable_wrapper_subclass(value)
    }
