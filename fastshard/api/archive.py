# SPDX-License-Identifier: Apache-2.0
"""Archives of ``torch.save``, written by torch and by the engine together.

Torch writes everything but large records: an archive in memory with holes (``archive_skeleton.py``). The
engine writes it and the storages into the file, and amends what depends on the storages' CRC-32 when their
bytes have passed. If a new file cannot take the place of the old one (:mod:`fastshard.publish.in_place`),
torch writes over it.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import pickle
import stat
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from ..base.activity import count_left
from ..base.originals import original_of
from ..engine import background
from ..engine import tensors as _tensors
from ..engine.engine import Engine, Options, Stats, engine_for, progress_wanted
from ..engine.figures import counted, keep_stats
from ..engine.pipeline import How, encoded_path, finish, wanted
from ..engine.plan import FilePlan
from ..publish.in_place import LATE, note_made, why_in_place
from ..publish.linking import place_of
from ..publish.manifests import add, check_wanted, forget
from .archive_by_torch import can_replace, new_file, replace_by_torch, sync_folder
from .archive_errors import NO_SPACE, archive_error, archive_errors, as_archive_error, no_space
from .archive_skeleton import NotByEngine, Pickling, Plan, Skeleton, make_skeleton, plan, stem_in_archive

if TYPE_CHECKING:
    from .. import _native

_CALL: Final = "torch.save"
_PROTOCOL: Final = torch.serialization.DEFAULT_PROTOCOL


_AS_TORCH: Final = How()


def torch_save(
    obj: object,
    f: Any,
    pickle_module: Any = pickle,
    pickle_protocol: int = _PROTOCOL,
    _use_new_zipfile_serialization: bool = True,
    _disable_byteorder_record: bool = False,
    *,
    in_place: bool = False,
    durable: bool = False,
    keep_cached: bool = True,
    progress: bool | None = None,
    manifest: bool | Literal["sha256"] = False,
    engine: Engine | Options | None = None,
) -> None:
    """Saves any object as ``torch.save`` does: the same file, byte for byte, which ``torch.load`` reads.

    The file appears under its name complete or not at all. Its mode follows the umask. If it replaces a file,
    it takes over that one's mode, owner, access list and extended attributes. A symbolic link keeps pointing
    where it points.

    In some cases a new file in the place of the old one would not be what others see, or cannot be made: if
    the file has another name (a hard link), if this process has it open and not mapped, if the path leads
    through ``/proc``, if the file is a mount point or another user's, and if the folder may not be written
    to. Torch then writes over the old file. What the engine cannot do is left to ``torch.save`` as well: a
    file-like object as ``f``, a device or a pipe, the old format, an active ``skip_data()``, storages without
    memory, a torch before 2.6. ``fastshard.status()`` counts all of these.

    Args:
        obj: what to pickle. Storages are saved whole, shared ones once, from any device, behind what was enqueued
            on its current stream before the call.
        f: the path of the file; or, as there, an object with ``write``.
        pickle_module: as there.
        pickle_protocol: as there.
        in_place: let torch write over the existing file, as ``torch.save`` does. That needs no space for a second
            file, and leaves part of a file if it fails. It needs a path.
        durable, keep_cached, progress, manifest, engine: as for :func:`fastshard.save_file`; all but ``progress`` and
            ``engine`` need a path. A manifest has the CRC-32 of the whole file, and is written when that stands.

    Raises:
        ArchiveError: a system call failed; a ``RuntimeError``, as in ``torch.save``, and an ``OSError``, of the
            class that ``open`` raises.
        ValueError: ``in_place``, ``durable``, ``keep_cached`` or ``manifest`` for what is not a path.
        Exception: whatever pickling raises, unchanged.
    """
    pickling = Pickling(
        obj, pickle_module, pickle_protocol, _use_new_zipfile_serialization, _disable_byteorder_record
    )
    check_wanted(manifest)
    how = How(durable=durable, keep_cached=keep_cached, progress=progress, manifest=manifest, engine=engine)
    _save(_original(), pickling, f, how, in_place)


def in_the_place_of_torch(
    original: Callable[..., None],
    /,
    obj: object,
    f: Any,
    pickle_module: Any = pickle,
    pickle_protocol: int = _PROTOCOL,
    _use_new_zipfile_serialization: bool = True,
    _disable_byteorder_record: bool = False,
) -> None:
    """Does the same for callers of ``torch.save``, whose original function is the first argument."""
    pickling = Pickling(
        obj, pickle_module, pickle_protocol, _use_new_zipfile_serialization, _disable_byteorder_record
    )
    _save(original, pickling, f, _AS_TORCH, False)


def _save(original: Callable[..., None], pickling: Pickling, f: Any, how: How, in_place: bool) -> None:
    def by_torch(target: Any) -> None:
        original(
            pickling.obj,
            target,
            pickle_module=pickling.module,
            pickle_protocol=pickling.protocol,
            _use_new_zipfile_serialization=pickling.new_format,
            _disable_byteorder_record=pickling.no_byteorder,
        )

    began = time.perf_counter()
    path = os.fspath(f) if isinstance(f, (str, os.PathLike)) else None
    if not isinstance(path, str):
        if how.durable or not how.keep_cached or in_place or how.manifest:
            raise ValueError(
                f"in_place, durable, keep_cached and manifest need a path, not {type(f).__name__}"
            )
        count_left(_CALL, _kind_of(f))
        return by_torch(f)
    if not stem_in_archive(path):
        count_left(_CALL, "a path that torch takes for no file name")
        return by_torch(path)
    _save_path(by_torch, pickling, path, how, in_place, began)
    is_in_flight = background.current() is not None and background.conflicting([background.place_of(path)])
    if how.manifest and not is_in_flight:
        _describe(path, how)


def _describe(path: str, how: How) -> None:
    """Adds the file to the manifest of the folder that it is in."""
    with archive_errors(path):
        add(place_of(path), how.manifest, durable=how.durable, keep_cached=how.keep_cached)


def _tell(path: str, how: How, _: object) -> None:
    """Lets the manifest say of the file what it is to say. It is a step of an asynchronous save."""
    if how.manifest:
        _describe(path, how._replace(keep_cached=False))  # as it was written past the page cache
    else:
        forget([place_of(path)], durable=how.durable)


def _save_path(
    by_torch: Callable[[Any], None], pickling: Pickling, path: str, how: How, in_place: bool, began: float
) -> None:
    # In a block of asynchronous() only what is written at once waits for earlier saves.
    background.make_way(path, wait=background.current() is None)
    with archive_errors(path):
        encoded_path(path)
        try:
            reason = why_in_place(path)
            if reason is not None and background.current() is not None:
                # An earlier save may just have put the file there, and hold it for a moment.
                background.make_way(path)
                reason = why_in_place(path)
        except (FileNotFoundError, NotADirectoryError):
            _check_folder(path)
            reason = None
        forget({path, place_of(path)} if os.path.islink(path) else {path}, durable=how.durable)
    if in_place:
        reason = reason or "in_place=True"
    if reason:
        return _write_over(by_torch, path, reason, how)
    try:
        reason = _write_new(pickling, path, how, began) if pickling.new_format else "the old format"
    except OSError as error:
        if error.errno not in LATE or error.filename != path or getattr(error, "published", False):
            raise
        if not os.path.lexists(path):
            raise
        # Found out late: the file that is there can be opened, which has been tried.
        late = f"a file that cannot be replaced ({errno.errorcode[error.errno]})"
        return _write_over(by_torch, path, late, how)
    if reason:
        if not can_replace(path):
            return _write_over(by_torch, path, reason, how)
        count_left(_CALL, reason)
        background.make_way(path)
        by_name = pickling.new_format and path.isascii()
        replace_by_torch(by_torch, path, by_name, how.durable, how.keep_cached)


def _write_new(pickling: Pickling, path: str, how: How, began: float) -> str | None:
    """Writes a new file: by the engine, or at once if it is small.

    Returns why that cannot be done; ``None`` if the file stands.
    """
    needed = None

    def small(nbytes: int) -> _native.NewFile:
        nonlocal needed
        needed = nbytes
        return new_file(path, how.keep_cached, True)

    at_once = how.engine is None and not progress_wanted(how.progress)
    try:
        made = make_skeleton(pickling, path, small if at_once else None)
        if isinstance(made, Skeleton):
            planned = plan(made)
            needed = made.nbytes
            _write(path, made, planned, how, began)
        else:
            _publish(made, path, how, began)
    except NotByEngine as why:
        return str(why)
    except OSError as error:
        if error.errno in NO_SPACE and error.filename == path and not getattr(error, "published", False):
            raise no_space(error.errno, path, needed) from None
        raise
    return None


def _publish(made: _native.NewFile, path: str, how: How, began: float) -> None:
    """Publishes a small archive that torch has written."""
    try:
        background.make_way(path)
        with archive_errors(path):
            nbytes, refused = made.publish(how.durable)
    finally:
        made.close()
    keep_stats(_stats_of(nbytes, time.perf_counter() - began, refused), _CALL, path)


def _stats_of(nbytes: int, seconds: float, refused: Sequence[str]) -> Stats:
    """Returns the figures of a file that this thread has written at once."""
    return Stats(
        files=1,
        nbytes=nbytes,
        seconds=seconds,
        plan_seconds=0.0,
        copy_seconds=0.0,
        write_seconds=seconds,
        sync_seconds=0.0,
        write_path="buffered",
        staging="none",
        staging_nbytes=0,
        mapped_nbytes=0,
        device_scratch_nbytes=0,
        fallbacks=tuple(refused),
    )


def _write(path: str, skeleton: Skeleton, planned: Plan, how: How, began: float) -> None:
    file = FilePlan(encoded_path(path), b"", planned.items)
    scope = background.current()
    if scope is not None and scope.check_unchanged:
        raise ValueError("check_unchanged: torch does not count changes of storages, which torch.save writes")

    with archive_errors(path):
        future = engine_for(how.engine).submit(
            [file],
            keep_alive=(planned, skeleton),
            streams=_tensors.current_streams([view.device for view in planned.items]),
            durable=how.durable,
            keep_cached=how.keep_cached,
            checksums=planned.amend is not None,
            follow_links=True,
            fetch=planned.fetch,
            amend=planned.amend,
            steps=[
                functools.partial(note_made, path),
                *([functools.partial(_tell, path, how)] if scope is not None else ()),
                counted(_CALL, path),
            ],
            explain=functools.partial(_explained, path, skeleton.nbytes),
            plan_seconds=time.perf_counter() - began,
            serve=False,
            wanted=None if scope is None else wanted(scope, [path]),
        )
        finish(future, how.progress, os.path.basename(path))


def _explained(path: str, nbytes: int, error: BaseException) -> BaseException | None:
    """Returns what the caller is told of an error of the engine."""
    if isinstance(error, OSError) and error.errno in NO_SPACE and not getattr(error, "published", False):
        return no_space(error.errno, path, nbytes)
    return as_archive_error(path, error)


def _write_over(by_torch: Callable[[Any], None], path: str, reason: str, how: How) -> None:
    """Writes as torch does, and leaves what torch leaves."""
    count_left(_CALL, reason)
    background.make_way(path)
    by_torch(path)
    if not how.durable and how.keep_cached:
        return
    with archive_errors(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return
            os.fsync(descriptor)
            if not how.keep_cached:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    if how.durable:
        sync_folder(os.path.dirname(os.path.realpath(path)), path)


def _kind_of(f: object) -> str:
    """Returns one of a few texts for the kind of object."""
    if isinstance(f, io.BytesIO):
        return "a BytesIO"
    return "an open file" if hasattr(f, "fileno") else "a file-like object"


def _original() -> Callable[..., None]:
    """Returns ``torch.save`` itself, whoever has replaced it."""
    return original_of("torch.serialization", "save")


def _check_folder(path: str) -> None:
    """Raises if the folder does not exist, before anything is pickled, as torch does."""
    folder = os.path.dirname(path)
    try:
        is_folder = not folder or stat.S_ISDIR(os.stat(folder).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_folder = False
    if not is_folder:
        raise archive_error(errno.ENOENT, f"Parent directory {folder} does not exist.", path)
