# SPDX-License-Identifier: Apache-2.0
"""Finds the functions that fastshard replaces as their libraries have written them, whoever has replaced
them."""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Callable
from typing import Any, Final, TypeAlias

Function: TypeAlias = Callable[..., Any]

replaced: Final[dict[int, Function]] = {}
"""The original of each replacement that was ever made, by the replacement's id. The replacements are kept
alive elsewhere."""
_asked_for: dict[tuple[str, str], Function] = {}
"""Originals of functions that somebody else has replaced, as far as they were asked for."""


def is_ours(function: object) -> bool:
    """Returns whether a function is one of fastshard's replacements."""
    return id(function) in replaced


def original_of(module: str, name: str) -> Function:
    """Returns a module's own function of that name, whoever has replaced it.

    Raises ``LookupError`` if nothing leads to it.
    """
    home = namespace(sys.modules.get(module))
    function = home.get(name)
    while function is not None and not is_ours(function):
        if is_own(function, module) and not hasattr(function, "__wrapped__"):
            own: Function = function
            return own
        function = getattr(function, "__wrapped__", None)
    if function is not None:
        return replaced[id(function)]
    known = _asked_for.get((module, name))
    if known is None or not is_own(known, module):
        # Its functions: each refers to the dict of its module.
        known = next(
            (f for f in gc.get_referrers(home) if is_own(f, module) and f.__qualname__ == name), None
        )
        if known is None:
            raise LookupError(f"{module}.{name} has been replaced, and the original cannot be found")
        _asked_for[module, name] = known
    return known


def is_own(function: object, module: str) -> bool:
    """Returns whether a function was defined by that module."""
    return type(function) is types.FunctionType and function.__globals__ is namespace(sys.modules.get(module))


_module_dict: Final[Any] = vars(types.ModuleType)["__dict__"]


def namespace(module: object) -> dict[str, Any]:
    """Returns a module's dict without going through its class; an empty dict for what is not a module."""
    found = _module_dict.__get__(module) if issubclass(type(module), types.ModuleType) else None
    return found if isinstance(found, dict) else {}
