# SPDX-License-Identifier: Apache-2.0
"""Putting fastshard in the place of other libraries' savers, and taking it out again.

To add a replacement: a row in :data:`TABLE` and its implementation. A row names the module that *defines* the
function, the attribute in there (``"save_file"``; ``"PreTrainedModel.save_pretrained"`` for what a class holds,
static and class methods included), and the implementation, which is imported by the first call.
It is called as ``implementation(original, *args, **kwargs)`` with the caller's arguments, ``self`` first for a
method; for a door with the original's parameters ``adapters.py`` makes it. Three kinds of calls go to the original instead:

- with arguments that the implementation's parameters do not take: wrong ones get the original's own
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
function that somebody else has already replaced is left alone, which is logged.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from .loading import load

if TYPE_CHECKING:
    import inspect
    from importlib.machinery import ModuleSpec

DISABLE_VARIABLE: Final = "FASTSHARD_DISABLE"
"""Set (and not ``0``), it makes ``import fastshard.auto`` do nothing."""

Function: TypeAlias = Callable[..., Any]


class Entry(NamedTuple):
    """A function to be replaced: ``implementation`` as ``"module:function"``."""

    module: str
    attribute: str
    implementation: str


TABLE: tuple[Entry, ...] = (
    Entry("safetensors.torch", "save_file", "fastshard.adapters:save_file"),
    Entry("safetensors.torch", "save", "fastshard.adapters:save"),
    Entry("safetensors.torch", "save_model", "fastshard.adapters:save_model"),
    Entry(
        "huggingface_hub.serialization._torch",
        "save_torch_state_dict",
        "fastshard.adapters:save_torch_state_dict",
    ),
    Entry("huggingface_hub.serialization._torch", "save_torch_model", "fastshard.adapters:save_torch_model"),
    Entry("torch.serialization", "save", "fastshard.adapters:torch_save"),
    Entry(
        "transformers.modeling_utils",
        "PreTrainedModel.save_pretrained",
        "fastshard.transformers:save_pretrained",
    ),
    Entry(
        "transformers.integrations.accelerate",
        "load_offloaded_parameter",
        "fastshard.transformers:load_offloaded_parameter",
    ),
    Entry("transformers.utils.logging", "_tqdm_cls.__call__", "fastshard.transformers:progress_bar"),
    Entry("accelerate.accelerator", "Accelerator.save_model", "fastshard.accelerate:save_model"),
    Entry(
        "accelerate.utils.modeling",
        "get_state_dict_offloaded_model",
        "fastshard.accelerate:get_state_dict_offloaded_model",
    ),
)


class _State:
    """What asks for the replacements to be in place; changed under ``_lock``."""

    lasting = False
    """Between ``install()`` and ``uninstall()``."""
    blocks = 0
    """``with installed()`` blocks under way, of all threads."""

    @property
    def active(self) -> bool:
        return self.lasting or self.blocks > 0


class _OfThisThread(threading.local):
    def __init__(self) -> None:
        self.running: set[Entry] = set()
        self.finding: set[str] = set()


class _Pair(NamedTuple):
    original: Function
    replacement: Function


class _ClassAttribute(NamedTuple):
    owner: type
    name: str
    original: object
    replacement: object


_state = _State()
_this_thread = _OfThisThread()
_lock = threading.RLock()
"""Nothing is imported or logged under it: it is the last one that a thread takes."""
_pairs: dict[int, _Pair] = {}
"""Every replacement ever made, by the original's id; kept, so that it is the same one after the next install."""
_class_attributes: list[_ClassAttribute] = []
"""Those in place."""
_left_alone: set[Entry] = set()

# A fork waits for another thread that is in the middle of replacing; the child finds all of it or nothing.
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def install() -> None:
    """Lets fastshard do the work of the functions in :data:`TABLE`, until :func:`uninstall`.

    Imports no library: those that are not there yet are patched when they are imported. Twice is once; again, it
    also reaches modules that have bound an original in the meantime. Call it outside of the import of a library
    that it is to patch. Any thread may call it at any time; forked children inherit it, spawned processes do not.

    Raises:
        ImportError: fastshard's native module does not load. Nothing has been replaced then: better a
            script that ends in its first line than one that ends at its first save.
    """
    _load_native()
    with _lock:
        _state.lasting = True
    _begin()


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


def _load_native() -> None:
    try:
        from . import _native  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"fastshard replaces nothing, as its native module cannot be loaded: {error} "
            f"({DISABLE_VARIABLE}=1 makes `import fastshard.auto` do nothing)"
        ) from error


def _begin() -> None:
    with _lock:
        if _state.active and not any(finder is _finder for finder in sys.meta_path):
            sys.meta_path.insert(0, _finder)
    _await_imports()
    _replace_if_active()


def _end() -> None:
    """Under the lock."""
    if _state.active:
        return
    # A new list: removed from the old one, an import under way on another thread would miss the next finder.
    sys.meta_path = [finder for finder in sys.meta_path if finder is not _finder]
    _rebind({id(pair.replacement): (pair.replacement, pair.original) for pair in _pairs.values()})
    for owner, name, original, replacement in _class_attributes:
        if vars(owner).get(name) is replacement:
            setattr(owner, name, original)
    _class_attributes.clear()


def _await_imports() -> None:
    """Another thread may be importing a module of the table, and have begun before the finder was there."""
    for name in {entry.module for entry in TABLE}:
        spec = _namespace(sys.modules.get(name)).get("__spec__")
        if getattr(spec, "_initializing", False):
            with contextlib.suppress(Exception):  # the other thread's, which will see it
                importlib.import_module(name)  # waits for it


def _replace_if_active() -> None:
    foreign = []
    with _lock:
        if not _state.active:
            return
        for entry in TABLE:
            if not _replace(entry):
                foreign.append(entry)
        _rebind({id(pair.original): (pair.original, pair.replacement) for pair in _pairs.values()})
        news = [entry for entry in foreign if entry not in _left_alone]
        _left_alone.update(news)
    if news:
        import logging

        for entry in news:
            logging.getLogger("fastshard").warning(
                "%s.%s is left alone: it is not that library's own function any more",
                entry.module,
                entry.attribute,
            )


def _replace(entry: Entry) -> bool:
    """Makes the replacement, and puts it into a class; false if somebody else has been there."""
    home = holder = _namespace(sys.modules.get(entry.module))
    *classes, name = entry.attribute.split(".")
    owner = None
    for part in classes:
        owner = holder.get(part)
        if not issubclass(type(owner), type):
            return True
        holder = dict(vars(owner))
    if name not in holder:
        return True  # another version of the library, or not imported
    value = holder[name]
    kind = type(value) if type(value) in (staticmethod, classmethod) else None
    function = value.__func__ if kind else value
    if any(function is pair.replacement for pair in _pairs.values()):
        return True
    if type(function) is not types.FunctionType or function.__globals__ is not home:
        return False
    pair = _pairs.setdefault(id(function), _Pair(function, _replacement(function, entry)))
    if owner is not None:
        replacement = kind(pair.replacement) if kind else pair.replacement
        setattr(owner, name, replacement)
        _class_attributes.append(_ClassAttribute(owner, name, value, replacement))
    return True


def _rebind(exchange: dict[int, tuple[Function, Function]]) -> None:
    """Exchanges functions, given by their ids, in the dicts of all modules."""
    if not exchange:
        return
    for module in sys.modules.copy().values():
        namespace = _namespace(module)
        for name, value in namespace.copy().items():
            if id(value) in exchange:
                old, new = exchange[id(value)]
                if namespace.get(name) is old:
                    namespace[name] = new


_module_dict: Final[Any] = vars(types.ModuleType)["__dict__"]


def _namespace(module: object) -> dict[str, Any]:
    """A module's dict, past whatever its class makes of attributes; nothing of what is not a module."""
    namespace = _module_dict.__get__(module) if issubclass(type(module), types.ModuleType) else None
    return namespace if isinstance(namespace, dict) else {}


def _replacement(original: Function, entry: Entry) -> Function:
    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        running = _this_thread.running
        if not _state.active or entry in running:
            return original(*args, **kwargs)
        running.add(entry)
        try:
            implementation, signature = _load(entry.implementation)
            if not _takes(signature, original, *args, **kwargs):
                return original(*args, **kwargs)
            return implementation(original, *args, **kwargs)
        finally:
            running.discard(entry)

    return replacement


@functools.cache
def _load(implementation: str) -> tuple[Function, inspect.Signature]:
    import inspect

    module, _, name = implementation.partition(":")
    function = getattr(load(module), name)
    return function, inspect.signature(function)


def _takes(signature: inspect.Signature, /, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


class _Finder:
    """Finds what the finders behind it find, and only for modules of the table has a word with the loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        finding = _this_thread.finding
        if fullname in finding or not any(entry.module == fullname for entry in TABLE):
            return None
        finding.add(fullname)  # a finder behind this one may ask all others, this one too
        try:
            spec = self._spec_behind(fullname, path, target)
        finally:
            finding.discard(fullname)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec

    def _spec_behind(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None
    ) -> ModuleSpec | None:
        from_here = itertools.dropwhile(lambda finder: finder is not self, list(sys.meta_path))
        for finder in itertools.islice(from_here, 1, None):
            if hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    return spec
        return None


class _Loader:
    """The loader of a module of the table, which it leaves the module to when its code runs."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_loader"), name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _replace_if_active()


_finder: Final = _Finder()
