# SPDX-License-Identifier: Apache-2.0
"""Saves that a forked process writes: the files hold what the tensors were when the save began.

Where it matters how far that process has come, each of its writes waits for the test (``faults.calls.Holding``).
"""

from __future__ import annotations

import array
import errno
import mmap
import os
import re
import resource
import signal
import subprocess
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch as reference
import torch
from conftest import assert_same
from faults import calls
from forked import run, started
from forked_writes import HEADER, MIB, children, large, plan, submit, view, views
from helpers import filled, names, open_descriptors
from simcuda import SimCuda
from test_cuda_path import noise, on_device, on_host
from test_direct import pages_cached

from fastshard import Engine, Options, SaveError, _native, save_file, save_file_async, torch_save_async
from fastshard.engine.background import Wanted
from fastshard.engine.plan import FETCHED, ForeignFile, Link, Memory, TensorView, WriteItem
from fastshard.engine.planning import lay_out
from fastshard.mapped import load_mapped

pytestmark = pytest.mark.usefixtures("no_hang")
watched = pytest.mark.skipif(bool(calls.refusal()), reason=calls.refusal())

PRELUDE = """
import contextlib, errno, os, signal, sys, threading, time, zlib
from concurrent.futures import CancelledError
import torch
from faults.calls import Holding
from forked_writes import *
from fastshard import Engine, Options, SaveError, _native
from fastshard.engine.plan import FilePlan, SaveOptions
from helpers import filled
def fail(*error):
    sys.__excepthook__(*error)
    os._exit(1)  # without waiting for what is held
sys.excepthook = fail
engine = Engine(Options(threads=2))
path = sys.argv[1]
def bytes_of(*tensors):
    return HEADER + b"".join(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
def contents(path=path):
    with open(path, "rb") as file:
        return file.read()
"""


def script(text: str, *arguments: object, **options: object) -> list[str]:
    """The lines that the script says."""
    found = run(PRELUDE + text, *arguments, **options)  # type: ignore[arg-type]
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout.splitlines()


VALUES = """
kind = sys.argv[2]
def made():
    if kind == "contiguous":
        return [*large(2), filled((5,), torch.uint8, 2), large(1)[0][:MIB + 1]], None
    if kind == "strided":
        wide = filled((512, 8192), torch.float32, 4)
        return [wide[:, 4096:], wide[:, :64], wide.view(-1)[:1000].view(10, 100).t(), filled((700, 900)).t()], None
    if kind == "cast":
        return [t.to(torch.float32) for t in (filled((2000, 1000), torch.int16), filled((999, 7), torch.int8).t())], torch.bfloat16
    if kind == "small":
        return [filled((n % 97,), torch.float32, n) for n in range(3000)], None
tensors, dtype = made()
items = views({f"{n:04}": t for n, t in enumerate(tensors)}, dtype) if dtype else [view(t) for t in tensors]
expected = bytes_of(*[t.to(dtype) if dtype else t for t in tensors])
writes = Holding("pwritev")
future = submit(engine, [plan(path, items)], tensors, checksums=True)
assert future._native.read()
held = writes.next()  # of the first bytes: it has read no more than these
assert held.thread == process_of(future) != os.getpid() and held.thread in children()
for tensor in tensors:
    tensor.fill_(77)
writes.answer(held)
writes.answer_all()
stats = future.result()
assert contents() == expected
assert [zlib.crc32(HEADER)] + future.checksums()[0] == future._native.checksums()[0]
offset = len(HEADER)
for checksum, item in zip(future.checksums()[0], items, strict=True):
    assert checksum == zlib.crc32(expected[offset:offset + item.nbytes])
    offset += item.nbytes
print(stats.write_path, stats.staging, stats.fallbacks, stats.nbytes == len(expected), children())
"""


@watched
@pytest.mark.parametrize("kind", ["contiguous", "strided", "cast", "small"])
def test_the_file_holds_what_the_tensors_were(folder: Path, kind: str) -> None:
    staging = "pageable" if kind in ("strided", "cast") else "none"
    expected = f"buffered {staging} () True []"
    assert script(VALUES, folder / "weights", kind) == [expected]


def test_several_files_appear_together(folder: Path, new_engine: Callable[..., Engine]) -> None:
    tensors = [filled((n * MIB // 4 + n,), torch.uint8, n) for n in range(1, 6)]
    expected = [HEADER + bytes(tensor.tolist()) for tensor in tensors]
    for threads in (1, 3):
        files = [plan(folder / f"{n}", [tensor]) for n, tensor in enumerate(tensors)]
        before = [tensor.clone() for tensor in tensors]
        future = submit(new_engine(threads=threads), files, tensors, durable=threads == 1)
        for tensor in tensors:
            tensor.fill_(threads)
        future.result()
        for n, data in enumerate(expected):
            assert_same((folder / f"{n}").read_bytes(), data)
        for tensor, was in zip(tensors, before, strict=True):
            tensor.copy_(was)
    assert names(folder) == [str(n) for n in range(5)]


def test_bytes_that_are_known_last(path: Path, new_engine: Callable[..., Engine]) -> None:
    """As the checksums of an archive."""
    tensors = [filled((3 * MIB,), torch.uint8, 1), filled((1000, 3), torch.uint8, 2).t()]
    data = [bytes(t.contiguous().view(-1).tolist()) for t in tensors]

    def amend(checksums: list[list[int]]) -> list[tuple[int, int, bytes]]:
        assert not path.exists()
        return [(0, 2, checksums[0][1].to_bytes(4, "little"))]

    future = submit(new_engine(), [plan(path, tensors)], tensors, checksums=True, amend=amend)
    for tensor in tensors:
        tensor.zero_()
    future.result()
    crc = zlib.crc32(data[1]).to_bytes(4, "little")
    assert_same(path.read_bytes(), HEADER[:2] + crc + HEADER[6:] + b"".join(data))


def test_others_files_and_links(tmp_path: Path, new_engine: Callable[..., Engine]) -> None:
    """Parts of a file that somebody else publishes, and names of files that exist."""
    theirs = tmp_path / "theirs"
    theirs.write_bytes(b"." * (2 * MIB + 200))
    tensor = filled((2 * MIB,), torch.uint8)
    expected = bytes(tensor.tolist())
    (tmp_path / "old").write_bytes(b"linked")
    foreign = plan("", [WriteItem(view(tensor), 100)], size=2 * MIB + 200)
    foreign = foreign._replace(target=ForeignFile(os.fsencode(theirs)))
    link = foreign._replace(
        target=Link(os.fsencode(tmp_path / "new"), os.fsencode(tmp_path / "old")),
        header=b"",
        items=[],
        size=None,
    )
    future = submit(new_engine(), [foreign, link], tensor)
    tensor.zero_()
    future.result()
    assert_same(theirs.read_bytes(), HEADER + b"." * (100 - len(HEADER)) + expected + b"." * 100)
    assert (tmp_path / "new").samefile(tmp_path / "old")


MEMORY = """
tensors = large()
twice = large(1)[0] + 0.5
wanted = bytes_of(*tensors, twice), bytes_of(twice, twice[:1000])
total = sum(len(data) for data in wanted)
writes = Holding("pwritev")
future = submit(engine, [plan(path, [*tensors, twice]), plan(path + ".2", [twice, twice[:1000]])], tensors)
held = writes.next()
before = resident(held.thread)
assert dropped(future) == future.progress().nbytes_written == 0
seen = []
for _ in range(4):
    writes.answer(held)
    held = writes.next()
    seen.append(dropped(future) // MIB)
assert seen == sorted(seen) and 16 <= seen[0] + 4 and seen[-1] >= 64 - 4, seen
assert before - resident(held.thread) >= 60 * MIB
while future.progress().nbytes_written < 64 * MIB:  # this process looks from time to time
    time.sleep(0.001)
for tensor in tensors:
    tensor.zero_()
# What lies in two files is given back when both have it.
first = held.arguments[0]
while held.arguments[0] == first:
    writes.answer(held)
    held = writes.next()
assert dropped(future) // MIB == 63, dropped(future)
twice.zero_()
writes.answer(held)
writes.answer_all()
future.result()
assert dropped(future) // MIB == 79, dropped(future)
assert (contents(), contents(path + ".2")) == wanted
"""


@watched
def test_written_memory_is_given_back(folder: Path) -> None:
    script(MEMORY, folder / "weights")


ALONE = """
signal.signal(signal.SIGCHLD, signal.SIG_IGN if sys.argv[2] == "ignored" else lambda *_: print("signal"))
reader, writer = os.pipe()
tensors = large()
expected = bytes_of(*tensors)
writes = Holding("pwritev")
future = submit(engine, [plan(path, tensors)], tensors)
held = writes.next()
process = process_of(future)
os.close(writer)
assert os.read(reader, 1) == b""  # nobody else has the other end
for wait in (os.wait, lambda: os.waitpid(-1, os.WNOHANG)):
    try:
        print(wait())
    except ChildProcessError:
        pass
with open(f"/proc/{process}/oom_score_adj") as file:
    assert file.read().strip() == "1000"
status = dict(line.split(":", 1) for line in open(f"/proc/{process}/status").read().splitlines())
assert int(status["SigBlk"], 16) | 1 << 8 | 1 << 18 | 3 << 31 >= 0x7fffffffffffffff ^ (1 << 8 | 1 << 18 | 3 << 31), status["SigBlk"]
assert status["Threads"].strip() == "1"
writes.answer(held)
writes.answer_all()
future.result()
assert children() == [] and process_of(future) == 0 and contents() == expected
assert not os.path.exists(f"/proc/{process}")
"""


@watched
@pytest.mark.parametrize("signals", ["ignored", "handled"])
def test_nobody_notices_the_process(path: Path, signals: str) -> None:
    """Neither a signal nor a wait for any child, and it keeps nothing open that this process closes."""
    assert script(ALONE, path, signals) == []


ENDED = """
how = sys.argv[2]
with open(path, "wb") as file:
    file.write(b"old")
tensors = large()
writes = Holding("pwritev")
future = submit(engine, [plan(path, tensors), plan(path + ".2", tensors[:1])], tensors)
writes.answer(writes.next())
held = writes.next()
process = process_of(future)
if how == "cancelled":
    assert future.cancel()
elif how == "interrupted":
    def interrupt(*_):
        raise KeyboardInterrupt
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
elif how.isdigit():
    writes.answer(held, int(how))
else:
    os.kill(process, signal.SIGKILL)
try:
    future.result()
except SaveError as error:
    print(type(error).__name__, error.errno, error.filename == path, error.strerror)
except BaseException as error:
    print(type(error).__name__)
print(future.done(), children(), process_of(future), contents(), sorted(os.listdir(os.path.dirname(path))))
writes.answer_all()
submit(engine, [plan(path, tensors)], tensors).result()
assert contents() == bytes_of(*tensors)
"""
REST = "True [] 0 b'old' ['weights']"


@watched
@pytest.mark.parametrize(
    ("how", "error"), [("cancelled", "CancelledError"), ("interrupted", "KeyboardInterrupt")]
)
def test_a_save_that_is_stopped_leaves_the_old_file(folder: Path, how: str, error: str) -> None:
    assert script(ENDED, folder / "weights", how) == [error, REST]


@watched
def test_a_process_that_is_killed_is_an_error_that_says_so(folder: Path) -> None:
    told, rest = script(ENDED, folder / "weights", "killed")
    said = f"{os.strerror(errno.ECHILD)}; the forked process that wrote the file was killed by signal 9"
    assert told == f"SaveError {errno.ECHILD} True {said}, as the kernel does when memory runs out"
    assert rest == REST


@watched
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_there_fails_the_save(folder: Path, code: int) -> None:
    told, rest = script(ENDED, folder / "weights", code)
    assert told.startswith(f"SaveError {code} True {os.strerror(code)}")
    assert ("64.0 MiB needed for this file (80.0 MiB for all of the save)" in told) == (code == errno.ENOSPC)
    assert rest == REST


INTERRUPTED_CALLS = """
tensors = large()
expected = bytes_of(*tensors)
writes = Holding("pwritev")
future = submit(engine, [plan(path, tensors)], tensors)
for _ in range(3):
    writes.answer(writes.next(), errno.EINTR)
writes.answer_all()
future.result()
assert contents() == expected
"""


@watched
def test_a_write_that_is_interrupted_is_made_again(path: Path) -> None:
    script(INTERRUPTED_CALLS, path)


LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (20 * MIB, resource.RLIM_INFINITY))
tensors = large()
try:
    submit(engine, [plan(path, tensors)], tensors).result()
except SaveError as error:
    print(error.errno, error.filename == path, os.listdir(os.path.dirname(path)), children())
"""


def test_a_write_that_the_kernel_refuses(memory: Path) -> None:
    """Where no space is reserved, the process that writes is the first to learn of it."""
    assert script(LIMITED, memory / "weights") == [f"{errno.EFBIG} True [] []"]


REFUSED = """
what, code = sys.argv[2], int(sys.argv[3])
with open(path, "wb") as file:
    file.write(b"old")
tensors = large(1)
if what == "clone":
    # The one that copies the process: CLONE_FILES alone. Threads are let go.
    Holding("clone").answer_all(lambda held: code if held.arguments[0] == 0x400 else 0)
else:
    import resource
    os.setresuid(65534, 65534, 65534)
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
for held in (False, True):
    try:
        future = submit(engine, [plan(path, tensors)], tensors, held=held)
        future._native.begin()
    except _native.NotForked as error:
        print(error, error.items)
    if held:
        assert future.cancel() and future.cancelled()
    future = None
    print(contents(), sorted(os.listdir(os.path.dirname(path))), children())
if what == "clone":
    engine.submit([plan(path, tensors)], keep_alive=tensors).result()
    assert contents() == bytes_of(*tensors)
"""


@watched
@pytest.mark.parametrize("code", [errno.EPERM, errno.EAGAIN, errno.ENOMEM, errno.ENOSYS])
def test_where_no_process_is_to_be_had_nothing_has_begun(folder: Path, code: int) -> None:
    said = [f"clone refused: {os.strerror(code)} []", "b'old' ['weights'] []"]
    assert script(REFUSED, folder / "weights", "clone", code) == said * 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_where_no_thread_is_to_be_had_nothing_has_begun(public: Path) -> None:
    public.chmod(0o777)
    (public / "weights").write_bytes(b"")
    (public / "weights").chmod(0o666)
    said = [f"thread refused: {os.strerror(errno.EAGAIN)} []", "b'old' ['weights'] []"]
    assert script(REFUSED, public / "weights", "thread", 0) == said * 2


@pytest.fixture
def not_inherited() -> Iterator[torch.Tensor]:
    """Memory as drivers make it that lock pages."""
    memory = mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)
    yield torch.frombuffer(memory, dtype=torch.uint8)


def test_memory_that_is_not_inherited_is_named(
    folder: Path, new_engine: Callable[..., Engine], not_inherited: torch.Tensor
) -> None:
    before = children(), open_descriptors()
    files = [
        plan(folder / "0", [filled((9,))]),
        plan(folder / "1", [filled((9,)), not_inherited, filled((9,))]),
    ]
    assert _native.not_forkable(files) == [[], []]  # which cannot be known before
    with pytest.raises(_native.NotForked, match="does not have") as raised:
        submit(new_engine(), files)
    assert raised.value.items == [[], [1]]
    assert (names(folder), (children(), open_descriptors())) == ([], before)


def test_what_cannot_be_forked(tmp_path: Path, new_engine: Callable[..., Engine]) -> None:
    (tmp_path / "file").write_bytes(bytes(MIB))
    shared = torch.from_file(str(tmp_path / "file"), shared=True, size=MIB, dtype=torch.uint8)
    private = torch.from_file(str(tmp_path / "file"), shared=False, size=MIB, dtype=torch.uint8)
    tensors = {
        "a": filled((1000,)),
        "b": filled((1000,)).share_memory_(),
        "c": torch.empty(0).share_memory_(),
        "d": shared[MIB // 2 :],
        "e": private,
        "f": filled((10, 1000)).share_memory_()[:, 3:5],
    }
    items = [view(tensor) for tensor in tensors.values()]
    elsewhere = [TensorView(0, 5, FETCHED), TensorView(4096, 5, 0)]
    native = lay_out(tensors, allow_strided=True).items
    assert isinstance(native, _native.Layout)
    layout = plan(tmp_path / "c", [])._replace(items=native)
    names_of = native.names()
    files = [plan(tmp_path / "a", items), plan(tmp_path / "b", elsewhere), layout]
    found = _native.not_forkable(files)
    assert found[:2] == [[1, 3, 5], [0, 1]]
    assert {names_of[index] for index in found[2]} == {"b", "d", "f"}
    with pytest.raises(_native.NotForked, match="no copy of") as raised:
        submit(new_engine(), files[:1], tensors)
    assert raised.value.items == found[:1]
    memory = torch.empty(len(HEADER), dtype=torch.uint8)
    with pytest.raises(_native.NotForked):
        submit(new_engine(), [plan("", [])._replace(target=Memory(memory.data_ptr(), len(HEADER)))])
    assert names(tmp_path) == ["file"]


def test_what_the_process_lacks_is_copied_first(
    path: Path, new_engine: Callable[..., Engine], not_inherited: torch.Tensor
) -> None:
    engine = new_engine()
    tensors = {"a": torch.arange(float(MIB)), "b": not_inherited, "c": filled((9,)).share_memory_()}
    expected = reference.save(tensors)
    for _ in range(2):
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        future = save_file_async(tensors, path, snapshot="fork", engine=engine)
        for tensor in tensors.values():
            tensor.fill_(1)
        figures = future.result()
        assert (figures.snapshot, figures.fallbacks) == ("fork", ())
        assert MIB < engine.arena.peak < 4 * MIB
        assert_same(path.read_bytes(), expected)
        for name, tensor in tensors.items():
            tensor.copy_(before[name])


def test_tensors_of_devices_are_copied_at_once(
    sim: SimCuda, path: Path, new_engine: Callable[..., Engine]
) -> None:
    engine = new_engine()
    sources = [on_device(sim, noise(3 * MIB)), on_host(noise(2 * MIB))]
    items = [source.view for source in sources]
    expected = HEADER + sources[0].packed + sources[1].packed
    figures = engine.submit(
        [plan(path, items)], keep_alive=sources, wanted=Wanted("fork", paths=frozenset((str(path),)))
    ).result()
    assert figures.snapshot == "copy"
    assert figures.fallbacks == ("no snapshot by a forked process: tensors of devices are copied anyway",)
    assert engine.arena.peak <= 6 * MIB  # once, in huge pages
    assert_same(path.read_bytes(), expected)


def test_an_archive(path: Path) -> None:
    """Whose checksums are those of the bytes that were written."""
    tensors = {f"{n}": torch.arange(float(MIB)) * n for n in range(4)}
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    future = torch_save_async(tensors, path, snapshot="fork")
    for tensor in tensors.values():
        tensor.zero_()
    assert future.result().snapshot == "fork"
    assert zipfile.ZipFile(path).testzip() is None
    loaded = torch.load(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_the_views_of_a_layout() -> None:
    tensors = {"b": filled((3, 4)), "a": filled((5, 6)).t(), "c": filled((2,), torch.float64)}
    for dtype in (None, torch.bfloat16):
        layout = lay_out(tensors, allow_strided=True, dtype=dtype).items
        assert isinstance(layout, _native.Layout)
        assert layout.views() == [layout.entry(index)[5] for index in range(3)]
        assert [TensorView._make(fields) for fields in layout.views()] == views(tensors, dtype)


def test_weights_that_lie_in_files(tmp_path: Path, new_engine: Callable[..., Engine]) -> None:
    """They are read from the tensors' own mapping: changed ones are what they were, too, and can be changed again."""
    made = {"a": filled((700_000,)), "b": filled((900, 1000)), "c": filled((10,), torch.uint8)}
    save_file(made, tmp_path / "source")
    tensors = load_mapped(tmp_path / "source")
    tensors["a"][100_000:200_000] = 1
    made["a"][100_000:200_000] = 1
    items = [view(tensors["a"]), view(tensors["b"].t()), view(tensors["c"])]
    future = submit(new_engine(), [plan(tmp_path / "saved", items)], tensors)
    for tensor in tensors.values():
        tensor.zero_()
    future.result()
    expected = [made["a"], made["b"].t().contiguous(), made["c"]]
    data = b"".join(tensor.view(-1).view(torch.uint8).numpy().tobytes() for tensor in expected)
    assert_same((tmp_path / "saved").read_bytes(), HEADER + data)


@pytest.mark.parametrize("write_path", ["auto", "direct", "mapped"])
def test_past_the_page_cache_it_says_what_it_does(
    tmp_path: Path, new_engine: Callable[..., Engine], write_path: str
) -> None:
    tensor = torch.arange(5 * MIB)[: 5 * MIB // 2]
    expected = HEADER + tensor.numpy().tobytes()
    for keep_cached in (True, False):
        path = tmp_path / str(keep_cached)
        future = submit(
            new_engine(write_path=write_path), [plan(path, [tensor])], tensor, keep_cached=keep_cached
        )
        stats = future.result()
        said = ("written through the page cache, as a forked process does it",)
        as_always = keep_cached or _native.filesystem(str(tmp_path))[0] == "tmpfs"
        assert stats.fallbacks == (() if as_always and write_path == "auto" else said)
        assert stats.write_path == "buffered"
        assert as_always or pages_cached(path) == 0
        assert_same(path.read_bytes(), expected)


def test_with_too_many_files_there_is_no_fork(tmp_path: Path, new_engine: Callable[..., Engine]) -> None:
    files = [plan(tmp_path / f"{n}", []) for n in range(150)]
    engine = new_engine()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    try:
        with pytest.raises(_native.NotForked, match="so many files"):
            submit(engine, files)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert names(tmp_path) == []
    submit(engine, files).result()
    assert len(names(tmp_path)) == 150


KILLED = """
tensors = large()
writes = Holding("pwritev")
future = submit(engine, [plan(path, tensors)], tensors)
writes.answer(writes.next())
writes.next()
os.kill(process_of(future), signal.SIGSTOP)  # or it would notice that nobody answers
print(process_of(future), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@watched
def test_the_process_ends_with_its_parent(folder: Path) -> None:
    (folder / "weights").write_bytes(b"old")
    with started(PRELUDE + KILLED, folder / "weights") as (child, output):
        process = int(output.readline())
        assert child.wait() == -signal.SIGKILL
    end = time.monotonic() + 300
    while time.monotonic() < end:
        try:
            with open(f"/proc/{process}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    break  # whoever inherits it has not waited for it yet
        except FileNotFoundError:
            break
        time.sleep(0.01)
    else:
        pytest.fail("it lives on")
    assert (names(folder), (folder / "weights").read_bytes()) == (["weights"], b"old")


LOCKED = """
import faulthandler
faulthandler.dump_traceback_later(100, exit=True)
tensors = [filled((300, 1000), torch.float32, n).t() for n in range(4)] + large(1)
expected = bytes_of(*tensors)
with busy_allocators():
    for n in range(40):
        future = submit(engine, [plan(path, tensors)], tensors, checksums=True)
        assert future.result().nbytes == len(expected)
        assert contents() == expected
assert children() == []
"""


def test_locks_that_other_threads_hold(path: Path) -> None:
    script(LOCKED, path)


FORKED = """
tensors = large()
expected = bytes_of(*tensors)
writes = Holding("pwritev")
future = submit(engine, [plan(path, tensors)], tensors)
held = writes.next()
process = process_of(future)
pid = os.fork()
if pid == 0:
    try:
        future.result()
    except RuntimeError as error:
        assert "parent" in str(error), error
    del future
    engine.close()
    os.kill(process, 0)  # it goes on
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
for tensor in tensors:
    tensor.zero_()
writes.answer(held)
writes.answer_all()
future.result()
assert contents() == expected and children() == []
"""


@watched
def test_a_fork_of_the_parents_own_meanwhile(path: Path) -> None:
    script(FORKED, path)


def test_saves_beside_each_other(folder: Path, new_engine: Callable[..., Engine]) -> None:
    """Forked ones and others, of one engine; then nothing of them is left."""
    engine = new_engine(threads=2)
    tensors = dict(enumerate(large()))
    expected = {name: HEADER + tensor.numpy().tobytes() for name, tensor in tensors.items()}
    before = children(), open_descriptors()
    futures = [
        submit(engine, [plan(folder / f"{name}", [tensor])], tensor) for name, tensor in tensors.items()
    ]
    futures += [
        engine.submit([plan(folder / f"{name}.plain", [tensor])], keep_alive=tensor)
        for name, tensor in tensors.items()
    ]
    for future in futures:
        future.result()
    del futures, future
    for name, data in expected.items():
        assert_same((folder / f"{name}").read_bytes(), data)
        assert_same((folder / f"{name}.plain").read_bytes(), data)
    assert (children(), open_descriptors()) == before


def test_nothing_of_the_module_is_looked_up_late() -> None:
    """A forked process must not need the dynamic loader, which has locks."""
    try:
        shown = subprocess.run(
            ["readelf", "-d", _native.__file__], capture_output=True, text=True, check=True
        ).stdout
    except FileNotFoundError:
        pytest.skip("no readelf here")
    assert "NOW" in shown


def test_engines_can_be_closed_while_a_process_writes(path: Path) -> None:
    tensors = large()
    expected = HEADER + b"".join(tensor.numpy().tobytes() for tensor in tensors)
    with Engine(Options(threads=1)) as engine:
        future = submit(engine, [plan(path, tensors)], tensors)
        native = engine._natives[None]
    native.close()
    assert future.result().nbytes == len(expected)
    assert_same(path.read_bytes(), expected)


def test_errors_before_the_fork_are_those_of_other_saves(
    tmp_path: Path, new_engine: Callable[..., Engine]
) -> None:
    with pytest.raises(SaveError) as raised:
        submit(new_engine(), [plan(tmp_path / "missing" / "weights", [filled((5,))])])
    assert raised.value.errno == errno.ENOENT
    with pytest.raises(ValueError, match="lies beyond|a gap"):
        submit(new_engine(), [plan(tmp_path / "weights", [WriteItem(view(filled((5,))), 100)])])


def _in_memory(tensor: torch.Tensor) -> int:
    """Pages of a tensor that the process has (Documentation/admin-guide/mm/pagemap.rst)."""
    first = -(-tensor.data_ptr() // mmap.PAGESIZE)
    count = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE - first
    with open("/proc/self/pagemap", "rb") as pages:
        pages.seek(8 * first)
        entries = array.array("Q", pages.read(8 * count))
    return sum(entry >> 63 for entry in entries)


def _huge(tensor: torch.Tensor) -> int:
    """Bytes in huge pages of the mapping that a tensor lies in, perhaps with others."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= tensor.data_ptr() < int(span[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    return 0


@pytest.mark.skipif(
    not _native.can_collapse(), reason="the kernel does not put memory together in huge pages"
)
def test_memory_is_put_together_for_the_next_fork(tmp_path: Path) -> None:
    """So that it has a page table to copy that is 512 times as small. What has no memory yet gets none by that."""
    changed = torch.ones(260 * MIB, dtype=torch.uint8)
    untouched = torch.frombuffer(mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE), dtype=torch.uint8)
    # It does not begin or end with a huge page, and the kernel takes some for shared that were.
    wanted = changed.nbytes // 4 * 3
    with Engine(Options(threads=1)) as engine:
        for value in (7, 8):
            changed.fill_(value)
            tensors = {"changed": changed, "untouched": untouched}
            future = save_file_async(tensors, tmp_path / "f", snapshot="fork", engine=engine)
            changed.fill_(0)  # which takes the huge pages apart again
            assert future.result().fallbacks == ()
            deadline = time.monotonic() + 300
            while _huge(changed) < wanted and time.monotonic() < deadline:
                time.sleep(0.02)
            assert _huge(changed) >= wanted
            assert _in_memory(untouched) == 0
            assert reference.load_file(tmp_path / "f")["changed"].eq(value).all()
