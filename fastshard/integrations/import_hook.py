# SPDX-License-Identifier: Apache-2.0
"""Calls a function when the code of a module has run, without importing the module."""

from __future__ import annotations

import itertools
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec


class _OfThisThread(threading.local):
    @property
    def finding(self) -> set[str]:
        """The set is made in one step: a signal handler that interrupts an ``__init__`` would find an object
        without it."""
        found: set[str] = self.__dict__.setdefault("_finding", set())
        return found


class Hook:
    """A finder that finds what the finders behind it find. It wraps the loaders of wanted modules only."""

    def __init__(self, wanted: Callable[[str], bool], imported: Callable[[str], None]) -> None:
        self._wanted = wanted
        self._imported = imported
        self._this_thread = _OfThisThread()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        finding = self._this_thread.finding
        if fullname in finding or not self._wanted(fullname):
            return None
        finding.add(fullname)  # a finder behind this one may ask all others, this one too
        try:
            spec = self._spec_behind(fullname, path, target)
        finally:
            finding.discard(fullname)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, self._imported)  # type: ignore[assignment]
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
    """Wraps the loader of a wanted module. Before the module's code runs, its own loader is put back."""

    def __init__(self, loader: Any, imported: Callable[[str], None]) -> None:
        self._loader = loader
        self._imported = imported

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_loader"), name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._imported(module.__name__)


def begin(hook: Hook) -> None:
    """Puts the hook before all other finders, unless it is there already."""
    if not any(finder is hook for finder in sys.meta_path):
        sys.meta_path.insert(0, hook)


def end(hook: Hook) -> None:
    """Removes the hook."""
    # A new list: removed from the old one, an import under way on another thread would miss the next finder.
    sys.meta_path = [finder for finder in sys.meta_path if finder is not hook]
