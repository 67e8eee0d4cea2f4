# SPDX-License-Identifier: Apache-2.0
"""A directory whose files change all at once: readers find the old checkpoint or the new one, never a
mixture.

New files are made in a hidden folder (:mod:`fastshard.publish.staging`) in the directory. If the directory is
missing, it is made in a hidden folder above the topmost missing one, which then appears by one rename with
everything in it. :mod:`fastshard.publish.switching` puts files in place in a directory that exists.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Final, NamedTuple

from .._native import Closing, close_later, close_soon
from ..formats.hf_index import exists
from .exchanging import make_beside, name_beside, real_place
from .folder import SMALL_NBYTES, Folder, Named, open_folder
from .hidden_names import NEW, PREFIX, STAGING
from .hidden_names import final_places as final_places
from .record import Record, write
from .staging import Hidden, clear_away, make_hidden
from .switching import Switch, published, remove_left, turn_names, wait_for_turn

_WAIT_SECONDS: Final = 60.0
_MOST_TRIES: Final = 20
_APPEARED: Final = frozenset((errno.EEXIST, errno.ENOTEMPTY, errno.EBUSY, errno.ENOTDIR))


@contextlib.contextmanager
def replacing(
    directory: str,
    stale: Callable[[str], bool] = lambda name: False,
    *,
    obsolete: Iterable[str] = (),
    create: bool = False,
    durable: bool = False,
    record: Callable[[str], Record] | None = None,
) -> Iterator[str]:
    """Gives a hidden directory to write files to. When the block ends, they stand in ``directory``, all at
    once.

    In the same moment, files of the same names are replaced. Files whose names satisfy ``stale``, and those
    of ``obsolete``, which are paths relative to ``directory``, are removed; ``stale`` is also asked about
    files in the folders that new files are for. Replaced files hand on their mode (and owner, where that is
    allowed); a symbolic link is replaced itself. After an exception everything is as it was. With ``create``
    the directory may be missing, and does not appear before the block ends. With ``durable`` everything is on
    stable storage when the block has ended. ``record`` returns for the hidden directory, when the block ends, what the
    manifest is to say of the files in it.

    Raises ``FileNotFoundError`` or ``NotADirectoryError`` for the directory, ``IsADirectoryError`` if one
    stands in the place of a file, and other ``OSError``; their ``filename`` is that of the final place. An
    error with ``published`` was raised when the new files stood.
    """
    change = Replacement(directory, stale, obsolete=obsolete, create=create, durable=durable)
    with change:
        yield change.path
        change.record = record and record(change.path)
        change.publish()


@contextlib.contextmanager
def creating(
    directory: str, *, durable: bool = False, record: Callable[[str], Record] | None = None
) -> Iterator[str]:
    """Does what :func:`replacing` does for a ``directory`` that is missing or empty. Folders in it may be
    new, too."""
    change = Replacement(os.path.realpath(directory), create=True, durable=durable, must_be_empty=True)
    with change:
        yield change.path
        change.record = record and record(change.path)
        change.publish()


class Replacement:
    """Does what :func:`replacing` does in steps: it is a step of a save's handle.

    Files are made in the hidden directory :attr:`path`. :meth:`publish` puts them in place, and :meth:`close`
    releases everything, whether they were put in place or not. As a context manager it closes, and explains
    errors. With ``beside`` the hidden directory has the directory's own name, in a hidden folder beside it,
    also if the directory is there already. Raises as :func:`replacing`.
    """

    def __init__(
        self,
        directory: str,
        stale: Callable[[str], bool] = lambda name: False,
        *,
        obsolete: Iterable[str] = (),
        create: bool = False,
        durable: bool = False,
        must_be_empty: bool = False,
        beside: bool = False,
    ) -> None:
        self._directory = directory
        self._what = stale, frozenset(obsolete), must_be_empty
        self._publishing = False
        self.record: Record | None = None
        """What is said of the files, for the directory's manifest."""
        try:
            _wait_for_space(directory)
            self._staging = _Staging(directory, create, durable, beside)
        except Exception as error:
            self.explain(error)
            raise
        self.path: Final = self._staging.path

    def publish(self, _: object = None) -> None:
        """Lets all files appear at once."""
        self._publishing = True
        self._staging.record = self.record
        self._staging.publish(*self._what)

    def close(self) -> None:
        """Removes the hidden folder."""
        self._staging.close()

    def explain(self, error: BaseException) -> None:
        """Lets an error name final places. ``published`` stays true only if files stand at their final
        places."""
        name_final_places(error, self._directory, self._publishing)

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.end(error)

    def end(self, error: BaseException | None) -> None:
        """Closes, and explains ``error``, which has ended the change, and an error of closing."""
        if error is not None:
            self.explain(error)
        try:
            self.close()
        except Exception as failed:
            self.explain(failed)
            raise


def name_final_places(error: BaseException, directory: str, publishing: bool = False) -> None:
    """Lets an error of a save into a hidden folder name the places in ``directory``. ``published`` stays true only
    while the save is ``publishing``."""
    if isinstance(error, OSError):
        if getattr(error, "published", False) and not publishing:  # in the hidden directory
            error.published = False  # type: ignore[attr-defined]
            if error.errno is not None:
                error.strerror = os.strerror(error.errno)
        for attribute in ("filename", "filename2"):
            path = getattr(error, attribute)
            path = os.fspath(path) if isinstance(path, os.PathLike) else path
            if isinstance(path, bytes):
                setattr(error, attribute, os.fsencode(final_places(os.fsdecode(path))))
            elif isinstance(path, str):
                setattr(error, attribute, final_places(path))
        if error.errno is not None and not isinstance(error.filename, (str, bytes, os.PathLike)):
            error.filename = directory  # it was about an open file, which does not know its name
    elif isinstance(error, Exception):
        error.args = tuple(final_places(said) if isinstance(said, str) else said for said in error.args)


class _Staging:
    """The hidden folder in which the files of a save are made, and the way they become visible."""

    def __init__(self, directory: str, create: bool, durable: bool, beside: bool = False) -> None:
        self.directory = directory
        self.durable = durable
        self.held: list[int] = []
        self.missing: list[str] = []
        """What is to be made: names, each in the one before."""
        self.leads_here = False
        self.record: Record | None = None
        self._process = os.getpid()
        self._switch: Switch | None = None
        while True:
            if not beside:
                try:
                    self.folder, self.hidden = self._in(directory)
                    break
                except FileNotFoundError:
                    if not create:
                        raise
            above, self.missing = missing_part(directory)
            if beside and not self.missing:
                above, base = real_place(directory)
                self.missing = [base]
            if self.missing:
                self.folder = open_folder(above)
                try:
                    remove_left(self.folder, self.held)
                    self.hidden = make_beside(self.folder, self.missing[0], self.held)
                except BaseException:
                    self.folder.close()
                    raise
                break
            try:
                os.stat(directory)  # others have made it meanwhile
            except FileNotFoundError:  # a link that leads nowhere
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), directory) from None
        try:
            self.inner = os.path.join(*self.missing) if self.missing else NEW
            self.hidden.mkdirs(self.inner)
        except BaseException:
            self.close()
            raise
        self.path = self.hidden.place(self.inner)

    def close(self) -> None:
        """Removes the hidden folder, unless names still lead into it; then the next save completes the
        change."""
        if os.getpid() != self._process:  # forked in the block: it is the parent's
            return
        if not self.leads_here:
            left = self._switch.change.left if self._switch is not None else None
            if left is None or not self.hidden.remove_known(left):
                clear_away(self.hidden, self.held)
        if self._switch is not None:
            self._switch.forget()
        self.held.append(self.hidden.give_away())
        self.folder.close()
        let_go(self.held)

    def publish(
        self, stale: Callable[[str], bool], obsolete: Collection[str], must_be_empty: bool = False
    ) -> None:
        if self.missing:
            self._publish_made(stale, obsolete, must_be_empty)
            return
        switch = self._switch = Switch(self.hidden, self.durable, self.held, self.record)
        try:
            switch.run(stale, obsolete, must_be_empty)
        finally:
            self.leads_here = switch.change.leads_here

    def _publish_made(
        self, stale: Callable[[str], bool], obsolete: Collection[str], must_be_empty: bool
    ) -> None:
        first = self.missing[0]
        if self.record is not None:
            with self.hidden.open(self.inner) as made:
                write(made, self.record)
        if self.durable:
            with self.hidden.open(first) as made:
                for name in (*(name for names in made.tree() for name in names), ""):
                    made.sync(name)
        try:
            self.hidden.rename(first, self.folder, first)
        except OSError as error:
            if error.errno not in _APPEARED:
                raise
            # Others have made it meanwhile, and it is not empty.
            other = _Staging(self.directory, True, self.durable)
            other.record = self.record
            try:
                self.hidden.rename(self.inner, other.hidden, other.inner)
                other.publish(stale, obsolete, must_be_empty)
            finally:
                other.close()
            return
        if self.durable:
            try:
                self.folder.sync()
            except OSError as error:
                raise published(error, self.directory) from error

    def _in(self, directory: str) -> tuple[Folder, Hidden]:
        """Returns the directory and a new hidden folder in it, after what killed saves have left has been
        removed."""
        for last in [False] * _MOST_TRIES + [True]:
            folder = open_folder(directory)
            hidden = None
            try:
                for above in _places_left(directory):
                    with open_folder(above) as parent:
                        remove_left(parent, self.held)
                hidden = make_hidden(folder, "in", self.held)
                # Who changes names here sees this hidden folder from now on, and does not exchange the directory.
                turn = next(turn_names(folder))
                if folder.stat(turn) is not None:
                    wait_for_turn(folder, turn, self.held, time.monotonic() + _WAIT_SECONDS)
                found = os.stat(directory)
                if (found.st_dev, found.st_ino) == folder.identity() and hidden.is_in_place():
                    return folder, hidden
            except BaseException as error:
                if hidden is not None:
                    clear_away(hidden, self.held)
                    hidden.close()
                folder.close()
                if last or not isinstance(error, FileNotFoundError):
                    raise
            else:  # it was exchanged meanwhile, and what was just made is in the new one now, or nowhere
                with contextlib.suppress(OSError), open_folder(directory) as new:
                    if new.identity(hidden.name) == hidden.identity():
                        new.rmdir(hidden.name)
                hidden.close()
                folder.close()
        raise OSError(errno.EBUSY, "other saves keep replacing the folder", directory)


def was_left(directory: str, names: Iterable[str]) -> bool:
    """Returns whether hidden folders of other saves are in a directory that has these names, or above it."""
    if any(name.startswith(PREFIX) and STAGING.fullmatch(name) for name in names):
        return True
    return any(True for _ in _places_left(directory))


def _places_left(directory: str) -> Iterator[str]:
    """Yields folders in which a killed save may have left a hidden folder for this directory or for one above
    it."""
    for above, hidden in _beside(*real_place(directory), os.geteuid()):
        with Named(directory):
            found = exists(hidden)
        if found:
            yield above


@functools.lru_cache(maxsize=256)
def _beside(above: str, base: str, user: int) -> tuple[tuple[str, str], ...]:
    """Returns for a folder and all above it the folder around it, and the path of this user's hidden folder
    there."""
    found = []
    while base:
        found.append((above, os.path.join(above, name_beside(base))))
        above, base = os.path.split(above)
    return tuple(found)


def missing_part(directory: str) -> tuple[str, list[str]]:
    """Returns the part of a path that exists, and the names that are to be made in it."""
    path, names = directory, list[str]()
    while path and not exists(path):
        path, name = os.path.split(path.rstrip(os.sep))
        names.insert(0, name)
    made: list[str] = []
    for name in names:
        if name == os.pardir and made:
            made.pop()
        elif name == os.pardir:
            path = os.path.join(path, name)
        elif name not in ("", os.curdir):
            made.append(name)
    return path or os.curdir, made


class _Freeing(NamedTuple):
    """Files that have lost their names and are being freed."""

    closing: Closing
    nbytes: int


_freeing: list[_Freeing] = []


def let_go(descriptors: list[int]) -> None:
    """Closes descriptors of files and folders that have lost their names.

    With the last descriptor the kernel frees the file. That takes time for a large one, which is closed on a
    thread of its own. For a small one and for a folder it takes time only while the disk is busy. A folder's lock
    is released at once.
    """
    nbytes = 0
    for fd in descriptors:
        with contextlib.suppress(OSError):
            found = os.fstat(fd)
            nbytes += found.st_blocks * 512
            if stat.S_ISDIR(found.st_mode):
                fcntl.flock(fd, fcntl.LOCK_UN)
    if nbytes <= SMALL_NBYTES:
        while descriptors:
            close_soon(descriptors.pop())
        return
    _freeing[:] = [going for going in _freeing if not going.closing.done()]
    _freeing.append(_Freeing(close_later(descriptors), nbytes))


def _wait_for_space(directory: str) -> None:
    """Waits for files that are being freed, if the next save may need their space."""
    going = [going for going in _freeing if not going.closing.done()]
    if not going:
        return
    try:
        room = os.statvfs(directory)
        if sum(one.nbytes for one in going) < room.f_bavail * room.f_frsize:
            return
    except FileNotFoundError:
        pass
    for one in going:
        one.closing.wait()
