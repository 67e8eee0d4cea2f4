# SPDX-License-Identifier: Apache-2.0
"""What a save changes in a folder: which names are replaced, which appear, and which are removed."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Collection
from typing import Final

from .attributes import inherit
from .folder import Folder
from .hidden_names import NEW, STAGING
from .staging import Hidden

REFUSED: Final = frozenset(
    (
        errno.EPERM,
        errno.EACCES,
        errno.ENOSYS,
        errno.EOPNOTSUPP,
        errno.EMLINK,
        errno.EXDEV,
        errno.EINVAL,
        errno.EBUSY,
        errno.EROFS,
    )
)
"""Errors of a way to change names that a filesystem does not have or does not allow. Then there is another
way."""

_SMALL_TEXTS: Final = (".json", ".jinja", ".txt", ".md")
_MOST_COMPARED: Final = 64 << 10

Stale = Callable[[str], bool]


class Places:
    """A folder and the folders in it. Each is opened once, from the one above it, and none of them is a
    link."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._open = {"": folder}

    def close(self) -> None:
        """Closes all of them but the folder itself."""
        for folder in self._open.values():
            if folder is not self.folder:
                folder.close()
        self._open = {"": self.folder}

    def find(self, path: str) -> Folder | None:
        """Returns a folder in the folder; ``None`` if it is missing."""
        if path not in self._open:
            above = self.find(os.path.dirname(path))
            if above is None or above.stat(os.path.basename(path)) is None:
                return None
            self._open[path] = above.open(os.path.basename(path))
        return self._open[path]

    def of(self, name: str) -> tuple[Folder, str]:
        """Returns the folder in which a file is, and its name there."""
        folder = self.find(os.path.dirname(name))
        if folder is None:
            path = self.folder.place(os.path.dirname(name))
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return folder, os.path.basename(name)


class Change:
    """The change from what is in a folder to what is in ``.new`` of the hidden folder in it.

    Everything is listed before anything is changed.
    """

    def __init__(self, hidden: Hidden, durable: bool, held: list[int]) -> None:
        self.folder = hidden.parent
        self.hidden = hidden
        self.durable = durable
        self.held = held
        """Gets descriptors of what has lost its last name."""
        self.published = False
        """Whether the new files stand."""
        self.leads_here = False
        """Whether names lead into the hidden folder, so that it must stay."""
        self.places = Places(self.folder)
        self.new = hidden.open(NEW)
        self.files: list[str] = []
        """Paths of the new ones, relative to the folder."""
        self.folders: list[str] = []
        """Those in ``.new``."""
        self.entries: dict[str, dict[str, bool]] = {}
        """Of each folder concerned that there is: names, and whether they are folders."""
        self.kept: list[str] = []
        """Files for which there is one to replace."""
        self.fresh: list[str] = []
        """Those for which there is none."""
        self.gone: list[str] = []
        """Names that are there, and will not be."""
        self.left: list[str] | None = None
        """All that is left in ``.new``, once that is known: small files."""
        self._alike: dict[str, os.stat_result] = {}
        """Files that have owner, mode and size of those they replace, small ones with no other name."""

    def close(self) -> None:
        self.places.close()
        self.new.close()

    def read_new(self) -> None:
        self.files, self.folders = self.new.tree()
        if self.durable:
            for name in (*self.files, *self.folders, ""):
                self.new.sync(name)

    def compare(self, stale: Stale, obsolete: Collection[str], must_be_empty: bool) -> None:
        """Lists what is there. Raises ``IsADirectoryError`` if a folder is in the place of a file."""
        concerned = {""}
        for name in (*self.files, *obsolete):
            while name := os.path.dirname(name):
                concerned.add(name)
        self.entries = {}
        self._alike = {}
        for path in sorted(concerned):
            folder = self.places.find(path)
            if folder is not None:
                self.entries[path] = dict(folder.entries())
        if must_be_empty and not all(map(STAGING.fullmatch, self.entries[""])):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), self.folder.path)
        found = {f"{path}/{name}" if path else name: folder for path, name, folder in self.present()}
        self.kept = [name for name in self.files if name in found]
        self.fresh = [name for name in self.files if name not in found]
        self.gone = [
            name
            for name in sorted(found.keys() - set(self.files))
            if not found[name] and (name in obsolete or stale(name))
        ]
        for name in self.kept:
            if found[name]:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self.folder.place(name))
            self._inherit(name)

    def differing(self) -> list[str]:
        """Returns the new files that are not there already, to the byte.

        Those that are there are mostly configurations, and only get a new time of change. Weights always
        count as new, and so does everything in a durable save and every file with a second name.
        """
        if self.durable:
            return self.files
        kept = {*self.kept}
        return [name for name in self.files if name not in kept or not self._is_there(name)]

    def _is_there(self, name: str) -> bool:
        old = self._alike.get(name)
        if old is None or not name.endswith(_SMALL_TEXTS):
            return False
        folder, base = self.places.of(name)
        try:
            text = self.new.read(name, _MOST_COMPARED)
            return len(text) == old.st_size and folder.read(base, _MOST_COMPARED) == text
        except OSError:  # then it is replaced
            return False

    def touch(self, name: str) -> None:
        """Gives a file that is there already the new file's times, as if it had been replaced: a manifest must not be
        newer than the digests beside it, which were made after it."""
        folder, base = self.places.of(name)
        new = self.new.stat(name)
        if new is not None:
            with contextlib.suppress(OSError):
                times = (new.st_atime_ns, new.st_mtime_ns)
                os.utime(base, ns=times, dir_fd=folder.fd, follow_symlinks=False)

    def present(self) -> list[tuple[str, str, bool]]:
        """Returns for each entry the folder's path, its name, and whether it is a folder."""
        return [
            (path, name, is_folder)
            for path, names in self.entries.items()
            for name, is_folder in names.items()
        ]

    def _inherit(self, name: str) -> None:
        """Gives a new file the mode and the owner of the file that it replaces."""
        folder, base = self.places.of(name)
        old, new = folder.stat(base), self.new.stat(name)
        if old is None or new is None or not stat.S_ISREG(old.st_mode) or not stat.S_ISREG(new.st_mode):
            return
        had_both = inherit(old, self.new, name, new)
        # With a second name it may be changed from elsewhere.
        if had_both and old.st_size == new.st_size <= _MOST_COMPARED and old.st_nlink == 1:
            self._alike[name] = old
