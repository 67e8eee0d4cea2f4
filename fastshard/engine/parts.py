# SPDX-License-Identifier: Apache-2.0
"""The parts of a save that are Python's, and what is different about one whose caller goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .options import Stats

Fetch = Callable[[int, int, int, int, int], None]
Amend = Callable[[list[list[int]]], list[tuple[int, int, bytes]]]
Step = Callable[[Stats], None]


class Linked(NamedTuple):
    """What a save does not have to write, for ``Stats``."""

    files: int
    nbytes: int
    refused: tuple[str, ...] = ()


class Served(NamedTuple):
    """What Python does for a save. :meth:`fastshard.Engine.submit` describes the fields."""

    fetch: Fetch | None = None
    amend: Amend | None = None
    steps: Sequence[Step] = ()
    undo: Callable[[], None] | None = None
    explain: Callable[[BaseException], BaseException | None] | None = None
    tensor_names: Mapping[str, Sequence[str]] | None = None
    plan_seconds: float = 0.0
    linked: Linked | None = None


class Background(NamedTuple):
    """What is different about a save whose caller goes on while its files are written."""

    kind: str
    """The snapshot: ``"copy"``, ``"fork"``, ``"none"`` (nobody changes the tensors), or ``"written"`` (there is
    none: the tensors may be changed when all bytes are written)."""
    packing: Any = None
    """The save (``SaveFuture``) that copies the tensors into the arena. The save itself is held until it has ended."""
    after: Sequence[Any] = ()
    """Earlier saves of the same files. The save is held until they have ended."""
    paths: frozenset[str] = frozenset()
    """The files and folders that it will change."""
    refused: tuple[str, ...] = ()
    """Why there is no better snapshot, for ``Stats.fallbacks``."""
