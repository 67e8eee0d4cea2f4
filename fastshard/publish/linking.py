# SPDX-License-Identifier: Apache-2.0
"""Names that change at once because one symbolic link decides for all of them.

The hidden folder gets::

    .new/    the files of this save
    .old/    hard links to the files they replace
    .now     -> .old, later -> .new

1. Every name concerned is replaced by a link to ``.now/<name>``, which still leads to the old contents.
2. A rename lets ``.now`` lead to ``.new``: all names change at once.
3. The links are replaced by the files they lead to.

After a kill before step 2 every name leads to the old file, after a later one to the new file. Either way
:func:`settle` replaces the links by files, however often it is begun.

New names lead nowhere before step 2, and removed names lead nowhere after it. Loaders that ask whether a file
exists (an index, a single file) are told that it does not. Shards are found by a pattern and opened, so they
lead to a safetensors file without tensors (``.blank``) for that moment. An empty single file or index, on the
other hand, would be taken for the checkpoint.

The hidden folder has mode 0711 meanwhile: whoever may read the files can pass, and nobody else can list or
lock it. By then every file in it has its final mode.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from typing import Final

from ..formats.naming import is_numbered
from .attributes import let_pass
from .change import REFUSED, Change, Places
from .folder import MOST_HELD, Folder, Named
from .hidden_names import NEW, NOW, OLD, STAGING
from .staging import Hidden

_LINK: Final = ".link"
_GONE: Final = ".gone"
_BLANK: Final = ".blank"
_EMPTY: Final = (8).to_bytes(8, "little") + b"{}".ljust(8)
"""A safetensors file without tensors."""


class Linking:
    """Steps 1 to 3. Each may be repeated: what is done already is left alone."""

    def __init__(self, change: Change) -> None:
        self._change = change
        self._hidden = change.hidden
        self._old: Folder | None = None
        self.names = [*change.kept, *change.gone, *change.fresh]

    def run(self) -> bool:
        """Changes the names, and returns whether that was possible; if not, everything is as it was.

        An error that is raised when the new files stand leaves :attr:`Change.published` set.
        """
        change = self._change
        change.leads_here = True
        try:
            self.redirect()
        except BaseException as error:
            self.finish()
            if isinstance(error, OSError) and error.errno in REFUSED and not change.published:
                return False
            raise
        self.finish()
        return True

    def repeat(self) -> None:
        """Continues a save that was interrupted in :meth:`run`."""
        if self._hidden.readlink(NOW) != NEW:
            self.redirect()
        self.finish()

    def redirect(self) -> None:
        """Does steps 1 and 2."""
        change, hidden = self._change, self._hidden
        hidden.chmod(0o711)
        for name in ("", *change.folders):
            let_pass(change.new, name)
        old = self._opened_old()
        for path in change.entries:
            old.mkdirs(path)
            let_pass(old, path)
        for name in (*change.kept, *change.gone):
            self._keep(name, old)
        if any(map(is_numbered, (*change.gone, *change.fresh))):
            self._make_blank()
        for names, side in ((change.gone, change.new), (change.fresh, old)):
            for name in filter(is_numbered, names):
                for depth in range(name.count("/")):
                    path = "/".join(name.split("/")[: depth + 1])
                    side.mkdirs(path)
                    let_pass(side, path)
                with contextlib.suppress(FileExistsError):
                    side.symlink(_up(name) + _BLANK, name)
        if hidden.readlink(NOW) is None:
            hidden.symlink(OLD, NOW)
        for path in change.folders:
            change.folder.mkdirs(path)
        for name in self.names:
            folder, base = change.places.of(name)
            _put_symlink(hidden, _target(hidden, name), folder, base)
        if change.durable:
            for folder in self._folders():
                folder.sync()
            for path in ("", *change.entries):
                old.sync(path)
            hidden.sync()
        _put_symlink(hidden, NEW, hidden, NOW)

    def finish(self) -> None:
        """Does step 3, or goes back to what was there. What fails is tried once more."""
        change = self._change
        failed: OSError | None = None
        for last in (False, True):
            try:
                decided = self._hidden.readlink(NOW)
                if decided is None or self._old is None:
                    break
                change.published = decided == NEW
                if change.published and change.durable and not last:
                    self._hidden.sync()
                side = change.new if change.published else self._old
                settle(self._hidden, change.places, self.names, side, change.published, change.held)
                break
            except OSError as error:
                if last:
                    raise
                failed = error
        change.leads_here = False
        if change.published and change.durable:
            if failed is not None:
                raise failed
            for folder in self._folders():
                folder.sync()

    def close(self) -> None:
        if self._old is not None:
            self._old.close()

    def _folders(self) -> list[Folder]:
        """Returns the folders in which names change."""
        found = (self._change.places.find(path) for path in {os.path.dirname(name) for name in self.names})
        return [folder for folder in found if folder is not None]

    def _opened_old(self) -> Folder:
        if self._old is None:
            with contextlib.suppress(FileExistsError):
                self._hidden.mkdir(OLD)
            self._old = self._hidden.open(OLD)
            let_pass(self._old, "")
        return self._old

    def _keep(self, name: str, old: Folder) -> None:
        folder, base = self._change.places.of(name)
        text = folder.readlink(base)
        with contextlib.suppress(FileExistsError):
            if text is None:
                folder.link(base, old, name)
            else:
                # A link to where it leads, as what it says is relative to where it is.
                old.symlink(text if os.path.isabs(text) else _from_old(name) + text, name)

    def _make_blank(self) -> None:
        with Named(_BLANK, self._hidden):
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(_BLANK, flags, 0o644, dir_fd=self._hidden.fd)
            try:
                os.write(fd, _EMPTY)
                os.fchmod(fd, 0o644)
            finally:
                os.close(fd)


def settle(
    hidden: Hidden, places: Places, names: Iterable[str], side: Folder, forward: bool, held: list[int]
) -> None:
    """Replaces the links that lead here by the files of ``.new`` (``forward``) or ``.old``. ``held`` gets descriptors
    of the links."""
    for name in names:
        folder, base = places.find(os.path.dirname(name)), os.path.basename(name)
        if folder is None or folder.readlink(base) != _target(hidden, name):
            continue
        if len(held) < MOST_HELD:
            held += folder.held(base)
        found = side.stat(name)
        text = side.readlink(name) if found is not None and stat.S_ISLNK(found.st_mode) else None
        if found is None or text == _up(name) + _BLANK:
            folder.rename(base, hidden, _GONE)
        elif text is None:
            _put_file(hidden, side, name, folder, base)
        else:
            _put_symlink(hidden, text if forward else text.removeprefix(_from_old(name)), folder, base)
    if not forward:
        _remove_made(hidden, places, side)


def settle_left(hidden: Hidden, folder: Folder, held: list[int]) -> None:
    """Does what :func:`settle` does for a save that was killed."""
    decided = hidden.readlink(NOW)
    if decided is None:
        return
    places = Places(folder)
    try:
        names: set[str] = set()
        for side in (NEW, OLD):
            with hidden.open(side) as opened:
                names.update(opened.tree()[0])
        with hidden.open(NEW if decided == NEW else OLD) as opened:
            settle(hidden, places, sorted(names), opened, decided == NEW, held)
    finally:
        places.close()


def place_of(path: str) -> str:
    """Returns the real place of a file, through links; but a link that stands for a file only while its folder is being
    changed is that file."""
    try:
        text = os.readlink(path)
    except OSError:
        text = ""
    found = STAGING.search(text)
    if found is None or not text.startswith(f"/{NOW}/", found.end()):
        return os.path.realpath(path)
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


def is_placeholder(path: str) -> bool:
    """Returns whether a name has no contents of its own and exists only until the next save settles what a
    killed one has left."""
    try:
        text = os.readlink(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno == errno.EINVAL:  # no link
            return False
        raise
    if not STAGING.search(text):
        return False
    try:
        target = os.lstat(os.path.join(os.path.dirname(path), text))
    except FileNotFoundError:
        return True
    return stat.S_ISLNK(target.st_mode) and os.path.basename(os.path.realpath(path)) == _BLANK


def _remove_made(hidden: Hidden, places: Places, old: Folder) -> None:
    """Removes folders that were made for files that do not appear after all."""
    with hidden.open(NEW) as new:
        for path in sorted(new.tree()[1], reverse=True):
            if old.stat(path) is None and places.folder.stat(path) is not None:
                with contextlib.suppress(OSError):  # somebody's by now
                    places.folder.rmdir(path)


def _up(name: str) -> str:
    """Returns the relative path from a file's place in ``.new`` or ``.old`` to the hidden folder."""
    return "../" * (name.count("/") + 1)


def _from_old(name: str) -> str:
    """Returns the relative path from a file's place in ``.old`` to the folder it came from."""
    path = os.path.dirname(name)
    return _up(name) + "../" + (path + "/" if path else "")


def _target(hidden: Hidden, name: str) -> str:
    """Returns the target of the link for a name."""
    return "../" * name.count("/") + f"{hidden.name}/{NOW}/{name}"


def _put_symlink(hidden: Hidden, text: str, folder: Folder, base: str) -> None:
    try:
        hidden.symlink(text, _LINK)
    except FileExistsError:
        hidden.unlink(_LINK)
        hidden.symlink(text, _LINK)
    hidden.rename(_LINK, folder, base)


def _put_file(hidden: Hidden, side: Folder, name: str, folder: Folder, base: str) -> None:
    """Replaces a link by a second name of its file. Whoever has just read the link still finds the file
    through it."""
    try:
        try:
            side.link(name, hidden, _LINK)
        except FileExistsError:
            hidden.unlink(_LINK)
            side.link(name, hidden, _LINK)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        side.rename(name, folder, base)
    else:
        hidden.rename(_LINK, folder, base)
