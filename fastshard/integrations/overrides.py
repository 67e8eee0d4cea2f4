# SPDX-License-Identifier: Apache-2.0
"""Finds out whether a user's own code takes part in another library's save.

A library's own code can be run on a hidden directory, where files are written later. Code that a user has
added to it (a method of a subclass, a wrapper of the saver) must see what it sees without fastshard: the
caller's paths, and files that are complete. Where there is such code, the save is left to the library, file
by file.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

from ..base.activity import count_on_the_spot
from ..base.originals import is_ours, is_own, namespace
from ..engine import background

_LIBRARIES: Final = frozenset(
    (
        "torch",
        "safetensors",
        "huggingface_hub",
        "transformers",
        "accelerate",
        "peft",
        "diffusers",
        "trl",
        "fastshard",
    )
)
"""Libraries whose code does nothing with a file that it has just saved."""
_SAVERS: Final = ("safetensors.torch", "torch.serialization")


def bound(module: str, name: str) -> object:
    """Returns what a module binds to a name now, without running code of the module."""
    return namespace(sys.modules.get(module)).get(name)


def wrapped(*savers: object) -> bool:
    """Returns whether one of these functions is a user's that replaces ``safetensors.torch.save_file`` or
    ``torch.save``."""
    return not all(
        saver is None or is_ours(saver) or any(is_own(saver, home) for home in _SAVERS) for saver in savers
    )


def overridden(holder: object, *names: str) -> str | None:
    """Returns the first of these methods that is not a library's own, as ``"Config.save_pretrained"``."""
    for name in names:
        method = getattr(holder, name, None)
        if method is not None and not is_of_a_library(method):
            return f"{type(holder).__name__}.{name}"
    return None


def is_of_a_library(method: Any) -> bool:
    """Returns whether a function or a method belongs to one of the libraries that are known here."""
    function: Callable[..., Any] = getattr(method, "__func__", method)
    # The module of a wrapper's code, and the one that it says.
    said = getattr(function, "__globals__", {}).get("__name__"), getattr(function, "__module__", None)
    return all(isinstance(module, str) and module.partition(".")[0] in _LIBRARIES for module in said)


@contextlib.contextmanager
def on_the_spot(call: str, reason: str) -> Iterator[None]:
    """A block whose saves are complete when their calls return. If they were to be asynchronous, that is
    counted."""
    if background.current() is not None:
        count_on_the_spot(call, reason)
    with background.synchronous():
        yield
