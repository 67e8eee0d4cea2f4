# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that several saves and ordinary small files fill, and that appears when all of them are done.

The loops of other libraries write a checkpoint file by file. :func:`checkpoint` gives them a hidden folder of
the same name for that, beside the final place. Saves in it are asynchronous: each has its snapshot when its
call returns, and is written while the job goes on. When all of them have ended, the folder gets its name by
one rename.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..base.activity import one_save
from ..engine import background
from ..engine.engine import SaveFuture, Stats
from ..engine.pipeline import start_after
from ..formats.manifest import FileEntry
from .directory import Replacement
from .manifests import Wanted, record_of
from .messages import Messages

_running = threading.local()
_in_flight: list[Checkpoint] = []
"""The checkpoints of this process that have not appeared yet, or whose error nobody has been told."""


class Checkpoint:
    """A folder that does not have its name yet. It is filled by one thread, in :func:`checkpoint`."""

    def __init__(self, directory: str, durable: bool, manifest: Wanted = False) -> None:
        self.directory = directory
        """Where it will appear."""
        self.manifest = manifest
        """What it will say of its files."""
        self.entries: dict[str, FileEntry] = {}
        """What the saves in it know of their files, by the paths in it."""
        self.sums: dict[str, str] = {}
        """The same of their SHA-256."""
        self.future: SaveFuture | None = None
        """After the block: ends when the folder stands under its name, or everything is undone."""
        self.messages = Messages(directory)
        """What other libraries say of its files."""
        self._stale: dict[str, Callable[[str], bool]] = {}
        self.change = Replacement(directory, self._is_stale, create=True, durable=durable, beside=True)
        self.path = self.change.path
        """The hidden folder to write to, of the same name as :attr:`directory`."""
        self.thread = threading.get_ident()
        self.stands = False
        """Whether everything has succeeded."""
        self.saves: list[SaveFuture] = []
        """Those that fill it."""
        self._steps: list[Callable[[], object]] = []

    def then(self, step: Callable[[], object]) -> None:
        """Adds what is to be done when the checkpoint stands. An error of it is the save's."""
        self._steps.append(step)

    def holds(self, path: object) -> bool:
        """Returns whether a path is the folder's, or of something in it."""
        found = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
        return isinstance(found, str) and f"{found}{os.sep}".startswith(self.path + os.sep)

    def part(self, directory: str, stale: Callable[[str], bool], manifest: Wanted = False) -> Part:
        """Returns what stands for the change of names of a save that fills this folder, or one in it. What is ``stale``
        in the same folder of an earlier checkpoint goes when the whole appears. If the save wants a manifest, the whole
        has one."""
        os.makedirs(directory, exist_ok=True)
        self._stale[os.path.normpath(os.path.relpath(directory, self.path))] = stale
        self.manifest = self.manifest or manifest
        return Part(self, directory)

    def _is_stale(self, path: str) -> bool:
        stale = self._stale.get(os.path.dirname(path) or os.curdir)
        return stale is not None and stale(os.path.basename(path))

    def publish_now(self, count: Callable[[], None]) -> None:
        """Lets the folder appear, as nothing in it is being written any more."""
        self._record()
        self.change.publish()
        self.change.close()
        self._run_steps()
        count()

    def publish(self, count: Callable[[], None]) -> None:
        """Lets the folder appear when the saves in it have ended."""
        self.future = start_after(
            self.saves,
            [self.directory],
            steps=[
                self._await_saves,
                self._record,
                self.change.publish,
                self._run_steps,
                lambda _: self._end(count),
            ],
            undo=self.close,
            explain=self.change.explain,
        )
        _in_flight.append(self)

    def close(self) -> None:
        """Removes the hidden folder. Saves in it that have not ended are stopped."""
        for future in self.saves:
            future.cancel()
        for future in self.saves:
            future.wait()
        self.saves.clear()
        self._steps.clear()
        self.change.close()

    def _await_saves(self, _: Stats) -> None:
        for future in self.saves:
            future.result()

    def _record(self, _: object = None) -> None:
        if self.manifest:
            # Asynchronous saves write past the page cache: nothing is to be brought in to be digested.
            self.change.record = record_of(
                self.path, self.manifest, self.entries, self.sums, keep_cached=not self.saves
            )

    def _run_steps(self, figures: object = None) -> None:
        for step in self._steps:
            step()
        self.messages.tell(figures)

    def _end(self, count: Callable[[], None]) -> None:
        count()
        self.stands = True


class Part:
    """A save in a checkpoint, as :class:`fastshard.publish.directory.Replacement` without a change of
    names."""

    def __init__(self, whole: Checkpoint, path: str) -> None:
        self._whole = whole
        self.path = path
        self.messages = whole.messages
        """They are the checkpoint's, which tells them when it stands."""
        self.explain = whole.change.explain

    def know(self, entries: Mapping[str, FileEntry], sums: Mapping[str, str]) -> None:
        """Notes what manifest and digests are to say of files, by their paths in this folder."""
        inner = os.path.relpath(self.path, self._whole.path)
        for name, entry in entries.items():
            self._whole.entries[os.path.normpath(os.path.join(inner, name))] = entry
        for name, digest in sums.items():
            self._whole.sums[os.path.normpath(os.path.join(inner, name))] = digest

    def publish(self, _: object = None) -> None:
        """Has nothing to do: the files are where they are to be."""

    def close(self) -> None:
        """Has nothing to remove."""

    def end(self, error: BaseException) -> None:
        """Explains what has ended the save."""
        self.explain(error)


@contextlib.contextmanager
def checkpoint(
    directory: str,
    *,
    call: str,
    loggers: tuple[str, ...] = (),
    durable: bool = False,
    manifest: Wanted = False,
    waited: bool = False,
) -> Iterator[Checkpoint]:
    """A context manager that gives a hidden folder for the checkpoint ``directory``.

    In the block this thread's saves are asynchronous. At its end all snapshots are complete, and the folder
    appears when everything is written: see :attr:`Checkpoint.future`, which also belongs to the block of
    :func:`fastshard.asynchronous` around this one. With ``waited`` the saves end with their calls, and the folder
    stands when the block has ended. If ``directory`` is there already, files of the same names
    are replaced then, all at once, and others stay, except what the saves in the block know to be stale. After an
    exception in the block everything is as it was.

    ``manifest`` is what the folder is to say of all files in it, as for :func:`fastshard.save_file`. All saves in it
    count as one of the public function ``call``. Messages of ``loggers`` about its files are
    held back until these stand, and name the final places.
    """
    outer, around = current_checkpoint(), background.current()
    if waited:
        background.make_way(directory)
        saves: Any = background.synchronous()
    else:
        saves = background.asynchronous(snapshot=around.snapshot if around else "auto")
    with one_save(call, directory) as counted:
        made = Checkpoint(directory, durable, manifest)
        try:
            _running.checkpoint = made
            try:
                with saves, made.messages.held_back(loggers, made.path):
                    if not waited:
                        made.saves = saves.futures
                    yield made
            finally:
                _running.checkpoint = outer
            publish = made.publish_now if waited else made.publish
            publish(counted.expect())
        except BaseException as error:
            made.change.explain(error)
            made.close()
            raise
    if around is not None and made.future is not None:
        around.take(made.future)


def current_checkpoint() -> Checkpoint | None:
    """Returns the checkpoint that this thread is filling."""
    return getattr(_running, "checkpoint", None)


def wait_for_earlier() -> None:
    """Waits for the checkpoints of this process that are in flight.

    Raises the error of one of this thread's that has failed, if nobody has been told yet. Those of other
    threads are left to these.
    """
    for made in _in_flight[:]:
        assert made.future is not None
        try:
            if made.future.wait() and not made.future.seen and made.thread == threading.get_ident():
                made.future.result()
        finally:
            if made.future.done() and (made.future.seen or made.stands) and made in _in_flight:
                _in_flight.remove(made)


os.register_at_fork(after_in_child=_in_flight.clear)  # they are the parent's
