# SPDX-License-Identifier: Apache-2.0
"""Whether what fastshard replaces (:mod:`fastshard.integrations.patch_table`) fits the installed libraries.

:func:`examine` examines the installed library before anything is replaced. The functions must exist, be the
library's own, and take the parameters that the implementation knows by their positions, and what the
implementation uses of the library (:data:`NEEDS`) must exist. No code of a module runs for that.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ..base.originals import Function as Function
from ..base.originals import is_own, namespace
from .patch_entry import Entry as Entry
from .patch_table import NEEDS as NEEDS


class Target(NamedTuple):
    """A function where it is bound: in a module or a class, which may hold it as a static or a class method."""

    entry: Entry
    function: Function
    owner: type | None
    value: object
    kind: type[staticmethod[..., Any]] | type[classmethod[Any, ..., Any]] | None


class Found(NamedTuple):
    """What :func:`examine` has found of a group."""

    entries: tuple[Entry, ...]
    """The functions that the installed version should have."""
    targets: tuple[Target, ...] = ()
    """The functions that can be replaced, if there is no reason against it."""
    awaited: str | None = None
    """A module that has to be imported first."""
    misfit: str | None = None
    """Why the group does not fit the installed version."""
    foreign: tuple[Entry, ...] = ()
    """The functions that somebody else has replaced."""


def groups(table: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Returns the rows of a table by the names of their groups, in the order of the table."""
    found: dict[str, list[Entry]] = {}
    for entry in table:
        found.setdefault(entry.belongs_to, []).append(entry)
    return found


def version_of(library: str) -> str:
    """Returns the version of a library that is imported; an empty text if it does not tell."""
    said = namespace(sys.modules.get(library)).get("__version__")
    if isinstance(said, str):
        return said
    return _installed_version(library) if library in sys.modules else ""


@functools.cache
def _installed_version(library: str) -> str:
    """Returns the installed version, for libraries whose module in ``sys.modules`` is a lazy object."""
    from importlib import metadata

    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


def expected(entries: Iterable[Entry]) -> list[Entry]:
    """Returns the functions of a group that the imported version of the library should have."""
    return [entry for entry in entries if _is_of_this_version(entry)]


def _is_of_this_version(entry: Entry) -> bool:
    release = _release(version_of(entry.library)) if entry.since or entry.until else ()
    return (not entry.since or release >= _release(entry.since)) and (
        not entry.until or release < _release(entry.until)
    )


def _release(version: str) -> tuple[int, ...]:
    """Returns the numbers that a version begins with. A version without any counts as new."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3]) or (
        sys.maxsize,
    )


def bring(group: str, entries: Sequence[Entry], ready: Callable[[str], bool]) -> None:
    """Imports what a group needs besides the module of its first row, once that is imported.

    All of it belongs to the same library, and most of it is imported with that module.
    """
    if ready(entries[0].module):
        for module in _modules(group, expected(entries)):
            if module not in sys.modules:
                try:
                    importlib.import_module(module)
                except Exception:  # which `examine` will see
                    continue


def _modules(group: str, entries: Iterable[Entry]) -> list[str]:
    needed = (need.partition(":")[0] for need in NEEDS.get(group, ()))
    return list(dict.fromkeys((*(entry.module for entry in entries), *needed)))


def examine(
    group: str,
    entries: Sequence[Entry],
    ready: Callable[[str], bool],
    is_ours: Callable[[object], bool],
) -> Found:
    """Whether a group can be replaced. ``ready``: whether a module's code has run; ``is_ours``: whether this is a
    replacement that is in place already."""
    wanted = tuple(expected(entries))
    if not wanted or not ready(entries[0].module):
        return Found(tuple(entries), awaited=entries[0].module)
    for module in _modules(group, wanted):
        if module not in sys.modules:
            return Found(wanted, misfit=f"there is no module {module}")
        if not ready(module):
            return Found(wanted, awaited=module)
    missing = []
    for need in NEEDS.get(group, ()):
        module, _, name = need.partition(":")
        if name not in namespace(sys.modules[module]):
            missing.append(f"{module} has no {name}")
    targets, foreign = [], []
    for entry in wanted:
        target = _target(entry)
        if target is None:
            missing.append(f"{entry.module} has no {entry.attribute}")
        elif is_ours(target.function):
            continue
        elif not is_own(target.function, entry.module):
            foreign.append(entry)
        else:
            targets.append(target)
            if other := _other_parameters(target.function, entry.parameters.split()):
                missing.append(f"{entry} {other}")
    return Found(wanted, tuple(targets), None, "; ".join(missing) or None, tuple(foreign))


def _target(entry: Entry) -> Target | None:
    holder = namespace(sys.modules.get(entry.module))
    *classes, name = entry.attribute.split(".")
    owner = None
    for part in classes:
        owner = holder.get(part)
        if not issubclass(type(owner), type):
            return None
        holder = dict(vars(owner))
    if name not in holder:
        return None
    value = holder[name]
    kind = type(value) if type(value) in (staticmethod, classmethod) else None
    return Target(entry, value.__func__ if kind else value, owner, value, kind)


def _other_parameters(function: Function, known: list[str]) -> str | None:
    """How the parameters that can be given by their places differ from those that the implementation knows; more of
    them, or fewer, do not: calls that it does not take are the original's."""
    code = function.__code__
    found = list(code.co_varnames[: code.co_argcount])
    both = min(len(found), len(known))
    if found[:both] == known[:both] or (not found and code.co_flags & 0x04):  # CO_VARARGS: a decorated one
        return None
    return f"takes ({', '.join(found)}), not ({', '.join(known)})"
