# SPDX-License-Identifier: Apache-2.0
"""Plans with offsets, in new files, in memory, and in files that somebody else has made and will publish."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import resource
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import safetensors.torch as reference
import torch
from conftest import BUDGET, SLOT, assert_same
from helpers import names, preload, run_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from simcuda import Result, SimCuda
from test_cuda_path import STRIDED, on_device
from test_fetch import Library, fetched, noise, on_host

from fastshard import SaveError, _native
from fastshard.engine.engine import Engine, Options
from fastshard.engine.plan import HOST, FilePlan, ForeignFile, Memory, TensorView, WriteItem
from fastshard.formats.safetensors import header

pytestmark = pytest.mark.usefixtures("no_hang")

NewEngine = Callable[..., Engine]
HEADER = b"a header of 29 bytes, not 512"
OTHERS = 0xAA
"""What is in a file before a save."""


def foreign(path: Path) -> ForeignFile:
    return ForeignFile(os.fsencode(path))


def made(path: Path, nbytes: int) -> Path:
    """A file that somebody has made, full of what is theirs."""
    path.write_bytes(bytes([OTHERS]) * nbytes)
    return path


def strided_view(data: bytes) -> tuple[TensorView, bytes]:
    """Every other byte."""
    address = ctypes.cast(data, ctypes.c_void_p).value or 0
    count = len(data) // 2
    return TensorView(address, count, HOST, 1, (count,), (2,)), data[: 2 * count : 2]


class Part:
    """An item of a plan, and what it must be in the file."""

    def __init__(self, kind: str, data: bytes) -> None:
        self.data, self.packed = data, data
        if kind == "strided":
            self.view, self.packed = strided_view(data)
        else:
            self.view = fetched(data) if kind == "fetched" else on_host(data)


parts = st.builds(
    Part,
    st.sampled_from(["host", "host", "strided", "fetched"]),
    st.one_of(st.integers(0, 200), st.integers(0, 9000), st.just(SLOT + 77)).map(noise),
)
gaps = st.one_of(st.just(0), st.integers(1, 100), st.integers(1, 9000), st.just(3 * 4096))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[bytes, list[tuple[int, Part]], int]:
    """A header, parts at their offsets in any order, and the size of the file."""
    head = draw(st.sampled_from([b"", HEADER]))
    offset, placed = len(head), []
    for part in draw(st.lists(parts, max_size=8)):
        offset += draw(gaps)
        placed.append((offset, part))
        offset += len(part.packed)
    return head, draw(st.permutations(placed)), offset + draw(gaps)


TARGETS = [
    ("new", "buffered"),
    ("new", "direct"),
    ("new", "mapped"),
    ("foreign", "buffered"),
    ("memory", "buffered"),
]


@pytest.fixture(scope="module")
def engines() -> Iterator[Callable[[str], Engine]]:
    with contextlib.ExitStack() as stack:
        kept: dict[str, Engine] = {}

        def engine(write_path: str) -> Engine:
            options = Options(memory_budget=BUDGET, threads=3, write_path=write_path)
            return kept.get(write_path) or kept.setdefault(write_path, stack.enter_context(Engine(options)))

        yield engine


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), target=st.sampled_from(TARGETS), durable=st.booleans(), tail=st.integers(0, 5000))
def test_items_lie_where_they_say_and_nothing_else_changes(
    tmp_path_factory: pytest.TempPathFactory,
    engines: Callable[[str], Engine],
    layout: tuple[bytes, list[tuple[int, Part]], int],
    target: tuple[str, str],
    durable: bool,
    tail: int,
) -> None:
    head, placed, size = layout
    kind, write_path = target
    # What is nobody's is zero in a new file, and stays what it was in one that is there, which may be larger.
    image = bytearray(size) if kind == "new" else bytearray([OTHERS]) * (size + tail * (kind == "foreign"))
    path = tmp_path_factory.mktemp("plan") / "f"
    data, address = _native.new_bytes(size)
    if kind == "foreign":
        path.write_bytes(image)
    elif kind == "memory":
        ctypes.memset(address, OTHERS, size)
    for offset, packed in [(0, head), *((offset, part.packed) for offset, part in placed)]:
        image[offset : offset + len(packed)] = packed
    where = {"new": os.fsencode(path), "foreign": foreign(path), "memory": Memory(address, size)}[kind]
    plan = FilePlan(where, head, [WriteItem(part.view, offset) for offset, part in placed], size)
    library = Library([part.data for _, part in placed])
    future = engines(write_path).submit(
        [plan], keep_alive=placed, fetch=library, durable=durable, checksums=True
    )
    stats = future.result()
    assert_same(data if kind == "memory" else path.read_bytes(), bytes(image))
    assert future.checksums() == [[zlib.crc32(part.packed) for _, part in placed]]
    assert stats.nbytes == len(head) + sum(len(part.packed) for _, part in placed)
    expected = {"new": ("buffered" if write_path == "direct" else write_path), "foreign": "buffered"}
    assert stats.write_path == expected.get(kind, kind)
    assert names(path.parent) == ([] if kind == "memory" else ["f"])


# Several who write one file.

RANK = """
import sys, torch
from fastshard.engine.engine import Engine
from fastshard.engine.plan import *
path, rank, ranks, head, offsets = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), bytes.fromhex(sys.argv[4]), eval(sys.argv[5])
tensors = torch.load(sys.argv[6])
items = []
for name, offset in offsets.items():
    part = tensors[name].tensor_split(ranks)[rank]
    first = sum(len(before) for before in tensors[name].tensor_split(ranks)[:rank])
    row = tensors[name][0].nbytes
    items.append(WriteItem(TensorView(part.data_ptr(), part.nbytes, HOST), offset + first * row))
input()  # both at once
with Engine() as engine:
    plan = FilePlan(ForeignFile(path.encode()), head if rank == 0 else b"", items, int(sys.argv[7]))
    engine.submit([plan], keep_alive=tensors, durable=True).result()
print("written")
"""


def laid_out(tensors: dict[str, torch.Tensor]) -> tuple[bytes, dict[str, int], int]:
    """Header, offset of each tensor in the file, and the file's size."""
    codes = {torch.float32: "F32", torch.int16: "I16", torch.uint8: "U8"}
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    head = header(((n, codes[tensors[n].dtype], tensors[n].shape, tensors[n].nbytes) for n in order), None)
    offsets, end = {}, len(head)
    for name in order:
        offsets[name] = end
        end += tensors[name].nbytes
    return head, offsets, end


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "large": torch.randn(4099, 257, generator=generator),
        "middle": torch.randint(-9000, 9000, (1001, 33), dtype=torch.int16, generator=generator),
        "small": torch.randint(0, 255, (7, 3), dtype=torch.uint8, generator=generator),
        **{f"layer.{i}": torch.randn(5, i + 1, generator=generator) for i in range(40)},
    }


def test_processes_write_their_slices_of_one_file(tmp_path: Path) -> None:
    """As ranks of a sharded model do: one of them also the header. The file is that of a save of the whole."""
    tensors, path, source = some_tensors(), tmp_path / "model.safetensors", tmp_path / "tensors.pt"
    torch.save(tensors, source)
    head, offsets, size = laid_out(tensors)
    path.touch()
    os.truncate(path, size)
    inode = path.stat().st_ino
    ranks = 2
    arguments = [str(ranks), head.hex(), repr(offsets), str(source), str(size)]
    command = [sys.executable, "-c", RANK, str(path)]
    children = [
        subprocess.Popen(
            [*command, str(rank), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    assert [child.communicate(timeout=300)[0] for child in children] == ["written\n"] * ranks
    assert_same(path.read_bytes(), reference.save(tensors))
    assert path.stat().st_ino == inode and names(tmp_path) == ["model.safetensors", "tensors.pt"]


def test_saves_of_one_engine_write_one_file_at_once(tmp_path: Path, new_engine: NewEngine) -> None:
    """By its name and by a descriptor, in one save and in several; among them one that is cancelled elsewhere."""
    data = [noise(SLOT + 1000 * i, i) for i in range(6)]
    path = made(tmp_path / "f", sum(map(len, data)))
    offsets = [sum(map(len, data[:i])) for i in range(6)]
    engine = new_engine(threads=4)
    fd = os.open(path, os.O_RDWR)
    targets = [foreign(path), ForeignFile(b"anything", fd)]
    plans = [
        FilePlan(targets[i % 2], b"", [WriteItem(on_host(part), offset)], offset + len(part))
        for i, (part, offset) in enumerate(zip(data, offsets))
    ]
    futures = [engine.submit(chosen, keep_alive=data) for chosen in (plans[:3], plans[3:5], plans[5:])]
    for future in futures:
        future.result()
    assert_same(path.read_bytes(), b"".join(data))
    os.write(fd, b"still the caller's")
    os.close(fd)


def test_more_files_than_descriptors(tmp_path: Path, new_engine: NewEngine) -> None:
    count = 60
    paths = [made(tmp_path / f"{i:02}", 50) for i in range(count)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, limits[1]))
    try:
        items = [WriteItem(on_host(HEADER), 7)]
        plans = [FilePlan(foreign(path), b"", items, 50) for path in paths]
        new_engine(threads=2).submit(plans, keep_alive=None, durable=True).result()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    expected = bytes([OTHERS]) * 7 + HEADER + bytes([OTHERS]) * (43 - len(HEADER))
    assert [path.read_bytes() for path in paths] == [expected] * count


def test_a_file_without_a_name(new_engine: NewEngine) -> None:
    fd = os.memfd_create("f")
    os.truncate(fd, 100)
    plan = FilePlan(ForeignFile(b"a memfd", fd), b"", [WriteItem(on_host(HEADER), 50)], 100)
    new_engine().submit([plan], keep_alive=None).result()
    assert os.pread(fd, 200, 0) == bytes(50) + HEADER + bytes(50 - len(HEADER))
    os.close(fd)


@pytest.mark.parametrize("options", [{}, {"durable": True}, {"keep_cached": False}], ids=str)
def test_amendments_go_into_it(tmp_path: Path, new_engine: NewEngine, options: dict[str, bool]) -> None:
    path, item = made(tmp_path / "f", 3 * SLOT), noise(SLOT)
    plan = FilePlan(foreign(path), b"", [WriteItem(on_host(item), 1000)], 2 * SLOT)

    def amend(checksums: list[list[int]]) -> list[tuple[int, int, bytes]]:
        return [(0, 3, checksums[0][0].to_bytes(4, "little"))]

    new_engine().submit([plan], keep_alive=item, checksums=True, amend=amend, **options).result()
    image = bytearray([OTHERS]) * (3 * SLOT)
    image[1000 : 1000 + SLOT] = item
    image[3:7] = zlib.crc32(item).to_bytes(4, "little")
    assert_same(path.read_bytes(), bytes(image))


# What goes wrong.


def too_small(path: Path) -> ForeignFile:
    return foreign(made(path, 99))


def only_readable(path: Path) -> ForeignFile:
    return ForeignFile(os.fsencode(path), os.open(made(path, 100), os.O_RDONLY))


def appending(path: Path) -> ForeignFile:
    return ForeignFile(os.fsencode(path), os.open(made(path, 100), os.O_WRONLY | os.O_APPEND))


def closed(path: Path) -> ForeignFile:
    return ForeignFile(os.fsencode(path), 12345)


def folder(path: Path) -> ForeignFile:
    path.mkdir()
    return foreign(path)


REFUSED = [
    (foreign, errno.ENOENT, ""),
    (
        too_small,
        errno.EINVAL,
        "the file has 99 bytes, the plan needs 100: its creator must give it its size first",
    ),
    (only_readable, errno.EBADF, "it is not open for writing"),
    (appending, errno.EINVAL, ""),
    (closed, errno.EBADF, ""),
    (folder, errno.EISDIR, ""),
]


@pytest.mark.parametrize(("target", "code", "text"), REFUSED, ids=[what.__name__ for what, *_ in REFUSED])
def test_refused_before_the_first_byte(
    tmp_path: Path, new_engine: NewEngine, target: Callable[[Path], ForeignFile], code: int, text: str
) -> None:
    """Also of the save's other files."""
    path, other, another = tmp_path / "f", tmp_path / "new", made(tmp_path / "another", 100)
    file = target(path)
    before = path.read_bytes() if path.is_file() else None
    plans = [
        FilePlan(os.fsencode(other), HEADER, []),
        FilePlan(foreign(another), HEADER, [], 100),
        FilePlan(file, HEADER, [], 100),
    ]
    with pytest.raises(SaveError, match=re.escape(text or os.strerror(code))) as raised:
        new_engine().submit(plans, keep_alive=None)
    assert (raised.value.errno, raised.value.filename) == (code, str(path))
    assert (path.read_bytes() if path.is_file() else None) == before
    assert not other.exists() and another.read_bytes() == bytes([OTHERS]) * 100
    assert [name for name in names(tmp_path) if name.startswith(".")] == []
    if file.descriptor is not None and file.descriptor != 12345:
        os.close(file.descriptor)


def test_a_negative_descriptor(new_engine: NewEngine) -> None:
    with pytest.raises(ValueError, match="cannot be negative"):
        new_engine().submit([FilePlan(ForeignFile(b"f", -1), b"", [])], keep_alive=None)


class Interrupted(Exception):
    """What a test's fetch function raises."""


def begun(path: Path, other: Path) -> list[FilePlan]:
    """A save of two parts of which the second has to be fetched, and of a new file beside it."""
    parts = [WriteItem(on_host(HEADER), 10), WriteItem(fetched(bytes(2 * SLOT)), 100)]
    return [FilePlan(foreign(path), b"", parts, 3 * SLOT), FilePlan(os.fsencode(other), HEADER, [])]


def test_what_was_written_stays_when_the_save_fails(tmp_path: Path, new_engine: NewEngine) -> None:
    path, other = made(tmp_path / "f", 3 * SLOT), tmp_path / "new"
    before = path.stat()

    def fetch(file: int, item: int, first: int, nbytes: int, address: int) -> None:
        ctypes.memset(address, 7, nbytes)
        if first > 0:
            raise Interrupted

    with pytest.raises(Interrupted):
        new_engine(threads=1).submit(begun(path, other), keep_alive=None, fetch=fetch).result()
    found, after = path.read_bytes(), path.stat()
    assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size)
    assert found[:10] == bytes([OTHERS]) * 10 and found[10 : 10 + len(HEADER)] == HEADER
    assert names(tmp_path) == ["f"]


def test_a_cancelled_save_says_so(tmp_path: Path, new_engine: NewEngine) -> None:
    path, other = made(tmp_path / "f", 3 * SLOT), tmp_path / "new"
    future = new_engine().submit(begun(path, other), keep_alive=None, fetch=lambda *_: None, serve=False)
    assert future.cancel()  # nobody has brought its bytes yet
    with pytest.raises(
        CancelledError,
        match=f"save cancelled; what had been written to {path} before the error remains in place",
    ):
        future.result()
    assert names(tmp_path) == ["f"] and path.stat().st_size == 3 * SLOT


def test_a_failing_device_says_so(sim: SimCuda, new_engine: NewEngine, tmp_path: Path) -> None:
    path = made(tmp_path / "f", 3 * SLOT)
    source = on_device(sim, STRIDED["column half"])
    plan = FilePlan(foreign(path), b"", [WriteItem(source.view, 10)], 3 * SLOT)
    sim.fail("cuMemcpyDtoHAsync", Result.LAUNCH_FAILED, nth=0)
    sim.fail("cuMemcpy2DAsync", Result.LAUNCH_FAILED, nth=0)
    sim.fail("cuLaunchKernel", Result.LAUNCH_FAILED, nth=0)
    with pytest.raises(
        RuntimeError, match=f"what had been written to {path} before the error remains in place"
    ):
        new_engine().submit([plan], keep_alive=source).result()
    assert path.read_bytes() == bytes([OTHERS]) * (3 * SLOT)


SAVE = """
from fastshard.engine.plan import ForeignFile
path, other, durable = sys.argv[1], sys.argv[2], sys.argv[3] == "durable"
plans = [
    FilePlan(ForeignFile(os.fsencode(path)), b"written", [], 100),
    FilePlan(os.fsencode(other), b"new contents", []),
]
try:
    Engine().submit(plans, keep_alive=None, durable=durable).result()
    print("saved")
except SaveError as error:
    print(error.errno, error.filename, error.strerror)
"""


@pytest.mark.parametrize("durable", [True, False])
def test_a_durable_save_syncs_it(tmp_path: Path, preloaded: Path, durable: bool) -> None:
    """The first sync is that of the file, and where it fails nothing is published."""
    path, other = made(tmp_path / "f", 100), tmp_path / "new"
    how = "durable" if durable else ""
    done = run_engine(SAVE, path, other, how, env=preload(preloaded, f"fsync@1:{errno.EIO}"))
    if durable:
        assert done.stdout.startswith(f"5 {path} "), done.stderr
        assert f"; what had been written to {path} before the error remains in place" in done.stdout
    else:
        assert done.stdout == "saved\n", done.stderr
    assert other.exists() != durable
    assert path.read_bytes() == b"written" + bytes([OTHERS]) * 93


def test_a_full_disk(small_disk: Path, new_engine: NewEngine) -> None:
    path = small_disk / "f"
    path.touch()
    os.truncate(path, 64 << 20)
    data = noise(1 << 20)
    items = [WriteItem(on_host(data), i << 20) for i in range(64)]
    with pytest.raises(
        SaveError, match=f"what had been written to {path} before the error remains in place"
    ) as raised:
        new_engine().submit([FilePlan(foreign(path), b"", items, 64 << 20)], keep_alive=data).result()
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(path)
    assert path.stat().st_size == 64 << 20
    with path.open("rb") as file:
        assert file.read(1 << 20) == data


@pytest.mark.parametrize("beside", [b"", b"a new file beside it"])
def test_killed_while_it_is_written(tmp_path: Path, beside: bytes) -> None:
    """What is others' stays, and so does all that the next save needs."""
    path, other = made(tmp_path / "f", 1 << 17), tmp_path / "new"
    script = """
    from fastshard.engine.plan import ForeignFile
    items = [TensorView(0, 1 << 16, FETCHED)]
    plans = [FilePlan(ForeignFile(os.fsencode(sys.argv[1])), b"written", items, 1 << 17)]
    if sys.argv[3]:
        plans.append(FilePlan(os.fsencode(sys.argv[2]), sys.argv[3].encode(), []))
    Engine().submit(plans, keep_alive=None, fetch=lambda *_: os.kill(os.getpid(), 9)).result()
    """
    before = path.stat()
    done = run_engine(script, path, other, beside.decode())
    assert done.returncode == -9
    after = path.stat()
    assert (before.st_ino, before.st_size, before.st_mode) == (after.st_ino, after.st_size, after.st_mode)
    assert path.read_bytes()[7:] == bytes([OTHERS]) * ((1 << 17) - 7)
    assert not other.exists()
    assert_saves_again(path, tmp_path)


def assert_saves_again(path: Path, folder: Path) -> None:
    with Engine() as engine:
        engine.submit([FilePlan(foreign(path), HEADER, [], 1 << 17)], keep_alive=None).result()
    assert path.read_bytes()[: len(HEADER)] == HEADER and "f" in names(folder)


# From devices.


@pytest.mark.parametrize("target", ["new", "foreign"])
@pytest.mark.parametrize("write_path", ["buffered", "direct", "mapped", "registered"])
def test_from_devices(
    sim: SimCuda, new_engine: NewEngine, tmp_path: Path, write_path: str, target: str
) -> None:
    """Gaps of all sizes between what comes from two devices and from the host; copies that are late."""
    sim.set_delay(0, 2000)
    sources = [on_device(sim, array, i % 2) for i, array in enumerate(STRIDED.values())]
    host = noise(50_000)
    placed, offset = [], len(HEADER) + 3
    for i, source in enumerate(sources):
        offset += 8 * (i * i * 37 % 700)
        placed.append((offset, source.packed, source.view))
        offset += len(source.packed)
    placed.append((offset + 5, host, on_host(host)))
    size = offset + 5 + len(host) + 10_000
    path = tmp_path / "f"
    image = bytearray(size) if target == "new" else bytearray(made(path, size).read_bytes())
    for at, packed, _ in [(0, HEADER, None), *placed]:
        image[at : at + len(packed)] = packed
    plan = FilePlan(
        os.fsencode(path) if target == "new" else foreign(path),
        HEADER,
        [WriteItem(view, at) for at, _, view in reversed(placed)],
        size,
    )
    engine = new_engine(threads=3, memory_budget=2 * BUDGET, write_path=write_path)
    future = engine.submit([plan], keep_alive=(sources, host), checksums=True)
    future.result()
    assert_same(path.read_bytes(), bytes(image))
    assert future.checksums() == [[zlib.crc32(packed) for _, packed, _ in reversed(placed)]]
