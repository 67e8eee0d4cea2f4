# SPDX-License-Identifier: Apache-2.0
"""Which tensors of two checkpoints differ, however they are cut into files.

Tensors are read in windows, by several threads, so memory stays at a few MiB for each thread. Not read are those that lie in the same
file under two names, as in a checkpoint that was linked, and those whose CRC-32 stands in the manifests of both sides,
or whose files have the same SHA-256 in ``SHA256SUMS``.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final, NamedTuple

from .. import _native
from ..base.loading import load
from ..engine.engine import progress_wanted, usable_cpus
from ..engine.reading import perform_all
from ..formats.safetensors import BITS
from .tensors_of import Contents, Placed, tensors_of
from .values import Apart, apart, known

ONLY_A: Final = "only in A"
ONLY_B: Final = "only in B"
DTYPE: Final = "dtype"
SHAPE: Final = "shape"
BYTES: Final = "bytes"
CRC32: Final = "CRC-32"
SHA256: Final = "SHA-256"
SAME_FILE: Final = "same file"

_WINDOW_NBYTES: Final = 1 << 20
"""Both sides of a window stay in a core's cache: with 4 MiB it takes 1.6 times as long."""
_WINDOW_ELEMENTS: Final = _WINDOW_NBYTES // 8
"""Of windows whose values are compared: their elements become doubles."""
_STRETCH_NBYTES: Final = 64 << 20
_MAX_THREADS: Final = 8


@dataclass
class Difference:
    """A tensor that is not the same on both sides."""

    name: str
    kind: str
    """"only in A", "only in B", "shape", "dtype", "bytes", or "CRC-32" if only that was compared."""
    a: str | None = None
    """Its dtype and shape in A."""
    b: str | None = None
    nbytes: int = 0
    """Its size, in A if it is there."""
    elements: int | None = None
    """How many elements were compared by their values."""
    differing: int | None = None
    """How many of them are not equal."""
    nans: int | None = None
    """How many of those are NaN on one side only."""
    max_abs: float | None = None
    """The largest absolute difference of the others; in JSON "inf" if it is infinite."""
    at: list[int] | None = None
    """The indices of the element where it was found."""


@dataclass
class Diff:
    """What :func:`diff_checkpoints` has found."""

    a: str
    b: str
    tensors: int = 0
    """How many tensors both sides have."""
    equal: dict[str, int] = field(default_factory=dict)
    """How many of them are equal, by what that was told: "same file", "SHA-256" (of the whole file), "CRC-32" or "bytes"."""
    read_nbytes: int = 0
    """How many bytes of tensors were to be read of each side."""
    differences: list[Difference] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    """Other files of two folders that are not the same, and how: "only in A", "only in B", "bytes" or "CRC-32"."""

    @property
    def same(self) -> bool:
        return not self.differences and not self.files

    def as_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold."""
        told = {"same": self.same, **asdict(self)}
        for difference in told["differences"]:
            if difference["max_abs"] is not None and not math.isfinite(difference["max_abs"]):
                difference["max_abs"] = str(difference["max_abs"])
        return told


class _Pair:
    """A tensor, or another file, on both sides."""

    def __init__(self, name: str, a: Placed, b: Placed) -> None:
        self.name = name
        self.a = a
        self.b = b
        self.differs = False
        self.apart: list[Apart] = []  # lists grow in one step

    @property
    def elements(self) -> int:
        return math.prod(self.a.shape)


class _Stretch(NamedTuple):
    """A part of a pair that is compared by one thread."""

    pair: _Pair
    first: int
    """The number of its first byte or, with ``values``, of its first element."""
    length: int
    values: bool


def diff_checkpoints(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    max_abs: bool = False,
    digests: bool = True,
    weights_only: bool = False,
    progress: bool | None = None,
) -> Diff:
    """Compares two checkpoints tensor by tensor, and the other files of two folders byte by byte.

    Args:
        a: A safetensors file, an index, or a folder with such, also in folders of it.
        b: The same.
        max_abs: Compare the values of those that differ, also between dtypes, and tell how far they are apart. It
            needs torch, and reads all of these.
        digests: Take tensors and files for equal whose CRC-32 is the same in the manifests of both sides, or the SHA-256 of their files in ``SHA256SUMS``.
        weights_only: Leave the other files out.
        progress: Show a bar. Default: ``FASTSHARD_PROGRESS``.

    Raises ``OSError``, and ``ValueError`` naming the file for one that is damaged or of another kind.
    """
    sides = tensors_of(a), tensors_of(b)
    found = Diff(sides[0].path, sides[1].path)
    to_read = _compare_descriptions(found, sides, max_abs, digests)
    folders = all(side.is_folder for side in sides)
    others = _compare_names(found, sides, digests) if folders and not weights_only else []
    compare = [*_stretches(to_read, max_abs), *_stretches(others, False)]
    found.read_nbytes = sum(pair.a.nbytes for pair in to_read)
    total = sum(pair.a.nbytes for pair in (*to_read, *others))
    if progress_wanted(progress):
        with load("tqdm.auto").tqdm(total=total, unit="B", unit_scale=True, desc="diff") as bar:
            _read_all(compare, bar.update)
    else:
        _read_all(compare, lambda nbytes: None)
    _gather(found, to_read, max_abs)
    found.files.update((pair.name, BYTES) for pair in others if pair.differs)
    found.differences.sort(key=lambda difference: difference.name)
    found.files = dict(sorted(found.files.items()))
    return found


def _compare_descriptions(
    found: Diff, sides: tuple[Contents, Contents], max_abs: bool, digests: bool
) -> list[_Pair]:
    """Notes what can be told without reading. Returns the tensors that have to be read, in A's order."""
    one, other = sides
    for name in one.tensors.keys() - other.tensors.keys():
        place = one.tensors[name]
        found.differences.append(Difference(name, ONLY_A, _described(place), None, place.nbytes))
    for name in other.tensors.keys() - one.tensors.keys():
        place = other.tensors[name]
        found.differences.append(Difference(name, ONLY_B, None, _described(place), place.nbytes))
    to_read = []
    for name, a in one.tensors.items():
        b = other.tensors.get(name)
        if b is None:
            continue
        found.tensors += 1
        by, kind = _told(a, b, digests)
        if kind is None and by is None:
            to_read.append(_Pair(name, a, b))
        elif kind is None and by is not None:
            found.equal[by] = found.equal.get(by, 0) + 1
        elif kind is not None:
            found.differences.append(Difference(name, kind, _described(a), _described(b), a.nbytes))
            if max_abs and kind != SHAPE and a.nbytes and known(a.code) and known(b.code):
                to_read.append(_Pair(name, a, b))
    return to_read


def _told(a: Placed, b: Placed, digests: bool) -> tuple[str | None, str | None]:
    """Returns by what two tensors are known to be equal, or what tells them apart, without reading them."""
    if a.shape != b.shape:
        return None, SHAPE
    if a.code != b.code:
        return None, DTYPE
    if a.identity == b.identity and a.offset == b.offset:
        return SAME_FILE, None
    if not a.nbytes:
        return BYTES, None
    if digests and a.sha256 is not None and a.sha256 == b.sha256 and a.offset == b.offset:
        return SHA256, None
    if digests and a.crc32 is not None and b.crc32 is not None:
        return (CRC32, None) if a.crc32 == b.crc32 else (None, CRC32)
    return None, None


def _described(place: Placed) -> str:
    return f"{place.code} {list(place.shape)}"


def _compare_names(found: Diff, sides: tuple[Contents, Contents], digests: bool) -> list[_Pair]:
    """Notes which other files only one side has, or have another size. Returns those that have to be read."""
    one, other = sides
    found.files.update(dict.fromkeys(one.others.keys() - other.others.keys(), ONLY_A))
    found.files.update(dict.fromkeys(other.others.keys() - one.others.keys(), ONLY_B))
    pairs = []
    for name in one.others.keys() & other.others.keys():
        a, b = one.others[name], other.others[name]
        by, kind = _told(a, b, digests)
        if kind is not None:
            found.files[name] = BYTES if kind == SHAPE else kind
        elif by is None:
            pairs.append(_Pair(name, a, b))
    return pairs


def _stretches(pairs: Iterable[_Pair], max_abs: bool) -> Iterator[list[_Stretch]]:
    """Cuts the pairs into stretches, and yields those that one thread compares: neighbours in the same files."""
    together: list[_Stretch] = []
    nbytes = 0.0
    for pair in pairs:
        values = max_abs and known(pair.a.code) and known(pair.b.code)
        whole = pair.elements if values else pair.a.nbytes
        each = _STRETCH_NBYTES if not values else _STRETCH_NBYTES // 8
        for first in range(0, whole, each):
            stretch = _Stretch(pair, first, min(each, whole - first), values)
            if together and (nbytes >= _STRETCH_NBYTES or _files(together[-1]) != _files(stretch)):
                yield together
                together, nbytes = [], 0.0
            together.append(stretch)
            nbytes += stretch.length * (BITS[pair.a.code] / 8 if values else 1)
    if together:
        yield together


def _files(stretch: _Stretch) -> tuple[str, str]:
    return stretch.pair.a.path, stretch.pair.b.path


def _read_all(compare: list[list[_Stretch]], advance: Callable[[int], object]) -> None:
    def task(stretches: list[_Stretch]) -> Callable[[], None]:
        return lambda: _compare(stretches, advance)

    perform_all([[task(stretches)] for stretches in compare], min(_MAX_THREADS, usable_cpus()))


def _compare(stretches: list[_Stretch], advance: Callable[[int], object]) -> None:
    """Compares stretches of the same two files."""
    buffers = mmap.mmap(-1, _WINDOW_NBYTES), mmap.mmap(-1, _WINDOW_NBYTES)
    paths = _files(stretches[0])
    files: list[int] = []
    try:
        files += (os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths)
        for stretch in stretches:
            (_compare_values if stretch.values else _compare_bytes)(stretch, files, buffers, advance)
    finally:
        for file in files:
            os.close(file)


Buffers = tuple[mmap.mmap, mmap.mmap]


def _compare_bytes(
    stretch: _Stretch, files: list[int], buffers: Buffers, advance: Callable[[int], object]
) -> None:
    pair, first, length, _ = stretch
    one, other = map(_address, buffers)
    for begin in range(first, first + length, _WINDOW_NBYTES):
        nbytes = min(_WINDOW_NBYTES, first + length - begin)
        if not pair.differs:
            for file, buffer, place in zip(files, buffers, (pair.a, pair.b), strict=True):
                _read(file, buffer, place, begin, nbytes)
            if not _native.same_bytes(one, other, nbytes):
                pair.differs = True
        advance(nbytes)


def _compare_values(
    stretch: _Stretch, files: list[int], buffers: Buffers, advance: Callable[[int], object]
) -> None:
    pair, first, length, _ = stretch
    one, other = map(_address, buffers)
    for begin in range(first, first + length, _WINDOW_ELEMENTS):
        elements = min(_WINDOW_ELEMENTS, first + length - begin)
        sizes = []
        for file, buffer, place in zip(files, buffers, (pair.a, pair.b), strict=True):
            sizes.append(elements * BITS[place.code] // 8)
            _read(file, buffer, place, begin * BITS[place.code] // 8, sizes[-1])
        if pair.a.code != pair.b.code or not _native.same_bytes(one, other, sizes[0]):
            pair.differs = True
            a, b = (memoryview(buffer)[:n] for buffer, n in zip(buffers, sizes, strict=True))
            pair.apart.append(apart(a, pair.a.code, b, pair.b.code, begin))
        advance(sizes[0])


def _address(buffer: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _read(file: int, buffer: mmap.mmap, place: Placed, begin: int, nbytes: int) -> None:
    done = 0
    with memoryview(buffer) as memory:
        while done < nbytes:
            got = os.preadv(file, [memory[done:nbytes]], place.offset + begin + done)
            if not got:
                raise ValueError(f"{place.path!r} has become shorter while it was read")
            done += got


def _gather(found: Diff, pairs: Iterable[_Pair], max_abs: bool) -> None:
    noted = {difference.name: difference for difference in found.differences}
    for pair in pairs:
        difference = noted.get(pair.name)
        if difference is None and not pair.differs:
            found.equal[BYTES] = found.equal.get(BYTES, 0) + 1
            continue
        if difference is None:
            described = _described(pair.a), _described(pair.b)
            difference = Difference(pair.name, BYTES, *described, pair.a.nbytes)
            found.differences.append(difference)
        if max_abs and known(pair.a.code) and known(pair.b.code):
            _tell_values(difference, pair)


def _tell_values(difference: Difference, pair: _Pair) -> None:
    whole = Apart()
    for part in pair.apart:
        whole = whole.plus(part)
    difference.elements = pair.elements
    difference.differing, difference.nans = whole.differing, whole.nans
    difference.max_abs = whole.max_abs
    difference.at = _indices(whole.at, pair.a.shape) if whole.at >= 0 else None


def _indices(number: int, shape: tuple[int, ...]) -> list[int]:
    found = []
    for size in reversed(shape):
        number, index = divmod(number, size)
        found.append(index)
    return found[::-1]
