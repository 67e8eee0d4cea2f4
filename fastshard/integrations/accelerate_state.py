# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of ``Accelerator.save_state`` that are written while training goes on.

``fastshard.install(asynchronous=True)`` replaces accelerate's functions with these. Accelerate's own code makes
the checkpoint in a hidden folder, so its files are its own. All values are captured when the call returns, and
the folder appears complete or not at all. Older checkpoints (``total_limit``) are removed when the new one
stands. One checkpoint is in flight at a time.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from ..base.activity import count_on_the_spot
from ..engine import background
from ..publish.checkpoint import checkpoint, wait_for_earlier
from ..publish.folder import open_folder
from ..publish.hidden_names import PREFIX
from ..publish.switching import remove_left
from . import patching
from .overrides import bound, overridden, wrapped
from .transformers import completing

_CALL: Final = "Accelerator.save_state"
_LOGGERS: Final = ("accelerate.accelerator", "accelerate.checkpointing")


def save_state(
    original: Callable[..., Any],
    accelerator: Any,
    output_dir: str | os.PathLike[str] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Saves a checkpoint that appears when everything in it is written.

    Raises the error of the checkpoint before, if that has failed.
    """
    wait_for_earlier()
    automatic = accelerator.project_configuration.automatic_checkpoint_naming
    above = os.path.join(accelerator.project_dir, "checkpoints") if automatic else None
    directory = os.path.join(above, f"checkpoint_{accelerator.save_iteration}") if above else output_dir
    if directory is None or (above and os.path.exists(directory)) or os.path.isfile(directory):
        return original(accelerator, output_dir, *args, **kwargs)  # which raises
    directory = os.fspath(directory)
    asynchronous = patching.is_asynchronous()
    reason = next(_reasons(accelerator, directory), None) if asynchronous else None
    if reason is not None:
        count_on_the_spot(_CALL, reason)
    if reason is not None or not asynchronous:
        with background.synchronous(), completing(directory, accelerator.is_main_process):
            return original(accelerator, output_dir, *args, **kwargs)
    if above:
        os.makedirs(above, exist_ok=True)
    with checkpoint(directory, call=_CALL, loggers=_LOGGERS, manifest=patching.manifest()) as made:
        with _named_by_caller(accelerator.project_configuration):
            original(accelerator, made.path, *args, **kwargs)
        limit = accelerator.project_configuration.total_limit
        if above and limit is not None:
            made.then(functools.partial(_rotate, above, limit))
    return Path(directory)


def _reasons(accelerator: Any, directory: str) -> Iterator[str]:
    """Yields why a checkpoint is to stand when the call returns."""
    if accelerator.num_processes > 1:
        yield "several processes save together"
    if accelerator.distributed_type.value != "NO":
        yield f"{accelerator.distributed_type.value} saves"
    if accelerator._save_model_state_pre_hook:
        yield "a hook of register_save_state_pre_hook may look at what was saved"
    if os.path.islink(directory):
        yield "the folder is a link"
    if wrapped(bound("accelerate.utils.other", "safe_save_file"), bound("torch", "save")):
        yield "somebody else's save_file or torch.save is in place"
    own = overridden(accelerator, "save", "save_state", "get_state_dict")
    if own:
        yield f"{own} may look at what was saved"


@contextlib.contextmanager
def _named_by_caller(configuration: Any) -> Iterator[None]:
    """A block in which accelerate saves where it is told to, and removes nothing."""
    automatic = configuration.automatic_checkpoint_naming
    configuration.automatic_checkpoint_naming = False
    try:
        yield
    finally:
        configuration.automatic_checkpoint_naming = automatic


def _rotate(above: str, limit: int) -> None:
    """Removes the oldest checkpoints, by the numbers in their names, as accelerate does before it saves."""
    named = [name for name in os.listdir(above) if not name.startswith(PREFIX) and re.search("[0-9]", name)]
    named.sort(key=lambda name: int(re.findall("[0-9]+", name)[0]))
    for name in named[: max(0, len(named) - limit)]:
        shutil.rmtree(os.path.join(above, name))


def load_state(original: Callable[..., Any], accelerator: Any, *args: Any, **kwargs: Any) -> Any:
    """Loads a checkpoint when none is in flight any more. What a killed save has left, and accelerate might take for
    the newest checkpoint, is removed before."""
    wait_for_earlier()
    if accelerator.project_configuration.automatic_checkpoint_naming:
        with (
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            open_folder(os.path.join(accelerator.project_dir, "checkpoints")) as folder,
        ):
            remove_left(folder, [])
    return original(accelerator, *args, **kwargs)


def end_training(original: Callable[..., Any], accelerator: Any, *args: Any, **kwargs: Any) -> Any:
    """Ends the training when all checkpoints stand. Raises the error of one that has failed."""
    try:
        return original(accelerator, *args, **kwargs)
    finally:
        wait_for_earlier()
