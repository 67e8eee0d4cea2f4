# SPDX-License-Identifier: Apache-2.0
"""What a staged state dict consists of: tensors in one piece of memory, which is free again when the last of them has
died, and the way of all of them at once into another process."""

from __future__ import annotations

import copy
import ctypes
import io
import mmap
import os
import pickle
import weakref
from collections.abc import Callable
from multiprocessing import reduction
from typing import Any

import torch

from ..engine.arena import Block


class Lent:
    """Memory of a block that tensors are made in. It is given back when the last of them has died, wherever that is:
    each has a storage of its own, which holds the memory, so a writer that saves whole storages saves no more than the
    tensor."""

    def __init__(self, block: Block, nbytes: int, give_back: Callable[[Block], None]) -> None:
        self.block = block
        self.nbytes = nbytes
        self.memory: Any = (ctypes.c_char * nbytes).from_address(block.address)
        weakref.finalize(self.memory, give_back, block).atexit = False

    def tensor(self, offset: int, like: torch.Tensor) -> torch.Tensor:
        """Returns a contiguous tensor with this dtype and shape in the memory."""
        return _tensor(self.memory, offset, like.dtype, like.shape)

    def place_of(self, tensor: torch.Tensor) -> int | None:
        """Returns the offset of a contiguous tensor in the memory; ``None`` if it lies elsewhere."""
        if tensor.layout is not torch.strided or not tensor.is_cpu or not tensor.is_contiguous():
            return None
        offset = tensor.data_ptr() - self.block.address
        return offset if tensor.numel() and 0 <= offset < self.nbytes else None


def _tensor(memory: Any, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
    return torch.frombuffer(memory, dtype=dtype, count=nbytes // dtype.itemsize, offset=offset).view(shape)


class StagedDict(dict[Any, Any]):
    """A state dict in memory that other processes can map. It is pickled for them as a description of its tensors,
    with one file descriptor for all of them together, and arrives as a ``dict``."""

    def __init__(self, content: dict[Any, Any], lent: Lent) -> None:
        super().__init__(content)
        self._lent = lent

    def __reduce__(self) -> tuple[Any, ...]:
        buffer = io.BytesIO()
        _Pickler(buffer, self._lent).dump(dict(self))
        assert self._lent.block.file is not None
        descriptor = reduction.DupFd(self._lent.block.file.fileno())
        return _arrived, (descriptor, self._lent.block.nbytes, buffer.getvalue())

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()

    def __copy__(self) -> dict[Any, Any]:
        return dict(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[Any, Any]:
        return copy.deepcopy(dict(self), memo)


class _Pickler(reduction.ForkingPickler):
    """Pickles tensors in the memory as their places, and all others as torch does."""

    def __init__(self, buffer: io.BytesIO, lent: Lent) -> None:
        super().__init__(buffer, pickle.HIGHEST_PROTOCOL)
        self._lent = lent

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        if type(value) is not torch.Tensor:
            return None
        offset = self._lent.place_of(value)
        return None if offset is None else (offset, value.dtype, tuple(value.shape))


class _Unpickler(pickle.Unpickler):
    def __init__(self, buffer: io.BytesIO, memory: Any) -> None:
        super().__init__(buffer)
        self._memory = memory

    def persistent_load(self, place: Any) -> torch.Tensor:
        return _tensor(self._memory, *place)


_mapped: weakref.WeakValueDictionary[tuple[int, int], Any] = weakref.WeakValueDictionary()
"""What of other processes is mapped here, by the identity of its file. Mostly the tensors of one save are still there
when those of the next one arrive."""


def _arrived(descriptor: Any, nbytes: int, pickled: bytes) -> dict[Any, Any]:
    """Returns the state dict in the process that it was sent to."""
    fd = descriptor.detach()
    try:
        status = os.fstat(fd)
        key = status.st_dev, status.st_ino
        memory = _mapped.get(key)
        if memory is None:
            memory = (ctypes.c_char * nbytes).from_buffer(mmap.mmap(fd, nbytes))
            _mapped[key] = memory
    finally:
        os.close(fd)
    found: dict[Any, Any] = _Unpickler(io.BytesIO(pickled), memory).load()
    return found
