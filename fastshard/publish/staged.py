# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of several files as one save: files are collected, written in parallel, and stand all at once.

Other libraries call ``save_file`` once for each shard, and then write an index. :func:`staged` gives them a
hidden directory for that. The :func:`save_file` that :func:`fastshard.install` puts in the place of
safetensors' does not write there, but collects.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, Final

import torch

from ..base.activity import one_save
from ..engine import background
from ..engine.engine import SaveFuture, Stats, Step
from ..engine.mapped import lies_in_file
from ..engine.parts import Linked
from ..engine.pipeline import How, PathLike, PlannedFile, StateDict, finish, plan_file, start, write_files
from ..engine.sharing import storage_of
from ..engine.tensors import check_dtype
from ..errors import SaveError, rewritten
from ..formats.manifest import FileEntry
from ..formats.naming import (
    MANIFEST_NAME,
    are_of_the_same_weights,
    is_safetensors_of,
    is_weights,
    pickled_stems,
)
from .checkpoint import Part, current_checkpoint
from .directory import Replacement, was_left
from .folder import Named
from .hidden_names import final_places, hidden_folder_of
from .incremental import Base
from .manifests import Outline, record_of
from .messages import Messages

DESCRIPTION: Final = "Saving checkpoint shards"
"""The text of the progress bar."""
_TEMPORARY_NBYTES: Final = 128 << 20

_running = threading.local()


class Stage:
    """Files of one checkpoint that are not visible yet. It belongs to one thread."""

    def __init__(self, path: str, how: How) -> None:
        self.path = path
        self.hidden = hidden_folder_of(path)
        """A folder for temporary files. What is left in it goes with the stage."""
        self.lasting: Callable[[], set[int]] | None = None
        """Returns the addresses of storages that outlive the save in any case. If it is given, files are
        written as soon as the other storages, which only the collected files keep alive, take too much memory
        together."""
        self.at_once = False
        """Whether each file is written when it is added, as somebody else's code may change the tensors
        between two of them."""
        self.entries: dict[str, FileEntry] = {}
        """For a manifest: of the files that were written, by their paths in the stage."""
        # What was written past the page cache is not to be brought in to be digested.
        self._keep_cached = how.keep_cached and background.current() is None
        self.finishing: list[Callable[[], object]] = []
        """What is to be called when all files are written, with their entries known."""
        self.base = None if how.base is None else Base(how.base, check_dtype(how.dtype), how.durable)
        """The earlier checkpoint whose files serve this one."""
        self._how = how
        self._shown: dict[PathLike, str] = {}
        self._files: dict[PathLike, PlannedFile] = {}
        self._unseen: list[torch.Tensor] = []
        self._nbytes = 0
        self._known: set[int] | None = None
        self._temporary: dict[int, int] = {}
        self._began: float | None = None

    def add(
        self,
        tensors: StateDict,
        filename: PathLike,
        metadata: dict[str, str] | None,
        shown: PathLike | None = None,
    ) -> PlannedFile:
        """Adds a file to be written. Its tensors are kept alive until then. Returns its plan.

        ``shown`` is the name that the caller has given it.
        Raises what :func:`fastshard.save_file` raises for the tensors.
        """
        if self._began is None:
            self._began = time.perf_counter()
        planned = plan_file(tensors, filename, metadata, self._how)
        self._files.pop(filename, None)
        if self.base is not None and self.base.serve(planned, filename):
            return planned
        self._files[filename] = planned
        self._shown[filename] = final_places(os.fspath(filename)) if shown is None else os.fspath(shown)
        if self.lasting is not None:
            self._unseen += tensors.values()
            self._nbytes += sum(tensor.nbytes for tensor in tensors.values())
            if self._nbytes > _TEMPORARY_NBYTES:  # or nothing of it can be too much
                self._look_at_storages(self.lasting)
        if self.at_once or sum(self._temporary.values()) > _TEMPORARY_NBYTES:
            self.write()
        return planned

    def _look_at_storages(self, lasting: Callable[[], set[int]]) -> None:
        if self._known is None:
            self._known = lasting()
        for tensor in self._unseen:
            address, nbytes = storage_of(tensor) or (0, 0)
            if address and address not in self._known and not lies_in_file(tensor):
                self._temporary[address] = nbytes
        self._unseen = []

    def write(self) -> None:
        """Writes in parallel what was added, and waits."""
        if self._files:
            with background.synchronous():
                finish(self.start(), self._how.progress, DESCRIPTION)

    def start(self, **steps: Any) -> SaveFuture:
        """Starts writing what was added. ``steps`` are those of :func:`fastshard.engine.pipeline.start`."""
        files, began = self._files, self._began
        self._files, self._temporary, self._began = {}, {}, None
        self._unseen, self._nbytes = [], 0
        if self._how.manifest:
            outlines = {name: Outline(planned) for name, planned in files.items()}
            steps["steps"] = [functools.partial(self._note, outlines), *steps.get("steps", ())]
        began = time.perf_counter() if began is None else began
        return start(files, self._how, began, shown=self._shown, **steps)

    def _note(self, outlines: dict[PathLike, Outline], figures: Stats) -> None:
        """Notes what the manifest is to say of the files that have been written."""
        for path, outline in outlines.items():
            name, crc32s = os.path.relpath(os.fspath(path), self.path), figures.checksums[self._shown[path]]
            if outline.fits(crc32s):  # else no bytes have passed: it is a link
                self.entries[name] = outline.entry(crc32s)

    def record(self, change: Replacement | Part, _: Stats) -> None:
        """Lets a change say what is in its files. It is a step of the save, when all of them are written."""
        for call in self.finishing:
            call()
        sums: dict[str, str] = {}
        if self.base is not None:
            served, known = self.base.known, self.base.known_sums
            self.entries |= {os.path.relpath(path, self.path): entry for path, entry in served.items()}
            sums = {os.path.relpath(path, self.path): digest for path, digest in known.items()}
        if isinstance(change, Part):
            change.know(self.entries, sums)
        else:
            change.record = record_of(
                self.path, self._how.manifest, self.entries, sums, keep_cached=self._keep_cached
            )

    def holds(self, filename: object) -> bool:
        """Returns whether a file of this name belongs to the checkpoint."""
        return isinstance(filename, (str, os.PathLike)) and os.fspath(filename).startswith(self.path + os.sep)

    def write_text(self, path: str, text: str) -> None:
        """Writes a small file at once. Errors name it, which they would not if it was opened before."""
        with Named(path), open(path, "w") as file:
            file.write(text)

    def weights(self) -> set[str]:
        """Returns the names of the checkpoint's files of weights, including those that were added."""
        added = (os.path.basename(os.fspath(name)) for name in self._files)
        return {name for name in (*os.listdir(self.path), *added) if is_weights(name)}


@contextlib.contextmanager
def staged(
    directory: str,
    stale: Callable[[str], bool] | None,
    how: How,
    *,
    call: str = "save_files",
    create: bool = False,
    loggers: tuple[str, ...] = (),
    error_kind: type[SaveError] | None = None,
) -> Iterator[Stage]:
    """A context manager that gives a stage for a checkpoint in ``directory``.

    Inside the block, :func:`save_file` on this thread only collects. At its end the files are written and
    published: see :func:`fastshard.publish.directory.replacing`.

    ``call`` is the public function whose save it is. ``stale`` tells which files to remove; ``None`` stands
    for other files of the weights that this save has. ``loggers`` are the names of loggers whose messages are
    about files; these messages are held back until the files stand, and name the final places. ``error_kind`` is what
    failed system calls are raised as; ``None``: as they come.
    """
    outer = current()
    names: set[str] = set()
    obsolete = stale or (lambda name: are_of_the_same_weights(names, name))
    made = current_checkpoint()
    part = (
        made.part(directory, obsolete, how.manifest) if made is not None and made.holds(directory) else None
    )
    messages = Messages(directory) if part is None else part.messages
    if part is None:
        background.make_way(directory)

    with one_save(call, directory) as counted, _raised_as(error_kind):
        change = part or Replacement(directory, obsolete, create=create, durable=how.durable)
        try:
            stage = _running.stage = Stage(change.path, how)
            try:
                with messages.held_back(loggers, change.path):
                    yield stage
            finally:
                _running.stage = outer
            names |= stage.weights()
            counts = counted.expect()
            steps: list[Step] = [change.publish, counts]
            if how.manifest:
                steps.insert(0, functools.partial(stage.record, change))
            base = stage.base
            if base is not None:
                steps.insert(0, base.note)
                steps.insert(-1, base.noted)
            if part is None:
                messages.preferred = _preferred(directory, names)
                steps.insert(-1, messages.tell)
            future = stage.start(
                steps=steps,
                undo=change.close,
                explain=functools.partial(_explained, change, error_kind),
                linked=None if base is None else Linked(base.files, base.nbytes, tuple(base.refused)),
                paths=[directory] if part is None else None,
            )
        except BaseException as error:
            change.end(error)
            raise
        finish(future, how.progress, DESCRIPTION)


@contextlib.contextmanager
def _raised_as(kind: type[SaveError] | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if kind is None or isinstance(error, kind):
            raise
        raise rewritten(error, kind) from None


def _explained(
    change: Replacement | Part, kind: type[SaveError] | None, error: BaseException
) -> BaseException | None:
    change.explain(error)
    is_other = kind is not None and isinstance(error, OSError) and not isinstance(error, kind)
    return rewritten(error, kind) if is_other else None  # type: ignore[arg-type]


def save_alone(
    tensors: StateDict,
    directory: str,
    name: str,
    metadata: dict[str, str] | None,
    obsolete: Collection[str],
    how: How,
    *,
    call: str,
    listed: list[str] | None = None,
) -> bool:
    """Saves a checkpoint of one file without a stage, if nothing else changes in the directory. Returns
    whether it did.

    ``listed`` are the names in the directory, if they are known.
    """
    if os.path.dirname(name) or any(other != name for other in obsolete):
        return False
    listed = os.listdir(directory) if listed is None else listed
    if how.manifest or how.base is not None or MANIFEST_NAME in listed or was_left(directory, listed):
        return False
    began = time.perf_counter()
    path = os.path.join(directory, name)
    with one_save(call, directory):
        write_files({path: plan_file(tensors, path, metadata, how)}, how, began, DESCRIPTION)
    return True


def _preferred(directory: str, names: set[str]) -> list[str]:
    """Returns older safetensors files that loaders prefer to the pickled files which are being saved.

    They may be there on purpose, so they stay, and a warning names them.
    """
    stems = pickled_stems(names)
    if not stems:
        return []
    try:
        there = os.listdir(directory)
    except FileNotFoundError:  # the directory comes with the files
        return []
    return [name for name in sorted(there) if name not in names and is_safetensors_of(stems, name)]


def current() -> Stage | None:
    """Returns the stage that this thread is in."""
    return getattr(_running, "stage", None)
