# SPDX-License-Identifier: Apache-2.0
"""Loads modules at their first use, so that nobody meets a module that is half loaded.

A signal handler may interrupt an import and save. In the same thread it would find a module of which half the
code has run. So a module is loaded by a thread of its own, in which no handler runs, while the caller waits.
A handler that interrupts the waiting loads what it needs in the same way, and waits at the locks that the
import system has for threads.
"""

from __future__ import annotations

import _thread
import contextlib
import importlib
import queue
import sys
import weakref
from types import ModuleType
from typing import Any, Final

_IMPORTED: Final = frozenset(
    "accelerate fastshard filelock huggingface_hub numpy packaging safetensors sglang torch tqdm transformers"
    " typing_extensions vllm".split()
)
"""Modules that ours import, and those among their imports that know about plugins."""
_STUCK_SECONDS: Final = 60.0
_loaded: Final[dict[str, ModuleType]] = {}
"""Keeps the modules for finalizers: when the interpreter ends, ``sys.modules`` is empty."""
_loaders: Final[set[int]] = set()
"""The threads that are loading a module."""


def load(name: str) -> ModuleType:
    """Returns the module of that name. If it was not imported yet, another thread imports it."""
    module = sys.modules.get(name)
    if module is None and sys.is_finalizing():
        module = _loaded.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        _loaded[name] = module  # whoever imported it
        return module
    if not sys.is_finalizing() and _thread.get_ident() not in _loaders and not _is_importing():
        _load_apart(name)
    module = _loaded[name] = importlib.import_module(name)  # also what has failed, to say why
    return module


def _load_apart(name: str) -> None:
    """Lets another thread import the module and waits for it. Returns at once if no thread can be started."""

    def work(_alive: object) -> None:
        ident = _thread.get_ident()
        _loaders.add(ident)
        try:
            importlib.import_module(name)
        except BaseException:
            pass  # the caller tries again
        finally:
            _loaders.discard(ident)

    # The end of the thread is the end of its argument, also of a thread that gets no memory for its first frame.
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
    alive = _Alive()
    watch = weakref.ref(alive, ended.put)
    try:
        _thread.start_new_thread(work, (alive,))
    except RuntimeError:
        return
    del alive
    with contextlib.suppress(
        queue.Empty
    ):  # it waits for a lock of this thread's, perhaps: the import system finds out
        ended.get(timeout=_STUCK_SECONDS)
    del watch


class _Alive:
    __slots__ = ("__weakref__",)


def _is_importing() -> bool:
    """Returns whether this thread is in the middle of an import that the loading thread would wait for."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        finding = code.co_name == "_find_and_load" and code.co_filename.startswith("<frozen importlib")
        if finding and str(frame.f_locals.get("name")).partition(".")[0] in _IMPORTED:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
