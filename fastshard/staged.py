# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of several files: shards are collected, written in parallel, and stand all at once.

Other libraries call ``save_file`` once for each shard, then write an index. :func:`staged` gives them a hidden
directory to do that in, and :func:`save_file`, which :func:`fastshard.install` puts in the place of safetensors',
does not write there but collects.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from . import saving
from .directory import replacing
from .planning import PathLike, StateDict
from .saving import How, PlannedFile

DESCRIPTION: Final = "Saving checkpoint shards"
"""Of the progress bar."""

_running = threading.local()


class Stage:
    """Files of one checkpoint that are not visible yet. For one thread."""

    def __init__(self, path: str, how: How) -> None:
        self.path = path
        self._how = how
        self._files: dict[PathLike, PlannedFile] = {}
        self._began: float | None = None

    def add(self, tensors: StateDict, filename: PathLike, metadata: dict[str, str] | None) -> None:
        """A file to be written. Its tensors stay alive until then. Raises what :func:`fastshard.save_file` raises
        for them."""
        if self._began is None:
            self._began = time.perf_counter()
        self._files[filename] = saving.plan_file(tensors, filename, metadata, self._how)

    def write(self) -> None:
        """Writes what was added, in parallel."""
        if self._files:
            assert self._began is not None
            files, self._files = self._files, {}
            saving.write_files(files, self._how, self._began, DESCRIPTION)
            self._began = None

    def holds(self, filename: object) -> bool:
        """Whether a file of this name belongs to the checkpoint."""
        return isinstance(filename, (str, os.PathLike)) and os.fspath(filename).startswith(self.path + os.sep)


@contextlib.contextmanager
def staged(
    directory: str, stale: Callable[[str], bool], how: How, *, create: bool = False
) -> Iterator[Stage]:
    """A stage for a checkpoint in ``directory``: see :func:`fastshard.directory.replacing`. When the block ends, what
    was added is written, and then all files stand. Until then :func:`save_file` on this thread adds."""
    outer = current()
    with replacing(directory, stale, create=create, durable=how.durable) as path:
        stage = _running.stage = Stage(path, how)
        try:
            yield stage
        finally:
            _running.stage = outer
        stage.write()


def current() -> Stage | None:
    """The stage that this thread is in."""
    return getattr(_running, "stage", None)


def save_file(tensors: StateDict, filename: PathLike, metadata: dict[str, str] | None = None) -> None:
    """As ``safetensors.torch.save_file``: at once, or with the other files of the checkpoint it belongs to."""
    stage = current()
    if stage is not None and stage.holds(filename):
        stage.add(tensors, filename, metadata)
    else:
        saving.save_file(tensors, filename, metadata)
