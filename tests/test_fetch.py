# SPDX-License-Identifier: Apache-2.0
"""Bytes that only Python can bring: accelerators fastshard has no native way from, a slot at a time."""

from __future__ import annotations

import ctypes
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch as reference
import torch
from conftest import BUDGET, SLOT, assert_same
from helpers import DTYPES, filled

import fastshard
from fastshard import _native
from fastshard.engine import tensors
from fastshard.engine.engine import Engine, SaveFuture
from fastshard.engine.plan import FETCHED, HOST, FilePlan, Memory, TensorView

HEADER = b"a header"

NewEngine = Callable[..., Engine]
Fetch = Callable[[int, int, int, int, int], None]

pytestmark = pytest.mark.usefixtures("no_hang")


SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda t: t,
    "scalar": lambda t: t[3, 4, 5],
    "vector of every other": lambda t: t[2, 3, ::2],
    "columns": lambda t: t[:, :, 2:7],
    "transposed": lambda t: t[1].t(),
    "permuted": lambda t: t.permute(2, 0, 1),
    "rows of every other": lambda t: t[::2, 1:],
    "expanded": lambda t: t[:1].expand(4, 9, 10),
    "expanded behind": lambda t: t[:, :, :1].expand(7, 9, 3),
    "empty": lambda t: t[:, :0],
}


def packed_bytes(tensor: torch.Tensor) -> bytes:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    data = tensor.view(integers[tensor.element_size()]).contiguous()
    return bytes(data.view(-1).view(torch.uint8).numpy())


# One piece.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces(dtype: torch.dtype, shape: str) -> None:
    tensor = SHAPES[shape](filled((7, 9, 10), dtype))
    expected = packed_bytes(tensor)
    count = tensor.numel()
    pieces = [(0, count), (0, count // 3), (count // 3, count), (1, count), (count // 2, count // 2 + 1)]
    for first, last in pieces:
        if 0 <= first < last <= count:
            begin, end = first * dtype.itemsize, last * dtype.itemsize
            out = bytearray(b"\xaa" * (end - begin + 16))
            memory = (ctypes.c_char * len(out)).from_buffer(out)
            tensors.fetch(tensor, begin, end - begin, ctypes.addressof(memory) + 8)
            assert out == b"\xaa" * 8 + expected[begin:end] + b"\xaa" * 8


@pytest.mark.parametrize("shape", SHAPES)
def test_every_piece_of_a_tensor(shape: str) -> None:
    tensor = SHAPES[shape](filled((7, 9, 10), torch.int16))
    expected = packed_bytes(tensor)
    out = (ctypes.c_char * max(len(expected), 1))()
    for length in (2, 6, 38, 250):
        ctypes.memset(out, 0, len(out))
        for first in range(0, len(expected), length):
            nbytes = min(length, len(expected) - first)
            tensors.fetch(tensor, first, nbytes, ctypes.addressof(out) + first)
        assert out.raw[: len(expected)] == expected


# The engine asks for pieces.


class Library:
    """What a test's fetch function knows: the bytes of every item, and how they were asked for."""

    def __init__(self, *files: list[bytes]) -> None:
        self.files = files
        self.asked: list[tuple[int, int, int, int]] = []

    def __call__(self, file: int, item: int, first_byte: int, nbytes: int, address: int) -> None:
        self.asked.append((file, item, first_byte, nbytes))
        ctypes.memmove(address, self.files[file][item][first_byte : first_byte + nbytes], nbytes)


def fetched(data: bytes) -> TensorView:
    return TensorView(0, len(data), FETCHED)


def on_host(data: bytes) -> TensorView:
    return TensorView(ctypes.cast(data, ctypes.c_void_p).value or 0, len(data), HOST)


def submit(
    engine: Engine,
    files: dict[Path, list[TensorView]],
    fetch: Fetch,
    keep: object = None,
    *,
    serve: bool = True,
) -> SaveFuture:
    plans = [FilePlan(os.fsencode(path), HEADER, views) for path, views in files.items()]
    return engine.submit(plans, keep_alive=keep, fetch=fetch, serve=serve)


def noise(nbytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(nbytes)


@pytest.mark.parametrize("write_path", ["buffered", "direct", "mapped"])
def test_large_and_small(new_engine: NewEngine, path: Path, write_path: str) -> None:
    items = [noise(5 * SLOT + 3), b"", *[noise(i, seed=i) for i in range(100)], noise(2 * SLOT, seed=1)]
    library = Library(items)
    engine = new_engine(write_path=write_path)
    stats = submit(engine, {path: [fetched(data) for data in items]}, library).result()
    assert_same(path.read_bytes(), HEADER + b"".join(items))
    assert stats.write_path == write_path
    assert stats.staging_nbytes <= BUDGET
    assert max(nbytes for *_, nbytes in library.asked) <= SLOT
    assert sum(nbytes for *_, nbytes in library.asked) == sum(map(len, items))  # each byte once


def test_memory_is_bounded(new_engine: NewEngine, path: Path) -> None:
    data = noise(20 * BUDGET)
    stats = submit(new_engine(), {path: [fetched(data)]}, Library([data])).result()
    assert_same(path.read_bytes(), HEADER + data)
    assert stats.staging == "pageable"
    assert stats.staging_nbytes <= BUDGET


def test_memory_target(new_engine: NewEngine) -> None:
    items = [noise(2 * SLOT), noise(77)]
    data, address = _native.new_bytes(len(HEADER) + sum(map(len, items)))
    plan = FilePlan(Memory(address, len(data)), HEADER, [fetched(items[0]), fetched(items[1])])
    new_engine().submit([plan], keep_alive=None, fetch=Library(items)).result()
    assert_same(data, HEADER + b"".join(items))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_several_files_beside_host_tensors(new_engine: NewEngine, tmp_path: Path, threads: int) -> None:
    contents = [[noise(SLOT // 2 * (i % 3) + 100 * i, seed=i) for i in range(7)] for _ in range(5)]
    files = {
        tmp_path / f"{number}.part": [
            (on_host if (i + number) % 3 == 0 else fetched)(data) for i, data in enumerate(items)
        ]
        for number, items in enumerate(contents)
    }
    submit(new_engine(threads=threads), files, Library(*contents), contents).result()
    for path, items in zip(files, contents, strict=True):
        assert_same(path.read_bytes(), HEADER + b"".join(items))


def test_many_threads_share_an_engine(new_engine: NewEngine, tmp_path: Path) -> None:
    """Each serves its own save, however the slots are shared among them."""
    engine = new_engine()
    contents = [noise(4 * SLOT + i, seed=i) for i in range(6)]

    def work(i: int) -> None:
        path = tmp_path / str(i)
        submit(engine, {path: [fetched(contents[i])]}, Library([contents[i]])).result()
        assert_same(path.read_bytes(), HEADER + contents[i])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(6)))


def test_pieces_are_brought_by_the_thread_that_waits(new_engine: NewEngine, path: Path) -> None:
    data, threads = noise(3 * SLOT), set()

    def fetch(*request: int) -> None:
        threads.add(threading.get_ident())
        library(*request)

    library = Library([data])
    plan = FilePlan(os.fsencode(path), HEADER, [fetched(data)])
    future = new_engine().submit([plan], keep_alive=None, fetch=fetch, serve=False)
    assert not future.done()
    assert threads == set()
    future.result()
    assert threads == {threading.get_ident()}


def test_close_brings_what_is_missing(new_engine: NewEngine, path: Path) -> None:
    data = noise(3 * SLOT)
    engine = new_engine()
    future = submit(engine, {path: [fetched(data)]}, Library([data]))
    engine.close()
    assert future.done()
    assert_same(path.read_bytes(), HEADER + data)


# What goes wrong.


class Stumble(Exception):
    pass


@pytest.mark.parametrize("error", [Stumble, KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("nth", [1, 2, 4])
def test_exception_in_fetch(
    new_engine: NewEngine, tmp_path: Path, error: type[BaseException], nth: int
) -> None:
    """It reaches the caller, nothing is left behind, and the engine works on."""
    items = [noise(3 * SLOT), noise(50), noise(2 * SLOT, seed=1)]
    files = {
        tmp_path / f"{i}.part": [fetched(items[0]), on_host(items[1]), fetched(items[2])] for i in range(2)
    }
    library = Library(items, items)
    engine = new_engine()

    def fetch(*request: int) -> None:
        if len(library.asked) == nth - 1:
            raise error("no further")
        library(*request)

    (tmp_path / "0.part").write_bytes(b"old")
    with pytest.raises(error, match="no further"):
        submit(engine, files, fetch, items).result()
    assert len(library.asked) == nth - 1  # nothing was brought after that
    assert os.listdir(tmp_path) == ["0.part"]
    assert (tmp_path / "0.part").read_bytes() == b"old"
    assert submit(engine, files, library, items).result().staging_nbytes > SLOT  # all slots are there
    for path in files:
        assert_same(path.read_bytes(), HEADER + b"".join(items))


def test_cancelled_by_the_thread_that_waits(new_engine: NewEngine, path: Path) -> None:
    data = noise(5 * SLOT)
    library = Library([data])
    futures: list[SaveFuture] = []

    def fetch(*request: int) -> None:
        library(*request)
        futures[0].cancel()

    futures.append(submit(new_engine(), {path: [fetched(data)]}, fetch, serve=False))
    with pytest.raises(CancelledError):
        futures[0].result()
    assert len(library.asked) <= 2
    assert os.listdir(path.parent) == []


def test_cancelled_before_anything_was_brought(new_engine: NewEngine, path: Path) -> None:
    data = noise(5 * SLOT)
    library = Library([data])
    future = submit(new_engine(), {path: [fetched(data)]}, library, serve=False)
    assert future.cancel()
    with pytest.raises(CancelledError):
        future.result()
    assert library.asked == []
    assert os.listdir(path.parent) == []


def test_cancelled_by_another_thread_while_a_piece_is_brought(new_engine: NewEngine, path: Path) -> None:
    """The piece's slot is not given away under the hands of the thread that fills it."""
    data, other = noise(SLOT // 2), noise(SLOT // 2, seed=1)
    engine = new_engine()
    bringing, cancelled = threading.Event(), threading.Event()

    def slow_fetch(*request: int) -> None:
        bringing.set()
        cancelled.wait()
        Library([data])(*request)

    def fetch_beside(*request: int) -> None:
        Library([other])(*request)
        cancelled.set()  # what the cancelled save still writes now goes over these bytes, or beside them
        waiting.join()

    def wait() -> None:
        with pytest.raises(CancelledError):
            future.result()

    future = submit(engine, {path.with_name("cancelled"): [fetched(data)]}, slow_fetch)
    waiting = threading.Thread(target=wait)
    waiting.start()
    assert bringing.wait(300)
    future.cancel()
    submit(engine, {path: [fetched(other)]}, fetch_beside).result()
    assert_same(path.read_bytes(), HEADER + other)
    assert os.listdir(path.parent) == [path.name]


# The public functions, with tensors that torch believes to be on another accelerator.


class ElsewhereTensor(torch.Tensor):
    """Reports a device that fastshard has no native way from; its address would be of no use."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    where: torch.device

    @property
    def device(self) -> torch.device:
        return self.where

    is_cpu = False

    def data_ptr(self) -> int:
        return 0xBAD0000 + super().data_ptr()


def elsewhere(tensor: torch.Tensor, where: str = "xpu:0") -> ElsewhereTensor:
    moved = torch.Tensor._make_subclass(ElsewhereTensor, tensor)
    moved.where = torch.device(where)
    return moved


def state_dict() -> dict[str, torch.Tensor]:
    """More than the slots hold; strided tensors, too."""
    found = {str(dtype): filled((21, 33), dtype, seed=i) for i, dtype in enumerate(DTYPES)}
    base = filled((500, 1000))
    found["large"] = filled((1000, 701), torch.bfloat16)
    found |= {"left": base[:, :500], "right": base[:, 500:], "transposed": filled((301, 303)).t()}
    return {**found, "scalar": torch.tensor(2.5), "empty": torch.empty(3, 0)}


def reference_bytes(state: dict[str, torch.Tensor]) -> bytes:
    return bytes(reference.save({name: tensor.contiguous() for name, tensor in state.items()}))


@pytest.mark.parametrize("where", ["xpu:0", "mps:0", "hpu:1"])
def test_save_file(new_engine: NewEngine, path: Path, where: str) -> None:
    state = {name: elsewhere(tensor, where) for name, tensor in state_dict().items()}
    fastshard.save_file(state, path, allow_strided=True, engine=new_engine())
    assert_same(path.read_bytes(), reference_bytes(state_dict()))
    assert fastshard.stats().staging_nbytes <= BUDGET


def test_save_files_beside_host_tensors(new_engine: NewEngine, tmp_path: Path) -> None:
    files = {}
    for i in range(3):
        state = state_dict()
        files[tmp_path / f"{i}.safetensors"] = {
            name: elsewhere(tensor) if number % 3 != i else tensor
            for number, (name, tensor) in enumerate(state.items())
        }
    fastshard.save_files(files, allow_strided=True, engine=new_engine())
    for path in files:
        assert_same(path.read_bytes(), reference_bytes(state_dict()))


def test_save_to_bytes(new_engine: NewEngine) -> None:
    state = {name: elsewhere(tensor) for name, tensor in state_dict().items()}
    assert_same(fastshard.save(state, allow_strided=True, engine=new_engine()), reference_bytes(state_dict()))


def test_strided_tensors_are_refused_unless_allowed(new_engine: NewEngine, path: Path) -> None:
    with pytest.raises(ValueError, match="non contiguous tensor: `w`"):
        fastshard.save_file({"w": elsewhere(filled((4, 5)).t())}, path, engine=new_engine())
    assert not path.exists()


def test_save_file_interrupted(new_engine: NewEngine, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"old")
    engine = new_engine()
    state = {name: elsewhere(tensor) for name, tensor in state_dict().items()}
    with monkeypatch.context() as patch:
        calls = iter([tensors.fetch] * 3)

        def fetch(*request: object) -> None:
            next(calls, interrupt)(*request)

        def interrupt(*request: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(tensors, "fetch", fetch)
        with pytest.raises(KeyboardInterrupt):
            fastshard.save_file(state, path, allow_strided=True, engine=engine)
    assert os.listdir(path.parent) == [path.name]
    assert path.read_bytes() == b"old"
    fastshard.save_file(state, path, allow_strided=True, engine=engine)
    assert_same(path.read_bytes(), reference_bytes(state_dict()))
