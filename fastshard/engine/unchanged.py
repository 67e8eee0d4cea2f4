# SPDX-License-Identifier: Apache-2.0
"""Whether tensors still have the bytes that a file has.

torch counts the changes of a tensor, but not all of them: not those through ``.data``, and not those by kernels of
others, as some optimizers have. So the count is believed only of frozen parameters, which no optimizer changes, and
only if memory, layout and a sample of the elements are the same, too. Of all others the bytes are compared.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch

from . import tensors as _tensors
from .borrowed import storage_reference
from .engine import usable_cpus
from .plan import HOST
from .reading import perform_all, shared_out
from .sharing import storage_of
from .tensors import Entry

_SAMPLES: Final = 1024
_BLOCK_NBYTES: Final = 1 << 20
"""What is read of a file before it is compared: it stays in the processor's cache."""
_FETCHED_NBYTES: Final = 16 << 20
_SPOT_NBYTES: Final = 4096
"""What is compared of each tensor before everything is: most changed tensors differ there."""


def some_elements(tensor: torch.Tensor, most: int) -> torch.Tensor:
    """Returns the bits of some elements, evenly spread, on the tensor's own device."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    tensor = tensor.view(bits)
    if tensor.dim() == 0:
        return tensor.clone()
    count = min(most, tensor.numel())
    steps = torch.arange(count, device=tensor.device, dtype=torch.int64)
    indices = steps * (tensor.numel() - 1) // max(count - 1, 1)
    if tensor.is_contiguous():
        return tensor.view(-1)[indices]
    return tensor[torch.unravel_index(indices, tensor.shape)]


class Seen(NamedTuple):
    """A tensor as it was when its bytes went into a file."""

    form: tuple[object, ...]
    storage: Any
    """A weak reference: as long as it is held, no other storage is taken for this one."""
    elements: torch.Tensor


def seen(entry: Entry) -> Seen | None:
    """Returns what is kept of a tensor; ``None`` if it could not be known again."""
    tensor = entry.tensor
    form = _form(entry)
    if form is None or not tensor.numel():
        return None
    return Seen(form, storage_reference(tensor.untyped_storage()), some_elements(tensor, _SAMPLES))


def _form(entry: Entry) -> tuple[object, ...] | None:
    """Returns what says that a tensor is the same and has not been changed, as far as torch counts that."""
    tensor = entry.tensor
    if tensor.is_inference():
        return None  # its changes are not counted
    place = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.is_conj(), tensor.is_neg()
    return tensor._version, *place, tensor.dtype, tensor.device, entry.code, entry.view.cast


def still_the_same(pairs: Iterable[tuple[Seen, Seen]]) -> bool:
    """Returns whether all these tensors, as they are now, are what was seen before."""
    alike: dict[torch.device, list[torch.Tensor]] = {}
    for before, now in pairs:
        if before.form != now.form or before.storage != now.storage:
            return False
        if now.elements.is_cpu and not torch.equal(before.elements, now.elements):
            return False
        if not now.elements.is_cpu:  # asked once, as each answer has to be waited for
            alike.setdefault(now.elements.device, []).append((before.elements == now.elements).all())
    return all(bool(torch.stack(found).all()) for found in alike.values())


def frozen_storages(parameters: Iterable[torch.Tensor]) -> frozenset[int]:
    """Returns the addresses of memory in which no parameter is trained."""
    frozen, trained = set[int](), set[int]()
    for parameter in parameters:
        address, _ = storage_of(parameter) or (0, 0)
        (trained if parameter.requires_grad else frozen).add(address)
    return frozenset(frozen - trained - {0})


def parameters_in(groups: Iterable[Mapping[str, object]]) -> Iterator[torch.Tensor]:
    """Yields what is known to be trained or not: parameters, and whatever else needs a gradient."""
    for group in groups:
        for value in group.values() if isinstance(group, Mapping) else ():
            if isinstance(value, torch.nn.Parameter) or getattr(value, "requires_grad", False):
                yield value  # type: ignore[misc]


def is_in(storages: frozenset[int], tensor: torch.Tensor) -> bool:
    """Returns whether a tensor's memory is one of these."""
    return bool(storages) and (storage_of(tensor) or (0, 0))[0] in storages


class _Differs(Exception):
    """Something is not the same: nothing more has to be read."""


def same_bytes(fd: int, placed: Sequence[tuple[int, Entry]], dtype: torch.dtype | None) -> bool:
    """Returns whether a file has the bytes of these tensors at these offsets, cast to ``dtype``.

    It stops at the first difference. Raises ``OSError`` for what cannot be read.
    """
    plain: list[tuple[int, int, int]] = []
    fetched: list[tuple[int, Entry]] = []
    for offset, entry in placed:
        view = entry.view
        if view.device == HOST and view.shape is None and view.cast is None:
            plain.append((offset, view.data, view.nbytes))
        else:
            fetched.append((offset, entry))
    try:
        _Comparison(fd, [_spot(*one) for one in plain]).run()
        for offset, entry in fetched:
            _compare_fetched(fd, offset, entry, dtype)
        _Comparison(fd, plain).run()
    except _Differs:
        return False
    return True


def _spot(offset: int, address: int, nbytes: int) -> tuple[int, int, int]:
    middle = max(0, (nbytes - _SPOT_NBYTES) // 2)
    return offset + middle, address + middle, min(nbytes, _SPOT_NBYTES)


class _Comparison:
    """Compares parts of a file with memory, by several threads."""

    def __init__(self, fd: int, parts: Sequence[tuple[int, int, int]]) -> None:
        self._fd = fd
        self._parts = parts
        self._buffers = threading.local()

    def run(self) -> None:
        calls: list[Callable[[], None]] = []
        for offset, address, nbytes in self._parts:
            for done in range(0, nbytes, _FETCHED_NBYTES):
                taken = min(_FETCHED_NBYTES, nbytes - done)
                calls.append(self._call(offset + done, address + done, taken))
        threads = min(16, usable_cpus())
        perform_all(shared_out(calls, threads), threads)

    def _call(self, offset: int, address: int, nbytes: int) -> Callable[[], None]:
        return lambda: self._compare(offset, address, nbytes)

    def _compare(self, offset: int, address: int, nbytes: int) -> None:
        buffer = self._buffers.__dict__.get("buffer")
        if buffer is None:
            buffer = self._buffers.buffer = mmap.mmap(-1, _BLOCK_NBYTES)
        compare(self._fd, offset, address, nbytes, buffer)


def compare(fd: int, offset: int, address: int, nbytes: int, buffer: mmap.mmap) -> None:
    """Raises ``_Differs`` unless the memory has the bytes of the file."""
    from .. import _native

    here = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    with memoryview(buffer) as room:
        while nbytes:
            taken = os.preadv(fd, [room[: min(nbytes, _BLOCK_NBYTES)]], offset)
            if not taken or not _native.same_bytes(address, here, taken):
                raise _Differs
            offset, address, nbytes = offset + taken, address + taken, nbytes - taken


def _compare_fetched(fd: int, offset: int, entry: Entry, dtype: torch.dtype | None) -> None:
    """Does the same for a tensor that has to be packed, cast or copied first, as it would be for a save."""
    nbytes = entry.view.nbytes
    step = max(_BLOCK_NBYTES, min(nbytes, _FETCHED_NBYTES))
    buffer, packed = mmap.mmap(-1, _BLOCK_NBYTES), mmap.mmap(-1, step)
    address = ctypes.addressof(ctypes.c_char.from_buffer(packed))
    for done in range(0, nbytes, step):
        taken = min(step, nbytes - done)
        _tensors.fetch(entry.tensor, done, taken, address, dtype)
        compare(fd, offset + done, address, taken, buffer)
