# SPDX-License-Identifier: Apache-2.0
"""A set of objects that others own, which needs no lock.

Each of its operations is a single step of the interpreter. So a signal handler, a finalizer or another thread
may read and change it at any moment; a ``WeakSet`` must not be changed while somebody iterates over it.
"""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

T = TypeVar("T")


class Living(Generic[T]):
    """A set of objects, compared by identity, that holds each only as long as somebody else does."""

    def __init__(self) -> None:
        self._references: set[weakref.ref[T]] = set()

    def add(self, item: T) -> None:
        self._references.add(weakref.ref(item, self._references.discard))

    def all(self) -> list[T]:
        """Returns the objects that live now."""
        references = list(self._references)
        return [item for item in (reference() for reference in references) if item is not None]
