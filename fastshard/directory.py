# SPDX-License-Identifier: Apache-2.0
"""A directory whose files change all at once: whoever looks finds the old checkpoint or the new one, never a mixture.

No filesystem renames several files in one step, so a single symbolic link makes the decision for all of them. The
new files are made in a hidden directory in the target::

    .fastshard-<16 hex digits>.staging/
        new/    the files of this save
        old/    hard links to the files it replaces or makes obsolete
        now     -> old, later -> new

1. Every name concerned is replaced by a link to ``.../now/<name>``, so far the same contents as before.
2. ``now`` is pointed to ``new`` by a rename: all names change at once, obsolete ones dangle.
3. The links are replaced by the new files themselves, dangling ones go, and so does the hidden directory.

Killed before 2 the directory holds the old checkpoint, killed after it the new one; the next save there finishes
what was begun. Where links are refused (FAT, some FUSE and network mounts) the files are renamed one by one, those
that make others visible last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

_STAGING: Final = re.compile(r"\.fastshard-[0-9a-f]{16}\.staging")
_STAGED: Final = re.compile(rf"/{_STAGING.pattern}(/(new|old|now)\b)?")
_LOCK_SECONDS: Final = 10.0
"""Putting files in place takes milliseconds; whoever holds the lock for longer uses it for something else."""
_MOST_HELD: Final = 256
_NO_LINKS: Final = frozenset(
    (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV, errno.EINVAL)
)


@contextlib.contextmanager
def replacing(
    directory: str,
    stale: Callable[[str], bool] = lambda name: False,
    *,
    obsolete: Iterable[str] = (),
    create: bool = False,
    durable: bool = False,
) -> Iterator[str]:
    """Gives a hidden directory to write files to. When the block ends they stand in ``directory``, all at once.

    Files that stand there under the same names are replaced, and those for whose names ``stale`` holds and those of
    ``obsolete``, paths relative to ``directory``, are removed, in the same moment. Replaced files hand on their mode (and owner, where that is allowed); a symbolic link is
    replaced itself. After an exception everything is as it was. ``create``: make the directory if it is missing.
    ``durable``: all of it is on stable storage when the block has ended.

    Raises ``FileNotFoundError`` or ``NotADirectoryError`` for the directory, ``IsADirectoryError`` where one stands
    in the place of a file, and other ``OSError``; their ``filename`` is that of the final place.
    """
    with _made(directory if create else ""):
        _wait_for_space()
        with _locked(directory):
            _finish_abandoned(directory)
            staging = _Staging(directory, durable)
        try:
            yield staging.new
            with _locked(directory):
                staging.put_in_place(stale, obsolete)
        finally:
            staging.close()


@contextlib.contextmanager
def creating(directory: str, *, durable: bool = False) -> Iterator[str]:
    """Gives a hidden directory to write files and directories to. When the block ends it is ``directory``.

    One rename makes it so: nothing is there before. ``directory`` must be missing, or empty (and no mount point). After
    an exception everything is as it was; errors and ``durable`` as for :func:`replacing`.
    """
    place = os.path.realpath(directory)
    parent = os.path.dirname(place)
    with _made(parent):
        _wait_for_space()
        with _locked(parent):
            _finish_abandoned(parent)
            staging = _Staging(parent, durable)
        try:
            created = os.path.join(staging.new, os.path.basename(place))
            os.mkdir(created)
            yield created
            staging.put_directory_in_place(created, place)
        finally:
            staging.close()


@contextlib.contextmanager
def _made(directory: str) -> Iterator[None]:
    """Makes it, if there is a name, and takes it away again after an exception; ``OSError`` gets the final places."""
    made = _make_directories(directory)
    try:
        yield
        made = []
    except OSError as error:
        error.filename = _final(error.filename)
        error.filename2 = _final(error.filename2)
        raise
    finally:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                os.rmdir(path)


class _Staging:
    """The hidden directory, and how its files get to their places."""

    def __init__(self, directory: str, durable: bool, name: str | None = None) -> None:
        self.directory = directory
        self.durable = durable
        self.name = name or f".fastshard-{secrets.token_hex(8)}.staging"
        self.path = os.path.join(directory, self.name)
        self.new = os.path.join(self.path, "new")
        self.old = os.path.join(self.path, "old")
        self.now = os.path.join(self.path, "now")
        self._held: list[int] = []
        if name is None:
            os.mkdir(self.path)
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            # Whoever is at work in there holds the lock.
            self.mine = _lock(self._fd) is True or name is None
            if name is None:
                # Readers come by here for a moment.
                os.chmod(self.path, stat.S_IMODE(os.stat(directory).st_mode))
                os.mkdir(self.new)
                os.mkdir(self.old)
        except BaseException:
            if name is None:
                shutil.rmtree(self.path, ignore_errors=True)
            raise

    def close(self) -> None:
        """Removes it, unless others are at work in it or names still lead into it."""
        if self.mine and not any(self._is_ours(name) for name in self._names()):
            for path in (self.new, self.old, *(os.path.join(self.old, name) for name in _files(self.old))):
                self._hold(path)
            shutil.rmtree(self.path, ignore_errors=True)
        _let_go([*self._held, self._fd])

    def put_in_place(self, stale: Callable[[str], bool], obsolete: Iterable[str]) -> None:
        names = _files(self.new)
        for name in names:
            self._inherit(name)
        gone = [
            entry.name
            for entry in os.scandir(self.directory)
            if entry.name not in names and stale(entry.name) and (entry.is_symlink() or not entry.is_dir())
        ]
        gone += [
            name for name in obsolete if name not in (*names, *gone) and os.path.lexists(self._place(name))
        ]
        present = [name for name in names if os.path.lexists(self._place(name))] + gone
        for name in names:
            os.makedirs(os.path.dirname(self._place(name)), exist_ok=True)
        if self.durable:
            for path in (*(os.path.join(self.new, name) for name in names), self.new):
                sync(path)
        linked = False
        try:
            # Of new files the last one shows the others, unless they are in several folders.
            several = len({os.path.dirname(name) for name in names}) > 1
            linked = (bool(present) or several) and self._redirect(names, present)
            if linked:
                self._point_to("new")
        finally:
            self.settle()
        if not linked:
            for name in sorted(names, key=_visibility):
                os.rename(os.path.join(self.new, name), self._place(name))
            for name in gone:
                os.unlink(self._place(name))
        if self.durable:
            for path in {os.path.dirname(self._place(name)) for name in (*names, *gone)}:
                sync(path)

    def put_directory_in_place(self, created: str, place: str) -> None:
        if os.path.isdir(place):
            os.chmod(created, stat.S_IMODE(os.stat(place).st_mode))
        if self.durable:
            for folder, _, files in os.walk(created):
                for path in (*(os.path.join(folder, name) for name in files), folder):
                    sync(path)
        os.rename(created, place)
        if self.durable:
            sync(self.directory)

    def _redirect(self, names: list[str], present: list[str]) -> bool:
        """Replaces every name by a link that leads to its old file; false where that is not possible."""
        try:
            for name in present:
                os.makedirs(os.path.dirname(os.path.join(self.old, name)), exist_ok=True)
                if os.path.islink(self._place(name)):
                    # A link to it, not a copy of it: what it says is relative to where it is.
                    os.symlink(os.path.realpath(self._place(name)), os.path.join(self.old, name))
                else:
                    os.link(self._place(name), os.path.join(self.old, name))
            self._point_to("old")
            for name in dict.fromkeys((*present, *names)):
                link = os.path.join(self.path, "link")
                os.symlink(self._target(name), link)
                os.rename(link, self._place(name))
        except OSError as error:
            if error.errno in _NO_LINKS:
                return False
            raise
        if self.durable:
            for path in (self.old, *{os.path.dirname(self._place(name)) for name in present}):
                sync(path)
        return True

    def _point_to(self, which: str) -> None:
        following = os.path.join(self.path, "next")
        os.symlink(which, following)
        os.rename(following, self.now)
        if self.durable:
            sync(self.path)

    def settle(self) -> None:
        """Replaces the links by the files they lead to."""
        for name in self._names():
            if self._is_ours(name):
                self._hold(self._place(name))
                source = os.path.join(self.now, name)
                if os.path.lexists(source):
                    os.rename(source, self._place(name))
                else:
                    os.unlink(self._place(name))

    def _hold(self, path: str) -> None:
        """Keeps what is about to lose its name, as to free it takes time: :func:`_let_go`."""
        if len(self._held) < _MOST_HELD:
            with contextlib.suppress(OSError):
                self._held.append(os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC))

    def _names(self) -> list[str]:
        return sorted({*_files(self.new), *_files(self.old)})

    def _place(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def _target(self, name: str) -> str:
        """What a name's link says."""
        return os.path.join(os.path.relpath(".", os.path.dirname(name) or "."), self.name, "now", name)

    def _is_ours(self, name: str) -> bool:
        try:
            return os.readlink(self._place(name)) == self._target(name)
        except OSError:
            return False

    def _inherit(self, name: str) -> None:
        """The mode and the owner of the file that is replaced."""
        try:
            old = os.lstat(self._place(name))
        except (FileNotFoundError, NotADirectoryError):
            return
        if stat.S_ISDIR(old.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self._place(name))
        if stat.S_ISREG(old.st_mode):
            path = os.path.join(self.new, name)
            found = os.stat(path)
            if (found.st_uid, found.st_gid) != (old.st_uid, old.st_gid):
                with contextlib.suppress(PermissionError):
                    os.chown(path, old.st_uid, old.st_gid)
            os.chmod(path, stat.S_IMODE(old.st_mode))


def _finish_abandoned(directory: str) -> None:
    """Ends what killed saves have begun here."""
    for name in os.listdir(directory):
        if _STAGING.fullmatch(name) and not os.path.islink(os.path.join(directory, name)):
            with contextlib.suppress(OSError):  # of others, or gone meanwhile: not in the way
                staging = _Staging(directory, False, name)
                if staging.mine:
                    staging.settle()
                staging.close()


def _visibility(name: str) -> tuple[int, str]:
    """An index or a manifest shows its shards, and a single file is looked for before an index: the last to come."""
    shows = name.endswith(".index.json") or name.startswith("fastshard-")
    return (2 if shows else 1 if name.endswith((".safetensors", ".bin")) else 0), name


def _files(top: str) -> list[str]:
    """Paths of all files in there, relative to it; sorted."""
    return sorted(
        os.path.relpath(os.path.join(folder, name), top)
        for folder, folders, files in os.walk(top)
        for name in (*files, *(name for name in folders if os.path.islink(os.path.join(folder, name))))
    )


def _make_directories(path: str) -> list[str]:
    """Those that were missing, from the top."""
    missing = []
    while path and not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path.rstrip(os.sep))
    for folder in reversed(missing):
        os.makedirs(folder, exist_ok=True)
    return missing[::-1]


_going: dict[threading.Event, list[int]] = {}
"""Descriptors that are being closed, by what is set when they are."""


def _let_go(descriptors: list[int]) -> None:
    """Closes them on a thread of their own. With the last descriptor the kernel frees what has lost its name: on a
    disk that is being written to a tenth of a second even for an empty directory (ext4 then waits for its journal)."""
    gone = threading.Event()
    _going[gone] = descriptors

    def close() -> None:
        try:
            while descriptors:  # what is in there is open, whenever the process forks
                os.close(descriptors.pop())
        finally:
            del _going[gone]
            gone.set()

    try:
        threading.Thread(target=close, name="fastshard-let-go", daemon=True).start()
    except RuntimeError:  # no more threads, or the interpreter ends
        close()


def _wait_for_space() -> None:
    """What was let go may be what the next save needs room for."""
    for gone in list(_going):
        gone.wait()


def _close_in_child() -> None:
    """A forked process must not keep what its parent lets go."""
    for descriptors in _going.values():
        for fd in descriptors:
            os.close(fd)
    _going.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _lock(fd: int) -> bool | None:
    """Whether this process has the lock now; ``None`` on a filesystem without locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


@contextlib.contextmanager
def _locked(directory: str) -> Iterator[None]:
    """One save at a time puts its files in place here."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while _lock(fd) is False and time.monotonic() < deadline:
            time.sleep(0.005)
        yield
    finally:
        os.close(fd)


def sync(path: str) -> None:
    """Of a file or a directory: what it holds is on stable storage."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _final(path: object) -> object:
    """Where a staged file was to stand."""
    if isinstance(path, bytes):
        return os.fsencode(final_places(os.fsdecode(path)))
    return final_places(path) if isinstance(path, str) else path


def final_places(text: str) -> str:
    """A path or a message, with the final places of staged files."""
    return _STAGED.sub("", text)
