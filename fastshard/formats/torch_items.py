# SPDX-License-Identifier: Apache-2.0
"""Tensors that ``torch.save`` has written one by one: where the bytes of one lie in its archive.

A ``.distcp`` file has one such archive behind the other. Only what describes the tensor is read, and nothing is
unpickled (:mod:`fastshard.formats.inert_pickle`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from .inert_pickle import Inert, read_pickle
from .torch_archive import Record, UnknownLayout, records_of

Read = Callable[[int, int], bytes]
"""Returns so many bytes at an offset of the archive."""

_EDGE: Final = 4096
"""Bytes at the beginning of an archive that hold all but the tensor, with torch's own names; as many at the end."""
_MAX_PICKLE_NBYTES: Final = 1 << 20
_MOST_RECORDS: Final = 64
_STORAGES: Final = {
    "Float": "float32",
    "Double": "float64",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}
_TYPED: Final = {f"torch.{kind}Storage": dtype for kind, dtype in _STORAGES.items()}
_UNTYPED: Final = ("torch.storage.UntypedStorage", "torch.UntypedStorage")
_V2: Final = "torch._utils._rebuild_tensor_v2"
_V3: Final = "torch._utils._rebuild_tensor_v3"
_PARAMETER: Final = "torch._utils._rebuild_parameter"
_DTYPES: Final = """
    float16 bfloat16 float32 float64 complex32 complex64 complex128 bool int8 int16 int32 int64 uint8 uint16 uint32
    uint64 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2
""".split()
DTYPE_NAMES: Final = {f"torch.{name}": name for name in _DTYPES}
"""The full names of torch's dtypes in a pickle, with the short ones."""
_KNOWN: Final = {*_TYPED, *_UNTYPED, *DTYPE_NAMES, _V2, _V3, _PARAMETER, "collections.OrderedDict"}


class SavedTensor(NamedTuple):
    """A tensor in an archive."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements."""
    first: int
    """The element of the storage that is the tensor's first."""
    begin: int
    """Offset of the storage in the archive."""
    nbytes: int
    """Size of the storage."""
    crc: int
    """CRC-32 of the storage; 0 if there is none."""


def find_tensor(read: Read, nbytes: int) -> SavedTensor:
    """Returns where the tensor lies in an archive of so many bytes.

    Raises ``ValueError`` if the archive is damaged, or holds anything but one plain tensor.
    """
    try:
        records = {record.name: record for record in records_of(Edges(read, nbytes), _MOST_RECORDS)}
    except UnknownLayout as error:
        raise ValueError(str(error)) from None
    order = records.get("byteorder")
    if order is not None and read(order.begin, min(order.nbytes, 16)) != b"little":
        raise ValueError("its bytes are not in little-endian order")
    description = records.get("data.pkl")
    if description is None or description.nbytes > _MAX_PICKLE_NBYTES:
        raise ValueError("it has no description of a tensor")
    found = read_pickle(read(description.begin, description.nbytes), _KNOWN)
    try:
        return _tensor(found, records, nbytes)
    except (TypeError, IndexError, ValueError, AttributeError) as error:
        said = str(error) if isinstance(error, _Refused) else "a description of anything but a plain tensor"
        raise ValueError(said) from None


class _Refused(ValueError):
    pass


def _tensor(found: Any, records: dict[str, Record], nbytes: int) -> SavedTensor:
    if found.name == _PARAMETER:
        found = found.arguments[0]
    if found.name not in (_V2, _V3):
        raise _Refused(f"it holds no plain tensor, but a {found.name or type(found).__name__}")
    arguments: tuple[Any, ...] = found.arguments
    storage, first, shape, strides, _, _ = arguments[:6]
    more = [*arguments[6:]]
    told: tuple[Any, ...] = storage.arguments if storage.name == "" else ()
    if told[0] != "storage" or not isinstance(told[1], Inert):
        raise _Refused("a storage is not described as torch does it")
    if found.name == _V3:
        dtype = DTYPE_NAMES[more.pop(0).name]
    elif told[1].name in _TYPED:
        dtype = _TYPED[told[1].name]
    else:
        raise _Refused(f"the tensor's dtype is not known: its storage is a {told[1].name}")
    if any(more):
        raise _Refused("the tensor is conjugated or negated, and its bytes are not")
    record = records.get(f"data/{told[2]}")
    if record is None:
        raise _Refused("the bytes of the tensor are not in it")
    if record.begin + record.nbytes > nbytes:
        raise _Refused("the bytes of the tensor lie behind its end")
    numbers = [first, *shape, *strides]
    if len(shape) != len(strides) or any(type(n) is not int or n < 0 for n in numbers):
        raise _Refused(
            f"it describes a tensor of shape {list(shape)!r:.100} and strides {list(strides)!r:.100}"
        )
    return SavedTensor(dtype, tuple(shape), tuple(strides), first, record.begin, record.nbytes, record.crc)


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Returns from how many elements of memory such a tensor takes its own."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the strides of a tensor whose elements lie one behind the other."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


class Edges:
    """An archive of which only the beginning and the end are read at once. It is asked as
    :func:`fastshard.formats.torch_archive.records_of` asks."""

    def __init__(self, read: Read, nbytes: int) -> None:
        self._read = read
        self._nbytes = nbytes
        self._head = read(0, min(nbytes, _EDGE))
        self._tail_at = max(0, nbytes - _EDGE)
        self._tail = read(self._tail_at, nbytes - self._tail_at)

    def __len__(self) -> int:
        return self._nbytes

    def unpack(self, form: struct.Struct, offset: int) -> tuple[Any, ...]:
        return form.unpack(self.part(offset, form.size))

    def part(self, offset: int, nbytes: int) -> bytes:
        if offset < 0 or nbytes < 0 or offset + nbytes > self._nbytes:
            raise ValueError("a part of it lies outside")
        if offset + nbytes <= len(self._head):
            return self._head[offset : offset + nbytes]
        if offset >= self._tail_at:
            return self._tail[offset - self._tail_at : offset - self._tail_at + nbytes]
        return self._read(offset, nbytes)
