# SPDX-License-Identifier: Apache-2.0
"""Prepared saves: the same files as ever, whoever reads, removes, replaces, kills or forks meanwhile."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked
import pytest
import safetensors.torch as reference
import torch
from conftest import BUDGET, SLOT, assert_same
from helpers import PRELUDE, crc32, filled, names, preload, run, same
from simcuda import Result, SimCuda
from test_cuda_path import noise, on_device, on_host, varied

import fastshard
from fastshard import SaveError, prepare
from fastshard.engine.engine import Engine
from fastshard.engine.plan import FilePlan

MIB = 1 << 20
NewEngine = Callable[..., Engine]


def model(value: float = 0.0) -> dict[str, torch.Tensor]:
    """More than one chunk of a memory target, odd sizes, every element ``value``."""
    return {
        "large": torch.full((3 * MIB // 2 + 1,), value),
        "half": torch.full((513, 7), value, dtype=torch.bfloat16),
        "scalar": torch.full((), value),
        "empty": torch.empty(0, 3),
        **{f"small.{i}": torch.full((i + 1,), int(value), dtype=torch.int8) for i in range(50)},
    }


def fill(tensors: dict[str, torch.Tensor], value: float) -> None:
    for tensor in tensors.values():
        tensor.fill_(value)


# The same files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generations", [2, 3])
@pytest.mark.parametrize("threads", [1, 3])
def test_each_save_is_what_save_file_writes(
    folder: Path, new_engine: NewEngine, generations: int, threads: int
) -> None:
    path, tensors = folder / "m.safetensors", model()
    metadata = {"step": "many"}
    engine = new_engine(threads=threads)
    with prepare(tensors, path, metadata, generations=generations, engine=engine) as prepared:
        assert names(folder) == []
        for value in range(1, 2 * generations + 2):
            fill(tensors, value)
            stats = prepared.save()
            expected = reference.save(tensors, metadata)
            assert_same(path.read_bytes(), expected)
            assert prepared.nbytes == stats.nbytes == len(expected)
            assert (stats.write_path, stats.staging, stats.staging_nbytes) == ("standing", "none", 0)
    assert names(folder) == [path.name]
    assert_same(path.read_bytes(), reference.save(tensors, metadata))


def test_strided_tensors(folder: Path) -> None:
    base = filled((300, 4096), torch.float16)
    views = {"columns": base[:, 1000:3000], "other": base[:, 3000:].t(), "dense": filled((5, 5))}
    with pytest.raises(ValueError, match="non contiguous"):
        prepare({"t": torch.zeros(3, 5).t()}, folder / "m.safetensors")
    with prepare(views, folder / "m.safetensors", allow_strided=True) as prepared:
        for _ in range(3):
            base += 1
            prepared.save()
            dense = {name: tensor.contiguous() for name, tensor in views.items()}
            assert_same((folder / "m.safetensors").read_bytes(), reference.save(dense))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32])
def test_cast(folder: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.randn(700, 1000), "b": torch.randn(5000, dtype=torch.float16), "n": torch.arange(5)}
    with prepare(tensors, folder / "m.safetensors", dtype=dtype) as prepared:
        for _ in range(3):
            tensors["a"] += 1
            prepared.save()
            cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
            assert_same((folder / "m.safetensors").read_bytes(), reference.save(cast))


def test_checksums(folder: Path) -> None:
    tensors = model(1)
    with prepare(tensors, folder / "m.safetensors", checksums=True) as prepared:
        for value in (1, 2):
            fill(tensors, value)
            sums = prepared.save().checksums[str(folder / "m.safetensors")]
            assert sums == {name: crc32(t) for name, t in tensors.items()}


def test_no_tensors(folder: Path) -> None:
    with prepare({}, folder / "m.safetensors") as prepared:
        prepared.save()
        assert_same((folder / "m.safetensors").read_bytes(), reference.save({}))


def test_durable(folder: Path) -> None:
    tensors = model(3)
    with prepare(tensors, folder / "m.safetensors", durable=True) as prepared:
        for _ in range(3):
            assert prepared.save().sync_seconds > 0
    assert same(folder / "m.safetensors", tensors)


def test_stats_and_progress(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with prepare(model(), folder / "m.safetensors") as prepared:
        stats = prepared.save(progress=True)
        assert fastshard.stats() is not None and fastshard.stats().nbytes == stats.nbytes == prepared.nbytes  # type: ignore[union-attr]
    assert "m.safetensors" in capfd.readouterr().err


# Who reads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generations", [2, 4])
def test_a_reader_keeps_its_save_for_as_long_as_promised(folder: Path, generations: int) -> None:
    path, tensors = folder / "m.safetensors", model()
    with prepare(tensors, path, generations=generations) as prepared:
        readers: list[tuple[float, mmap.mmap, bytes]] = []
        for value in range(1, 10):
            fill(tensors, value)
            prepared.save()
            readers = readers[-(generations - 1) :] if generations > 1 else []
            for seen, mapped, contents in readers:
                assert mapped[:] == contents, f"save {seen} changed during save {value}"
            with open(path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            readers.append((value, mapped, reference.save(tensors)))


def test_whoever_opens_the_file_finds_one_complete_save(memory: Path) -> None:
    path, tensors = memory / "m.safetensors", model()
    stop = threading.Event()
    torn: list[set[float]] = []
    seen = set()

    def read() -> None:
        while not stop.is_set():
            data = path.read_bytes()  # a copy, made within the time a reader has
            loaded = reference.load(data)
            values = {float(part) for t in loaded.values() if t.numel() for part in (t.min(), t.max())}
            seen.update(values)
            if len(values) != 1:
                torn.append(values)

    with prepare(tensors, path, generations=16) as prepared, ThreadPoolExecutor(2) as pool:
        prepared.save()
        readers = [pool.submit(read) for _ in range(2)]
        for value in range(1, 60):
            fill(tensors, value)
            prepared.save()
            time.sleep(0.002)
        stop.set()
        for reader in readers:
            reader.result()
    assert torn == [] and len(seen) > 1


# Who else touches the files ------------------------------------------------------------------------------


def test_the_old_file_stands_until_the_first_save(folder: Path) -> None:
    path = folder / "m.safetensors"
    path.write_bytes(b"old")
    path.chmod(0o640)
    prepare(model(), path).close()
    assert path.read_bytes() == b"old" and names(folder) == [path.name]
    with prepare(model(1), path) as prepared:
        assert path.read_bytes() == b"old"
        for _ in range(3):
            prepared.save()
            assert same(path, model(1)) and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert names(folder) == [path.name]


def test_symlink_is_replaced(folder: Path) -> None:
    (folder / "there").mkdir()
    (folder / "there" / "real").write_bytes(b"of others")
    path = folder / "m.safetensors"
    path.symlink_to("there/real")
    with prepare(model(1), path) as prepared:
        for _ in range(3):
            prepared.save()
            assert not path.is_symlink() and same(path, model(1))
    assert (folder / "there" / "real").read_bytes() == b"of others"
    assert names(folder / "there") == ["real"]


def hidden(folder: Path) -> list[Path]:
    return sorted(folder.glob(".fastshard-*"))


MEDDLING: dict[str, Callable[[Path], object]] = {
    "removes the file": lambda path: path.unlink(),
    "replaces the file": lambda path: (
        path.with_name("x").write_bytes(b"x"),
        path.with_name("x").rename(path),
    ),
    "links the file": lambda path: os.link(path, path.with_name(f"kept{len(names(path.parent))}")),
    "cuts the old generation": lambda path: os.truncate(hidden(path.parent)[0], 100),
    "removes the old generation": lambda path: hidden(path.parent)[0].unlink(),
    "replaces the old generation": lambda path: (
        hidden(path.parent)[0].unlink(),
        hidden(path.parent)[0:] or path.with_name("y").write_bytes(b"y"),
    ),
}


@pytest.mark.parametrize("what", MEDDLING)
def test_somebody_else(folder: Path, what: str) -> None:
    path, tensors = folder / "m.safetensors", model()
    with prepare(tensors, path) as prepared:
        for value in range(8):
            fill(tensors, value)
            prepared.save()
            assert same(path, tensors)
            if value in (2, 3, 5):
                MEDDLING[what](path)
    assert same(path, tensors)
    assert hidden(folder) == []


def test_the_directory_goes_and_comes_back(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    tensors = model(1)
    with prepare(tensors, inner / "m.safetensors") as prepared:
        prepared.save()
        inner.rename(folder / "moved")
        with pytest.raises(SaveError) as raised:
            prepared.save()
        assert raised.value.errno == errno.ENOENT
        (folder / "moved").rename(inner)
        fill(tensors, 2)
        prepared.save()
        assert same(inner / "m.safetensors", tensors)


def test_two_of_them_on_one_path(folder: Path) -> None:
    path = folder / "m.safetensors"
    with prepare(model(1), path) as one, prepare(model(2), path) as two:
        for _ in range(4):
            one.save()
            assert same(path, model(1))
            two.save()
            two.save()
            assert same(path, model(2))
    assert names(folder) == [path.name]


# What may be saved ---------------------------------------------------------------------------------------


def test_bound_to_other_tensors(folder: Path) -> None:
    path = folder / "m.safetensors"
    with prepare(model(1), path) as prepared:
        prepared.save(model(2))
        assert same(path, model(2))
        prepared.save()
        assert same(path, model(2))
        prepared.bind(model(3))
        assert same(path, model(2))
        prepared.save()
        assert same(path, model(3))


def test_swapped_memory_is_followed(folder: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1000))
    with prepare({"p": parameter}, folder / "m.safetensors") as prepared:  # type: ignore[dict-item]
        prepared.save()
        parameter.data = torch.ones(1000)
        prepared.save()
    assert same(folder / "m.safetensors", {"p": torch.ones(1000)})


@pytest.mark.parametrize(
    ("others", "text"),
    [
        ({"a": torch.zeros(4)}, "`b` is missing"),
        ({"a": torch.zeros(4), "b": torch.zeros(4), "c": torch.zeros(4)}, "`c` is unexpected"),
        ({"a": torch.zeros(4), "b": torch.zeros(2, 2)}, "`b` has shape"),
        ({"a": torch.zeros(4), "b": torch.zeros(4, dtype=torch.int32)}, "`b` has dtype"),
    ],
)
def test_only_tensors_of_the_same_kind_can_be_bound(
    folder: Path, others: dict[str, torch.Tensor], text: str
) -> None:
    path, tensors = folder / "m.safetensors", {"a": torch.ones(4), "b": torch.ones(4)}
    with prepare(tensors, path) as prepared:
        prepared.save()
        for attempt in (prepared.bind, prepared.save):
            with pytest.raises(ValueError, match=text):
                attempt(others)
        prepared.save()
    assert same(path, tensors)


@pytest.mark.parametrize("generations", [1, 0, -3, True, 2.0, None])
def test_generations_must_be_a_sensible_number(folder: Path, generations: object) -> None:
    with pytest.raises(ValueError, match="generations"):
        prepare(model(), folder / "m.safetensors", generations=generations)  # type: ignore[arg-type]


def test_tensors_that_would_have_to_be_copied_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="`z` cannot be prepared"):
        prepare({"z": torch.zeros(3, dtype=torch.complex64).conj()}, folder / "m.safetensors")
    assert names(folder) == []


def test_errors_are_those_of_save_file(folder: Path) -> None:
    for bad, kind in (
        ({"a": torch.zeros(3).to_sparse()}, ValueError),
        ({"a": torch.zeros(3), "b": 5}, ValueError),
        ({1: torch.zeros(3)}, TypeError),
    ):
        with pytest.raises(kind):
            prepare(bad, folder / "m.safetensors")  # type: ignore[arg-type]
    shared = torch.zeros(3)
    with pytest.raises(RuntimeError, match="share memory"):
        prepare({"a": shared, "b": shared}, folder / "m.safetensors")
    with pytest.raises(SaveError) as raised:
        prepare(model(), folder / "missing" / "m.safetensors")
    assert raised.value.errno == errno.ENOENT
    with pytest.raises(SaveError) as raised:
        prepare(model(), folder)
    assert raised.value.errno == errno.EISDIR
    assert names(folder) == []


# Ends ----------------------------------------------------------------------------------------------------


def test_full_filesystem_is_noticed_by_prepare(small_disk: Path) -> None:
    path = small_disk / "m.safetensors"
    path.write_bytes(b"old")
    tensors = {"a": torch.zeros(2 * MIB)}  # 8 MiB: two fit, three do not
    with pytest.raises(SaveError) as raised:
        prepare(tensors, path, generations=4)
    assert raised.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old" and hidden(small_disk) == []
    with prepare(tensors, path) as prepared:
        prepared.save()
    assert same(path, tensors)


@pytest.mark.parametrize("refuse", ["fallocate:28", "fallocate@2:28"])
def test_nothing_is_left_of_a_failed_prepare(tmp_path: Path, preloaded: Path, refuse: str) -> None:
    script = """
    try:
        prepare({"a": torch.zeros(100)}, sys.argv[1])
    except SaveError as error:
        print(error.errno, os.listdir(os.path.dirname(sys.argv[1])))
    """
    done = run(script, tmp_path / "m.safetensors", env=preload(preloaded, refuse))
    assert done.stdout.split(maxsplit=1) == [str(errno.ENOSPC), "[]\n"], done.stderr


REFUSED = {"tmpfile": "O_TMPFILE", "fallocate": "fallocate", "exchange": "renameat2", "link": "link"}


@pytest.mark.parametrize(
    "refuse", ["", "tmpfile", "fallocate", "exchange", "exchange link", "tmpfile fallocate exchange link"]
)
def test_filesystems_that_cannot_do_everything(tmp_path: Path, preloaded: Path, refuse: str) -> None:
    script = """
    tensors = {"a": torch.zeros(100_000)}
    with prepare(tensors, sys.argv[1]) as prepared:
        for value in range(5):
            tensors["a"].fill_(value)
            stats = prepared.save()
            assert (load_file(sys.argv[1])["a"] == value).all()
    print(*stats.fallbacks, sep="\\n")
    """
    done = run(script, tmp_path / "m.safetensors", env=preload(preloaded, refuse))
    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == ["m.safetensors"]
    expected = sorted(f"{REFUSED[what]} refused: Operation not supported" for what in refuse.split())
    assert done.stdout.splitlines() == (expected or [""])


def test_closed_and_closed_again(folder: Path) -> None:
    prepared = prepare(model(), folder / "m.safetensors")
    prepared.close()
    prepared.close()
    for attempt in (prepared.save, lambda: prepared.bind(model())):
        with pytest.raises(RuntimeError, match="closed"):
            attempt()
    assert names(folder) == []


def test_closing_the_engine_closes_it(folder: Path) -> None:
    engine = Engine()
    prepared = prepare(model(1), folder / "m.safetensors", engine=engine)
    prepared.save()
    prepared.save()
    engine.close()
    assert names(folder) == ["m.safetensors"]
    with pytest.raises(RuntimeError, match="closed"):
        prepared.save()
    prepared.close()


def test_dropped_without_closing(folder: Path) -> None:
    prepared = prepare(model(1), folder / "m.safetensors")
    prepared.save()
    prepared.save()
    del prepared
    assert names(folder) == ["m.safetensors"]


def test_exit_without_closing(memory: Path) -> None:
    script = """
    prepared = prepare({"a": torch.ones(1000)}, sys.argv[1])
    prepared.save()
    prepared.save()
    """
    done = run(script, memory / "m.safetensors")
    assert done.returncode == 0 and names(memory) == ["m.safetensors"], done.stderr


@pytest.mark.parametrize("first", ["hook", "save"])
def test_a_save_in_an_exit_hook(memory: Path, first: str) -> None:
    """Whether the hook was registered before or after the engine's own."""
    script = """
    import atexit
    tensors = {"a": torch.ones(1000)}
    if sys.argv[2] == "hook":
        atexit.register(lambda: last())
    prepared = prepare(tensors, sys.argv[1])
    if sys.argv[2] == "save":
        atexit.register(lambda: last())
    prepared.save()

    def last():
        for value in (2, 3):
            tensors["a"].fill_(value)
            print(prepared.save().nbytes == os.path.getsize(sys.argv[1]))
    """
    done = run(script, memory / "m.safetensors", first)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["True", "True"], "")
    assert same(memory / "m.safetensors", {"a": torch.full((1000,), 3.0)})
    assert names(memory) == ["m.safetensors"]


LOOP = """
tensors = {str(i): torch.zeros(1 << 18) for i in range(16)}
prepared = prepare(tensors, sys.argv[1])
value = 0
while True:
    value += 1
    for tensor in tensors.values():
        tensor.fill_(value)
    prepared.save()
    if value == 3:
        print("ready", flush=True)
"""


@pytest.mark.parametrize("delay", [0.02, 0.05, 0.11, 0.17])
def test_kill_leaves_a_complete_file_and_the_next_removes_the_rest(memory: Path, delay: float) -> None:
    path = memory / "m.safetensors"
    with (
        forked.started(PRELUDE + LOOP, path) as (child, output),
        prepare(model(), memory / "other") as living,  # does not touch what a living process needs
    ):
        assert output.readline() == "ready\n"
        living.save()
        living.save()
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        loaded = reference.load_file(path)
        assert len({float(part) for t in loaded.values() for part in (t.min(), t.max())}) == 1
        left = hidden(memory)
        assert len(left) == 2  # the killed one's and ours
        with prepare(model(5), path) as prepared:
            assert len(hidden(memory)) == 1
            prepared.save()
        living.save()
        assert same(memory / "other", model())
    assert same(path, model(5)) and hidden(memory) == []


def test_forked_child_must_not_use_it(memory: Path) -> None:
    script = """
    import warnings
    warnings.simplefilter("ignore")
    tensors = {"a": torch.ones(1000)}
    prepared = prepare(tensors, sys.argv[1])
    prepared.save()
    prepared.save()
    child = os.fork()
    if child == 0:
        try:
            prepared.save()
        except RuntimeError as error:
            print(error, flush=True)
        prepared.close()
        del prepared
        save_file(tensors, sys.argv[1] + ".child")
        sys.exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
    tensors["a"].fill_(2)
    prepared.save()
    prepared.save()
    """
    done = run(script, memory / "m.safetensors")
    assert done.stdout.splitlines() == ["this prepared save belongs to the parent process", "0"], done.stderr
    assert same(memory / "m.safetensors", {"a": torch.full((1000,), 2.0)})
    assert names(memory) == ["m.safetensors", "m.safetensors.child"]


def test_many_threads_take_turns(memory: Path) -> None:
    path = memory / "m.safetensors"
    with prepare(model(0), path) as prepared, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda value: prepared.save(model(value)), range(20)))
        values = {float(t.max()) for t in reference.load_file(path).values() if t.numel()}
        assert len(values) == 1


@pytest.mark.usefixtures("planned_in_python")
def test_a_failed_save_leaves_the_newest_and_can_be_repeated(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that Python brings fail in the middle of a generation."""
    from fastshard.engine import tensors as module

    path, tensors = memory / "m.safetensors", model(1)
    monkeypatch.setattr(module, "device_number", lambda device: -2)
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False))
    with prepare(tensors, path) as prepared:
        prepared.save()
        fill(tensors, 2)
        with monkeypatch.context() as patch:
            patch.setattr(module, "fetch", interrupted)
            with pytest.raises(KeyboardInterrupt):
                prepared.save()
        assert same(path, model(1))
        prepared.save()
        assert same(path, model(2))


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


# From devices --------------------------------------------------------------------------------------------


def native(engine: Engine, path: Path, sources: list[object], generations: int = 2):  # type: ignore[no-untyped-def]
    plan = FilePlan(os.fsencode(path), b"a header", [s.view for s in sources])  # type: ignore[attr-defined]
    return engine.prepare(plan, generations)


def save_native(engine: Engine, prepared: object, streams: dict[int, int] | None = None) -> fastshard.Stats:
    return engine.submit_prepared(
        prepared,  # type: ignore[arg-type]
        keep_alive=None,
        streams=streams or {},
        durable=False,
        fetch=None,
    ).result()


def test_devices_copy_straight_into_the_file(sim: SimCuda, new_engine: NewEngine, memory: Path) -> None:
    sim.set_delay(0, 3000)
    sources = [*varied(sim), on_host(noise(70_000)), *varied(sim, 1), on_host(noise(40, 80).T)]
    engine = new_engine(threads=3, memory_budget=2 * MIB)
    path = memory / "m"
    prepared = native(engine, path, sources)
    expected = b"a header" + b"".join(s.packed for s in sources)
    registered = sim.live()["registered_bytes"]
    assert registered >= 2 * len(expected)
    for _ in range(3):
        stats = save_native(engine, prepared)
        assert_same(path.read_bytes(), expected)
        assert (stats.write_path, stats.staging, stats.staging_nbytes) == ("standing", "in place", 0)
    assert sim.live()["registered_bytes"] <= registered + 2 * MIB
    prepared.close()
    assert sim.live()["registered_bytes"] <= 2 * MIB
    assert names(memory) == ["m"]


def test_what_was_enqueued_is_in_each_save(sim: SimCuda, new_engine: NewEngine, memory: Path) -> None:
    engine, path = new_engine(), memory / "m"
    source = on_device(sim, noise(5 * SLOT + 3))
    stream = sim.stream(0)
    prepared = native(engine, path, [source])
    for seed in range(1, 5):
        fresh = noise(5 * SLOT + 3, seed=seed)
        sim.enqueue_write(stream, source.view.data, fresh.tobytes(), delay=0.03)
        save_native(engine, prepared, {0: stream})
        assert_same(path.read_bytes(), b"a header" + fresh.tobytes())


def test_a_failed_copy_leaves_the_newest(sim: SimCuda, new_engine: NewEngine, memory: Path) -> None:
    engine, path = new_engine(), memory / "m"
    source = on_device(sim, noise(9 * SLOT))
    prepared = native(engine, path, [source])
    save_native(engine, prepared)
    before = path.read_bytes()
    fresh = noise(9 * SLOT, seed=7)
    sim.write(source.view.data, fresh.tobytes())
    sim.fail("cuMemcpyDtoHAsync", Result.LAUNCH_FAILED, nth=2)
    with pytest.raises(RuntimeError):
        save_native(engine, prepared)
    assert_same(path.read_bytes(), before)
    save_native(engine, prepared)
    assert_same(path.read_bytes(), b"a header" + fresh.tobytes())


@pytest.mark.parametrize("place", ["disk", "memory, refused"])
def test_two_hops_where_the_file_cannot_be_page_locked(
    sim: SimCuda, new_engine: NewEngine, memory: Path, tmp_path: Path, place: str
) -> None:
    folder = tmp_path if place == "disk" else memory
    if place != "disk":
        sim.fail("cuMemHostRegister", Result.NOT_SUPPORTED, nth=0)
    engine, path = new_engine(), folder / "m"
    sources = [*varied(sim), on_host(noise(70_000))]
    prepared = native(engine, path, sources)
    for _ in range(3):
        stats = save_native(engine, prepared)
        assert_same(path.read_bytes(), b"a header" + b"".join(s.packed for s in sources))
    assert stats.staging == ("pinned" if place == "disk" else "pageable")
    assert stats.staging_nbytes <= BUDGET
    refused = [text for text in stats.fallbacks if "page-locking the file" in text]
    assert len(refused) == (place != "disk")


@pytest.mark.parametrize("refuse", [False, True])
def test_first_save_into_registered_windows(
    sim: SimCuda, new_engine: NewEngine, memory: Path, refuse: bool
) -> None:
    sim.set_delay(0, 3000)
    if refuse:
        sim.fail("cuMemHostRegister", Result.NOT_SUPPORTED, nth=0)
    sources = [*varied(sim), on_host(noise(70_000)), on_host(noise(40, 80).T), *varied(sim, 1)]
    engine = new_engine(threads=3, memory_budget=2 * MIB, write_path="registered")
    for name in "ab":
        plan = FilePlan(os.fsencode(memory / name), b"a header", [s.view for s in sources])
        stats = engine.submit([plan], keep_alive=sources).result()
        assert_same((memory / name).read_bytes(), b"a header" + b"".join(s.packed for s in sources))
        assert stats.write_path == "registered"
        assert stats.staging == ("pageable" if refuse else "in place")
    assert names(memory) == ["a", "b"]
    assert sim.live()["registered_bytes"] <= 2 * MIB  # windows are let go one by one
