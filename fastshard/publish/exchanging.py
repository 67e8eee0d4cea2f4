# SPDX-License-Identifier: Apache-2.0
"""Exchanges a folder for one made beside it, which has the new files and hard links to all others.

So names appear and disappear at once. A link cannot do that, as it leads nowhere before or after, and loaders
that open whatever matches a pattern fail on such a link. Processes that use the old folder would be left in
it. So it is not done if the folder is the working directory or a mount point, or has folders in it that are
not part of the change.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from typing import Final

from .attributes import copy_all
from .change import REFUSED, Change
from .folder import Folder, Identity, Named, Scan, open_folder
from .hidden_names import NEW, OLD, hidden_name
from .staging import Hidden, adopt, clear_away, make_hidden, turn_name

_MOST_LINKED: Final = 4096
_EXCHANGE: Final = 2


def name_beside(base: str, slot: int = 0) -> str:
    """Returns the name of a hidden folder beside the one called ``base``."""
    return hidden_name(_purpose(base), slot)


def make_beside(parent: Folder, base: str, held: list[int]) -> Hidden:
    return make_hidden(parent, _purpose(base), held)


def _purpose(base: str) -> str:
    return f"beside {base}"


def real_place(path: str) -> tuple[str, str]:
    """Returns the folder above, and the name in it, of the place where a folder really is."""
    above, base = os.path.split(path)
    if base in ("", ".", "..") or _is_link(path):
        above, base = os.path.split(os.path.realpath(path))
    return above or ".", base


def _is_link(path: str) -> bool:
    try:
        with Named(path):
            return stat.S_ISLNK(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def exchange(change: Change) -> bool:
    """Exchanges the folder, and returns whether that was possible; if not, everything is as it was.

    An error that is raised when the new files stand leaves :attr:`Change.published` set.
    """
    above, base = real_place(change.folder.path)
    if not base or _is_working_directory(change.folder):
        return False
    linked, concerned = [], {*change.files, *change.gone}
    for path, name, is_folder in change.present():
        place = os.path.join(path, name)
        if is_folder and place not in change.entries and place != change.hidden.name:
            return False
        if not is_folder and place not in concerned:
            linked.append(place)
    if len(linked) > _MOST_LINKED:
        return False
    with contextlib.ExitStack() as stack:
        try:
            parent = stack.enter_context(open_folder(above))
            here, there = change.folder.status(), parent.status()
            if parent.identity(base) != change.folder.identity() or here.st_dev != there.st_dev:
                return False
            beside = make_beside(parent, base, change.held)
            stack.callback(beside.close)
        except OSError as error:
            if error.errno in REFUSED:
                return False
            raise
        stack.callback(clear_away, beside, change.held)
        # The new folder has a turn of its own: this save's, too, until what others have changed in the old one is there.
        turn = adopt(change.new, turn_name(change.new), make=True)
        if turn is None:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), change.folder.path)
        stack.enter_context(turn)
        turn.mkdir(OLD)  # were it empty, another save could take its name
        try:
            return _exchange(change, parent, base, beside, linked)
        finally:
            clear_away(turn, change.held)


def _exchange(change: Change, parent: Folder, base: str, beside: Hidden, linked: list[str]) -> bool:
    new, done, made = change.new, dict[str, Identity | None](), list[str]()
    scans: list[tuple[str, Scan]] = []
    try:
        with contextlib.suppress(FileExistsError):
            change.hidden.mkdir(OLD)  # were it empty, another save could take its name
        change.hidden.rename(NEW, beside, NEW)
        copy_all(change.folder, new)
        for path in sorted(change.entries.keys() - {""}):
            if path not in change.folders:
                if change.entries[path] and not any(name.startswith(f"{path}/") for name in linked):
                    continue  # all of it goes
                new.mkdir(path)
                made.append(path)
            with new.open(path) as inner:
                copy_all(change.places.of(os.path.join(path, "x"))[0], inner)
        for name in linked:
            folder, file = change.places.of(name)
            done[name] = None
            folder.link(file, new, name)
            done[name] = new.identity(name)
        if change.durable:
            for path in (*change.folders, *made, ""):
                new.sync(path)
            beside.sync()
        for path in change.entries:  # opened now, read later: no descriptor is needed then
            scans.append((path, change.places.of(os.path.join(path, "x"))[0].scan()))
        with Named(change.folder.path):
            _exchange_names(beside.fd, NEW, parent.fd, base)
        change.published = True
        _follow(change, scans, done)
        if change.durable:
            parent.sync()
        return True
    except BaseException as error:
        change.published = change.published or parent.identity(base) == new.identity()
        if change.published:
            raise
        for name in done:
            new.unlink(name)
        for path in reversed(made):
            new.rmdir(path)
        if beside.identity(NEW) is not None:
            beside.rename(NEW, change.hidden, NEW)
        if isinstance(error, OSError) and error.errno in REFUSED:
            return False
        raise
    finally:
        for _, scan in scans:
            scan.close()


def _follow(change: Change, scans: list[tuple[str, Scan]], linked: dict[str, Identity | None]) -> None:
    """Repeats in the new folder what others have changed in the old one while the new one was made."""
    new = change.new
    for path, scan in scans:
        for entry in scan:
            name = os.path.join(path, entry.name)
            if entry.name not in change.entries[path] and new.stat(name) is None:
                change.places.of(name)[0].rename(entry.name, new, name)
    for name, was in linked.items():
        folder, file = change.places.of(name)
        now = folder.identity(file)
        if now != was and new.identity(name) == was:
            if now is None:
                new.unlink(name)
            else:
                folder.rename(file, new, name)


def _is_working_directory(folder: Folder) -> bool:
    try:
        with Named(folder.path):
            found = os.stat(os.curdir)
    except FileNotFoundError:  # removed
        return False
    return (found.st_dev, found.st_ino) == folder.identity()


def _exchange_names(one: int, name: str, other: int, new: str) -> None:
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if call(one, os.fsencode(name), other, os.fsencode(new), ctypes.c_uint(_EXCHANGE)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
