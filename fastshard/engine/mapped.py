# SPDX-License-Identifier: Apache-2.0
"""Tensors that lie in files. They are made without reading the file and saved without taking memory.

They are ordinary CPU tensors over a private mapping of the file. Pages are read when they are first used, and
a tensor that is changed is changed for this process only. Meanwhile the file must not be cut or written to.
It may be replaced by a rename, as every save of fastshard does, also a save of these tensors into the same
file.

The engine knows these mappings (csrc/file/source_file.h). It reads unchanged tensors chunk by chunk, without
adding to the process's resident memory. A file that has been cut is reported as
:class:`~fastshard.SaveError`; a load from ordinary mapped memory would end the process with SIGBUS.
"""

from __future__ import annotations

import math
import os
import stat
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from safetensors import SafetensorError

from ..formats.json_text import shown
from ..formats.safetensors import CODES, StoredTensor, read_header

if TYPE_CHECKING:
    from .. import _native

PathLike = str | os.PathLike[str]

DTYPES: Final[dict[str, torch.dtype]] = {
    code: dtype for name, code in CODES.items() if (dtype := getattr(torch, name, None)) is not None
}
"""The torch dtype for each code in a header, as far as the installed torch has it."""


def in_torch(stored: StoredTensor) -> tuple[torch.dtype, tuple[int, ...]]:
    """Returns dtype and shape that torch has for a tensor in a file. Raises ``ValueError`` where it has none."""
    dtype = DTYPES.get(stored.code)
    if dtype is None:
        raise ValueError(f"this torch has no dtype for {stored.code}")
    shape = stored.shape
    if stored.code == "F4":  # two elements a byte
        if not shape or shape[-1] % 2:
            raise ValueError(f"shape {shape} splits a byte")
        shape = (*shape[:-1], shape[-1] // 2)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != stored.end - stored.begin:
        raise ValueError(f"{dtype} of shape {shape} has {nbytes} bytes, not {stored.end - stored.begin}")
    return dtype, shape


class _Identity(NamedTuple):
    """Tells a file from other files, and from itself before it was rewritten."""

    device: int
    inode: int
    nbytes: int
    modified_ns: int

    @staticmethod
    def of(info: os.stat_result) -> _Identity:
        return _Identity(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)


class _Contents(NamedTuple):
    """What the header of a safetensors file says."""

    begin: int
    """Offset in the file where the tensors' bytes begin."""
    tensors: dict[str, StoredTensor]


_MAX_HEADERS: Final = 64
_lock = threading.RLock()
"""It is reentrant, as a signal handler may map files while its thread holds the lock."""
_mappings: weakref.WeakValueDictionary[_Identity, _native.SourceFile] = weakref.WeakValueDictionary()
_headers: dict[_Identity, _Contents] = {}


class MappedFile:
    """A file whose bytes can be had as tensors.

    However often a file is asked for, there is one mapping of it, which lasts as long as one of its tensors
    or this object. Each tensor has a storage object of its own; tensors over the same bytes have equal
    addresses and sizes, so sharing is still detected.

    Raises ``OSError`` if the file cannot be opened and ``ValueError`` if it is not a regular file; errors
    name the file.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = os.fspath(path)
        # Not to hang on a pipe: the path may come from an index that somebody else wrote.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise ValueError(f"{self.path!r} is not a regular file")
            self._identity = _Identity.of(info)
            self._mapping = self._map(fd)
        finally:
            os.close(fd)

    def _map(self, fd: int) -> _native.SourceFile | None:
        from .. import _native

        if self._identity.nbytes == 0:
            return None
        with _lock:
            mapping = _mappings.get(self._identity)
            if mapping is None:
                mapping = _native.SourceFile(fd, self._identity.nbytes, os.fsencode(self.path))
                mapping = _mappings.setdefault(self._identity, mapping)
            return mapping

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes when it was mapped."""
        return self._identity.nbytes

    def view(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int = 0) -> torch.Tensor:
        """Returns a contiguous tensor of this dtype and shape whose bytes begin at ``offset`` in the file.

        Raises ``ValueError`` if the file ends before the tensor does.
        """
        count = math.prod(shape)
        end = offset + count * dtype.itemsize
        if offset < 0 or min(shape, default=0) < 0 or end > self.nbytes:
            raise ValueError(
                f"{self.path!r} has {self.nbytes} bytes: no {dtype} of shape {shape} lies at {offset}"
            )
        if count == 0:
            try:
                return torch.empty(shape, dtype=dtype, device="cpu")
            except (RuntimeError, TypeError, OverflowError):
                raise ValueError(f"torch has no tensor of shape {shown(shape)}") from None
        return torch.frombuffer(self._mapping, dtype=dtype, count=count, offset=offset).view(shape)

    def names(self) -> Iterator[str]:
        """Returns the names of the tensors of a safetensors file, in the order of their bytes. Raises as
        :meth:`tensor`."""
        return iter(self._contents().tensors)

    def tensor(self, name: str) -> torch.Tensor:
        """Returns the tensor of that name of a safetensors file.

        Raises ``SafetensorError`` if the file is none, if it has no such tensor, or if torch has no dtype for
        it.
        """
        begin, tensors = self._contents()
        stored = tensors.get(name)
        if stored is None:
            raise SafetensorError(f"File does not contain tensor {name}: {self.path!r}")
        try:
            return self._stored(stored, begin)
        except ValueError as error:
            raise SafetensorError(f"tensor {name!r} of {self.path!r}: {error}") from None

    def _stored(self, stored: StoredTensor, begin: int) -> torch.Tensor:
        return self.view(*in_torch(stored), begin + stored.begin)

    def _contents(self) -> _Contents:
        contents = _headers.get(self._identity)
        if contents is None:
            contents = self._read_header()
            with _lock:
                while len(_headers) >= _MAX_HEADERS:
                    _headers.pop(next(iter(_headers)), None)
                _headers[self._identity] = contents
        return contents

    def _read_header(self) -> _Contents:
        # By descriptor, as a read tells where a look into the mapping would end the process.
        with open(self.path, "rb") as file:
            if _Identity.of(os.fstat(file.fileno())) != self._identity:
                raise SafetensorError(f"{self.path!r} was replaced while it was being opened")
            try:
                header = read_header(file, self.nbytes)
            except ValueError as error:
                raise SafetensorError(f"Error while deserializing header: {error}: {self.path!r}") from None
        return _Contents(header.nbytes, {stored.name: stored for stored in header.tensors})


def load_mapped(path: PathLike) -> dict[str, torch.Tensor]:
    """Returns all tensors of a safetensors file, in the order of their bytes, without reading them.

    They are CPU tensors of the shapes and dtypes in the header; see :mod:`fastshard.engine.mapped` for what
    may be done with file and tensors. Raises as :class:`MappedFile` and :meth:`MappedFile.tensor`.
    """
    file = MappedFile(path)
    return {name: file.tensor(name) for name in file.names()}


def lies_in_file(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor, or the tensor that it is a view of, lies in a mapped file."""
    from .. import _native

    return tensor.is_cpu and _native.SourceFile.at(tensor.data_ptr()) is not None


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Returns whether two contiguous CPU tensors of equal size hold the same bytes. The comparison takes no
    memory.

    Raises ``OSError``, naming the file, if a file that one of them lies in has been cut.
    """
    from .. import _native

    return a.data_ptr() == b.data_ptr() or _native.same_bytes(a.data_ptr(), b.data_ptr(), a.nbytes)
