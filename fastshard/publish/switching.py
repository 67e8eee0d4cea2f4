# SPDX-License-Identifier: Apache-2.0
"""Changes names in a folder at once: before there are the old files, afterwards the new ones, never a
mixture.

No filesystem renames several files in one step. What is done depends on what changes:

- one file is new, and none is removed: it is renamed, and files that are there already, to the byte, stay;
- names appear or disappear: the folder is exchanged for one made beside it (:mod:`fastshard.publish.exchanging`);
- names stay, or the folder cannot be exchanged: a symbolic link decides for all (:mod:`fastshard.publish.linking`);
- links are refused (FAT, some network mounts): files are renamed one by one, and those that make others visible last.
"""

from __future__ import annotations

import errno
import functools
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Final

from ..formats.naming import MANIFEST_NAME, visibility
from .change import Change, Stale
from .exchanging import exchange
from .folder import Folder
from .hidden_names import STAGING
from .linking import Linking, settle_left
from .record import Record, amend
from .staging import Hidden, InUseError, adopt, clear_away, is_ours, turn_name

_TURN_SECONDS: Final = 60.0
"""Changing names takes milliseconds. A process that takes longer than this has been stopped."""
_MOST_NAMES: Final = 16
_IN_THE_WAY: Final = frozenset((errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EPERM, errno.EACCES))


class Switch:
    """Puts the files in ``.new`` of a hidden folder in place. ``record`` is what the save says of them."""

    def __init__(self, hidden: Hidden, durable: bool, held: list[int], record: Record | None = None) -> None:
        self.change = Change(hidden, durable, held)
        self.record = record
        self.thread = threading.get_ident()
        self.complete: Callable[[], object] | None = None
        """Does what is left to do, while this save has its turn."""
        self.linking: Linking | None = None
        self.interrupted = False
        """Whether another save, in a signal's handler, has done what was left to do."""
        _switches.append(self)

    def run(self, stale: Stale, obsolete: Collection[str], must_be_empty: bool) -> None:
        """Puts the files in place. An error that is raised when the new files stand has ``published``."""
        try:
            self._run(stale, obsolete, must_be_empty)
        except OSError as error:
            if self.interrupted:
                return
            if self.change.published:
                raise published(error, self.change.folder.path) from error
            raise
        finally:
            if not self.change.leads_here:
                self.complete = _nothing
            if self.linking is not None:
                self.linking.close()
            self.change.close()

    def forget(self) -> None:
        """Is called when the hidden folder has been removed."""
        _switches.remove(self)

    def _run(self, stale: Stale, obsolete: Collection[str], must_be_empty: bool) -> None:
        change = self.change
        change.read_new()
        if len(change.files) == 1 and self.record is None:
            self._compare(stale, obsolete, must_be_empty)
            if not change.gone and MANIFEST_NAME not in change.entries[""]:
                _rename_one(change, change.files[0])
                change.left = None if change.folders else []
                return
        self.complete = functools.partial(self._change_names, stale, obsolete, must_be_empty)
        self._take_turn()
        self._change_names(stale, obsolete, must_be_empty)

    def _change_names(self, stale: Stale, obsolete: Collection[str], must_be_empty: bool) -> None:
        change = self.change
        self._compare(stale, obsolete, must_be_empty)
        nothing = not change.files and not change.gone and self.record is None
        emptied = None if nothing else amend(change, self.record)
        if emptied is not None:
            change.read_new()
            self._compare(stale, {*obsolete, *emptied}, must_be_empty)
        if not change.files and not change.gone:
            return
        differing = change.files if change.fresh or change.gone else change.differing()
        if len(differing) < 2 and differing is not change.files:
            self.complete = functools.partial(self._rename_last, differing)
            self._rename_last(differing)
            return
        if change.fresh or change.gone:
            self.complete = self._refuse
            if exchange(change):
                return
        linking = self.linking = Linking(change)
        self.complete = linking.repeat
        if not linking.run():
            self.complete = self._refuse
            _one_by_one(change)

    def _rename_last(self, names: list[str]) -> None:
        """Puts the files in place if at most one of them is not there already."""
        change = self.change
        if names and change.new.stat(names[0]) is not None:
            _rename_one(change, names[0])
        change.published = True
        same = [name for name in change.files if name not in names]
        for name in same:
            change.touch(name)
        if not change.folders:
            change.left = same

    def _refuse(self) -> None:
        raise OSError(
            errno.EDEADLK,
            "this save has interrupted one that is being put in place",
            self.change.folder.path,
        )

    def _compare(self, stale: Stale, obsolete: Collection[str], must_be_empty: bool) -> None:
        """Compares with what is there, after what killed saves have left has been removed."""
        change = self.change
        change.compare(stale, obsolete, must_be_empty)
        if any(STAGING.fullmatch(name) and name != change.hidden.name for name in change.entries[""]):
            remove_left(change.folder, change.held, change.hidden.name)
            change.compare(stale, obsolete, must_be_empty)

    def _take_turn(self) -> None:
        """Waits for the turn. One save at a time changes names here: the one whose hidden folder has a
        certain name."""
        folder, hidden = self.change.folder, self.change.hidden
        deadline = time.monotonic() + _TURN_SECONDS
        for name in turn_names(folder):
            while True:
                try:
                    hidden.move(name)
                    return
                except OSError as error:
                    if error.errno not in _IN_THE_WAY or folder.stat(name) is None and not _is_race(error):
                        raise
                if not wait_for_turn(folder, name, self.change.held, deadline):
                    break
        raise OSError(errno.EBUSY, "hidden folders of others are in the way", folder.path)


_switches: list[Switch] = []
"""The changes under way in this process."""


def _nothing() -> None:
    """Does nothing."""


def _is_race(error: OSError) -> bool:
    """Returns whether what was in the way may just have been removed."""
    return error.errno in (errno.ENOTEMPTY, errno.EEXIST)


def turn_names(folder: Folder) -> Iterator[str]:
    """Yields the names under which a save takes its turn: it takes the first one that no other user has."""
    return (turn_name(folder, slot) for slot in range(_MOST_NAMES))


def wait_for_turn(folder: Folder, name: str, held: list[int], deadline: float) -> bool:
    """Waits until no save changes names here under this name, and completes what a killed one has begun.

    Returns ``False`` if the name is another user's.
    """
    while True:
        try:
            left = adopt(folder, name)
        except InUseError:
            if not _end_interrupted(folder, name):
                if time.monotonic() > deadline:
                    reason = "another save has been putting files in place for too long"
                    if folder.shared:
                        reason += "; if it was killed, the first save after an hour completes it"
                    raise OSError(errno.EBUSY, reason, folder.path) from None
                time.sleep(0.001)
            continue
        if left is not None:
            recover(left, held)
            return True
        found = folder.stat(name)
        if found is None:
            return True
        if not is_ours(found, folder):
            return False
        # Another save has taken the turn since: it is waited for, too.


def remove_left(folder: Folder, held: list[int], own: str = "") -> None:
    """Removes what killed saves of this user have left in a folder, and completes what they have begun
    there."""
    for name, is_folder in folder.entries():
        if is_folder and name != own and STAGING.fullmatch(name):
            try:
                left = adopt(folder, name)
            except InUseError:
                continue
            if left is not None:
                recover(left, held)


def recover(hidden: Hidden, held: list[int]) -> None:
    """Completes what a killed save has begun, or removes what it has left."""
    try:
        if hidden.name in turn_names(hidden.parent):
            settle_left(hidden, hidden.parent, held)
        hidden.remove(held)
    finally:
        hidden.close()


def _end_interrupted(folder: Folder, name: str) -> bool:
    """Completes a save of this thread that was interrupted by the signal handler in which this one runs.

    Returns whether there was one.
    """
    for switch in _switches:
        change = switch.change
        if switch.complete is None or switch.interrupted or switch.thread != threading.get_ident():
            continue
        if change.hidden.identity() == folder.identity(name):
            change.hidden.is_called(name)
            switch.complete()
            switch.interrupted = True
            clear_away(change.hidden, change.held)
            return True
    return False


def _rename_one(change: Change, name: str) -> None:
    while os.path.dirname(name) and change.places.find(os.path.dirname(name)) is None:
        name = os.path.dirname(name)  # with the folder that is missing
    folder, base = change.places.of(name)
    held = folder.held(base)
    try:
        change.new.rename(name, folder, base)
    finally:
        change.held += held
    change.published = True
    if change.durable:
        folder.sync()


def _one_by_one(change: Change) -> None:
    for path in change.folders:
        change.folder.mkdirs(path)
    for name in sorted(change.files, key=visibility):
        change.new.rename(name, *change.places.of(name))
    for name in change.gone:
        folder, base = change.places.of(name)
        folder.unlink(base)
    change.published = True
    if change.durable:
        for path in {os.path.dirname(name) for name in (*change.files, *change.gone)}:
            change.places.of(os.path.join(path, "x"))[0].sync()


def published(error: OSError, path: str) -> OSError:
    """Returns the error of a save whose files stand although it has failed."""
    reason = error.strerror or str(error)
    text = f"{path} is in place, but not known to be on stable storage: {reason}"
    said = OSError(error.errno or errno.EIO, text, error.filename or path)
    said.published = True  # type: ignore[attr-defined]
    return said
