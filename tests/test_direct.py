# SPDX-License-Identifier: Apache-2.0
"""Files written past the page cache, by io_uring and by threads, and files of which the page cache keeps nothing."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import random
import signal
import stat
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path

import forked
import pytest
import safetensors.torch as reference
import torch
from conftest import BUDGET, assert_same
from helpers import filled, names, open_descriptors, preload, run, same

import fastshard
from fastshard import Options, _native, save_file, save_files
from fastshard.engine.engine import IO_URING_VARIABLE, Engine
from fastshard.engine.plan import FETCHED, HOST, FilePlan, TensorView

pytestmark = pytest.mark.usefixtures("no_hang")

KIB, MIB = 1 << 10, 1 << 20
PAGE = 4096
CHUNK = 256 * KIB  # of an engine with the smallest budget
TENSORS = {"a": filled((3 * MIB + 5,), torch.uint8), "b": filled((100, 7), torch.float64, 1)}
OTHERS = {"a": torch.full((1000,), 7.0)}

NewEngine = Callable[..., Engine]


@pytest.fixture(autouse=True)
def direct_io(tmp_path: Path) -> None:
    """Skips the test where the temporary folder's filesystem has no direct I/O."""
    answers = dict(_native.probe(str(tmp_path)))
    if _native.filesystem(str(tmp_path))[0] == "tmpfs" or not any(
        name.startswith("direct I/O") and answer == "yes" for name, answer in answers.items()
    ):
        pytest.skip("no direct I/O in the temporary folder")


@pytest.fixture(params=["io_uring", "threads"])
def engines(
    request: pytest.FixtureRequest, new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch
) -> NewEngine:
    """Makes engines that write directly, either way."""
    if request.param == "threads":
        monkeypatch.setenv(IO_URING_VARIABLE, "0")
    elif _native.io_uring_refusal() != 0:
        pytest.skip("io_uring is not allowed here")
    return lambda **options: new_engine(**{"write_path": "direct", **options})


def saved(engine: Engine, path: Path, *parts: bytes) -> bytes:
    """What becomes of these parts, written directly."""
    views = [
        TensorView(ctypes.cast(part, ctypes.c_void_p).value or 0, len(part), HOST) for part in parts if part
    ]
    stats = engine.submit([FilePlan(os.fsencode(path), b"", views)], keep_alive=parts).result()
    assert stats.write_path == "direct"
    return path.read_bytes()


# The same bytes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [BUDGET, 4 * MIB])
def test_sizes_around_blocks_and_chunks(engines: NewEngine, path: Path, budget: int) -> None:
    engine = engines(memory_budget=budget)
    data = random.Random(0).randbytes(5 * CHUNK + PAGE + 1)
    for blocks in (0, 1, 2, CHUNK // PAGE, 4 * CHUNK // PAGE, 5 * CHUNK // PAGE):
        for nbytes in range(blocks * PAGE - 1, blocks * PAGE + 2):
            if nbytes >= 0:
                assert_same(saved(engine, path, data[:nbytes]), data[:nbytes])


def test_many_parts(engines: NewEngine, path: Path) -> None:
    draw = random.Random(1)
    parts = [draw.randbytes(draw.choice([1, 7, 300, PAGE, 70_000])) for _ in range(3000)]
    assert_same(saved(engines(), path, *parts), b"".join(parts))
    ones = [draw.randbytes(1) for _ in range(3 * PAGE)]  # more than max_ops in a block
    assert_same(saved(engines(), path, *ones), b"".join(ones))


def test_files_share_few_slots(engines: NewEngine, tmp_path: Path) -> None:
    files = {
        tmp_path / f"{i}.safetensors": {"a": filled((i * 300_000 + i,), torch.uint8, i), "e": torch.empty(0)}
        for i in range(8)
    }
    for threads in (1, 4, 8):
        save_files(files, engine=engines(threads=threads), durable=threads == 4)
        assert all(same(path, tensors) for path, tensors in files.items())
        stats = fastshard.stats()
        assert stats is not None and (stats.write_path, stats.staging) == ("direct", "pageable")
        assert stats.staging_nbytes <= BUDGET


def test_strided(engines: NewEngine, path: Path) -> None:
    tensors = {"t": filled((700, 900), torch.int16).T, "h": filled((512, 2048))[:, :1024]}
    save_file(tensors, path, allow_strided=True, engine=engines())
    reference.save_file({k: v.contiguous() for k, v in tensors.items()}, path.with_name("reference"))
    assert_same(path.read_bytes(), path.with_name("reference").read_bytes())


def test_links_modes_and_no_padding(engines: NewEngine, tmp_path: Path) -> None:
    path, link = tmp_path / "m.safetensors", tmp_path / "link"
    path.write_bytes(b"old")
    path.chmod(0o440)
    link.symlink_to(path.name)
    save_file(TENSORS, link, engine=engines())
    assert not link.is_symlink() and same(link, TENSORS) and path.read_bytes() == b"old"
    save_file(TENSORS, path, engine=engines())
    assert stat.S_IMODE(path.stat().st_mode) == 0o440
    assert same(path, TENSORS)
    # No blocks are kept behind the end.
    assert path.stat().st_blocks * 512 <= (path.stat().st_size + PAGE - 1) // PAGE * PAGE


def test_from_a_device(engines: NewEngine, sim: object, tmp_path: Path) -> None:
    from test_cuda_path import noise, on_device, on_host, save, varied

    for threads in (1, 3):
        files = {
            tmp_path / f"{i}": [*varied(sim, i, i), on_host(noise(40, 80).T), on_host(noise(9))]  # type: ignore[arg-type]
            for i in range(2)
        }
        stats = save(engines(threads=threads), files, durable=True)
        assert (stats.write_path, stats.staging) == ("direct", "pinned")
    sim.set_delay(0, 0)  # type: ignore[attr-defined]
    small = [on_device(sim, noise(1, seed=i)) for i in range(2 * PAGE)]  # type: ignore[arg-type]
    for path in files:
        path.unlink()
    save(engines(), {tmp_path / "small": small})


def test_a_device_that_fails(engines: NewEngine, sim: object, path: Path) -> None:
    from simcuda import Result
    from test_cuda_path import save, varied

    sources = varied(sim)  # type: ignore[arg-type]
    sim.fail("cuEventSynchronize", Result.UNKNOWN, nth=3)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError):
        save(engines(), {path: sources})
    assert names(path.parent) == []


# What is refused, and what fails -------------------------------------------------------------------------

SAVE = """
import json
tensors = {str(i): torch.full((1 << 17,), float(i)) for i in range(24)}
found = {}
try:
    save_file(tensors, sys.argv[1], engine=Options(write_path="direct", memory_budget=1 << 20))
    found = {"path": stats().write_path, "fallbacks": stats().fallbacks}
except SaveError as error:
    found = {"errno": error.errno, "filename": error.filename}
print(json.dumps(found))
"""


def save_with(library: Path, refuse: str, path: Path, **variables: str) -> dict[str, object]:
    done = run(SAVE, path, env={**preload(library, refuse), **variables})
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    if "errno" not in found:
        loaded = reference.load_file(path)
        assert all((loaded[str(i)] == i).all() for i in range(24))
    return found


@pytest.mark.parametrize("refuse", ["direct", "direct:22", "pwrite@1:22", "pwrite@1 tmpfile"])
def test_refused_direct_io_is_buffered(path: Path, preloaded: Path, refuse: str) -> None:
    found = save_with(preloaded, refuse, path)
    assert found["path"] == "buffered"
    assert any("O_DIRECT refused" in text for text in found["fallbacks"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS])
def test_refused_io_uring_is_threads(path: Path, preloaded: Path, code: int) -> None:
    found = save_with(preloaded, f"io_uring:{code}", path)
    assert (found["path"], found["fallbacks"]) == ("direct", [f"io_uring refused: {os.strerror(code)}"])


@pytest.mark.parametrize("refuse", ["", "fallocate", "tmpfile", "short", "pwrite@4:4 pwrite@5:11"])
def test_short_and_interrupted_writes_and_other_fallbacks(path: Path, preloaded: Path, refuse: str) -> None:
    for uring in "01":
        found = save_with(preloaded, refuse, path, **{IO_URING_VARIABLE: uring})
        assert found["path"] == "direct"


@pytest.mark.parametrize("refuse", ["pwrite@5:5", "pwrite@1:5", "pwrite@1:28", "fallocate:28"])
def test_failed_writes_leave_the_old_file(path: Path, preloaded: Path, refuse: str) -> None:
    save_file(OTHERS, path)
    found = save_with(preloaded, refuse, path, **{IO_URING_VARIABLE: "0"})
    assert found == {"errno": int(refuse.split(":")[1]), "filename": str(path)}
    assert same(path, OTHERS) and names(path.parent) == [path.name]


@pytest.mark.parametrize("uring", "01")
def test_a_write_that_fails_in_the_middle(path: Path, preloaded: Path, uring: str) -> None:
    """At the limit of a file's size: a short write, then an error."""
    save_file(OTHERS, path)
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ((5 << 20) + 8192,) * 2)\n" + SAVE
    done = run(limited, path, env={**preload(preloaded, "fallocate"), IO_URING_VARIABLE: uring})
    assert json.loads(done.stdout) == {"errno": errno.EFBIG, "filename": str(path)}, done.stderr
    assert same(path, OTHERS) and names(path.parent) == [path.name]


def test_memory_backed_filesystems_are_buffered() -> None:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no /dev/shm here")
    path = Path(f"/dev/shm/fastshard-test-{os.getpid()}")
    try:
        save_file(TENSORS, path, engine=Options(write_path="direct"), keep_cached=False)
        assert same(path, TENSORS)
        stats = fastshard.stats()
        assert stats is not None and stats.write_path == "buffered"
        assert any("O_DIRECT" in text for text in stats.fallbacks)
    finally:
        path.unlink(missing_ok=True)


def test_no_descriptors_or_threads_leak(engines: NewEngine, path: Path) -> None:
    def count() -> tuple[int, int]:
        return len(open_descriptors()), len(os.listdir("/proc/self/task"))

    engine = engines(threads=1)
    save_file(TENSORS, path, engine=engine)
    before = count()
    for _ in range(5):
        save_file(TENSORS, path, engine=engine)
    deadline = time.monotonic() + 5  # the kernel ends its workers in its own time
    while (after := count()) > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert after[0] <= before[0] and after[1] <= before[1] + 4


# Stopped in the middle -----------------------------------------------------------------------------------


def test_cancel(engines: NewEngine, path: Path) -> None:
    data = bytes(64 * MIB)
    engine = engines()
    view = TensorView(ctypes.cast(data, ctypes.c_void_p).value or 0, len(data), HOST)
    plan = FilePlan(os.fsencode(path), b"", [view, TensorView(0, 8, FETCHED)])  # it waits for the last bytes
    future = engine.submit([plan], keep_alive=data, fetch=lambda *_: None, serve=False)
    assert future.cancel()
    with pytest.raises(CancelledError):
        future.result()
    assert names(path.parent) == []
    save_file(TENSORS, path, engine=engine)
    assert same(path, TENSORS)


@pytest.mark.parametrize("uring", "01")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_signals_in_the_middle(path: Path, uring: str, how: signal.Signals) -> None:
    script = """
import sys, torch, signal
from fastshard import *
signal.signal(signal.SIGINT, signal.default_int_handler)
tensors = {str(i): torch.full((1 << 20,), 3.0) for i in range(32)}
engine = Options(write_path="direct")
save_file(tensors, sys.argv[1], engine=engine)
print("ready", flush=True)
try:
    while True:
        save_file(tensors, sys.argv[1], engine=engine)
except KeyboardInterrupt:
    sys.exit(3)
"""
    with forked.started(script, path, env={**os.environ, IO_URING_VARIABLE: uring}) as (child, output):
        assert output.readline() == "ready\n"
        time.sleep(0.1)
        child.send_signal(how)
        assert child.wait(timeout=300) == (3 if how == signal.SIGINT else -how)
    loaded = reference.load_file(path)
    assert len(loaded) == 32 and all((tensor == 3).all() for tensor in loaded.values())
    left = [name for name in names(path.parent) if name != path.name]
    assert len(left) <= (how == signal.SIGKILL) and all(name.startswith(".fastshard-") for name in left)


def test_fork_while_a_save_runs(tmp_path: Path) -> None:
    script = """
    import threading, warnings
    warnings.simplefilter("ignore")  # Python 3.12 warns of forking with threads
    engine = Options(write_path="direct")
    tensors = {str(i): torch.full((1 << 20,), 5.0) for i in range(8)}
    save_file(tensors, sys.argv[1] + "/parent", engine=engine)
    stop = threading.Event()
    def saves():
        while not stop.is_set():
            save_file(tensors, sys.argv[1] + "/parent", engine=engine)
    thread = threading.Thread(target=saves)
    thread.start()
    status = []
    for number in range(3):
        child = os.fork()
        if child == 0:
            save_file(tensors, f"{sys.argv[1]}/child{number}", engine=engine)
            sys.exit(0)
        status.append(os.waitpid(child, 0)[1])
    stop.set()
    thread.join()
    print(status)
    """
    done = run(script, tmp_path)
    assert done.stdout.splitlines()[-1] == "[0, 0, 0]", done.stderr
    assert names(tmp_path) == ["child0", "child1", "child2", "parent"]
    for name in names(tmp_path):
        loaded = reference.load_file(tmp_path / name)
        assert len(loaded) == 8 and all((tensor == 5).all() for tensor in loaded.values())


# When it is chosen ---------------------------------------------------------------------------------------


def test_choice(tmp_path: Path) -> None:
    def chosen(**what: object) -> str:
        return _native.filesystem(str(tmp_path), **what)[1]  # type: ignore[arg-type]

    if _native.filesystem(str(tmp_path))[0] not in ("ext4", "xfs"):
        pytest.skip("only a choice on filesystems known")
    assert chosen() == "buffered"
    assert chosen(durable=True, nbytes=MIB) == chosen(keep_cached=False, nbytes=MIB) == "buffered"
    assert chosen(durable=True) == chosen(past_cache=True, nbytes=MIB) == "buffered"
    assert chosen(durable=True, from_device=True) == chosen(keep_cached=False) == "direct"
    assert chosen(past_cache=True) == chosen(past_cache=True, durable=True) == "direct"
    assert chosen(write_path="buffered", keep_cached=False) == "buffered"
    assert chosen(write_path="buffered", past_cache=True) == "buffered"


def test_a_large_save_that_leaves_nothing_cached_is_direct(tmp_path: Path) -> None:
    chosen = _native.filesystem(str(tmp_path), keep_cached=False)[1]
    large = {str(i): filled((MIB + i,), torch.uint8, i) for i in range(17)}
    for tensors, write_path in ((large, chosen), (TENSORS, "buffered")):
        save_file(tensors, tmp_path / "m", keep_cached=False)
        stats = fastshard.stats()
        assert stats is not None and stats.write_path == write_path
        assert same(tmp_path / "m", tensors)


# A save that nobody waits for ----------------------------------------------------------------------------


@pytest.fixture
def chosen_by_itself(tmp_path: Path) -> None:
    if _native.filesystem(str(tmp_path))[0] not in ("ext4", "xfs"):
        pytest.skip(
            "saves go past the page cache by themselves on ext4 and XFS only, and this is another filesystem"
        )


def in_files(folder: Path) -> tuple[dict[Path, dict[str, torch.Tensor]], int]:
    """Tensors of odd sizes for two files, and all bytes of the files."""
    files = {
        folder / f"{i}.safetensors": {
            str(n): filled((3 * MIB + n * i,), torch.uint8, 10 * i + n) for n in range(8)
        }
        for i in (1, 3)
    }
    return files, sum(len(reference.save(tensors)) for tensors in files.values())


@pytest.mark.usefixtures("chosen_by_itself")
@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("checksums", [False, True])
def test_a_snapshot_is_written_from_where_it_lies(tmp_path: Path, checksums: bool, durable: bool) -> None:
    """Past the page cache, and without a copy of its own: only the two ends of each file are staged."""
    files, nbytes = in_files(tmp_path)
    with Engine(Options(memory_budget="4MiB")) as engine:
        future = fastshard.save_files_async(files, checksums=checksums, durable=durable, engine=engine)
        stats = future.result()
    assert (stats.write_path, stats.fallbacks, stats.nbytes) == ("direct", (), nbytes)
    assert 0 < stats.staging_nbytes <= 4 * CHUNK
    for path, tensors in files.items():
        assert pages_cached(path, exactly=False) <= 1  # the last page, which is cut
        assert same(path, tensors)


def test_what_has_no_copy_goes_through_the_page_cache(tmp_path: Path) -> None:
    """It would have to be staged, which is not worth it."""
    files, _ = in_files(tmp_path)
    stats = fastshard.save_files_async(files, snapshot="none").result()
    assert (stats.write_path, stats.staging_nbytes) == ("buffered", 0)


@pytest.mark.usefixtures("chosen_by_itself")
def test_an_archive_is_written_from_where_its_snapshot_lies(tmp_path: Path) -> None:
    state = {str(n): filled((MIB + 1000 * n,), torch.float32, n) for n in range(6)}
    with Engine(Options(memory_budget="4MiB")) as engine:
        stats = fastshard.torch_save_async(state, tmp_path / "a.pt", engine=engine).result()
    assert (stats.write_path, stats.fallbacks) == ("direct", ())
    assert stats.staging_nbytes <= 2 * CHUNK
    (tmp_path / "expected").mkdir()
    torch.save(state, tmp_path / "expected" / "a.pt")  # the name is in the archive
    assert_same((tmp_path / "a.pt").read_bytes(), (tmp_path / "expected" / "a.pt").read_bytes())


@pytest.mark.usefixtures("chosen_by_itself")
@pytest.mark.parametrize("manifest", [True, "sha256"])
def test_digests_bring_nothing_into_the_page_cache(tmp_path: Path, manifest: bool | str) -> None:
    tensors = {str(n): filled((3 * MIB + n,), torch.uint8, n) for n in range(8)}
    with fastshard.asynchronous() as saves:
        fastshard.save_torch_state_dict(tensors, tmp_path, max_shard_size="12MB", manifest=manifest)
    saves.wait()
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1 and all(pages_cached(path, exactly=False) <= 1 for path in shards)
    assert fastshard.verify(tmp_path).ok


def test_a_snapshot_without_room_to_spare_is_staged(tmp_path: Path) -> None:
    """The budget is kept to the byte: where the snapshot cannot lie as in its file, it is still written."""
    tensors = {str(n): filled((2 * MIB,), torch.uint8, n) for n in range(16)}
    with Engine(Options(snapshot_budget=32 * MIB, memory_budget="4MiB")) as engine:
        stats = fastshard.save_file_async(tensors, tmp_path / "a", engine=engine).result()
        assert (stats.snapshot, engine.arena.peak) == ("copy", 32 * MIB)
    assert same(tmp_path / "a", tensors)


# Nothing in the page cache -------------------------------------------------------------------------------


def pages_cached(path: Path, exactly: bool = True) -> int:
    """Pages of the file that are in the page cache, counted without bringing any in. ``exactly``: the kernel counts no
    others, as that of a block which was cut."""
    nbytes = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), nbytes) as mapping:
        residency = (ctypes.c_ubyte * ((nbytes + PAGE - 1) // PAGE))()
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), residency) == 0
        counted = sum(page & 1 for page in residency)
        if exactly:
            _cachestat(libc, file.fileno(), counted)
    return counted


def _cachestat(libc: ctypes.CDLL, fd: int, expected: int) -> None:
    """The kernel's own count agrees, where it has one (Linux 6.5)."""
    everything, found = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    if libc.syscall(ctypes.c_long(451), fd, everything, found, 0) == 0:
        assert found[0] == expected
        assert expected != 0 or (found[1], found[2]) == (0, 0)  # neither dirty nor under writeback


@pytest.fixture(params=["auto", "direct", "threads", "buffered", "mapped"])
def tidy_engine(
    request: pytest.FixtureRequest, new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch
) -> Engine:
    path = request.param
    if path == "threads":
        monkeypatch.setenv(IO_URING_VARIABLE, "0")
        path = "direct"
    return new_engine(write_path=path, memory_budget=4 * MIB)


@pytest.mark.parametrize("durable", [False, True])
def test_nothing_is_left_in_the_page_cache(tidy_engine: Engine, tmp_path: Path, durable: bool) -> None:
    large = {f"{i}": filled((2 * MIB + i,), torch.uint8, i) for i in range(12)}
    for number, tensors in enumerate([large, TENSORS, OTHERS]):
        files = {tmp_path / f"{number}{i}": tensors for i in range(2)}
        for _ in range(2):  # new files, and replaced ones
            save_files(files, durable=durable, keep_cached=False, engine=tidy_engine)
            assert [pages_cached(path) for path in files] == [0, 0]
        assert all(same(path, tensors) for path in files)
        assert all(pages_cached(path) > 0 for path in files)  # so pages are counted


def test_the_default_keeps_a_buffered_file_cached(path: Path, new_engine: NewEngine) -> None:
    save_file(TENSORS, path, engine=new_engine(write_path="buffered"))
    assert pages_cached(path) == (path.stat().st_size + PAGE - 1) // PAGE


def test_nothing_cached_of_a_model(path: Path) -> None:
    fastshard.save_model(torch.nn.Linear(100, 100), path, keep_cached=False)
    assert pages_cached(path) == 0


@pytest.mark.parametrize("refuse", ["direct", "fallocate", "tmpfile rename exchange"])
def test_nothing_cached_after_fallbacks(path: Path, preloaded: Path, refuse: str) -> None:
    script = """
    tensors = {str(i): torch.full((1 << 20,), float(i)) for i in range(8)}
    save_file(tensors, sys.argv[1], keep_cached=False)
    print(stats().write_path)
    """
    done = run(script, path, env=preload(preloaded, refuse))
    assert done.stdout.split() == ["buffered" if refuse == "direct" else "direct"], done.stderr
    assert pages_cached(path) == 0
