# SPDX-License-Identifier: Apache-2.0
"""The archives of ``torch.save``: where their records lie, and which bytes depend on the records' contents.

They are zip files whose records are stored, not compressed. The CRC-32 of a record is in the data descriptor
behind it, and in the central directory. Sizes and offsets of 4 GiB and more are in "zip64" extra fields
(PKWARE's APPNOTE.TXT, 4.3). The last record is the serialization id: 20 digits for the names of the records
and 20 for their CRCs, combined in file order as PyTorch does (``writeSerializationId`` in
caffe2/serialize/inline_container.cc, ``hash_combine`` in c10/util/hash.h). Torch takes the bytes ``PK\\7\\8``
at the beginning of a storage for the end of a record, and computes another serialization id then.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple, Protocol

Memory = bytes | bytearray | memoryview


class Source(Protocol):
    """The bytes of an archive, which need not be in memory."""

    def __len__(self) -> int: ...
    def unpack(self, form: struct.Struct, offset: int) -> tuple[Any, ...]: ...
    def part(self, offset: int, nbytes: int) -> Memory: ...


_END: Final = struct.Struct("<4s4H2LH")
_LOCATOR: Final = struct.Struct("<4sLQL")
_END_64: Final = struct.Struct("<4sQ2H2L4Q")
_LISTED: Final = struct.Struct("<4s4x2H4x3L3H8xL")  # only what is read, as there may be many
_CRC_LISTED: Final = 16
_LOCAL: Final = struct.Struct("<4s22x2H")
_DESCRIPTOR: Final = struct.Struct("<4sL")
_DESCRIBED: Final = 1 << 3  # flag: a data descriptor follows the data
_CRC: Final = struct.Struct("<L")
_IN_EXTRA: Final = 0xFFFFFFFF
_IDENTITY: Final = ".data/serialization_id"
_DIGITS: Final = 20
_HASH: Final = (1 << 64) - 1


class UnknownLayout(ValueError):
    """An archive whose layout this module does not know."""


class Record(NamedTuple):
    """A record, which is one file of the archive."""

    name: str
    """Name of the record without the top folder, which all records have in common."""
    begin: int
    """Offset of its data in the archive."""
    nbytes: int
    crc: int
    described: int | None
    """Offset of the CRC behind the data; ``None`` for empty records, which have none."""
    listed: int
    """Offset of the CRC in the central directory."""


class Archive:
    """The records of an archive in file order.

    Raises :class:`UnknownLayout` for anything but what ``torch.save`` writes, so whoever changes the bytes of
    a record can rely on :meth:`amendments`.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.records, self._directory = _read(_InMemory(memory))
        if not self.records or self.records[-1].name != _IDENTITY:
            raise UnknownLayout("no serialization id at the end")
        identity = self.records[-1]
        self._digits = bytes(memory[identity.begin : identity.begin + identity.nbytes])
        if self._digits[_DIGITS:] != _digits(self._crcs({})):
            raise UnknownLayout("another serialization id than the CRCs make")

    @property
    def has_crcs(self) -> bool:
        """Whether CRCs were computed at all: see ``torch.serialization.set_crc32_options``."""
        return any(record.crc for record in self.records)

    def amendments(self, crcs: Mapping[str, int]) -> list[tuple[int, bytes]]:
        """Returns what has to be changed if these records have other CRCs, as (offset, bytes)."""
        crcs = dict(crcs)
        identity = self.records[-1]
        digits = self._digits[:_DIGITS] + _digits(self._crcs(crcs))
        crcs[identity.name] = zlib.crc32(digits)
        begin, end = self._directory
        directory = bytearray(self._memory[begin:end])
        changed = [(identity.begin, digits)]
        for record in self.records:
            crc = crcs.get(record.name)
            if crc is not None and record.described is not None:
                changed.append((record.described, _CRC.pack(crc)))
                _CRC.pack_into(directory, record.listed - begin, crc)
        return [*changed, (begin, bytes(directory))]

    def _crcs(self, changed: Mapping[str, int]) -> Iterable[int]:
        """Returns the CRCs that go into the serialization id."""
        return (
            changed.get(record.name, record.crc)
            for record in self.records[:-1]
            if record.described is not None
        )


def records_of(source: Source, most: int) -> list[Record]:
    """Returns the records of an archive in file order. Raises :class:`UnknownLayout`, also if there are more than
    ``most``."""
    records, _ = _read(source, most)
    return records


class _InMemory:
    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def __len__(self) -> int:
        return len(self._memory)

    def unpack(self, form: struct.Struct, offset: int) -> tuple[Any, ...]:
        return form.unpack_from(self._memory, offset)

    def part(self, offset: int, nbytes: int) -> Memory:
        return self._memory[offset : offset + nbytes]


def _read(source: Source, most: int | None = None) -> tuple[list[Record], tuple[int, int]]:
    """Returns the records, and where the central directory begins and ends."""
    try:
        begin, nbytes, count = _central_directory(source)
        if most is not None and count > most:
            raise ValueError(f"{count} records")
        return _records(source, begin, count), (begin, begin + nbytes)
    except (struct.error, ValueError, OverflowError) as error:
        raise UnknownLayout(f"not an archive of torch.save: {error}") from None


def _digits(crcs: Iterable[int]) -> bytes:
    combined = 0
    for crc in crcs:
        combined ^= (crc + 0x9E3779B9 + (combined << 6) + (combined >> 2)) & _HASH
    return b"%0*d" % (_DIGITS, combined)


def _central_directory(source: Source) -> tuple[int, int, int]:
    """Returns offset and size in bytes of the central directory, and the number of records."""
    end = len(source) - _END.size  # no comment
    signature, _, _, _, count, nbytes, begin, _ = source.unpack(_END, end)
    _expect(signature, b"PK\x05\x06")
    signature, _, end_64, _ = source.unpack(_LOCATOR, end - _LOCATOR.size)
    if signature == b"PK\x06\x07":
        signature, *_, count, nbytes, begin = source.unpack(_END_64, end_64)
        _expect(signature, b"PK\x06\x06")
    return begin, nbytes, count


def _records(source: Source, at: int, count: int) -> list[Record]:
    records = []
    top = None
    for _ in range(count):
        signature, flags, method, crc, packed, nbytes, length, extra, comment, local = source.unpack(
            _LISTED, at
        )
        after = at + _LISTED.size + length
        name = str(source.part(after - length, length), "utf-8")
        if _IN_EXTRA in (packed, nbytes, local):
            packed, nbytes, local = _from_extra(source.part(after, extra), packed, nbytes, local)
        if top is None:
            top = name[: name.index("/") + 1]
        opening, local_length, local_extra = source.unpack(_LOCAL, local)
        begin = local + _LOCAL.size + local_length + local_extra
        described, closing = None, (b"PK\x07\x08", crc)
        if flags & _DESCRIBED:
            described, closing = begin + nbytes + 4, source.unpack(_DESCRIPTOR, begin + nbytes)
        if (
            (signature, method, packed, opening) != (b"PK\x01\x02", 0, nbytes, b"PK\x03\x04")
            or closing != (b"PK\x07\x08", crc)
            or not name.startswith(top)
        ):
            raise ValueError(f"the record {name!r}")
        records.append(Record(name[len(top) :], begin, nbytes, crc, described, at + _CRC_LISTED))
        at = after + extra + comment
    return records


def _from_extra(extra: Memory, packed: int, nbytes: int, local: int) -> tuple[int, int, int]:
    """Returns the numbers that are too large for their fields. The "zip64" extra field has just these, in
    this order."""
    at = 0
    while True:
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            break
        at += 4 + length
    numbers = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
    try:
        nbytes = next(numbers) if nbytes == _IN_EXTRA else nbytes
        packed = next(numbers) if packed == _IN_EXTRA else packed
        local = next(numbers) if local == _IN_EXTRA else local
    except StopIteration:
        raise ValueError("a size is missing") from None
    return packed, nbytes, local


def _expect(found: bytes, wanted: bytes) -> None:
    if found != wanted:
        raise ValueError(f"{found!r} where {wanted!r} was expected")
