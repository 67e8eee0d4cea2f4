# SPDX-License-Identifier: Apache-2.0
"""The implementations of replaced functions that are public functions of the same name.

:data:`fastshard.integrations.patch_table.TABLE` says which function each one replaces. They are called as
``implementation(original, *args, **kwargs)``. They take the original's parameters and no others, so that
nobody comes to depend on fastshard's own arguments through another library's function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..api import archive, hub, saving
from ..base.activity import count_left
from ..engine.pipeline import How, PathLike, StateDict
from ..publish import staged
from . import patching
from .overrides import bound, wrapped


def _namesake(
    function: Callable[..., Any], by_saver: bool = False, of_folder: bool = False
) -> Callable[..., Any]:
    """Returns the public function for callers of the original: without the parameters that only fastshard
    has.

    ``by_saver``: the original calls ``safetensors.torch.save_file``, or ``torch.save`` for pickled files. If
    somebody has replaced that with a function of his own, the original is called. ``of_folder``: it saves a
    checkpoint, which has a manifest if that is wanted.
    """
    signature = inspect.signature(function)
    theirs = [p for p in signature.parameters.values() if p.name not in How._fields]
    original = inspect.Parameter("original", inspect.Parameter.POSITIONAL_ONLY)

    def implementation(original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if by_saver:
            safe = kwargs.get("safe_serialization", True)
            if wrapped(bound("safetensors.torch", "save_file") if safe else bound("torch", "save")):
                count_left(function.__name__, "somebody else's save_file or torch.save is in place")
                return original(*args, **kwargs)
        if of_folder:
            kwargs["manifest"] = patching.manifest()
        return function(*args, **kwargs)

    implementation.__signature__ = signature.replace(parameters=[original, *theirs])  # type: ignore[attr-defined]
    return implementation


def _save_file(tensors: StateDict, filename: PathLike, metadata: dict[str, str] | None = None) -> None:
    """Saves a file at once, or together with the other files of the checkpoint that it belongs to."""
    stage = staged.current()
    if stage is not None and stage.holds(filename):
        stage.add(tensors, filename, metadata)
    else:
        saving.save_file(tensors, filename, metadata)


save_file = _namesake(_save_file)
save = _namesake(saving.save)
save_model = _namesake(saving.save_model, by_saver=True)
save_torch_state_dict = _namesake(hub.save_torch_state_dict, by_saver=True, of_folder=True)
torch_save = archive.in_the_place_of_torch
