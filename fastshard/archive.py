# SPDX-License-Identifier: Apache-2.0
"""``torch.save``'s own archives, the storages streamed in by the engine.

Torch writes everything but the storages' bytes: an archive in memory with holes of their sizes, by its
``torch.serialization.skip_data``. The engine puts it and the storages together, and what depends on the storages'
CRC-32 is amended when their bytes have passed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import pickle
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch

from . import tensors as _tensors
from .directory import sync
from .engine import Amend, Engine, Options, engine_for, progress_wanted
from .errors import ArchiveError
from .patching import original_of
from .plan import FETCHED, HOST, FilePlan, TensorView
from .planning import collector_paused, encoded_path
from .records import Archive, UnknownLayout
from .saving import keep_stats

_STORAGES: Final = (torch.storage.TypedStorage, torch.UntypedStorage)
Storage = Any
"""An ``UntypedStorage``."""


def torch_save(
    obj: object,
    f: Any,
    pickle_module: Any = pickle,
    pickle_protocol: int = torch.serialization.DEFAULT_PROTOCOL,
    _use_new_zipfile_serialization: bool = True,
    _disable_byteorder_record: bool = False,
    *,
    durable: bool = False,
    keep_cached: bool = True,
    progress: bool | None = None,
    engine: Engine | Options | None = None,
) -> None:
    """Saves any object as ``torch.save`` does: the same file, byte for byte, which ``torch.load`` reads.

    The file appears under its name complete or not at all; its mode follows the umask, or is that of the file it
    replaces, and a symbolic link keeps pointing where it points. What the engine cannot do is left to ``torch.save``
    itself: a file-like object as ``f``, a device or a pipe, the old format, an active ``skip_data()``, storages
    without memory, a torch before 2.6.

    Args:
        obj: what to pickle. Storages are saved whole, shared ones once, from any device, behind what was enqueued
            on its current stream before the call.
        f: where to, a path; or, as there, an object with ``write``.
        pickle_module: as there.
        pickle_protocol: as there.
        durable, keep_cached, progress, engine: as for :func:`fastshard.save_file`; the first two need a path.

    Raises:
        ArchiveError: a system call failed; a ``RuntimeError``, as in ``torch.save``, and an ``OSError``.
        ValueError: ``durable`` or ``keep_cached`` for what is not a path.
        Exception: whatever pickling raises, unchanged.
    """

    def by_torch(target: Any, module: Any = pickle_module) -> None:
        _original()(
            obj,
            target,
            pickle_module=module,
            pickle_protocol=pickle_protocol,
            _use_new_zipfile_serialization=_use_new_zipfile_serialization,
            _disable_byteorder_record=_disable_byteorder_record,
        )

    began = time.perf_counter()
    path = os.fspath(f) if isinstance(f, (str, os.PathLike)) else None
    if not isinstance(path, str):
        if durable or not keep_cached:
            raise ValueError(f"durable and keep_cached need a path, not {type(f).__name__}")
        return by_torch(f)
    if not _is_ordinary(path):
        return by_torch(path)
    skeleton = None
    if _use_new_zipfile_serialization and _can_skip_data():
        skeleton = _make_skeleton(by_torch, pickle_module, path)
    plan = skeleton and _plan(skeleton)
    if plan is None:
        return _replace_by_torch(by_torch, path, durable, keep_cached)
    with _archive_errors(path):
        future = engine_for(engine).submit(
            [FilePlan(encoded_path(path), b"", plan.items)],
            keep_alive=(plan, skeleton),
            streams=_tensors.current_streams(view.device for view in plan.items),
            durable=durable,
            keep_cached=keep_cached,
            checksums=plan.amend is not None,
            fetch=plan.fetch,
            amend=plan.amend,
            plan_seconds=time.perf_counter() - began,
            description=os.path.basename(path),
        )
        keep_stats(future.result(progress_wanted(progress)), "torch.save", path)


def _original() -> Callable[..., None]:
    """``torch.save`` itself, whoever has put what in its place."""
    return original_of("torch.serialization", "save")


def _can_skip_data() -> bool:
    """Whether torch can leave holes, and is not leaving them anyway: the caller then wants no data."""
    active = getattr(getattr(torch.serialization, "_serialization_tls", None), "skip_data", False)
    return hasattr(torch.serialization, "skip_data") and not active


def _is_ordinary(path: str) -> bool:
    """Whether this is, or will be, a regular file that torch calls by the same name.

    Raises for what can be no file before anything is pickled, as torch does.
    """
    folder, name = os.path.split(path)
    stem = name.rpartition(".")[0] if "." in name else name
    if "\\" in path or not stem:
        return False  # torch cuts names at backslashes, and refuses to save without a stem
    with _archive_errors(path):
        encoded_path(path)
    if folder and not os.path.isdir(folder):
        raise ArchiveError(errno.ENOENT, f"Parent directory {folder} does not exist.", path)
    with _archive_errors(path):
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            return True
    if stat.S_ISDIR(mode):
        raise ArchiveError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    return stat.S_ISREG(mode)


class _Skeleton(NamedTuple):
    """An archive without the storages' bytes."""

    mapping: mmap.mmap
    storages: dict[str, Storage]
    """By the names of their records."""


class _Plan(NamedTuple):
    items: list[TensorView]
    fetch: Callable[[int, int, int, int, int], None]
    amend: Amend | None


class _Recorder:
    """Stands for the pickle module: pickles as that does, and takes down the storages that torch meets.

    ``skip_data`` begins when pickling has ended: what objects do while they are pickled (nested saves, say) is what
    they do in ``torch.save``.
    """

    def __init__(self, module: Any, after: contextlib.ExitStack) -> None:
        self._module = module
        self._met: dict[str, Storage] = {}
        self.state = "new"
        recorder = self

        class Pickler(module.Pickler):  # type: ignore[misc]
            def __init_subclass__(cls, **keywords: Any) -> None:
                super().__init_subclass__(**keywords)
                cls.persistent_id = recorder._recording(cls.persistent_id)

            def dump(self, obj: object) -> None:
                recorder.state = "pickling"
                super().dump(obj)
                recorder.state = "pickled"
                after.enter_context(torch.serialization.skip_data())

        self.Pickler = Pickler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def take_storages(self) -> dict[str, Storage]:
        """By the names of their records. Nothing keeps them here: torch's class lives until the next collection."""
        taken = {f"data/{key}": storage for key, storage in self._met.items()}
        self._met.clear()
        return taken

    def _recording(self, persistent_id: Callable[[Any, object], Any]) -> Callable[[Any, object], Any]:
        met = self._met

        def record(pickler: Any, obj: object) -> Any:
            if not isinstance(obj, _STORAGES):  # most objects: quicker than torch finds out
                return None
            found = persistent_id(pickler, obj)
            if found is not None:  # ("storage", type, key, location, elements)
                met[found[2]] = getattr(obj, "_untyped_storage", obj)
            return found

        return record


def _make_skeleton(by_torch: Callable[[Any, Any], None], module: Any, path: str) -> _Skeleton | None:
    """Lets torch write the archive with holes; ``None`` where it cannot. Raises what pickling raises."""
    with contextlib.ExitStack() as stack:
        recorder = _Recorder(module, stack)
        try:
            memory = stack.enter_context(open(os.memfd_create("fastshard"), "r+b"))
            with _named_like(path, memory) as target:
                by_torch(target, recorder)
            mapping = mmap.mmap(memory.fileno(), 0)
        except Exception:
            if recorder.state == "pickling":
                raise
            return None
        finally:
            storages = recorder.take_storages()
    return _Skeleton(mapping, storages)


@contextlib.contextmanager
def _named_like(path: str, file: Any) -> Iterator[Any]:
    """What torch is told to write to, so that it writes to ``file`` what it would write to ``path``.

    An archive's top folder has the name of the file, or is called ``archive`` where that is not ASCII: torch then
    opens the file in Python.
    """
    if not path.isascii():
        yield file
        return
    folder = tempfile.mkdtemp(prefix="fastshard-")
    link = os.path.join(folder, os.path.basename(path))
    try:
        os.symlink(f"/proc/self/fd/{file.fileno()}", link)
        with _ascii(folder) as place:
            yield os.path.join(place, os.path.basename(path))
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(link)
        os.rmdir(folder)


def _scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """In memory, if there is a place: beside a busy disk its removal would take as long as a save."""
    try:
        return tempfile.TemporaryDirectory(prefix="fastshard-", dir="/dev/shm")
    except OSError:
        return tempfile.TemporaryDirectory(prefix="fastshard-")


@contextlib.contextmanager
def _ascii(folder: str) -> Iterator[str]:
    """The folder by a name that does not make torch open a file in Python."""
    if folder.isascii():
        yield folder
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _plan(skeleton: _Skeleton) -> _Plan | None:
    """Stretches of the skeleton and storages in turn; ``None`` where they do not fit together."""
    mapping, storages = skeleton
    base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    items: list[TensorView] = []
    filled: list[str] = []
    at = 0
    with collector_paused():
        try:
            archive = Archive(memoryview(mapping))
        except UnknownLayout:
            return None
        unseen = dict(storages)
        for record in archive.records:
            storage = unseen.pop(record.name, None)
            if storage is None:
                continue
            view = _view_of(storage)
            if view is None or view.nbytes != record.nbytes:
                return None
            if record.nbytes:
                items += TensorView(base + at, record.begin - at, HOST), view
                filled.append(record.name)
                at = record.begin + record.nbytes
        if unseen:
            return None
        items.append(TensorView(base + at, len(mapping) - at, HOST))

    def fetch(file: int, item: int, first_byte: int, nbytes: int, address: int) -> None:
        storage = storages[filled[item // 2]]
        data = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        _tensors.fetch(data, first_byte, nbytes, address)

    def amend(checksums: Sequence[Sequence[int]]) -> list[tuple[int, int, bytes]]:
        crcs = dict(zip(filled, checksums[0][1::2], strict=True))
        return [(0, offset, data) for offset, data in archive.amendments(crcs)]

    return _Plan(items, fetch, amend if filled and archive.has_crcs else None)


def _view_of(storage: Storage) -> TensorView | None:
    """All of its bytes; ``None``: it has no memory."""
    device, nbytes = storage.device, storage.nbytes()
    number = _tensors.device_number(device)
    if number == FETCHED and device.type != "meta":
        return TensorView(0, nbytes, FETCHED)
    data = storage.data_ptr()
    return TensorView(data, nbytes, number) if data or not nbytes else None


def _replace_by_torch(by_torch: Callable[[Any], None], path: str, durable: bool, keep_cached: bool) -> None:
    """``torch.save`` itself, into a hidden folder beside the target, as the file's own name goes into the archive."""
    target = os.path.realpath(path)
    parent = os.path.dirname(target)
    hidden = os.path.join(parent, f".fastshard-{secrets.token_hex(8)}.tmp")
    made = os.path.join(hidden, os.path.basename(path))
    with _archive_errors(path):
        os.mkdir(hidden, 0o700)
    try:
        if path.isascii():
            with _ascii(hidden) as place:
                by_torch(f"{place}/{os.path.basename(path)}")
        else:
            with open(made, "wb") as file:
                by_torch(file)
        with _archive_errors(path):
            with open(made, "rb") as file:
                _adopt_attributes(file.fileno(), target)
                if durable or not keep_cached:
                    os.fsync(file.fileno())
                if not keep_cached:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.replace(made, target)
            if durable:
                sync(parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(made)
        os.rmdir(hidden)


def _adopt_attributes(descriptor: int, target: str) -> None:
    """Mode and, for root, owner of the file that is replaced."""
    try:
        replaced = os.stat(target)
    except FileNotFoundError:
        return
    with contextlib.suppress(PermissionError):
        os.fchown(descriptor, replaced.st_uid, replaced.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(replaced.st_mode))


@contextlib.contextmanager
def _archive_errors(path: str) -> Iterator[None]:
    """Failed system calls as :class:`ArchiveError`. Not to be used around pickling, which raises as it likes."""
    try:
        yield
    except OSError as error:
        raise ArchiveError(error.errno, error.strerror, path) from None
