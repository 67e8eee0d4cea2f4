# SPDX-License-Identifier: Apache-2.0
"""A progress bar that reads a save's counters from outside; the save does not know of it."""

from __future__ import annotations

from typing import Any, Final

from ..base.loading import load
from .future import SaveFuture

_SECONDS: Final = 0.1


def wait_with_bar(future: SaveFuture, description: str) -> None:
    """Waits for a save and shows on a ``tqdm`` bar how many of its bytes are written.

    Does not raise what the save has failed with.
    """
    # No smoothing: the rate is that of the whole save, which began before the bar.
    bar: Any = load("tqdm.auto").tqdm(
        total=future.progress().nbytes, unit="B", unit_scale=True, desc=description, smoothing=0
    )
    bar.start_t = future.began
    with bar:
        ended = False
        while not ended:
            ended = future.wait(_SECONDS)
            written, nbytes = future.progress()
            stands = ended and not future.cancelled() and future.exception() is None
            bar.update((nbytes if stands else written) - bar.n)
