# SPDX-License-Identifier: Apache-2.0
"""A set of objects that others own, without a lock: each step is one of the interpreter's own, so that a signal handler, a
finalizer or another thread may look at it and change it at any moment (a ``WeakSet`` may not be changed while it is
looked at)."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

T = TypeVar("T")


class Living(Generic[T]):
    """Objects that are compared by identity, for as long as they live."""

    def __init__(self) -> None:
        self._references: set[weakref.ref[T]] = set()

    def add(self, item: T) -> None:
        self._references.add(weakref.ref(item, self._references.discard))

    def all(self) -> list[T]:
        """Those that live now."""
        references = list(self._references)
        return [item for item in (reference() for reference in references) if item is not None]
