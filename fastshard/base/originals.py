# SPDX-License-Identifier: Apache-2.0
"""The functions that fastshard stands in for, as their libraries have written them, whoever has put what in their place."""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Callable
from typing import Any, Final, TypeAlias

Function: TypeAlias = Callable[..., Any]

replaced: Final[dict[int, Function]] = {}
"""By the id of each replacement of ours ever made, which is kept elsewhere, its original."""
_asked_for: dict[tuple[str, str], Function] = {}
"""Those that others have replaced, as far as somebody has asked for them."""


def is_ours(function: object) -> bool:
    """Whether this is one of the replacements."""
    return id(function) in replaced


def original_of(module: str, name: str) -> Function:
    """The module's own function of that name, whoever has put what in its place.

    Raises ``LookupError`` where nothing leads to it.
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
            raise LookupError(f"{module}.{name} has been replaced, and nothing leads to what it was")
        _asked_for[module, name] = known
    return known


def is_own(function: object, module: str) -> bool:
    """Whether this is a function of that module's own."""
    return type(function) is types.FunctionType and function.__globals__ is namespace(sys.modules.get(module))


_module_dict: Final[Any] = vars(types.ModuleType)["__dict__"]


def namespace(module: object) -> dict[str, Any]:
    """A module's dict, past whatever its class makes of attributes; nothing of what is not a module."""
    found = _module_dict.__get__(module) if issubclass(type(module), types.ModuleType) else None
    return found if isinstance(found, dict) else {}
