# SPDX-License-Identifier: Apache-2.0
"""Items that lie strided in a file that somebody else has made: parts of tensors, between those of others."""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import math
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import BUDGET, SLOT, assert_same
from helpers import names, preload, run_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from simcuda import SimCuda
from test_cuda_path import STRIDED, on_device
from test_fetch import fetched

from fastshard import SaveError
from fastshard.engine.engine import Engine, Options
from fastshard.engine.plan import (
    CASTS,
    HOST,
    FilePlan,
    ForeignFile,
    Memory,
    Place,
    TensorView,
    WriteItem,
    place_of,
)

pytestmark = pytest.mark.usefixtures("no_hang")

NewEngine = Callable[..., Engine]
OTHERS = 0xAA
"""What is in a file before a save."""
HEADER = b"a header of 32 bytes, or of more"


def foreign(path: Path) -> ForeignFile:
    return ForeignFile(os.fsencode(path))


def made(path: Path, nbytes: int) -> Path:
    """A file that somebody has made, full of what is theirs."""
    path.write_bytes(bytes([OTHERS]) * nbytes)
    return path


def noise(*shape: int, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    count = math.prod(shape)
    data = np.random.default_rng([seed, *shape]).bytes(count * np.dtype(dtype).itemsize)
    return np.frombuffer(data, dtype).reshape(shape)


def view_of(array: np.ndarray) -> TensorView:
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return TensorView(array.ctypes.data, array.nbytes, HOST, array.itemsize, array.shape, strides)


class Box(NamedTuple):
    """A part of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(first, first + size) for first, size in zip(self.offsets, self.sizes))


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    firsts = [draw(st.integers(0, size)) for size in shape]
    return Box(tuple(firsts), tuple(draw(st.integers(0, size - first)) for size, first in zip(shape, firsts)))


shapes = st.lists(st.integers(1, 6), max_size=5).map(tuple)


# One place.


@settings(max_examples=300, deadline=None)
@given(data=st.data(), shape=shapes, itemsize=st.sampled_from([1, 2, 8]), offset=st.integers(0, 100))
def test_the_place_of_a_part(data: st.DataObject, shape: tuple[int, ...], itemsize: int, offset: int) -> None:
    box = data.draw(boxes(shape))
    place = place_of(shape, *box, itemsize, offset)
    numbers = np.arange(math.prod(shape) * itemsize).reshape(*shape, itemsize)
    expected = (offset + numbers[box.slices].reshape(-1)).tolist()
    runs = [
        place.file_offset + sum(at * stride for at, stride in zip(index, place.strides))
        for index in itertools.product(*map(range, place.shape))
    ]
    assert [begin + byte for begin in runs for byte in range(place.run_nbytes)] == expected
    assert place.nbytes == len(expected)
    # Merged as far as can be: as many runs as there are stretches of the file.
    stretches = sum(
        1 for one, next_one in itertools.pairwise([None, *expected]) if one is None or next_one != one + 1
    )
    assert (len(runs) if place.nbytes else 0) == stretches
    assert 1 not in place.shape


@pytest.mark.parametrize(
    ("shape", "offsets", "sizes", "expected"),
    [
        ((), (), (), Place(4, 10, 4)),
        ((6, 5), (2, 0), (3, 5), Place(60, 50, 60)),
        ((6, 5), (0, 1), (6, 2), Place(48, 14, 8, (6,), (20,))),
        ((2, 3, 5, 7), (0, 0, 2, 0), (2, 3, 2, 7), Place(336, 66, 56, (6,), (140,))),
        ((2, 3, 5, 7), (0, 1, 0, 3), (2, 1, 5, 2), Place(80, 162, 8, (2, 5), (420, 28))),
        ((6, 5), (6, 0), (0, 5), Place(0, 10, 0)),
    ],
)
def test_dimensions_are_merged(
    shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...], expected: Place
) -> None:
    assert place_of(shape, offsets, sizes, 4, 10) == expected


@pytest.mark.parametrize(
    ("offsets", "sizes"),
    [((0,), (6,)), ((0, 0), (6, 6)), ((-1, 0), (1, 1)), ((0, 3), (1, 3)), ((0, 0), (-1, 1))],
)
def test_no_part_of_a_tensor(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"of shape (6, 5) lies at {offsets} with the sizes {sizes}")
    ):
        place_of((6, 5), offsets, sizes, 4, 0)


# Many places.


class Item(NamedTuple):
    """What a plan writes, and what it must be in the file."""

    view: TensorView
    packed: bytes
    keep: object


def item_of(kind: str, whole: np.ndarray, box: Box) -> Item:
    """The part of a tensor, as a contiguous copy, as a view of the whole, or brought by Python; or cast."""
    part = whole[(*box.slices, ...)]
    packed = np.ascontiguousarray(part)
    if kind == "strided":
        return Item(view_of(part), packed.tobytes(), whole)
    if kind == "fetched":
        return Item(fetched(packed.tobytes()), packed.tobytes(), packed)
    if kind == "cast":
        numbers = torch.from_numpy(packed.astype("float32"))
        cast = numbers.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
        view = TensorView(numbers.data_ptr(), len(cast), HOST, cast=(CASTS["F32"], CASTS["BF16"]))
        return Item(view, cast, numbers)
    return Item(TensorView(packed.ctypes.data, packed.nbytes, HOST), packed.tobytes(), packed)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[np.ndarray, Box, str]:
    """A tensor, the part of it that is written, and how."""
    shape = draw(
        st.one_of(
            shapes,
            st.tuples(st.integers(1, 50), st.integers(1, 700)),
            st.tuples(st.integers(1, 5), st.integers(1, 20_000)),
            st.tuples(st.just(3), st.just(70_000)),
        )
    )
    kind = draw(st.sampled_from(["host", "strided", "fetched", "cast"]))
    dtype = draw(st.sampled_from(["uint8", "uint16", "uint64"])) if kind != "cast" else "uint16"
    return noise(*shape, dtype=dtype, seed=draw(st.integers(0, 9))), draw(boxes(shape)), kind


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(Options(memory_budget=BUDGET, threads=3)) as engine:
        yield engine


@settings(max_examples=150, deadline=None)
@given(
    tensors=st.lists(tensors(), max_size=6).map(
        lambda found: sorted(found, key=lambda one: -one[0].itemsize)
    ),
    head=st.sampled_from([b"", HEADER]),
    durable=st.booleans(),
    shift=st.integers(0, 5000),
    by_offset=st.booleans(),
    data=st.data(),
)
def test_parts_lie_where_they_belong_and_nothing_else_changes(
    tmp_path_factory: pytest.TempPathFactory,
    engine: Engine,
    tensors: list[tuple[np.ndarray, Box, str]],
    head: bytes,
    durable: bool,
    shift: int,
    by_offset: bool,
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.mktemp("placed") / "f"
    items = [item_of(kind, whole, box) for whole, box, kind in tensors]
    places, offset = [], len(head) + shift
    image_of: list[tuple[int, np.ndarray, Box, bytes]] = []
    for (whole, box, _), item in zip(tensors, items):
        places.append(place_of(whole.shape, *box, whole.itemsize, offset))
        image_of.append((offset, whole, box, item.packed))
        offset += whole.nbytes
    image = bytearray(made(path, offset + shift).read_bytes())
    image[: len(head)] = head
    for at, whole, box, packed in image_of:
        before = np.frombuffer(image, whole.dtype, whole.size, at).reshape(whole.shape)
        before[box.slices] = np.frombuffer(packed, whole.dtype).reshape(box.sizes)
    packed_at = itertools.accumulate((len(item.packed) for item in items), initial=len(head))
    views = [WriteItem(item.view, at) if by_offset else item.view for item, at in zip(items, packed_at)]
    numbered = dict(enumerate(items))
    if by_offset:
        order = data.draw(st.permutations(range(len(items))))
        views, numbered = [views[i] for i in order], {at: items[i] for at, i in enumerate(order)}

    def fetch(file: int, item: int, first: int, nbytes: int, address: int) -> None:
        ctypes.memmove(address, numbered[item].packed[first : first + nbytes], nbytes)

    header_place = Place(len(head), 0, len(head))
    plan = FilePlan(foreign(path), head, views, offset, [header_place, *places])
    future = engine.submit([plan], keep_alive=items, fetch=fetch, durable=durable, checksums=True)
    stats = future.result()
    assert_same(path.read_bytes(), bytes(image))
    assert future.checksums() == [[zlib.crc32(numbered[i].packed) for i in range(len(items))]]
    assert stats.nbytes == len(head) + sum(len(item.packed) for item in items)
    assert (stats.write_path, stats.fallbacks) == ("buffered", ())
    assert names(path.parent) == ["f"]


# Counts: rows of 30 bytes of which a plan writes 10, and rows so long that each is written by itself.


def columns(
    path: Path, rows: int, width: int, ranks: int = 3, rank: int = 1
) -> tuple[FilePlan, np.ndarray, bytes]:
    """The plan of one rank's columns, what it keeps, and the file that it makes."""
    whole = noise(rows, ranks * width, seed=rank)
    part = np.ascontiguousarray(whole[:, rank * width : (rank + 1) * width])
    before = np.full_like(whole, OTHERS)
    before[:, rank * width : (rank + 1) * width] = part
    made(path, whole.nbytes)
    place = place_of(whole.shape, (0, rank * width), (rows, width), 1, 0)
    view = TensorView(part.ctypes.data, part.nbytes, HOST)
    return FilePlan(foreign(path), b"", [view], whole.nbytes, [place]), part, before.tobytes()


@pytest.mark.parametrize(("rows", "width"), [(5000, 10), (300, 3000), (7, 200_000), (3, 10)])
def test_runs_are_counted(tmp_path: Path, new_engine: NewEngine, rows: int, width: int) -> None:
    plan, part, image = columns(tmp_path / "f", rows, width)
    stats = new_engine(threads=1).submit([plan], keep_alive=part).result()
    assert stats.written_runs == rows and stats.nbytes == part.nbytes and stats.fallbacks == ()
    assert_same((tmp_path / "f").read_bytes(), image)


def test_places_that_meet_are_one_run(tmp_path: Path, new_engine: NewEngine) -> None:
    path, data = made(tmp_path / "f", 1000), noise(600)
    places = [
        Place(0, 5, 0),
        Place(100, 200, 100),
        Place(0, 5, 0),
        Place(200, 300, 50, (4,), (50,)),
        Place(300, 500, 300),
    ]
    view = TensorView(data.ctypes.data, 600, HOST)
    stats = (
        new_engine().submit([FilePlan(foreign(path), b"", [view], 1000, places)], keep_alive=data).result()
    )
    assert stats.written_runs == 1
    assert path.read_bytes() == bytes([OTHERS]) * 200 + data.tobytes() + bytes([OTHERS]) * 200


def test_places_in_any_order(tmp_path: Path, new_engine: NewEngine) -> None:
    path, data = made(tmp_path / "f", 20_000), noise(10_000)
    places = [Place(100, 100 * i, 100) for i in reversed(range(0, 200, 2))]
    view = TensorView(data.ctypes.data, 10_000, HOST)
    stats = (
        new_engine().submit([FilePlan(foreign(path), b"", [view], 20_000, places)], keep_alive=data).result()
    )
    found = np.frombuffer(path.read_bytes(), "uint8").reshape(100, 2, 100)
    assert stats.written_runs == 100
    assert np.array_equal(found[::-1, 0].reshape(-1), data) and (found[:, 1] == OTHERS).all()


def test_amendments_go_into_the_file(tmp_path: Path, new_engine: NewEngine) -> None:
    plan, part, image = columns(tmp_path / "f", 100, 50)
    end = len(image)
    future = new_engine().submit(
        [plan], keep_alive=part, checksums=True, amend=lambda checksums: [(0, end - 3, b"end")]
    )
    future.result()
    assert_same((tmp_path / "f").read_bytes(), image[:-3] + b"end")


def test_a_million_runs_take_no_memory(tmp_path: Path) -> None:
    script = """
    import resource
    from fastshard.engine.engine import Options
    from fastshard.engine.plan import HOST, ForeignFile, place_of
    import ctypes
    rows, path = 1 << 20, sys.argv[1]
    part = ctypes.create_string_buffer(b"x" * (rows * 16), rows * 16)
    os.truncate(path, rows * 64)
    engine = Engine(Options(threads=2))
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    engine.submit([FilePlan(os.fsencode(path) + b".first", b"x", [])], keep_alive=None).result()
    before = peak()
    place = place_of((rows, 64), (0, 16), (rows, 16), 1, 0)
    view = TensorView(ctypes.addressof(part), rows * 16, HOST)
    stats = engine.submit([FilePlan(ForeignFile(os.fsencode(path)), b"", [view], rows * 64, [place])], keep_alive=part).result()
    print(stats.written_runs, peak() - before)
    """
    path = tmp_path / "f"
    path.touch()
    done = run_engine(script, path)
    assert done.returncode == 0, done.stderr
    runs, grown = map(int, done.stdout.split())
    # A thread has a window of 4 MiB mapped, whose pages are the file's.
    assert 1 << 20 <= runs <= (1 << 20) + 16 and grown < 16 << 20
    with path.open("rb") as file:
        assert file.read(64) == bytes(16) + b"x" * 16 + bytes(32)


# Several who write one file.

RANK = """
import sys
import numpy as np
from fastshard.engine.engine import Engine, Options
from fastshard.engine.plan import *
path, whole = sys.argv[1], np.load(sys.argv[2])
rank, ranks = int(sys.argv[3]), int(sys.argv[4])
width = whole.shape[1] // ranks
part = np.ascontiguousarray(whole[:, rank * width : (rank + 1) * width])
place = place_of(whole.shape, (0, rank * width), part.shape, whole.itemsize, 13)
plan = FilePlan(ForeignFile(path.encode()), b"", [TensorView(part.ctypes.data, part.nbytes, HOST)], 13 + whole.nbytes, [place])
with Engine(Options(threads=2)) as engine:
    for _ in range(5):
        input()
        engine.submit([plan], keep_alive=part).result()
        print("written", flush=True)
"""


@pytest.mark.parametrize(("rows", "width"), [(20_000, 6), (2000, 300), (120, 9000), (20, 50_000)])
def test_processes_write_columns_of_one_file_at_once(folder: Path, rows: int, width: int) -> None:
    """Of pages in which both have bytes neither loses any, whichever way they are written."""
    path, ranks = folder / "f", 2
    whole = noise(rows, ranks * width)
    np.save(folder / "whole.npy", whole)
    command = [sys.executable, "-c", RANK, path, folder / "whole.npy"]
    children = [
        subprocess.Popen(
            [*command, str(rank), str(ranks)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    for _ in range(5):
        path.unlink(missing_ok=True)
        path.touch()
        os.truncate(path, 13 + whole.nbytes + 5)  # a hole: all of its pages are new
        for child in children:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "written\n"
        assert_same(path.read_bytes(), bytes(13) + whole.tobytes() + bytes(5))
    assert [(child.communicate(timeout=300), child.returncode)[1] for child in children] == [0, 0]


# What the kernel refuses.

WRITE = """
import ctypes, json
from fastshard.engine.engine import Options
from fastshard.engine.plan import HOST, ForeignFile, place_of
path, rows, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
data = bytes(i * 7 % 251 for i in range(rows * width))
place = place_of((rows, 3 * width), (0, width), (rows, width), 1, 0)
view = TensorView(ctypes.cast(data, ctypes.c_void_p).value, len(data), HOST)
plan = FilePlan(ForeignFile(os.fsencode(path)), b"", [view], 3 * len(data), [place])
try:
    stats = Engine(Options(threads=1)).submit([plan], keep_alive=data, durable=len(sys.argv) > 4).result()
    print(json.dumps({"runs": stats.written_runs, "fallbacks": stats.fallbacks}))
except SaveError as error:
    print(json.dumps({"errno": error.errno, "path": error.filename}))
"""


def write(path: Path, library: Path, refuse: str, rows: int, width: int, *more: str) -> dict[str, object]:
    made(path, 3 * rows * width)
    done = run_engine(WRITE, path, rows, width, *more, env=preload(library, refuse))
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def assert_columns(path: Path, rows: int, width: int) -> None:
    found = np.frombuffer(path.read_bytes(), "uint8").reshape(rows, 3, width)
    assert (found[:, [0, 2]] == OTHERS).all()
    assert np.array_equal(found[:, 1].reshape(-1), np.arange(rows * width) * 7 % 251)


REFUSED = [
    ("", ()),
    (f"readv:{errno.EPERM}", ("storing short runs together refused: Operation not permitted",)),
    (f"readv:{errno.ENOSYS}", ("storing short runs together refused: Function not implemented",)),
    (f"readv@1:{errno.EFAULT}", ()),  # memory that the kernel does not read: a copy of it it does
    (f"readv:{errno.EFAULT}", ()),
    ("nfs", ("short runs are written one by one, as other machines may write to the same pages",)),
]


@pytest.mark.parametrize(("refuse", "fallbacks"), REFUSED)
def test_the_same_bytes_by_other_ways(
    tmp_path: Path, preloaded: Path, refuse: str, fallbacks: tuple[str, ...]
) -> None:
    path = tmp_path / "f"
    assert write(path, preloaded, refuse, 3000, 100) == {"runs": 3000, "fallbacks": list(fallbacks)}
    assert_columns(path, 3000, 100)


@pytest.mark.parametrize("width", [100, 100_000])
@pytest.mark.parametrize(("refuse", "code"), [("readv:1 pwritev", errno.ENOTSUP), ("fsync@1", errno.ENOTSUP)])
def test_errors_of_the_disk(tmp_path: Path, preloaded: Path, refuse: str, code: int, width: int) -> None:
    path = tmp_path / "f"
    found = write(path, preloaded, refuse, 20, width, "durable")
    assert found == {"errno": code, "path": str(path)}
    assert path.stat().st_size == 60 * width


@pytest.mark.parametrize("width", [64, 3000, 100_000])
def test_a_full_disk(small_disk: Path, new_engine: NewEngine, width: int) -> None:
    path, size = small_disk / "f", 90 << 20
    rows = size // (3 * width)
    path.touch()
    os.truncate(path, size)
    data = noise(rows * width)
    place = place_of((rows, 3 * width), (0, width), (rows, width), 1, 0)
    plan = FilePlan(foreign(path), b"", [TensorView(data.ctypes.data, data.nbytes, HOST)], size, [place])
    for _ in range(2):
        with pytest.raises(
            SaveError, match=f"what had been written to {path} before the error remains in place"
        ) as raised:
            new_engine().submit([plan], keep_alive=data).result()
        assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(path)
    assert path.stat().st_size == size


@pytest.mark.parametrize("sooner", [True, False])
@pytest.mark.parametrize("left", [0, SLOT])
@pytest.mark.parametrize("width", [64, 40_000])
def test_a_file_that_is_cut_meanwhile(
    folder: Path, new_engine: NewEngine, width: int, left: int, sooner: bool
) -> None:
    """Before anything is written, and while something may be."""
    path, rows = folder / "f", 4 * SLOT // width
    made(path, 3 * rows * width)

    def fetch(file: int, item: int, first: int, nbytes: int, address: int) -> None:
        if (first == 0) == sooner:
            os.truncate(path, left)

    place = place_of((rows, 3 * width), (0, width), (rows, width), 1, 0)
    plan = FilePlan(foreign(path), b"", [fetched(bytes(rows * width))], 3 * rows * width, [place])
    with pytest.raises(
        SaveError, match=r"the file was truncated while it was written: it has \d+ bytes, not"
    ) as raised:
        new_engine(threads=1).submit([plan], keep_alive=None, fetch=fetch).result()
    assert raised.value.errno == errno.EIO and raised.value.filename == str(path)
    if sooner or width == 64:
        assert path.stat().st_size == left  # nor is it made longer again


def test_killed_while_it_is_written(tmp_path: Path) -> None:
    path, rows, width = tmp_path / "f", 4096, 256
    script = """
    from fastshard.engine.engine import Options
    from fastshard.engine.plan import ForeignFile, place_of
    rows, width = int(sys.argv[2]), int(sys.argv[3])
    place = place_of((rows, 3 * width), (0, width), (rows, width), 1, 0)
    plan = FilePlan(ForeignFile(os.fsencode(sys.argv[1])), b"", [TensorView(0, rows * width, FETCHED)], 3 * rows * width, [place])
    def fetch(file, item, first, nbytes, address):
        if first > 0:
            os.kill(os.getpid(), 9)
    Engine(Options(memory_budget="1MiB")).submit([plan], keep_alive=None, fetch=fetch).result()
    """
    made(path, 3 * rows * width)
    assert run_engine(script, path, rows, width).returncode == -9
    found = np.frombuffer(path.read_bytes(), "uint8").reshape(rows, 3, width)
    assert (found[:, [0, 2]] == OTHERS).all() and names(tmp_path) == ["f"]


@pytest.mark.parametrize("nfs", [False, True])
def test_how_the_file_is_open(tmp_path: Path, preloaded: Path, nfs: bool) -> None:
    """To be mapped it is open for reading, too. On NFS it must not be: a page that was read is written as a whole."""
    script = """
    from fastshard.engine.plan import ForeignFile, Place
    fd = os.open(sys.argv[1], int(sys.argv[2]))
    def fetch(*_):
        for number in map(int, os.listdir("/proc/self/fd")):
            if number != fd and os.path.exists(f"/proc/self/fd/{number}") and os.path.samefile(f"/proc/self/fd/{number}", sys.argv[1]):
                with open(f"/proc/self/fdinfo/{number}") as info:
                    print(int(info.read().split("flags:")[1].split()[0], 8) & os.O_ACCMODE)
    for target in (ForeignFile(b"f", fd), ForeignFile(os.fsencode(sys.argv[1]))):
        plan = FilePlan(target, b"", [TensorView(0, 100, FETCHED)], 200, [Place(100, 0, 10, (10,), (20,))])
        Engine().submit([plan], keep_alive=None, fetch=fetch).result()
    """
    path = made(tmp_path / "f", 200)
    for access in (os.O_WRONLY, os.O_RDWR):
        done = run_engine(script, path, access, env=preload(preloaded, "nfs" if nfs else ""))
        assert done.stdout.split() == [str(os.O_WRONLY if nfs else os.O_RDWR)] * 2, done.stderr


def test_a_file_that_may_not_be_read(tmp_path: Path, new_engine: NewEngine) -> None:
    """It cannot be mapped, so its runs are written one by one."""
    if os.geteuid() == 0:
        pytest.skip("root may read every file")
    plan, part, image = columns(tmp_path / "f", 100, 10)
    (tmp_path / "f").chmod(0o200)
    stats = new_engine().submit([plan], keep_alive=part).result()
    (tmp_path / "f").chmod(0o600)
    assert stats.fallbacks == ("mapping the file refused: Permission denied",) and stats.written_runs == 100
    assert_same((tmp_path / "f").read_bytes(), image)


# What is no plan.

SIZE = 1000
VIEW = TensorView(0x10000, 100, HOST)


def planned(places: list[Place], items: list[TensorView | WriteItem] | None = None) -> FilePlan:
    items = [TensorView(0x10000, sum(place.nbytes for place in places), HOST)] if items is None else items
    return FilePlan(ForeignFile(b"f"), b"", items, SIZE, places)


NO_PLANS = [
    (FilePlan(b"f", b"", [VIEW], SIZE, [Place(100, 0, 100)]), "only a file that somebody else publishes can have places: f"),
    (FilePlan(Memory(1, SIZE), b"", [VIEW], SIZE, [Place(100, 0, 100)]), "only a file that somebody else publishes"),
    (FilePlan(ForeignFile(b"f"), b"", [VIEW], None, [Place(100, 0, 100)]), "must give the size of the file: f"),
    (planned([Place(99, 0, 99)], [VIEW]), "the places of f have 99 bytes, but its items have 100"),
    (planned([], [VIEW]), "the places of f have 0 bytes, but its items have 100"),
    (planned([Place(100, 0, 100)], []), "the places of f have 100 bytes, but its items have 0"),
    (planned([Place(101, 0, 100)], [WriteItem(VIEW, 1)]), "a gap before item 0 of f"),
    (planned([Place(100, 901, 100)]), "place 0 of f lies beyond the file's 1000 bytes: 100 at 901"),
    (planned([Place(100, 0, 10, (10,), (111,))]), "place 0 of f lies beyond the file's 1000 bytes: 1009 at 0"),
    (planned([Place(100, 1 << 62, 100)]), "lies beyond the file's 1000 bytes"),
    (planned([Place(1 << 62, 0, 1 << 60, (4,), (1 << 60,))]), "lies beyond the file's 1000 bytes"),
    (planned([Place(4, 0, 1 << 62, (4,), (1 << 62,))]), "is declared to have 4 bytes, but its runs have"),
    (planned([Place(90, 0, 10, (10,), (20,))]), "place 0 of f is declared to have 90 bytes, but its runs have 100"),
    (planned([Place(100, 0, 10, (10,), (9,))]), "the runs of place 0 of f overlap or are not in the order of the file"),
    (planned([Place(100, 0, 10, (5, 2), (10, 100))]), "the runs of place 0 of f overlap or are not in the order of the file"),
    (planned([Place(100, 0, 10, (10,), (20, 1))]), "shape and strides of a place must have the same length"),
    (planned([Place(100, 0, 100, (1,) * 9, (100,) * 9)]), "too many strided dimensions"),
    (planned([Place(100, -1, 100)]), "cannot be negative"),
    (planned([Place(100, 0, -10, (-10,), (20,))]), "cannot be negative"),
    (planned([Place(100, 0, 100), Place(100, 99, 100)]), "place 1 of f overlaps place 0"),
    (planned([Place(100, 0, 10, (10,), (100,)), Place(5, 905, 5)]), "place 1 of f overlaps place 0"),
    (planned([Place(40, 0, 10, (4,), (100,)), Place(40, 5, 10, (4,), (100,))]), "place 1 of f overlaps place 0"),
    (
        planned([Place(40, 0, 10, (4,), (100,)), Place(40, 50, 10, (4,), (100,)), Place(40, 130, 20, (2,), (77,))]),
        "place 2 of f overlaps place 0",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("plan", "text"), NO_PLANS, ids=range(len(NO_PLANS)))
def test_no_plans(new_engine: NewEngine, plan: FilePlan, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        new_engine().submit([plan], keep_alive=None)


def test_places_are_places(new_engine: NewEngine) -> None:
    with pytest.raises(TypeError, match="expected a Place, not a tuple"):
        new_engine().submit([planned([(100, 0, 100, (), ())], [VIEW])], keep_alive=None)  # type: ignore[list-item]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), shape=shapes, count=st.integers(2, 5))
def test_overlaps_are_found(engine: Engine, data: st.DataObject, shape: tuple[int, ...], count: int) -> None:
    """Of any parts of a tensor, or of two: those that share a byte, and only those."""
    taken = np.zeros((2, *shape), int)
    places, several = [], data.draw(st.booleans())
    for _ in range(count):
        which, box = data.draw(st.integers(0, several)), data.draw(boxes(shape))
        taken[(which, *box.slices)] += 1
        places.append(place_of(shape, *box, 1, which * math.prod(shape)))
    packed = noise(max(1, sum(place.nbytes for place in places)))
    view = TensorView(packed.ctypes.data, sum(place.nbytes for place in places), HOST)
    plan = FilePlan(ForeignFile(b"/nowhere/f"), b"", [view], 2 * math.prod(shape), places)
    with pytest.raises(ValueError if taken.max() > 1 else SaveError, match="overlaps place|No such file"):
        engine.submit([plan], keep_alive=packed)


def test_many_places_between_each_other(tmp_path: Path, new_engine: NewEngine) -> None:
    """A comparison of each with each would not come to an end."""
    count, rows = 20_000, 3
    path, data = made(tmp_path / "f", count * rows), noise(count * rows)
    places = [place_of((rows, count), (0, column), (rows, 1), 1, 0) for column in range(count)]
    view = TensorView(data.ctypes.data, data.nbytes, HOST)
    stats = new_engine().submit(
        [FilePlan(foreign(path), b"", [view], count * rows, places)], keep_alive=data
    ).result()  # fmt: skip
    assert stats.nbytes == count * rows
    assert_same(path.read_bytes(), data.reshape(count, rows).T.tobytes())


# From devices.


def test_from_devices(sim: SimCuda, new_engine: NewEngine, tmp_path: Path) -> None:
    """Whatever the way out of the device: two of them, copies that are late, and the host between them."""
    sim.set_delay(0, 2000)
    path = tmp_path / "f"
    sources = [on_device(sim, array, i % 2) for i, array in enumerate(STRIDED.values())]
    host = noise(60, 50)
    packed = [source.packed for source in sources] + [host.tobytes()]
    views = [*(source.view for source in sources), TensorView(host.ctypes.data, host.nbytes, HOST)]
    places, offset, parts = [], 77, []
    for at, part in enumerate(packed):
        rows = next(rows for rows in (60, 10, 7, 3, 2, 1) if len(part) % rows == 0)
        width = len(part) // rows
        places.append(place_of((rows, 2 * width + at), (0, at), (rows, width), 1, offset))
        parts.append((offset, rows, width, at, part))
        offset += rows * (2 * width + at)
    image = np.frombuffer(bytearray(made(path, offset).read_bytes()), "uint8")
    for begin, rows, width, at, part in parts:
        whole = image[begin : begin + rows * (2 * width + at)].reshape(rows, -1)
        whole[:, at : at + width] = np.frombuffer(part, "uint8").reshape(rows, width)
    engine = new_engine(threads=3, memory_budget=2 * BUDGET)
    future = engine.submit(
        [FilePlan(foreign(path), b"", views, offset, places)], keep_alive=(sources, host), checksums=True
    )
    future.result()
    assert_same(path.read_bytes(), image.tobytes())
    assert future.checksums() == [[zlib.crc32(part) for part in packed]]
