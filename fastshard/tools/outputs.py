# SPDX-License-Identifier: Apache-2.0
"""Files whose tensors come from other files, and how they are written."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple, Protocol

import torch

from ..engine import pipeline
from ..engine.engine import engine_for
from ..engine.figures import counted
from ..engine.pipeline import How
from ..engine.plan import FETCHED, FilePlan, TensorView

_MAX_ITEMS: Final = 1 << 16
"""The most views that are submitted at once, which bounds the memory of their descriptions."""


class Fetched(Protocol):
    """Bytes of a file that are put together when they are written."""

    @property
    def nbytes(self) -> int: ...
    def fetch(self, first: int, nbytes: int, address: int) -> None:
        """Puts bytes ``[first, first + nbytes)`` into memory. May be called by any thread."""


class Output(NamedTuple):
    """A file to be written."""

    path: str
    head: bytes
    items: Sequence[TensorView | Fetched]
    kept: list[torch.Tensor]


def write(outputs: Iterable[Output], stage: str, how: How, description: str) -> None:
    remaining = iter(outputs)
    while batch := list(_batch(remaining)):
        began = time.perf_counter()
        files = [
            FilePlan(
                os.fsencode(os.path.join(stage, output.path)),
                output.head,
                [
                    item if isinstance(item, TensorView) else TensorView(0, item.nbytes, FETCHED)
                    for item in output.items
                ],
            )
            for output in batch
        ]

        def fetch(file: int, item: int, first: int, nbytes: int, address: int) -> None:
            fetched = batch[file].items[item]  # noqa: B023 - called in this round only
            assert not isinstance(fetched, TensorView)
            fetched.fetch(first, nbytes, address)

        future = engine_for(how.engine).submit(
            files,
            keep_alive=batch,
            durable=how.durable,
            keep_cached=how.keep_cached,
            fetch=fetch,
            steps=[counted("save_file", "")],
            plan_seconds=time.perf_counter() - began,
            serve=False,
        )
        pipeline.finish(future, how.progress, description)


def _batch(outputs: Iterator[Output]) -> Iterator[Output]:
    count = 0
    for output in outputs:
        yield output
        count += len(output.items)
        if count >= _MAX_ITEMS:
            return


def copy(names: Iterable[str], source: str, stage: str) -> None:
    for name in names:
        shutil.copyfile(os.path.join(source, name), os.path.join(stage, name))
