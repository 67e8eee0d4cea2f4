# SPDX-License-Identifier: Apache-2.0
"""Whether somebody else's code takes part in another library's save.

A library's own code can be run into a stage, where files are hidden and are written later. What a user has put into it
(a subclass's method, a wrapper of the saver) is to see what it sees without fastshard: the caller's paths, and files
that are complete. Where there is such code, the save is left to the library, file by file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final

from ..base.originals import is_ours, is_own, namespace

_LIBRARIES: Final = frozenset(
    (
        "torch",
        "safetensors",
        "huggingface_hub",
        "transformers",
        "accelerate",
        "peft",
        "diffusers",
        "fastshard",
    )
)
"""Whose code does nothing with a file that it has just saved."""
_SAVERS: Final = ("safetensors.torch", "torch.serialization")


def bound(module: str, name: str) -> object:
    """What a module binds to a name now; nothing of the module runs."""
    return namespace(sys.modules.get(module)).get(name)


def wrapped(*savers: object) -> bool:
    """Whether one of these is somebody else's, put in the place of ``safetensors.torch.save_file`` or ``torch.save``."""
    return not all(
        saver is None or is_ours(saver) or any(is_own(saver, home) for home in _SAVERS) for saver in savers
    )


def overridden(holder: object, *names: str) -> str | None:
    """The first of these methods that is not a library's own, as ``"Config.save_pretrained"``."""
    for name in names:
        method = getattr(holder, name, None)
        if method is not None and not is_of_a_library(method):
            return f"{type(holder).__name__}.{name}"
    return None


def is_of_a_library(method: Any) -> bool:
    """Whether a function or a method is one of the libraries that are known here."""
    function: Callable[..., Any] = getattr(method, "__func__", method)
    # The module of a wrapper's code, and the one that it says.
    said = getattr(function, "__globals__", {}).get("__name__"), getattr(function, "__module__", None)
    return all(isinstance(module, str) and module.partition(".")[0] in _LIBRARIES for module in said)
