# SPDX-License-Identifier: Apache-2.0
"""The function that takes a replaced function's place, and the choice which calls go to the original."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..base import loading
from ..base.originals import Function
from .patch_groups import Entry

if TYPE_CHECKING:
    import inspect


class _OfThisThread(threading.local):
    @property
    def running(self) -> set[Entry]:
        """The set is made in one step: a signal handler that interrupts an ``__init__`` would find an object
        without it."""
        found: set[Entry] = self.__dict__.setdefault("_running", set())
        return found


_this_thread = _OfThisThread()
refused: dict[str, str] = {}
"""The groups that were found not to fit at their first call, and why."""


def replacement_of(
    original: Function, entry: Entry, is_active: Callable[[], bool], told: Callable[[], None]
) -> Function:
    """Returns the replacement of a function. ``told`` is called when a group is added to :data:`refused`."""
    takes: Function | None = None
    implementation: Function = original

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        nonlocal takes, implementation
        running = _this_thread.running
        # A first call in a finalizer, when modules go, comes too late to import anything.
        if not is_active() or entry in running or (takes is None and sys.is_finalizing()):
            return original(*args, **kwargs)
        running.add(entry)
        try:
            if takes is None:
                implementation, takes = _prepared(original, entry, told)
            try:
                takes(original, *args, **kwargs)
            except TypeError:
                return _by_the_original(original, entry, args, kwargs)
            return implementation(original, *args, **kwargs)
        finally:
            running.discard(entry)

    return replacement


def _by_the_original(original: Function, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    done = original(*args, **kwargs)  # the caller's error, if they are wrong
    from ..base.activity import count_left

    reason = (
        "fastshard does not fit" if entry.belongs_to in refused else "arguments that fastshard does not know"
    )
    count_left(entry.call, reason)
    return done


def _prepared(original: Function, entry: Entry, told: Callable[[], None]) -> tuple[Function, Function]:
    """Returns the implementation, and a function that raises ``TypeError`` for calls that it cannot take."""
    import inspect

    misfit = None
    try:
        implementation, ours = load(entry.implementation)
    except (ImportError, AttributeError) as error:
        misfit = f"{type(error).__name__}: {error}"
    else:
        theirs = inspect.signature(original)
        known = list(ours.parameters.values())[1:]
        for parameter in known:
            there = theirs.parameters.get(parameter.name)
            defaults = (there.default if there else parameter.empty), parameter.default
            if parameter.empty not in defaults and defaults[0] != defaults[1]:
                misfit = f"the default of {parameter.name} is {defaults[0]!r}, not {defaults[1]!r}"
    if misfit is not None:
        refused[entry.belongs_to] = f"{entry}: {misfit}"
        told()
        return original, _takes_nothing
    takes = binder(ours)
    if all(_is_no_stricter(parameter, theirs.parameters.get(parameter.name)) for parameter in known):
        return implementation, takes
    of_original = binder(theirs)

    def takes_both(original: Function, /, *args: Any, **kwargs: Any) -> None:
        takes(original, *args, **kwargs)
        of_original(*args, **kwargs)

    return implementation, takes_both


def _is_no_stricter(known: inspect.Parameter, there: inspect.Parameter | None) -> bool:
    """Returns whether the original takes a parameter in every way in which the implementation does."""
    return there is not None and (there.kind, there.default is there.empty) == (
        known.kind,
        known.default is known.empty,
    )


def binder(signature: inspect.Signature) -> Function:
    """Returns a function that takes the arguments of a signature and nothing else, much faster than its
    ``bind``."""
    return _compiled(signature, "pass")


def arguments_of(signature: inspect.Signature) -> Function:
    """Returns a function that takes the arguments of a signature and returns a dict of all of them, with
    defaults."""
    return _compiled(signature, "return locals()")


def _compiled(signature: inspect.Signature, body: str) -> Function:
    import inspect

    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    texts: list[str] = []
    previous = None
    for parameter in signature.parameters.values():
        kind = parameter.kind
        if previous is parameter.POSITIONAL_ONLY and kind is not previous:
            texts.append("/")
        if kind is parameter.KEYWORD_ONLY and previous not in (kind, parameter.VAR_POSITIONAL):
            texts.append("*")
        stars = "*" * ((kind is parameter.VAR_POSITIONAL) + 2 * (kind is parameter.VAR_KEYWORD))
        texts.append(
            stars
            + parameter.name
            + ("" if parameter.default is parameter.empty else f"=_defaults[{parameter.name!r}]")
        )
        previous = kind
    if previous is inspect.Parameter.POSITIONAL_ONLY:
        texts.append("/")
    made: dict[str, Any] = {"_defaults": defaults}
    exec(f"def takes({', '.join(texts)}): {body}", made)
    takes: Function = made["takes"]
    return takes


def _takes_nothing(*args: Any, **kwargs: Any) -> None:
    raise TypeError


@functools.cache
def load(implementation: str) -> tuple[Function, inspect.Signature]:
    import inspect

    module, _, name = implementation.partition(":")
    function = getattr(loading.load(module), name)
    return function, inspect.signature(function)
