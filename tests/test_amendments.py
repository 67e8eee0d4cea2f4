# SPDX-License-Identifier: Apache-2.0
"""Bytes that are known last: written over what is in the files, before anybody sees them."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
from conftest import SLOT, assert_same
from helpers import names
from test_direct import pages_cached
from test_fetch import Library, fetched, noise, on_host

from fastshard import _native
from fastshard.engine.engine import Amend, Engine, SaveFuture
from fastshard.engine.plan import FilePlan, Memory

pytestmark = pytest.mark.usefixtures("no_hang")

HEADER = b"a header of 29 bytes, not 512"
NewEngine = Callable[..., Engine]


def submit(engine: Engine, files: dict[Path, list[bytes]], amend: Amend, **options: bool) -> SaveFuture:
    plans = [
        FilePlan(os.fsencode(path), HEADER, [on_host(item) for item in items])
        for path, items in files.items()
    ]
    return engine.submit(plans, keep_alive=files, checksums=True, amend=amend, **options)


def written_over(data: bytes, *amendments: tuple[int, bytes]) -> bytes:
    changed = bytearray(data)
    for offset, piece in amendments:
        changed[offset : offset + len(piece)] = piece
    return bytes(changed)


@pytest.mark.parametrize("options", [{}, {"durable": True}, {"keep_cached": False}], ids=str)
@pytest.mark.parametrize("write_path", ["buffered", "direct", "mapped"])
@pytest.mark.parametrize("threads", [1, 3])
def test_checksums_go_into_the_file(
    tmp_path: Path, new_engine: NewEngine, write_path: str, threads: int, options: dict[str, bool]
) -> None:
    """Unaligned, into the last block too, of several files at once."""
    contents = {
        tmp_path / f"{n}": [noise(3 * SLOT + n, n), *[noise(i, i) for i in range(9)], noise(77)]
        for n in range(3)
    }
    seen: list[list[list[int]]] = []
    last = {path: len(HEADER) + sum(map(len, items)) - 4 for path, items in contents.items()}

    def amend(checksums: list[list[int]]) -> list[tuple[int, int, bytes]]:
        seen.append(checksums)
        assert not any(path.exists() for path in contents)
        places = [(n, offset) for n, end in enumerate(last.values()) for offset in (3, end)]
        return [(n, offset, checksums[n][0].to_bytes(4, "little")) for n, offset in places]

    future = submit(new_engine(write_path=write_path, threads=threads), contents, amend, **options)
    stats = future.result()
    assert seen == [[[zlib.crc32(item) for item in items] for items in contents.values()]]
    assert future.checksums() == seen[0]
    assert stats.write_path == write_path
    if options == {"keep_cached": False} and _native.filesystem(str(tmp_path))[0] != "tmpfs":
        assert [pages_cached(path) for path in contents] == [0, 0, 0]
    for path, items in contents.items():
        crc = zlib.crc32(items[0]).to_bytes(4, "little")
        expected = written_over(HEADER + b"".join(items), (3, crc), (last[path], crc))
        assert_same(path.read_bytes(), expected)


def test_beside_fetched_bytes_and_without_checksums(path: Path, new_engine: NewEngine) -> None:
    items = [noise(3 * SLOT), noise(100)]
    plan = FilePlan(os.fsencode(path), HEADER, [fetched(items[0]), on_host(items[1])])

    def amend(checksums: list[list[int]]) -> list[tuple[int, int, bytes]]:
        assert checksums == []
        return [(0, 0, b"A"), (0, 1, b""), (0, 2, b"ZZ")]

    new_engine(threads=1).submit([plan], keep_alive=items, fetch=Library(items), amend=amend).result()
    assert_same(path.read_bytes(), written_over(HEADER + b"".join(items), (0, b"A"), (2, b"ZZ")))


def test_memory_target(new_engine: NewEngine) -> None:
    item = noise(SLOT)
    data, address = _native.new_bytes(len(HEADER) + len(item))
    plan = FilePlan(Memory(address, len(data)), HEADER, [on_host(item)])
    new_engine().submit([plan], keep_alive=item, amend=lambda _: [(0, len(data) - 2, b"!?")]).result()
    assert_same(data, HEADER + item[:-2] + b"!?")


def test_nothing_to_amend(path: Path, new_engine: NewEngine) -> None:
    submit(new_engine(), {path: [b"data"]}, lambda _: []).result()
    assert path.read_bytes() == HEADER + b"data"


def test_a_save_that_waits_holds_no_writer(tmp_path: Path, new_engine: NewEngine) -> None:
    """One thread, several saves, waited for in the wrong order."""
    engine = new_engine(threads=1)
    futures = [
        submit(engine, {tmp_path / str(i): [noise(99, i)]}, lambda _: [(0, 0, b"!")]) for i in range(4)
    ]
    for future in reversed(futures):
        future.result()
    assert [(tmp_path / str(i)).read_bytes()[:1] for i in range(4)] == [b"!"] * 4


@pytest.mark.parametrize("serve", [False, True])
def test_asked_once_by_a_thread_that_waits_or_the_engines(
    path: Path, new_engine: NewEngine, serve: bool
) -> None:
    asked_by = []

    def amend(_: object) -> list[tuple[int, int, bytes]]:
        asked_by.append(threading.get_ident())
        return []

    future = submit(new_engine(), {path: [noise(SLOT)]}, amend, serve=serve)
    waiting = [threading.Thread(target=future.result) for _ in range(4)]
    for thread in waiting:
        thread.start()
    idents = {thread.ident for thread in waiting}
    for thread in waiting:
        thread.join()
    assert len(asked_by) == 1 and threading.get_ident() not in asked_by
    assert serve or set(asked_by) <= idents


def test_close_amends_what_is_missing(path: Path, new_engine: NewEngine) -> None:
    engine = new_engine()
    future = submit(engine, {path: [noise(SLOT)]}, lambda _: [(0, 0, b"!")])
    engine.close()
    assert future.done() and path.read_bytes()[:1] == b"!"


def test_a_dropped_save_is_amended(path: Path, new_engine: NewEngine, no_hang: None) -> None:
    submit(new_engine(), {path: [noise(SLOT)]}, lambda _: [(0, 0, b"!")])
    while not path.exists():
        time.sleep(0.001)
    assert path.read_bytes()[:1] == b"!"


# What goes wrong.


@pytest.mark.parametrize("outside", [(0, 10_000, b"x"), (0, (1 << 64) - 1, b"xx"), (1, 0, b"x")], ids=str)
def test_outside_of_the_files(path: Path, new_engine: NewEngine, outside: tuple[int, int, bytes]) -> None:
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="outside of its file"):
        submit(new_engine(), {path: [noise(99)]}, lambda _: [(0, 0, b"x"), outside]).result()
    assert path.read_bytes() == b"old" and names(path.parent) == [path.name]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_fails_the_save(path: Path, new_engine: NewEngine, error: type[BaseException]) -> None:
    path.write_bytes(b"old")

    def amend(_: object) -> list[tuple[int, int, bytes]]:
        raise error

    engine = new_engine()
    future = submit(engine, {path: [noise(SLOT)]}, amend)
    with pytest.raises(error):
        future.result()
    assert future.done() and future.checksums() == []
    assert path.read_bytes() == b"old" and names(path.parent) == [path.name]
    with pytest.raises(error):
        future.result()
    submit(engine, {path: [b"new"]}, lambda _: []).result()  # the engine goes on
    assert path.read_bytes() == HEADER + b"new"


def test_cancelled_before_and_while_it_is_asked(path: Path, new_engine: NewEngine, no_hang: None) -> None:
    engine = new_engine()
    future = submit(engine, {path: [noise(99)]}, lambda _: [], serve=False)
    while not future._native.take_amendment():
        assert not future.done(), "it ends without having asked"
        time.sleep(0.001)
    future.cancel()
    assert future.done()
    with pytest.raises(CancelledError):
        future.result()

    def amend(_: object) -> list[tuple[int, int, bytes]]:
        assert future.cancel()
        return [(0, 0, b"x")]

    future = submit(engine, {path: [noise(99)]}, amend, serve=False)
    with pytest.raises(CancelledError):
        future.result()
    assert names(path.parent) == []


def test_killed_while_it_is_asked(path: Path) -> None:
    script = (
        "import os, sys\nfrom fastshard.engine.engine import Engine\nfrom fastshard.engine.plan import FilePlan, Memory\n"
        "plan = FilePlan(os.fsencode(sys.argv[1]), b'header', [])\n"
        "Engine().submit([plan], keep_alive=None, amend=lambda _: os.kill(os.getpid(), 9)).result()"
    )
    assert subprocess.run([sys.executable, "-c", script, path], cwd=Path(__file__).parent).returncode == -9
    assert names(path.parent) == []


def test_many_at_random(tmp_path: Path, new_engine: NewEngine) -> None:
    """As many as an archive of small tensors has."""
    chance = random.Random(7)
    data = noise(5 * SLOT)
    end = len(HEADER) + len(data) - 4
    amendments = [(chance.randrange(end), chance.randbytes(4)) for _ in range(5000)]
    path = tmp_path / "m"
    submit(new_engine(write_path="direct"), {path: [data]}, lambda _: [(0, *a) for a in amendments]).result()
    assert_same(path.read_bytes(), written_over(HEADER + data, *amendments))
