# SPDX-License-Identifier: Apache-2.0
"""Lets torch write an archive of ``torch.save`` into memory, with holes in the place of large records.

Torch's own function pickles the object and writes the records. Instead of torch's zip writer it gets one that
passes on small records, and for large ones makes a hole of the record's size by torch's
``write_record_metadata``. Nothing of torch's state is changed. So a signal handler, a finalizer or another
thread that saves something meanwhile writes what it would write at any time.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import torch

from ..engine import tensors as _tensors
from ..engine.engine import Amend
from ..engine.plan import FETCHED, HOST, TensorView
from ..errors import ArchiveError
from ..formats.torch_archive import Archive, UnknownLayout
from .archive_errors import archive_error, archive_errors, why_torch_failed

if TYPE_CHECKING:
    from .. import _native

Held: TypeAlias = Any
"""What belongs into a hole: an ``UntypedStorage``, or the ``bytes`` of a pickle."""

_LARGE: Final = 64 << 10
"""Records of at least so many bytes become holes."""
_MOST_INSIDE: Final = 1 << 20
"""The most bytes of storages that do not become holes, all together."""
_SMALL: Final = 256 << 10
"""The bytes that torch could write in the time in which the engine makes a plan."""


class NotByEngine(Exception):
    """The engine cannot make this archive; the text says why."""


class Pickling(NamedTuple):
    """The arguments of ``torch.save``, except where it saves to."""

    obj: object
    module: Any
    protocol: int
    new_format: bool
    no_byteorder: bool


class Skeleton(NamedTuple):
    mapping: mmap.mmap
    holes: dict[str, Held]
    """What belongs into each hole, by the name of its record."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole archive."""
        return len(self.mapping)


class Plan(NamedTuple):
    items: list[TensorView]
    fetch: Callable[[int, int, int, int, int], None]
    amend: Amend | None


def make_skeleton(
    pickling: Pickling, path: str, small: Callable[[int], _native.NewFile] | None = None
) -> Skeleton | _native.NewFile:
    """Lets torch write the archive. ``small`` makes a file for an archive so small that it has no holes.

    ``small`` is called with the bytes of the records. The file that it makes is returned, and has to be
    published and closed. Raises :class:`NotByEngine`, what pickling raises, and :class:`ArchiveError` if
    there is no memory.
    """
    if not torch_makes_holes():
        raise NotByEngine("a torch that makes no holes")
    if getattr(getattr(torch.serialization, "_serialization_tls", None), "skip_data", False):
        raise NotByEngine("an active skip_data()")
    torch.serialization._check_dill_version(pickling.module)
    with _Writer(path, small) as writer:
        try:
            torch.serialization._save(
                pickling.obj, writer, pickling.module, pickling.protocol, pickling.no_byteorder
            )
            writer.end()
        except (RuntimeError, OSError) as error:
            failed = writer.why_failed(error)
            if failed is None:
                raise
            raise failed from error
        if writer.small_file is not None:
            made, writer.small_file = writer.small_file, None
            return made
        with archive_errors(path):
            return Skeleton(mmap.mmap(writer.memory, os.fstat(writer.memory).st_size), writer.holes)


def torch_makes_holes() -> bool:
    """Returns whether this torch has everything that is used of it here, as torch 2.6 and later have."""
    writer = getattr(torch._C, "PyTorchFileWriter", None)
    return hasattr(writer, "write_record_metadata") and all(
        hasattr(torch.serialization, name) for name in ("_save", "_check_dill_version")
    )


def named_like(path: str, descriptor: int) -> Any:
    """Returns what torch is told to write to, so that it writes to the descriptor's file what it would write
    to ``path``.

    The top folder of an archive has the name of the file, which torch reads from the last slash or backslash
    on. The system call that opens the path ends at the zero byte. If the path is not ASCII, the folder is
    called ``archive``, as torch then opens the file in Python.
    """
    if not path.isascii():
        return open(descriptor, "wb", closefd=False)
    return f"/proc/self/fd/{descriptor}\0\\{os.path.basename(path)}"


def stem_in_archive(path: str) -> str:
    """Returns the name of the archive's top folder. If it is empty, torch refuses to save."""
    name = os.path.basename(path).rpartition("\\")[2]
    return name.rpartition(".")[0] if "." in name else name


class _Writer:
    """Replaces torch's zip writer, which it makes when pickling has ended and the first record is written."""

    def __init__(self, path: str, small: Callable[[int], _native.NewFile] | None) -> None:
        self._path = path
        self._small = small
        self._opened: Any = None
        self._writer: Any = None
        self._left = _MOST_INSIDE
        self.memory = -1
        self.small_file: _native.NewFile | None = None
        self.holes: dict[str, Held] = {}

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        # The end of the process if torch's writer goes before it has ended and cannot write.
        with contextlib.suppress(Exception):
            self.end()
        self._writer = None  # has the file open, and who catches the error may keep this
        vars(self).pop("write_record", None)
        if self.small_file is not None:
            self.small_file.close()
        if self.memory >= 0:
            with contextlib.suppress(OSError):  # of memory: no disk is behind it, and the descriptor is gone
                os.close(self.memory)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def write_record(self, name: str, data: Any, nbytes: int) -> None:
        if self._writer is None:
            self._begin(sys._getframe(1).f_locals.get("serialized_storages"), nbytes)
        if self.small_file is not None:
            self._writer.write_record(name, data, nbytes)
        elif isinstance(data, _Elsewhere):
            self._make_hole(name, data.storage, nbytes)
        elif not isinstance(data, (torch.UntypedStorage, bytes)):
            self._writer.write_record(name, data, nbytes)
        elif nbytes < _LARGE and nbytes <= self._left:
            self._left -= nbytes
            self._writer.write_record(name, data, nbytes)
        else:
            self._make_hole(name, data, nbytes)

    def end(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.__exit__(None, None, None)

    def why_failed(self, error: Exception) -> ArchiveError | None:
        """Returns why torch could not write; ``None`` if its own error says it."""
        descriptor = self.memory if self.small_file is None else self.small_file.descriptor()
        if descriptor < 0:
            return None
        skipped = sum(len(held) if isinstance(held, bytes) else held.nbytes() for held in self.holes.values())
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            return archive_error(error.errno, os.strerror(error.errno), self._path)
        return why_torch_failed(error, descriptor, self._path, skipped)

    def _begin(self, storages: Any, nbytes: int) -> None:
        if not isinstance(storages, dict):
            raise NotByEngine("a torch that keeps its storages elsewhere")
        # What is on a device torch would copy to the host as a whole.
        elsewhere: dict[str, _Elsewhere] = {}
        for key, held in storages.items():
            nbytes += held.nbytes()
            if _is_elsewhere(held):
                elsewhere[key] = _Elsewhere(held)
        storages.update(elsewhere)
        if self._small is not None and not elsewhere and nbytes < _SMALL:
            self.small_file = self._small(nbytes)
            try:
                return self._open(self.small_file.descriptor())
            except RuntimeError:  # by a umask that allows nobody to write, for instance
                self.small_file.close()
                self.small_file = None
        with archive_errors(self._path):
            self.memory = os.memfd_create("fastshard")
        try:
            self._open(self.memory)
        except RuntimeError as error:
            raise NotByEngine("no /proc to open files by") from error

    def _open(self, descriptor: int) -> None:
        opened = torch.serialization._open_zipfile_writer(named_like(self._path, descriptor))
        self._opened, self._writer = opened, opened.__enter__()
        if self.small_file is not None:
            self.write_record = self._writer.write_record  # type: ignore[method-assign]

    def _make_hole(self, name: str, held: Held, nbytes: int) -> None:
        self._writer.write_record_metadata(name, nbytes)
        if nbytes:
            self.holes[name] = held


class _Elsewhere:
    """Replaces a storage on a device in torch's own dict of storages that it is going to write."""

    device: Final = torch.device("cpu")

    def __init__(self, storage: Any) -> None:
        self.storage = storage

    def nbytes(self) -> int:
        nbytes: int = self.storage.nbytes()
        return nbytes


def _is_elsewhere(storage: Any) -> bool:
    return storage.device.type not in ("cpu", "meta")


def plan(skeleton: Skeleton) -> Plan:
    """Returns the stretches of the skeleton and the contents of its holes, in turn.

    Raises :class:`NotByEngine` if they do not fit together.
    """
    mapping, holes = skeleton
    base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    items: list[TensorView] = []
    filled: list[str] = []
    at = 0
    try:
        archive = Archive(memoryview(mapping))
    except UnknownLayout as error:
        raise NotByEngine("an archive of another layout") from error
    for record in archive.records:
        held = holes.get(record.name)
        if held is None:
            continue
        view = view_of(held)
        if view is None or view.nbytes != record.nbytes:
            raise NotByEngine("a storage without memory")
        items += TensorView(base + at, record.begin - at, HOST), view
        filled.append(record.name)
        at = record.begin + record.nbytes
    if len(filled) != len(holes):
        raise NotByEngine("an archive of another layout")
    items.append(TensorView(base + at, len(mapping) - at, HOST))

    def amend(checksums: Sequence[Sequence[int]]) -> list[tuple[int, int, bytes]]:
        crcs = dict(zip(filled, checksums[0][1::2], strict=True))
        return [(0, offset, data) for offset, data in archive.amendments(crcs)]

    fetch = _fetcher([holes[name] for name in filled])
    return Plan(items, fetch, amend if archive.has_crcs else None)


def _fetcher(held: Sequence[Held]) -> Callable[[int, int, int, int, int], None]:
    on_streams = _tensors.on_current_streams(
        [
            one.device
            for one in held
            if not isinstance(one, bytes) and _tensors.device_number(one.device) == FETCHED
        ]
    )

    def fetch(file: int, item: int, first_byte: int, nbytes: int, address: int) -> None:
        storage = held[item // 2]
        with on_streams(storage.device):
            data = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            _tensors.fetch(data, first_byte, nbytes, address)

    return fetch


def view_of(held: Held) -> TensorView | None:
    """Returns a view of all bytes of a storage; ``None`` if it has no memory."""
    if isinstance(held, bytes):
        address = ctypes.cast(held, ctypes.c_void_p).value  # type: ignore[arg-type]
        return TensorView(address or 0, len(held), HOST)
    device, nbytes = held.device, held.nbytes()
    number = _tensors.device_number(device)
    if number == FETCHED and device.type != "meta":
        return TensorView(0, nbytes, FETCHED)
    data = held.data_ptr()
    return TensorView(data, nbytes, number) if data or not nbytes else None
