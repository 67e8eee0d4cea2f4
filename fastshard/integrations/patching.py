# SPDX-License-Identifier: Apache-2.0
"""Replaces the savers of other libraries, and puts them back.

``patch_table.py`` lists what is replaced by what. An implementation is called as ``implementation(original,
*args, **kwargs)`` with the caller's arguments, ``self`` first for a method; ``adapters.py`` makes it of a
public function of the same name. Three kinds of calls go to the original:

- calls with arguments that the implementation or the original does not take: wrong ones get the original's own
  ``TypeError``, and those of a newer version its own behaviour;
- calls from within the same implementation, on its thread, directly or through a library, so nothing can loop;
- calls after :func:`uninstall`, through a reference that it could not reach.

A replacement is bound wherever a module in ``sys.modules`` binds the original. The originals are found by
identity in the modules' dicts, so no code of a module runs (9 ms for 2,400 modules). A replacement has name,
module, signature and documentation of the original, so it is pickled as the original. Modules imported later
get it from the defining module, and the defining module is patched when its code has run.

Not reached are ``functools.partial`` objects, default arguments, class attributes, containers and closures
that hold the original from before, and modules that have put another object into ``sys.modules``. Such an
original cannot be pickled while the name is ours. If another import hook ahead of ours loads a module, ours
is not called; call ``install()`` again afterwards. A function that somebody else has already replaced is left
alone, with its group, and so is a group that does not fit the installed version of its library; both are
logged.
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
from .patch_groups import Entry as Entry
from .patch_groups import Found, Target, bring, examine, groups
from .patch_table import ASYNCHRONOUS as ASYNCHRONOUS
from .patch_table import TABLE as TABLE
from .switches import Manifest, State, check_manifest

_INFO: Final = 20  # logging's, which takes a while to import
_WARNING: Final = 30

DISABLE_VARIABLE: Final = "FASTSHARD_DISABLE"
"""If it is set to yes, ``import fastshard.auto`` and the plugins for vLLM and SGLang do nothing."""


class _Pair(NamedTuple):
    original: Function
    replacement: Function
    group: str


class _ClassAttribute(NamedTuple):
    owner: type
    name: str
    original: object
    replacement: object


_state: Final = State()
_lock = threading.RLock()
"""Nothing is imported or logged under this lock, so it is always the last one that a thread takes."""
_pairs: dict[int, _Pair] = {}
"""Every replacement that was ever made, by the original's id. They are kept, so that the next install uses
the same ones."""
_class_attributes: list[_ClassAttribute] = []
"""The class attributes that are replaced now."""
_in_place: set[str] = set()
"""The groups that are replaced now."""
_found: dict[str, Found] = {}
"""What was last found of each group."""
_told: set[str] = set()
"""The texts that were logged already."""
_finished: set[str] = set()
"""Modules whose code has just run, but whose import has not ended yet."""

# A fork waits for another thread that is in the middle of replacing; the child finds all of it or nothing.
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def install(*, asynchronous: bool = False, manifest: Manifest = False, incremental: bool = False) -> None:
    """Replaces the functions in :data:`patch_table.TABLE` with fastshard's, until :func:`uninstall`.

    No library is imported: those that are not loaded yet are patched when they are imported. A second call
    does nothing, except that it reaches modules that have bound an original in the meantime. Do not call it
    during the import of a library that it is to patch. Any thread may call it at any time. Forked children
    inherit the replacements, spawned processes do not; for these, and for scripts that are not to be edited,
    there is ``FASTSHARD_AUTO=1``. :func:`fastshard.status` shows what is replaced, and what is not and why.

    Args:
        asynchronous: let the loops of other libraries go on while their checkpoints are being written, as those
            of transformers' ``Trainer``. A checkpoint holds what everything was when the call that saves it
            returned, and appears complete or not at all, before the next one is made and before training ends;
            then an error of it is raised. Where somebody's own code may look at files that were just saved,
            checkpoints are written before the call returns, as without it; ``status()`` says where and why.
        manifest: let each folder that is saved say what is in its files, as for :func:`fastshard.save_file`:
            ``save_pretrained``, ``save_torch_state_dict``, ``Accelerator.save_model``, and as one whole a checkpoint of
            ``Trainer`` or ``Accelerator.save_state``. ``torch.save`` and ``save_file`` by themselves make none.
        incremental: let each checkpoint of ``Trainer`` link the weights that have not changed since the one before in
            the run folder, as with ``base`` of :func:`fastshard.save_file`, and give frozen parameters shards of their
            own. Each is complete by itself. Nobody may write into a linked file in place.

    Raises:
        ValueError: for any other ``manifest``.
        ImportError: fastshard's native module cannot be loaded. Nothing has been replaced then. So a script ends
            in its first line and not at its first save.
    """
    check_manifest(manifest)
    _load_native()
    with _lock:
        before = _wanted_lastingly()
        _state.lasting = True
        _state.lasting_asynchronous |= asynchronous
        _state.lasting_manifest = manifest or _state.lasting_manifest
        _state.lasting_incremental |= incremental
        first = before != _wanted_lastingly()
    _begin()
    if first:
        _log_installation()


def uninstall() -> None:
    """Undoes :func:`install`: every binding is the original's again, also those that others have made.

    Within a ``with installed()`` block, of any thread, the replacements stay until the last block ends.
    Without an ``install()`` it does nothing.
    """
    with _lock:
        _state.lasting = _state.lasting_asynchronous = _state.lasting_manifest = False
        _state.lasting_incremental = False
        _end()


@contextlib.contextmanager
def installed(
    *, asynchronous: bool = False, manifest: Manifest = False, incremental: bool = False
) -> Iterator[None]:
    """Replaces the functions for the duration of a ``with`` block, in the whole process.

    Blocks may be nested and may overlap on several threads. The replacements are undone when the last block
    ends, unless ``install()`` was called. Arguments and errors are those of :func:`install`.
    """
    check_manifest(manifest)
    _load_native()
    with _lock:
        _state.blocks += 1
        _state.asynchronous_blocks += asynchronous
        _state.manifest_blocks.append(manifest)
        _state.incremental_blocks += incremental
    try:
        _begin()
        yield
    finally:
        with _lock:
            _state.blocks -= 1
            _state.asynchronous_blocks -= asynchronous
            _state.manifest_blocks.remove(manifest)
            _state.incremental_blocks -= incremental
            _end()


def is_active() -> bool:
    """Returns whether the replacements are wanted."""
    return _state.active


def is_asynchronous() -> bool:
    """Returns whether checkpoints are to be written while their loops go on."""
    return _state.active and _state.asynchronous


def manifest() -> Manifest:
    """Returns what checkpoints are to say of their files."""
    return _state.active and _state.manifest


def is_incremental() -> bool:
    """Returns whether checkpoints are to link what has not changed."""
    return _state.active and _state.incremental


def _wanted_lastingly() -> tuple[object, ...]:
    state = _state
    return state.lasting, state.lasting_asynchronous, state.lasting_manifest, state.lasting_incremental


def _follows_checkpoints() -> bool:
    return _state.active and _state.follows_checkpoints


def _table() -> tuple[Entry, ...]:
    """Returns the rows that are wanted now."""
    return (*TABLE, *ASYNCHRONOUS) if _state.follows_checkpoints else TABLE


def overview() -> dict[str, tuple[Found, bool]]:
    """Returns for each group what was found of it, and whether it is replaced now. It does not need an
    ``install()``."""
    found = {}
    with _lock:
        for group, entries in groups(_table()).items():
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
    """Undoes the replacements if nobody wants them any more. Called under the lock."""
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
    """Waits for other threads that are importing a module of the table, and began before the finder was
    there."""
    for name in {entry.module for entry in _table()}:
        if _is_being_imported(name):
            with contextlib.suppress(Exception):  # the other thread's, which will see it
                importlib.import_module(name)  # waits for it


def _is_being_imported(name: str) -> bool:
    spec = namespace(sys.modules.get(name)).get("__spec__")
    return bool(getattr(spec, "_initializing", False))


def _ready(name: str) -> bool:
    return name in sys.modules and (name in _finished or not _is_being_imported(name))


def _imported(name: str) -> None:
    """Is called when the code of a module has run."""
    _finished.add(name)
    try:
        _replace_if_active(imported=True)
    finally:
        _finished.discard(name)


_finder: Final = import_hook.Hook(lambda name: any(entry.module == name for entry in _table()), _imported)


def _replace_if_active(imported: bool = False) -> None:
    """Replaces all groups that can be replaced now. ``imported`` is false at the installation."""
    if not _state.active:
        return
    by_group = groups(_table())
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
        wanted = _follows_checkpoints if entry in ASYNCHRONOUS else is_active
        pair = _Pair(function, replacement_of(function, entry, wanted, _log_findings), entry.belongs_to)
        _pairs[id(function)] = pair
        originals.replaced[id(pair.replacement)] = function
    if owner is not None:
        name = entry.attribute.rpartition(".")[2]
        replacement = kind(pair.replacement) if kind else pair.replacement
        setattr(owner, name, replacement)
        _class_attributes.append(_ClassAttribute(owner, name, value, replacement))


def _rebind(exchange: dict[int, tuple[Function, Function]]) -> None:
    """Exchanges functions, which are given by their ids, in the dicts of all modules."""
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
    """Logs a text, once."""
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
    """Returns the names of a group's functions and the version of their library."""
    library = found.entries[0].library
    functions = ", ".join(entry.call for entry in found.entries)
    return f"{functions} of {library} {patch_groups.version_of(library)}".rstrip()


def _log_installation() -> None:
    if "logging" not in sys.modules:  # so nobody listens
        return
    replaced = [described(_found[group]) for group in groups(_table()) if group in _in_place]
    awaited = {f.entries[0].library: None for f in _found.values() if f.awaited}
    texts = [
        f"replaces {'; '.join(replaced)}" if replaced else "",
        f"awaits {', '.join(awaited)}" if awaited else "",
    ]
    import logging

    how = "installed, asynchronously" if _state.asynchronous else "installed"
    how += ", with manifests" if _state.manifest else ""
    how += ", incrementally" if _state.incremental else ""
    logging.getLogger("fastshard").info("%s: %s", how, ", and ".join(text for text in texts if text))
