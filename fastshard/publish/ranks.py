# SPDX-License-Identifier: Apache-2.0
"""Several processes make one save, and agree at each step whether it goes on.

The caller decides how the processes reach each other: it gives a function that hands each of them what all of
them have said.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Gather = Callable[[str | None], list[str | None]]
"""Is called by all processes. Each gets the texts of all of them, in the order of their ranks."""


class Agreement:
    """The agreement between the processes of one save."""

    def __init__(self, rank: int, gather: Gather) -> None:
        self.first = rank == 0
        """Whether this is the process that does what only one may do."""
        self._gather = gather

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """A step that all processes take. If it fails in one of them it fails in all, so nobody waits for the
        others.

        Raises what the block raises, and ``RuntimeError``, saying which rank and why, if only others have
        failed.
        """
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        texts = self._gather(None if failure is None else described(failure))
        if failure is not None:
            raise failure
        failed = [rank for rank, text in enumerate(texts) if text is not None]
        if failed:
            raise RuntimeError(f"rank {failed[0]} could not save its part: {texts[failed[0]]}")

    def broadcast(self, value: str) -> str:
        """Returns the value that the first process has given."""
        return self._gather(value)[0] or ""


def described(error: BaseException) -> str:
    """Returns an error in one line, with its class where that says something."""
    return str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
