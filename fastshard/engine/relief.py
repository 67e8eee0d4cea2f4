# SPDX-License-Identifier: Apache-2.0
"""When the writers of an asynchronous save, which step aside for the job, are relieved by others that do not.

A writer that steps aside (``SCHED_IDLE``) gets the processors that the job leaves idle. Where it leaves none, the save
would take very long. So when somebody waits for it, or when it has taken long enough, threads of normal priority write
what is left. Python's threads never step aside: one that holds the interpreter would hold up all others.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from ..base.activity import count_taken_over

if TYPE_CHECKING:
    from .. import _native

WAITED_FOR: Final = "somebody waited for it"
FOLLOWED: Final = "the next save of the same files was there"
OVERDUE: Final = "the job left it too little of the processors"
PATIENCE_SECONDS: Final = 1.0
"""So long a save may take with what the job leaves, and as long as it takes to write its bytes at this rate:"""
PATIENCE_NBYTES: Final = 512 << 20


class Relief:
    """That of one save.

    Args:
        after: saves that have to end before this one begins.
    """

    def __init__(self, native: _native.Save, after: Sequence[Any]) -> None:
        self._native = native
        self._after = after
        self.why: str = ""
        """Why the writers were relieved; empty if they were not."""
        self._due = time.monotonic() + PATIENCE_SECONDS + self._native.nbytes / PATIENCE_NBYTES

    def take_over(self, why: str) -> None:
        """Relieves the writers, and those of the saves before it. Only the first call counts."""
        for earlier in self._after:
            earlier.relief.take_over(why)
        if not self.why and self._native.take_over():
            self.why = why
            count_taken_over(why)

    def take_over_if_overdue(self) -> None:
        if not self.why and time.monotonic() >= self._due:
            self.take_over(OVERDUE)
