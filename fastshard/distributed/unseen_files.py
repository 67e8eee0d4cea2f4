# SPDX-License-Identifier: Apache-2.0
"""The files of a save that many ranks make without being able to ask each other, and that one of them publishes.

A writer of ``torch.distributed.checkpoint`` is never told whether the other ranks have written their parts, nor that
the save has failed: only the coordinator's ``finish`` is called, and only if all went well. And with cached plans
nothing of one save goes from the coordinator to the ranks. So each rank makes its files in a hidden folder of its own
and says where with its results. The coordinator moves them into its hidden folder, and lets all of them appear at
once (:mod:`fastshard.publish.directory`). What is not published goes with the writer, before the next save, or at the
end of the process. What a killed rank has left the next save removes.
"""

from __future__ import annotations

import contextlib
import gc
import os
import weakref
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..publish.directory import Replacement, let_go, missing_part, name_final_places
from ..publish.folder import Folder, open_folder
from ..publish.hidden_names import hidden_folder_of
from ..publish.staging import Hidden, clear_away, make_hidden


class Made(NamedTuple):
    """A file that a rank has made."""

    rank: int
    path: str
    """Where it lies, hidden."""


class UnseenFiles:
    """The files of one save on one rank.

    ``stale`` tells which files in ``directory`` go when the new ones appear; it is asked on the rank that
    ``publishes`` only. Raises ``OSError`` if the directory cannot be written to.
    """

    def __init__(
        self, directory: str, rank: int, *, publishes: bool, durable: bool, stale: Callable[[str], bool]
    ) -> None:
        if (
            _open
        ):  # of a save that has failed, perhaps: the errors of torch's refer to themselves, and to its writer
            gc.collect()
        self.directory = directory
        self.rank = rank
        self._closers: list[Callable[[], None]] = []
        self._path: str | None = None
        self._names: set[str] = set()
        self._change: Replacement | None = None
        self._publishing = False
        # In the caller's thread or not, however the save ends, and once.
        self.close = weakref.finalize(self, _close, self._closers, os.getpid())
        _open.add(self)
        if publishes:
            names = self._names
            self._change = Replacement(
                directory, lambda name: name not in names and stale(name), create=True, durable=durable
            )
            self._closers.append(self._change.close)

    @property
    def path(self) -> str:
        """The hidden folder of this rank."""
        if self._change is not None:
            return self._change.path
        if self._path is None:
            self._path = self._own()
        return self._path

    def made(self, name: str) -> Made:
        """Returns a file of this rank, by the name that it will have."""
        return Made(self.rank, os.path.join(self.path, name))

    def publish(self, files: Mapping[str, Made]) -> None:
        """Lets these files appear, and all stale ones go. It is called once.

        Raises ``OSError`` if a file of another rank is not to be seen from here, or cannot be moved.
        """
        assert self._change is not None
        try:
            folders = dict.fromkeys(self._adopt(name, made) for name, made in files.items())
            for folder in folders:
                _remove_empty(folder)
            self._names.update(files)
            self._publishing = True
            self._change.publish()
        except Exception as error:
            self.explain(error)
            raise
        finally:
            self.close()
            _open.discard(self)

    def explain(self, error: BaseException) -> None:
        """Lets an error name the final places of files."""
        name_final_places(error, self.directory, self._publishing)

    def _adopt(self, name: str, made: Made) -> str:
        """Moves a file to where this rank's files are, and returns the folder that it was in."""
        place = os.path.join(self.path, name)
        folder = os.path.dirname(made.path)
        if made.path == place:
            return ""
        try:
            os.rename(made.path, place)
        except OSError as error:
            seen = "is not to be seen on" if isinstance(error, FileNotFoundError) else "cannot be moved by"
            raise type(error)(
                error.errno,
                f"{error.strerror}: the file that rank {made.rank} has made {seen} rank {self.rank}, which publishes "
                "the checkpoint (all ranks have to save to one filesystem, or with use_collectives=False)",
                os.path.join(self.directory, name),
            ) from None
        return folder

    def _own(self) -> str:
        """Makes the hidden folder of a rank that does not publish."""
        above, missing = missing_part(self.directory)
        parent = open_folder(above)
        held: list[int] = []
        try:
            hidden = make_hidden(parent, f"rank {self.rank} of {os.path.realpath(self.directory)}", held)
        except BaseException:
            parent.close()
            raise
        self._closers.append(lambda: _end(hidden, parent, held))
        inner = os.path.join(*missing) if missing else ""
        hidden.mkdirs(inner)
        return hidden.place(inner)


_open: weakref.WeakSet[UnseenFiles] = weakref.WeakSet()
"""Those that are not published."""


def _close(closers: list[Callable[[], None]], process: int) -> None:
    if os.getpid() != process:  # forked meanwhile: they are the parent's
        return
    while closers:
        closers.pop()()


def _end(hidden: Hidden, parent: Folder, held: list[int]) -> None:
    clear_away(hidden, held)
    held.append(hidden.give_away())
    parent.close()
    let_go(held)


def _remove_empty(folder: str) -> None:
    """Removes a rank's hidden folder, from which all files were taken. It may have folders for final places in it."""
    if not folder:
        return
    last = hidden_folder_of(folder)
    with contextlib.suppress(OSError):  # something is left, which its rank removes
        while True:
            os.rmdir(folder)
            if folder == last:
                return
            folder = os.path.dirname(folder)
