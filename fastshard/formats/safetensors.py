# SPDX-License-Identifier: Apache-2.0
"""The safetensors file format: dtype codes, the order of tensors, the bytes of the header.

A file is an unsigned 64-bit little-endian header length, that many bytes of JSON padded with spaces to a
multiple of 8, and the tensors' bytes back to back. What safetensors 0.8 writes for the same input is written
here to the byte; where its JSON is not valid (``save({}, {})``) or not deterministic (two or more metadata
keys), this module writes valid JSON in the order given.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import BinaryIO, Final, NamedTuple

from .json_text import MAX_UNSIGNED, Scanner, shown

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
"""The code in the header for each torch dtype. ``float4_e2m1fn_x2`` has two elements in a byte."""

CAST_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "float32": ("fp32", "f32", "float"),
    "float16": ("fp16", "f16", "half"),
    "bfloat16": ("bf16",),
    "float8_e4m3fn": ("fp8_e4m3fn", "f8_e4m3fn", "fp8_e4m3", "f8_e4m3"),
    "float8_e5m2": ("fp8_e5m2", "f8_e5m2"),
}
"""The dtypes that tensors can be cast to: torch's names, and the other names that people write."""

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
"""Bits of one element, by code."""
DTYPE_ORDER: Final[Mapping[str, int]] = {code: place for place, code in enumerate(BITS)}
"""The order of dtypes in a file. Tensors are sorted by (order, name); the widest dtypes come first, so each
tensor is aligned to its element size."""

quote = json.JSONEncoder(ensure_ascii=False).encode
"""Returns a JSON string as serde_json writes it: non-ASCII as it is, control characters as ``\\u00xx``."""


def cast_name(name: str) -> str:
    """Returns torch's name of a dtype that tensors can be cast to: ``"bf16"``, ``"BF16"``, ``"bfloat16"`` and
    ``"torch.bfloat16"`` all give ``"bfloat16"``.

    Raises ``ValueError`` for any other dtype.
    """
    short = name.strip().lower().removeprefix("torch.")
    for known, others in CAST_NAMES.items():
        if short == known or short in others:
            return known
    names = ", ".join(f"{known} ({others[0]})" for known, others in CAST_NAMES.items())
    raise ValueError(f"dtype must be one of {names}, not {name}")


def metadata_entry(metadata: Mapping[str, str]) -> str:
    """Returns the metadata as the first entry of a header."""
    pairs = ",".join(f"{quote(key)}:{quote(value)}" for key, value in metadata.items())
    return f'"{METADATA_KEY}":{{{pairs}}}'


class HeaderTooLarge(ValueError):
    """The header would be longer than readers accept."""


def header(
    tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None
) -> bytes:
    """Returns length prefix and JSON of a file with these ``(name, code, shape, nbytes)``, which are in file
    order.

    ``metadata=None`` leaves the entry out, an empty mapping writes an empty one: loaders tell them apart.
    Raises :class:`HeaderTooLarge`, and ``UnicodeEncodeError`` for a name with a lone surrogate.
    """
    parts = [] if metadata is None else [metadata_entry(metadata)]
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
        raise HeaderTooLarge(
            f"the header would have {len(encoded)} bytes, and readers accept {MAX_HEADER_NBYTES}"
        )
    return struct.pack("<Q", len(encoded)) + encoded


class StoredTensor(NamedTuple):
    """One entry of a file's header."""

    name: str
    code: str
    shape: tuple[int, ...]
    begin: int
    """Offset of the first byte, counted from the end of the header."""
    end: int


class FileHeader(NamedTuple):
    """The header of a file."""

    nbytes: int
    """Length in bytes of prefix and JSON together, which is the offset where the tensors' bytes begin."""
    metadata: dict[str, str] | None
    tensors: list[StoredTensor]
    """The tensors in the order of their bytes."""

    @property
    def data_nbytes(self) -> int:
        """Bytes of all tensors together."""
        return self.tensors[-1].end if self.tensors else 0


def read_header(file: BinaryIO, file_nbytes: int) -> FileHeader:
    """Reads and checks the header at the beginning of ``file``, which has ``file_nbytes`` bytes.

    Raises ``ValueError``, saying what is wrong, where safetensors refuses the file: see :func:`parse_header`.
    It is also raised if the file ends before or behind the header and the tensors.
    """
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ValueError(f"{file_nbytes} bytes are too few for a header")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_NBYTES or 8 + length > file_nbytes:
        raise ValueError(f"a header of {length} bytes in a file of {file_nbytes}")
    found = parse_header(file.read(length))
    end = found.nbytes + found.data_nbytes
    if end != file_nbytes:
        raise ValueError(f"the header accounts for {end} bytes, the file has {file_nbytes}")
    return found


def parse_header(encoded: bytes) -> FileHeader:
    """Returns the header that has this JSON.

    It is accepted or refused as by safetensors 0.8: of names that occur twice the last one counts, and
    unknown fields are skipped. Raises ``ValueError``, saying what is wrong, for invalid JSON, and for entries
    that lack a field, have one of another type, do not have the size of their shape, overlap or leave gaps.
    Two limits are fastshard's own, which no writer meets: a tensor has at most 65,536 dimensions, and a
    header at most 1 MiB of unknown fields.
    """
    try:
        metadata, tensors = _Entries(encoded.decode()).read()
    except ValueError as error:
        raise ValueError(f"the header is not that of a safetensors file: {error}") from None
    tensors.sort(key=_position)
    reached = 0
    for tensor in tensors:
        name, code, shape, begin, end = tensor
        if begin != reached or end < begin:
            raise ValueError(f"tensor {shown(name)} lies at {begin}:{end}, expected at {reached}")
        elements = 1
        for size in shape:
            elements *= size
            if elements > MAX_UNSIGNED:  # also where a zero follows
                break
        nbits = elements * BITS[code]
        if nbits != 8 * (end - begin) or nbits > MAX_UNSIGNED:
            raise ValueError(
                f"tensor {shown(name)} lies at {begin}:{end}, which is not the size of {code} {shown(shape)}"
            )
        reached = end
    return FileHeader(8 + len(encoded), metadata, tensors)


def _position(tensor: StoredTensor) -> tuple[int, int]:
    return tensor.begin, tensor.end


_MAX_DIMS: Final = 1 << 16
_MAX_OTHER: Final = 1 << 20
"""The most characters of unknown fields."""
_S: Final = r"[ \t\n\r]*"
_WORD: Final = r'"([^"\\\x00-\x1f]*)"'
_INT: Final = r"(0|[1-9][0-9]{0,18})"
_ENTRY: Final = re.compile(
    _S.join(
        [_WORD, ":", r"\{", '"dtype"', ":", '"([A-Z0-9_]+)"', ",", '"shape"', ":", r"\[([0-9, ]*)\]", ","]
        + ['"data_offsets"', ":", r"\[", _INT, ",", _INT, r"\]", r"\}", "([,}])", ""]
    )
)
"""An entry as all writers make it, with the white space before it."""
_PAIR: Final = re.compile(_S.join([_WORD, ":", _WORD, "([,}])", ""]))
_SHAPE: Final = re.compile(r"(?:0|[1-9][0-9]{0,18})(?:, ?(?:0|[1-9][0-9]{0,18})){0,31}")


class _Entries(Scanner):
    """Reads the entries of a header one by one: those that look as writers make them by a regular expression,
    all others value by value."""

    _other = 0

    def read(self) -> tuple[dict[str, str] | None, list[StoredTensor]]:
        metadata: dict[str, str] | None = None
        has_metadata = False
        found: dict[str, StoredTensor] = {}
        separator = self.begin_object()
        while separator != "}":
            separator = self._usual(found)
            if separator:
                continue
            name = self.key()
            if name != METADATA_KEY:
                found[name] = self._named_tensor(name)
            elif has_metadata:
                raise ValueError(f"{METADATA_KEY} occurs twice")
            else:
                has_metadata = True
                metadata = None if self.null() else self._texts()
            separator = self.separator(",}")
        self.end()
        return metadata, list(found.values())

    def _usual(self, found: dict[str, StoredTensor]) -> str:
        """Reads tensors as long as their entries are as usual. Returns what follows the last of them."""
        separator = ""
        shapes: dict[str, tuple[int, ...]] = {"": ()}
        while separator != "}" and (match := _ENTRY.match(self.text, self.at)) is not None:
            name, code, sizes, begin, end, behind = match.groups()
            shape = shapes.get(sizes)
            if shape is None:
                if _SHAPE.fullmatch(sizes) is None:
                    break
                shape = shapes[sizes] = tuple(map(int, sizes.split(",")))
            if name == METADATA_KEY or code not in BITS:
                break
            found[name] = StoredTensor(name, code, shape, int(begin), int(end))
            separator = behind
            self.at = match.end() if separator == "," else match.end(6)
        return separator

    def _texts(self) -> dict[str, str]:
        """Reads an object whose values are strings."""
        found: dict[str, str] = {}
        separator = self.begin_object()
        while separator != "}":
            match = _PAIR.match(self.text, self.at)
            if match is None:
                name = self.key()
                found[name] = self.string()
                separator = self.separator(",}")
            else:
                found[match[1]] = match[2]
                separator = match[3]
                self.at = match.end() if separator == "," else match.end(3)
        return found

    def _named_tensor(self, name: str) -> StoredTensor:
        try:
            return self._tensor(name)
        except ValueError as error:
            raise ValueError(f"tensor {shown(name)}: {error}") from None

    def _tensor(self, name: str) -> StoredTensor:
        code, shape, offsets = None, None, None
        if self.peek() == "[":  # a list of the three values is taken, too
            for number in self.elements(2):
                if number == 0:
                    code = self._code()
                elif number == 1:
                    shape = self._shape()
                elif number == 2:
                    offsets = self._offsets()
                else:
                    raise ValueError("it has more than three values")
        else:
            for key in self.members(2):
                if key == "dtype" and code is None:
                    code = self._code()
                elif key == "shape" and shape is None:
                    shape = self._shape()
                elif key == "data_offsets" and offsets is None:
                    offsets = self._offsets()
                elif key in ("dtype", "shape", "data_offsets"):
                    raise ValueError(f"{key} occurs twice")
                else:
                    self._pass_over()
        if code is None or shape is None or offsets is None:
            raise ValueError("dtype, shape or data_offsets are missing")
        return StoredTensor(name, code, shape, *offsets)

    def _code(self) -> str:
        if self.peek() == "{":  # {"F32": null} is taken, too
            codes = []
            for key in self.members(3):
                codes.append(key)
                if len(codes) > 1 or not self.null():
                    raise self.wrong("a dtype")
            code = codes[0] if codes else ""
        else:
            code = self.string()
        if code not in BITS:
            raise ValueError(f"no dtype {shown(code)} is known")
        return code

    def _shape(self) -> tuple[int, ...]:
        sizes = []
        for number in self.elements(3):
            if number == _MAX_DIMS:
                raise ValueError(f"a tensor of more than {_MAX_DIMS} dimensions")
            sizes.append(self.unsigned())
        return tuple(sizes)

    def _offsets(self) -> tuple[int, int]:
        offsets = []
        for number in self.elements(3):
            if number == 2:
                raise self.wrong("the end of the offsets")
            offsets.append(self.unsigned())
        if len(offsets) != 2:
            raise self.wrong("an offset")
        return offsets[0], offsets[1]

    def _pass_over(self) -> None:
        """Skips an unknown field."""
        began = self.at
        most = self.at + _MAX_OTHER - self._other
        self.skip(3, most)
        if self.at > most:
            raise ValueError("there is too much in fields that the format does not have")
        self._other += self.at - began
