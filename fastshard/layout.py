# SPDX-License-Identifier: Apache-2.0
"""The safetensors file format: dtype codes, the order of tensors, the bytes of the header.

A file is an unsigned 64-bit little-endian header length, that many bytes of JSON padded with spaces to a
multiple of 8, and the tensors' bytes back to back. What safetensors 0.8 writes for the same input is written
here to the byte; where its JSON is not valid (``save({}, {})``) or not deterministic (two or more metadata
keys), this module writes valid JSON in the order given.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import BinaryIO, Final, NamedTuple

MAX_HEADER_NBYTES: Final = 100_000_000
"""Readers refuse longer headers; the length includes the padding."""

METADATA_KEY: Final = "__metadata__"

CODES: Final[Mapping[str, str]] = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "float4_e2m1fn_x2": "F4",
}
"""torch dtype name -> code in the header. ``float4_e2m1fn_x2`` holds two elements a byte."""

_BY_WIDTH: Final = {
    64: "U64 I64 F64 C64",
    32: "F32 U32 I32",
    16: "BF16 F16 U16 I16",
    8: "F8_E5M2FNUZ F8_E4M3FNUZ F8_E8M0 F8_E4M3 F8_E5M2 I8 U8",
    6: "F6_E3M2 F6_E2M3",
    4: "F4",
}
BITS: Final[Mapping[str, int]] = {
    **{code: bits for bits, codes in _BY_WIDTH.items() for code in codes.split()},
    "BOOL": 8,
}
"""Of one element."""
RANKS: Final[Mapping[str, int]] = {code: rank for rank, code in enumerate(BITS)}
"""Tensors lie in the file by ascending (rank, name): widest dtypes first, so that each is aligned to itself."""

quote = json.JSONEncoder(ensure_ascii=False).encode
"""A JSON string as serde_json writes it: non-ASCII raw, control characters as ``\\u00xx``."""


class HeaderTooLarge(ValueError):
    """The header would be longer than readers accept."""


def header(
    tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None
) -> bytes:
    """Length prefix and JSON of a file with these ``(name, code, shape, nbytes)``, already in file order.

    ``metadata=None`` leaves the entry out, an empty mapping writes it empty: loaders tell them apart.
    Raises :class:`HeaderTooLarge`, and ``UnicodeEncodeError`` for a name with a lone surrogate.
    """
    parts = []
    if metadata is not None:
        pairs = ",".join(f"{quote(key)}:{quote(value)}" for key, value in metadata.items())
        parts.append(f'"{METADATA_KEY}":{{{pairs}}}')
    shapes: dict[Sequence[int], str] = {}
    begin = 0
    for name, code, shape, nbytes in tensors:
        text = shapes.get(shape)
        if text is None:
            text = shapes[shape] = ",".join(map(str, shape))
        end = begin + nbytes
        parts.append(f'{quote(name)}:{{"dtype":"{code}","shape":[{text}],"data_offsets":[{begin},{end}]}}')
        begin = end
    encoded = f"{{{','.join(parts)}}}".encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > MAX_HEADER_NBYTES:
        raise HeaderTooLarge(f"header of {len(encoded)} bytes; readers accept {MAX_HEADER_NBYTES}")
    return struct.pack("<Q", len(encoded)) + encoded


class StoredTensor(NamedTuple):
    """One entry of a file's header."""

    name: str
    code: str
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the end of the header."""
    end: int


class FileHeader(NamedTuple):
    """What a file says of itself."""

    nbytes: int
    """Length of prefix and JSON together: where the tensors' bytes begin."""
    metadata: dict[str, str] | None
    tensors: list[StoredTensor]
    """By position in the file."""


def read_header(file: BinaryIO, file_nbytes: int) -> FileHeader:
    """Reads and checks the header at the beginning of ``file``, which is ``file_nbytes`` long.

    Raises ``ValueError`` saying what is wrong when this is no safetensors file, or one whose entries have a name
    twice, are not of the size of their shape, overlap, leave gaps or do not end where the file does.
    """
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ValueError(f"{file_nbytes} bytes are too few for a header")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_NBYTES or 8 + length > file_nbytes:
        raise ValueError(f"a header of {length} bytes in a file of {file_nbytes}")
    try:
        entries = json.loads(file.read(length), object_pairs_hook=unique)
        metadata = entries.pop(METADATA_KEY, None)
        tensors = [
            StoredTensor(name, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in entries.items()
        ]
        tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"the header is not that of a safetensors file: {error!r}") from None
    reached = 0
    for tensor in tensors:
        if not _is_sized(tensor):
            raise ValueError(
                f"tensor {tensor.name!r} lies at {tensor.begin}:{tensor.end}, which is not the size of"
                f" {tensor.code} {list(tensor.shape)}"
            )
        if tensor.begin != reached or tensor.end < tensor.begin:
            raise ValueError(
                f"tensor {tensor.name!r} lies at {tensor.begin}:{tensor.end}, expected at {reached}"
            )
        reached = tensor.end
    if 8 + length + reached != file_nbytes:
        raise ValueError(f"the header accounts for {8 + length + reached} bytes, the file has {file_nbytes}")
    return FileHeader(8 + length, metadata, tensors)


def unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """The object of these pairs, as ``json.loads(..., object_pairs_hook=unique)`` makes it. Raises ``ValueError`` for
    a name that stands there twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name!r} stands there twice")
            seen.add(name)
    return found


def _is_sized(tensor: StoredTensor) -> bool:
    """Whether the entry's numbers are numbers, and its bytes as many as its dtype and shape say."""
    numbers = (*tensor.shape, tensor.begin, tensor.end)
    if not all(type(number) is int and number >= 0 for number in numbers):
        return False
    bits = BITS.get(tensor.code) if isinstance(tensor.code, str) else None
    return bits is not None and math.prod(tensor.shape) * bits == 8 * (tensor.end - tensor.begin)
