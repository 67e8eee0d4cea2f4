# SPDX-License-Identifier: Apache-2.0
"""Putting fastshard in the place of other libraries' savers, and taking it out again.

``patch_groups.py`` says what is replaced by what. An implementation is called as ``implementation(original, *args,
**kwargs)`` with the caller's arguments, ``self`` first for a method; for a public function with the original's
parameters ``adapters.py`` makes it. Three kinds of calls go to the original instead:

- with arguments that the implementation's parameters do not take, or the original's: wrong ones get the original's own
  ``TypeError``, and those of a newer version its own behaviour;
- from within the same implementation, on its thread, directly or by way of a library: nothing can loop;
- after :func:`uninstall`, through a reference that it could not reach.

A replacement is bound wherever a module in ``sys.modules`` binds the original (found by identity, in the modules'
own dicts: nothing of a module runs) and has its name, module, signature and documentation, so it is
pickled as the original. Modules imported later get it from the defining module, and a module that is imported later
is patched when its code has run. Out of reach: ``functools.partial`` objects, default arguments, class
attributes, containers and closures that took hold of the original before, and modules that have put another object in
their place in ``sys.modules``. Of a module that somebody else's import hook, put before ours, has found, we hear
nothing: ``install()`` again, afterwards, reaches it. What took hold of an original before cannot be pickled while the name is ours. A
function that somebody else has already replaced is left alone, with its group, which is logged; so is a group that does
not fit the installed version of its library.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Final, NamedTuple

from ..base import originals
from ..base.originals import Function, is_ours, namespace
from . import import_hook, patch_groups
from .calls import load as _load  # noqa: F401
from .calls import refused, replacement_of
from .patch_groups import TABLE as TABLE
from .patch_groups import Entry as Entry
from .patch_groups import Found, Target, bring, examine, groups

_INFO: Final = 20  # logging's, which takes a while to import
_WARNING: Final = 30

DISABLE_VARIABLE: Final = "FASTSHARD_DISABLE"
"""Where it says yes, ``import fastshard.auto`` and the plugins for vLLM and SGLang do nothing."""


class _State:
    """What asks for the replacements to be in place; changed under ``_lock``."""

    lasting = False
    """Between ``install()`` and ``uninstall()``."""
    blocks = 0
    """``with installed()`` blocks under way, of all threads."""

    @property
    def active(self) -> bool:
        return self.lasting or self.blocks > 0


class _Pair(NamedTuple):
    original: Function
    replacement: Function
    group: str


class _ClassAttribute(NamedTuple):
    owner: type
    name: str
    original: object
    replacement: object


_state = _State()
_lock = threading.RLock()
"""Nothing is imported or logged under it: it is the last one that a thread takes."""
_pairs: dict[int, _Pair] = {}
"""Every replacement ever made, by the original's id; kept, so that it is the same one after the next install."""
_class_attributes: list[_ClassAttribute] = []
"""Those in place."""
_in_place: set[str] = set()
"""Groups that are replaced."""
_found: dict[str, Found] = {}
"""What was last seen of each group."""
_told: set[str] = set()
"""What has been logged already."""
_finished: set[str] = set()
"""Modules whose code has just run, but whose import has not quite ended."""

# A fork waits for another thread that is in the middle of replacing; the child finds all of it or nothing.
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def install() -> None:
    """Lets fastshard do the work of the functions in :data:`patch_groups.TABLE`, until :func:`uninstall`.

    Imports no library: those that are not there yet are patched when they are imported. Twice is once; again, it
    also reaches modules that have bound an original in the meantime. Call it outside of the import of a library
    that it is to patch. Any thread may call it at any time; forked children inherit it, spawned processes do not (but
    for those, and for scripts that are not to be edited, there is ``FASTSHARD_AUTO=1``). :func:`fastshard.status` tells
    what is replaced, and what is not and why.

    Raises:
        ImportError: fastshard's native module does not load. Nothing has been replaced then: better a
            script that ends in its first line than one that ends at its first save.
    """
    _load_native()
    with _lock:
        first = not _state.lasting
        _state.lasting = True
    _begin()
    if first:
        _log_installation()


def uninstall() -> None:
    """Ends what :func:`install` began: every binding is the original's again, whoever made it.

    Inside a ``with installed()`` block, of any thread, the replacements stay until the last block ends.
    Without an ``install()`` it does nothing.
    """
    with _lock:
        _state.lasting = False
        _end()


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """:func:`install` for a ``with`` block, of the whole process. Blocks may nest and overlap on several threads; the
    replacements go with the end of the last one, unless ``install()`` was called."""
    _load_native()
    with _lock:
        _state.blocks += 1
    try:
        _begin()
        yield
    finally:
        with _lock:
            _state.blocks -= 1
            _end()


def is_active() -> bool:
    """Whether the replacements are asked for."""
    return _state.active


def overview() -> dict[str, tuple[Found, bool]]:
    """Group -> what was found of it, and whether it is replaced now; as it is without anybody's asking for it, too."""
    found = {}
    with _lock:
        for group, entries in groups(TABLE).items():
            seen = _found.get(group) if group in _in_place else examine(group, entries, _ready, is_ours)
            seen = seen or examine(group, entries, _ready, is_ours)
            if group in refused:
                seen = seen._replace(misfit=refused[group])
            found[group] = seen, group in _in_place and seen.misfit is None
    return found


def _load_native() -> None:
    try:
        from .. import _native  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"fastshard replaces nothing, as its native module cannot be loaded: {error} "
            f"({DISABLE_VARIABLE}=1 makes `import fastshard.auto` do nothing)"
        ) from error


def _begin() -> None:
    with _lock:
        if _state.active:
            import_hook.begin(_finder)
    _await_imports()
    _replace_if_active()


def _end() -> None:
    """Under the lock."""
    if _state.active:
        return
    import_hook.end(_finder)
    _rebind({id(pair.replacement): (pair.replacement, pair.original) for pair in _pairs.values()})
    for owner, name, original, replacement in _class_attributes:
        if vars(owner).get(name) is replacement:
            setattr(owner, name, original)
    _class_attributes.clear()
    _in_place.clear()


def _await_imports() -> None:
    """Another thread may be importing a module of the table, and have begun before the finder was there."""
    for name in {entry.module for entry in TABLE}:
        if _is_being_imported(name):
            with contextlib.suppress(Exception):  # the other thread's, which will see it
                importlib.import_module(name)  # waits for it


def _is_being_imported(name: str) -> bool:
    spec = namespace(sys.modules.get(name)).get("__spec__")
    return bool(getattr(spec, "_initializing", False))


def _ready(name: str) -> bool:
    return name in sys.modules and (name in _finished or not _is_being_imported(name))


def _imported(name: str) -> None:
    """A module's code has run."""
    _finished.add(name)
    try:
        _replace_if_active(imported=True)
    finally:
        _finished.discard(name)


_finder: Final = import_hook.Hook(lambda name: any(entry.module == name for entry in TABLE), _imported)


def _replace_if_active(imported: bool = False) -> None:
    """``imported``: because of an import, not at installation."""
    if not _state.active:
        return
    by_group = groups(TABLE)
    for group, entries in by_group.items():
        bring(group, entries, _ready)
    with _lock:
        if not _state.active:
            return
        new = []
        for group, entries in by_group.items():
            found = examine(group, entries, _ready, is_ours)
            fits = not (found.awaited or found.misfit or found.foreign or group in refused)
            if fits and group not in _in_place:
                _in_place.add(group)
                new.append(found)
            elif group not in _in_place:
                _found[group] = found
                continue
            _found[group] = found._replace(awaited=None, misfit=None, foreign=())
            for target in found.targets:  # of a group in place: what a reload has brought
                _replace(target)
        _rebind(
            {
                id(pair.original): (pair.original, pair.replacement)
                for pair in _pairs.values()
                if pair.group in _in_place
            }
        )
    _log_findings()
    if imported and _state.lasting and "logging" in sys.modules:
        for found in new:
            _tell(_INFO, f"replaces {described(found)}")


def _replace(target: Target) -> None:
    entry, function, owner, value, kind = target
    pair = _pairs.get(id(function))
    if pair is None:
        pair = _Pair(function, replacement_of(function, entry, is_active, _log_findings), entry.belongs_to)
        _pairs[id(function)] = pair
        originals.replaced[id(pair.replacement)] = function
    if owner is not None:
        name = entry.attribute.rpartition(".")[2]
        replacement = kind(pair.replacement) if kind else pair.replacement
        setattr(owner, name, replacement)
        _class_attributes.append(_ClassAttribute(owner, name, value, replacement))


def _rebind(exchange: dict[int, tuple[Function, Function]]) -> None:
    """Exchanges functions, given by their ids, in the dicts of all modules."""
    if not exchange:
        return
    for module in sys.modules.copy().values():
        home = namespace(module)
        for name, value in home.copy().items():
            if id(value) in exchange:
                old, new = exchange[id(value)]
                if home.get(name) is old:
                    home[name] = new


def _tell(level: int, text: str) -> None:
    """Once."""
    if text not in _told:
        _told.add(text)
        import logging

        logging.getLogger("fastshard").log(level, "%s", text)


def _log_findings() -> None:
    for group, found in list(_found.items()):
        for entry in found.foreign:
            rest = [other.call for other in found.entries if other not in found.foreign]
            with_it = f" (and with it {', '.join(rest)})" if rest else ""
            _tell(_WARNING, f"{entry} is left alone: it is not that library's own function any more{with_it}")
        misfit = refused.get(group) or found.misfit
        if misfit:
            _tell(_WARNING, f"{described(found)} is not replaced, as fastshard does not fit it: {misfit}")


def described(found: Found) -> str:
    """The functions of a group, and the version of their library."""
    library = found.entries[0].library
    functions = ", ".join(entry.call for entry in found.entries)
    return f"{functions} of {library} {patch_groups.version_of(library)}".rstrip()


def _log_installation() -> None:
    if "logging" not in sys.modules:  # so nobody listens
        return
    replaced = [described(_found[group]) for group in groups(TABLE) if group in _in_place]
    awaited = {f.entries[0].library: None for f in _found.values() if f.awaited}
    texts = [
        f"replaces {'; '.join(replaced)}" if replaced else "",
        f"awaits {', '.join(awaited)}" if awaited else "",
    ]
    import logging

    logging.getLogger("fastshard").info("installed: %s", ", and ".join(text for text in texts if text))
