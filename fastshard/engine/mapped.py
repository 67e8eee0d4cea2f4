# SPDX-License-Identifier: Apache-2.0
"""Tensors that lie in files: made without reading the file, saved without taking memory.

They are ordinary CPU tensors over a private mapping of the file: pages come in when somebody looks at them, and a
tensor that is changed is changed for this process only. The file must not be cut or written to meanwhile; replaced
by a rename (as every save of ours does, into the same name too) it may be. The engine knows these mappings
(csrc/source_file.h): it reads unchanged tensors chunk by chunk past the process's own pages, and reports a file that
has been cut as :class:`~fastshard.SaveError` where plain mapped memory would be a SIGBUS.
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
"""Code in the header -> torch dtype, as far as this torch has them."""


class _Identity(NamedTuple):
    """Tells a file from another one, and from what it was before it was written anew."""

    device: int
    inode: int
    nbytes: int
    modified_ns: int

    @staticmethod
    def of(info: os.stat_result) -> _Identity:
        return _Identity(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)


class _Contents(NamedTuple):
    """Of a safetensors file."""

    begin: int
    """Where the tensors' bytes begin."""
    tensors: dict[str, StoredTensor]


_MAX_HEADERS: Final = 64
_lock = threading.RLock()
"""A signal handler may map files, too, while its thread holds it."""
_mappings: weakref.WeakValueDictionary[_Identity, _native.SourceFile] = weakref.WeakValueDictionary()
_headers: dict[_Identity, _Contents] = {}


class MappedFile:
    """A file whose bytes can be had as tensors.

    There is one mapping of a file, however often it is asked for, which lasts as long as one of its tensors or this
    object. Each tensor has a storage of its own, two of the same bytes the same one by address and size, so code that
    looks for shared tensors finds those that are. Raises ``OSError`` where the file cannot be opened and
    ``ValueError`` for what is no regular file; errors name the file.
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
        """Size of the file when it was mapped."""
        return self._identity.nbytes

    def view(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int = 0) -> torch.Tensor:
        """A contiguous tensor of this type and shape whose bytes begin at ``offset``.

        Raises ``ValueError`` where the file ends before it does.
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
        """Of a safetensors file: its tensors, by position. Raises as :meth:`tensor`."""
        return iter(self._contents().tensors)

    def tensor(self, name: str) -> torch.Tensor:
        """Of a safetensors file: the tensor of that name.

        Raises ``SafetensorError`` for a file that is none, that has no such tensor, or one that torch cannot hold.
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
        return self.view(dtype, shape, begin + stored.begin)

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
    """All tensors of a safetensors file, by position in it, without reading them: see the module's text."""
    file = MappedFile(path)
    return {name: file.tensor(name) for name in file.names()}


def lies_in_file(tensor: torch.Tensor) -> bool:
    """Whether this is one of these tensors, or a view of one."""
    from .. import _native

    return tensor.is_cpu and _native.SourceFile.at(tensor.data_ptr()) is not None


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two contiguous CPU tensors of one size hold the same bytes, found out without taking memory.

    Raises ``OSError``, naming the file, where one of them has been cut.
    """
    from .. import _native

    return a.data_ptr() == b.data_ptr() or _native.same_bytes(a.data_ptr(), b.data_ptr(), a.nbytes)
