# SPDX-License-Identifier: Apache-2.0
"""From device memory to the file: the production CUDA code over the simulated driver, and over a real GPU.

The simulator completes copies late and poisons their targets until then, so a wait that is forgotten shows in
the file's bytes; a rule of CUDA's that is broken, and anything not given back, fails the test in its fixture
(``sim`` in conftest.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import safetensors.torch as reference
import torch
from conftest import (
    BUDGET,
    CACHE_VARIABLE,
    DRIVER_VARIABLE,
    REQUIRE_VARIABLE,
    SLOT,
    assert_same,
    real_gpu,
)
from helpers import filled
from simcuda import Result, SimCuda

import fastshard
from fastshard import _native
from fastshard.engine.engine import Engine, Options, SaveFuture, Stats
from fastshard.engine.plan import CASTS, HOST, FilePlan, Memory, TensorView

byte_bounds = np.byte_bounds if np.__version__.startswith("1.") else np.lib.array_utils.byte_bounds

MIB = 1 << 20
HEADER = b"a header"
HERE = Path(__file__).resolve().parent  # not the checkout: its package would come before the installed one

NewEngine = Callable[..., Engine]

needs_kernel = pytest.mark.skipif(not _native.kernels_compiled_in(), reason="built without kernels")


# Tensors on simulated devices.


def noise(*shape: int, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    itemsize = np.dtype(dtype).itemsize
    data = np.random.default_rng([seed, *shape]).bytes(int(np.prod(shape)) * itemsize)
    return np.frombuffer(data, dtype).reshape(shape)


@dataclass(frozen=True)
class Source:
    """A tensor of a plan, and what it must be in the file."""

    view: TensorView
    array: np.ndarray

    @property
    def packed(self) -> bytes:
        return self.array.tobytes()


def view_of(array: np.ndarray, address: int, device: int) -> TensorView:
    if array.flags.c_contiguous:
        return TensorView(address, array.nbytes, device)
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return TensorView(address, array.nbytes, device, array.itemsize, array.shape, strides)


def on_host(array: np.ndarray) -> Source:
    return Source(view_of(array, array.ctypes.data, HOST), array)


def on_device(sim: SimCuda, array: np.ndarray, device: int = 0, lead: int = 0) -> Source:
    """The array as it lies, gaps and all, `lead` bytes into a device allocation."""
    low, high = byte_bounds(array)
    address = sim.alloc(device, lead + high - low) + lead if array.nbytes else 0
    if array.nbytes:
        sim.write(address, ctypes.string_at(low, high - low))
    return Source(view_of(array, address, device), array)


STRIDED = {
    "column half": noise(96, 64, dtype="uint16")[:, :32],
    "column half in long runs": noise(70, 2, 6000)[:, 1],
    "transposed": noise(48, 80, dtype="uint32").T,
    "transposed bytes": noise(33, 57).T,
    "every other element": noise(4001, dtype="uint64")[::2],
    "odd rows of bytes": noise(61, 37)[::3, 1:30],
    "single bytes far apart": noise(90, 7)[:, 3],
    "dimensions swapped": noise(5, 6, 7, 8, dtype="uint16").transpose(2, 0, 3, 1),
    "expanded in front": np.broadcast_to(noise(70), (9, 70)),
    "expanded behind": np.broadcast_to(noise(40, 1, dtype="uint16"), (40, 3)),
    "overlapping windows": np.lib.stride_tricks.sliding_window_view(noise(64), 5),
    "eight dimensions": noise(*(3,) * 8)[(slice(0, 2),) * 8],
    "more than a slot": noise(300, 2, 1500)[:, 0],
    "more than a slot of elements": noise(99_991, 2, dtype="uint32")[:, 1],
}


def varied(sim: SimCuda, device: int = 0, seed: int = 0) -> list[Source]:
    """What takes every way out of a device: copy engine, kernel, pitched copies; more than all slots hold."""
    return [
        on_device(sim, noise(3 * SLOT + 1234, seed=seed), device),
        *[on_device(sim, noise(10 * i + 1, seed=seed), device, lead=i % 3) for i in range(30)],
        on_device(sim, STRIDED["column half"], device),
        on_device(sim, STRIDED["column half in long runs"], device),
        on_device(sim, STRIDED["dimensions swapped"], device),
    ]


# Saving and looking.


def contents(sources: list[Source]) -> bytes:
    return HEADER + b"".join(source.packed for source in sources)


def submit(engine: Engine, files: Mapping[Path, list[Source]], **options: object) -> SaveFuture:
    plans = [
        FilePlan(os.fsencode(path), HEADER, [s.view for s in sources]) for path, sources in files.items()
    ]
    return engine.submit(plans, keep_alive=files, **options)


def assert_saved(files: Mapping[Path, list[Source]]) -> None:
    for path, sources in files.items():
        assert_same(path.read_bytes(), contents(sources))


def save(engine: Engine, files: Mapping[Path, list[Source]], **options: object) -> Stats:
    """Saves, and compares the files with the plan."""
    stats = submit(engine, files, **options).result()
    assert_saved(files)
    for path in files:
        assert os.listdir(path.parent) == sorted(other.name for other in files) or len(files) > 1
    return stats


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.001)


def without_kernels(sim: SimCuda) -> None:
    sim.fail("cuModuleLoadData", Result.NO_BINARY_FOR_GPU, nth=0)


def without_pinning(sim: SimCuda) -> None:
    sim.fail("cuMemHostRegister", Result.OUT_OF_MEMORY, nth=0)


MODES = {
    "scratch": lambda sim: None,
    "no scratch": lambda sim: None,
    "link": lambda sim: None,
    "no kernel": without_kernels,
    "pageable": without_pinning,
}
ANY = range(1 << 20)
SOME = range(1, 1 << 20)
WAYS: dict[str, dict[str, range]] = {
    "scratch": {"launches": SOME, "copies": SOME, "pitched": range(1)},
    "no scratch": {"launches": SOME},
    "link": {"launches": SOME, "pitched": range(1)},
    "no kernel": {"launches": range(1), "copies": SOME},
    "pageable": {"launches": range(1), "copies": SOME},
}
"""Mode -> what the driver is called for, where there is something for the kernel."""
KERNEL_MODES = ("scratch", "no scratch", "link") if _native.kernels_compiled_in() else ()
GATHER_VARIABLE = "FASTSHARD_GATHER"
UNIT = 2 * MIB
"""In which the driver gives device memory."""


def assert_counts(sim: SimCuda, **expected: int | range) -> None:
    """Of calls since the last reset; it is not enough that the bytes are right."""
    counts = sim.counts()._asdict()
    wrong = {
        name: counts[name]
        for name, allowed in expected.items()
        if counts[name] not in (allowed if isinstance(allowed, range) else (allowed,))
    }
    assert not wrong, f"{wrong} instead of {expected}"


def assert_way(sim: SimCuda, mode: str) -> None:
    """What `mode` allows, and no wait for a whole stream."""
    if mode in KERNEL_MODES or mode in ("no kernel", "pageable"):
        assert_counts(sim, syncs=0, **WAYS[mode])


def stays_unfinished(future: SaveFuture) -> bool:
    """Whether it does not end in a time in which this machine, slow as it may be, makes several other saves."""
    memory = ctypes.create_string_buffer(MIB)
    target = ctypes.create_string_buffer(MIB)
    for _ in range(3):
        with Engine(Options(threads=2)) as other:
            where = Memory(ctypes.addressof(target), MIB)
            plan = FilePlan(where, b"", [TensorView(ctypes.addressof(memory), MIB, HOST)])
            other.submit([plan], keep_alive=memory).result()
        time.sleep(0.03)
    return not future.done()


@pytest.fixture(params=MODES)
def mode(
    request: pytest.FixtureRequest, sim: SimCuda, new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The ways out of a device for what the copy engine cannot take in one piece."""
    sim.set_delay(0, 200)  # there are many pieces
    MODES[request.param](sim)
    if request.param == "no scratch":
        new_engine.defaults["device_scratch"] = 0  # type: ignore[attr-defined]
    if request.param == "link":
        monkeypatch.setenv(GATHER_VARIABLE, "link")
    return str(request.param)


# The same bytes, whatever the tensors look like.


def test_contiguous_over_many_slots(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    stats = save(new_engine(), {path: [on_device(sim, noise(9 * SLOT + 4321))]})
    assert stats.staging == "pinned"
    assert stats.nbytes == len(HEADER) + 9 * SLOT + 4321
    assert_counts(sim, copies=10, launches=range(2), pitched=0, syncs=0, registrations=range(1, 3))


@pytest.mark.parametrize("kind", STRIDED)
def test_strided(sim: SimCuda, new_engine: NewEngine, path: Path, mode: str, kind: str) -> None:
    save(new_engine(), {path: [on_device(sim, STRIDED[kind]), on_device(sim, STRIDED[kind], lead=1)]})
    if mode not in KERNEL_MODES:
        assert sim.count("cuLaunchKernel") == 0
    elif mode == "scratch":
        assert sim.count("cuLaunchKernel") == sim.count("cuMemcpyDtoHAsync") > 0
    elif mode == "link":
        assert sim.count("cuMemcpy2DAsync") == sim.count("cuMemcpyDtoHAsync") == 0
    else:
        assert (sim.count("cuMemcpy2DAsync") > 0) == (kind == "column half in long runs")


def test_odd_offsets_and_lengths(sim: SimCuda, new_engine: NewEngine, path: Path, mode: str) -> None:
    sources = [on_device(sim, noise(1 + 7 * i, seed=i), lead=i % 17) for i in range(60)]
    save(new_engine(), {path: [*sources, on_device(sim, noise(80_001), lead=3)]})
    assert_way(sim, mode)


def test_all_kinds_together(sim: SimCuda, new_engine: NewEngine, path: Path, mode: str) -> None:
    stats = save(new_engine(), {path: varied(sim)})
    assert stats.staging == ("pageable" if mode == "pageable" else "pinned")
    assert_way(sim, mode)


def test_empty_tensors(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    empty = on_device(sim, noise(0, 3))
    save(new_engine(), {path: [empty, on_device(sim, noise(5)), empty]})
    save(new_engine(), {path: [empty]})


@needs_kernel
@pytest.mark.parametrize("devices", [1, 2])
def test_many_small_tensors_share_launches(
    sim: SimCuda, new_engine: NewEngine, path: Path, devices: int
) -> None:
    sources = [on_device(sim, noise(i % 200 + 1, seed=i), i % devices) for i in range(2000)]
    save(new_engine(), {path: sources})
    assert sim.count("cuLaunchKernel") <= 2 * devices
    # What lies between those of another device goes over the link.
    assert sim.count("cuMemcpyDtoHAsync") == (2 if devices == 1 else 0)
    # The caller's streams, one for each stream of a chunk, two for each block of scratch.
    assert sim.count("cuEventRecord") <= (9 if devices == 1 else 6)


@pytest.mark.parametrize("budget", [BUDGET, 16 * MIB])
def test_host_and_device_tensors_in_one_file(
    sim: SimCuda, new_engine: NewEngine, path: Path, budget: int
) -> None:
    sources: list[Source] = []
    for i in range(6):
        sources += [
            on_device(sim, noise(90_000 + i)),
            on_host(noise(200, seed=i)),
            on_host(noise(100_000, seed=i)),
        ]
        sources += [on_device(sim, noise(300, seed=i)), on_host(noise(40, 80, seed=i).T)]
    save(new_engine(memory_budget=budget), {path: sources})


@pytest.mark.parametrize("threads", [1, 3])
def test_no_writer_waits_for_a_slot_while_it_holds_the_others(
    sim: SimCuda, new_engine: NewEngine, path: Path, threads: int
) -> None:
    """Device memory that fills every slot, then host memory that is packed in a slot, too."""
    engine = new_engine(threads=threads)
    save(
        engine,
        {path: [on_device(sim, noise(2 * SLOT + 1)), on_host(noise(MIB)[::2]), on_device(sim, noise(MIB))]},
    )


def test_two_devices_in_one_file(sim: SimCuda, new_engine: NewEngine, path: Path, mode: str) -> None:
    sources = [on_device(sim, noise(3000 * i + 1, seed=i), device=i % 2) for i in range(40)]
    sources += [on_device(sim, array, device) for array in STRIDED.values() for device in (1, 0)]
    save(new_engine(), {path: sources})
    if mode in ("scratch", "link") and _native.kernels_compiled_in():
        assert_counts(sim, launches=SOME, pitched=0, syncs=0)  # a slot is pinned for both


@pytest.mark.parametrize("seed", range(5))
def test_late_and_out_of_order(sim: SimCuda, new_engine: NewEngine, tmp_path: Path, seed: int) -> None:
    sim.set_delay(0, 6000, seed)
    files = {
        tmp_path / f"{i}.part": [*varied(sim, i % 2, seed=i), on_host(noise(70_000)), *varied(sim, 1 - i % 2)]
        for i in range(3)
    }
    save(new_engine(memory_budget=2 * MIB, threads=3), files)


def test_more_files_than_slots_and_writers(sim: SimCuda, new_engine: NewEngine, tmp_path: Path) -> None:
    files = {tmp_path / f"{i}.part": [on_device(sim, noise(SLOT * i + 11), i % 2)] for i in range(7)}
    save(new_engine(), files)
    assert sorted(os.listdir(tmp_path)) == [path.name for path in files]


@pytest.mark.parametrize("options", [{"write_path": "mapped"}, {"write_path": "mapped", "threads": 4}])
def test_mapped(sim: SimCuda, new_engine: NewEngine, path: Path, options: dict[str, object]) -> None:
    sources = [*varied(sim), on_host(noise(40, 80).T), *varied(sim, 1)]
    assert save(new_engine(**options), {path: sources}).write_path == "mapped"
    assert_counts(sim, pitched=ANY if not KERNEL_MODES else 0, syncs=0, registrations=range(1, 3))


def test_durable(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    assert save(new_engine(), {path: varied(sim)}, durable=True).sync_seconds > 0
    assert_counts(sim, pitched=ANY if not KERNEL_MODES else 0, syncs=0, registrations=range(1, 3))


def test_memory_target(sim: SimCuda, new_engine: NewEngine, mode: str) -> None:
    sources = [*varied(sim), on_host(noise(40, 80).T), on_host(noise(100_000)), *varied(sim, 1)]
    expected = contents(sources)
    data, address = _native.new_bytes(len(expected))
    plan = FilePlan(Memory(address, len(data)), HEADER, [source.view for source in sources])
    stats = new_engine().submit([plan], keep_alive=sources).result()
    assert_same(data, expected)
    assert stats.write_path == "memory"
    assert_way(sim, mode)


def test_some_slots_are_pageable(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    sim.fail("cuMemHostRegister", Result.OUT_OF_MEMORY, nth=2)
    save(new_engine(), {path: [*varied(sim), *varied(sim, 1)]})
    assert sim.peak("registrations") == 1


def test_a_missing_directory_costs_nothing(sim: SimCuda, new_engine: NewEngine, tmp_path: Path) -> None:
    with pytest.raises(fastshard.SaveError) as refused:
        submit(new_engine(), {tmp_path / "missing" / "weights": varied(sim)})
    assert refused.value.errno == errno.ENOENT
    assert sim.count("cuMemcpyDtoHAsync") == 0


# What the caller had enqueued.


@pytest.mark.parametrize("nbytes", [100, 5 * SLOT])
@pytest.mark.parametrize("legacy", [False, True])
def test_pending_work_is_in_the_file(
    sim: SimCuda, new_engine: NewEngine, path: Path, nbytes: int, legacy: bool
) -> None:
    stale, fresh = noise(nbytes, seed=1), noise(nbytes, seed=2)
    view = on_device(sim, stale).view
    stream = 0 if legacy else sim.stream(0)
    sim.enqueue_write(stream, view.data, fresh.tobytes(), delay=0.1)
    save(new_engine(), {path: [Source(view, fresh)]}, streams={} if legacy else {0: stream})


def test_each_device_has_a_stream_of_its_own(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    sources, streams = [], {}
    for device in (0, 1):
        fresh = noise(100_000, seed=device)
        sources.append(Source(on_device(sim, noise(100_000, seed=7), device).view, fresh))
        streams[device] = sim.stream(device)
        sim.enqueue_write(streams[device], sources[-1].view.data, fresh.tobytes(), delay=0.05 + 0.05 * device)
    save(new_engine(), {path: sources}, streams=streams)


def test_later_work_of_the_caller_is_not_waited_for(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    source, other, stream = on_device(sim, noise(SLOT)), on_device(sim, noise(8)), sim.stream(0)
    engine = new_engine()
    save(engine, {path: [source] * 6})  # page-locks the slots: that may wait for all that runs
    with sim.paused():
        future = submit(engine, {path: [source]}, streams={0: stream})
        sim.enqueue_write(stream, other.view.data, bytes(8), delay=1.0)
    future.result()
    assert sim.read(other.view.data, 8) == other.packed
    assert_same(path.read_bytes(), contents([source]))


# Memory and overlap.


def test_memory_is_bounded(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    stats = save(new_engine(), {path: [on_device(sim, noise(20 * BUDGET))]})
    assert SLOT < stats.staging_nbytes <= BUDGET
    assert sim.peak("registered_bytes") <= BUDGET
    assert sim.peak("requested_bytes") == 20 * BUDGET
    assert stats.device_scratch_nbytes == 0


@pytest.mark.parametrize("budget", [BUDGET, BUDGET + 12345, 3 * MIB, 9 * MIB])
def test_memory_is_bounded_for_all_saves_together(
    sim: SimCuda, new_engine: NewEngine, tmp_path: Path, budget: int
) -> None:
    files = {tmp_path / f"{i}.part": [on_device(sim, noise(2 * MIB), i % 2)] for i in range(6)}
    stats = save(new_engine(memory_budget=budget, threads=6), files)
    assert stats.staging_nbytes <= budget
    assert sim.peak("registered_bytes") <= budget


def test_copies_run_ahead_of_the_writer(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    source = on_device(sim, noise(12 * SLOT))
    with sim.paused():
        future = submit(new_engine(memory_budget=8 * MIB), {path: [source]})
        wait_until(lambda: sim.count("cuEventSynchronize") > 0)
        assert 2 <= sim.count("cuMemcpyDtoHAsync") < 12  # under way, and none complete
    assert future.result().staging_nbytes > SLOT
    assert_same(path.read_bytes(), contents([source]))


def test_writes_run_beside_copies(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    sim.set_delay(0, 0)
    sim.set_bandwidth(16 * MIB)
    future = submit(new_engine(), {path: [on_device(sim, noise(2 * MIB))]})
    written = set()
    while not future.done():
        written.add(future._native.nbytes_written)
        time.sleep(0.002)
    assert len(written) > 3  # bit by bit, not all at the end
    assert future.result().staging_nbytes > SLOT


def test_many_threads_share_an_engine(sim: SimCuda, new_engine: NewEngine, tmp_path: Path) -> None:
    engine = new_engine()

    def work(i: int) -> None:
        folder = tmp_path / str(i)
        folder.mkdir()
        save(engine, {folder / "weights": varied_sources[i]})

    varied_sources = [varied(sim, i % 2, seed=i) for i in range(6)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(6)))
    assert sim.peak("registered_bytes") <= BUDGET


# The engine's end.


def test_close_gives_everything_back(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    sources = [*varied(sim), *varied(sim, 1)]
    before = sim.live()
    engine = new_engine()
    save(engine, {path: sources})
    assert sim.live()["registrations"] == 2
    assert sim.live()["streams"] == 0
    engine.close()
    assert sim.live() == before


def test_close_gives_everything_back_while_results_are_kept(
    sim: SimCuda, new_engine: NewEngine, path: Path
) -> None:
    sources = varied(sim)
    before = sim.live()
    engine = new_engine()
    future = submit(engine, {path: sources})
    future.result()
    engine.close()
    assert sim.live() == before
    assert future.done()
    assert future.stats.files == 1


def test_close_waits_for_saves(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    sim.set_bandwidth(8 * MIB)
    sources = [on_device(sim, noise(MIB))]
    with new_engine() as engine:
        submit(engine, {path: sources})
    assert_same(path.read_bytes(), contents(sources))


# Failures.


@dataclass(frozen=True)
class Failure:
    function: str
    result: Result
    nth: int = 1
    kernels: bool = True

    def __str__(self) -> str:
        return f"{self.function}-{self.nth}"


FAILURES = [
    Failure("cuDeviceGetCount", Result.UNKNOWN),
    Failure("cuDeviceGet", Result.INVALID_DEVICE),
    Failure("cuDevicePrimaryCtxRetain", Result.OUT_OF_MEMORY),
    Failure("cuCtxPushCurrent", Result.INVALID_CONTEXT),
    Failure("cuStreamCreateWithPriority", Result.OUT_OF_MEMORY),
    Failure("cuEventCreate", Result.OUT_OF_MEMORY),
    Failure("cuEventCreate", Result.OUT_OF_MEMORY, 2),
    Failure("cuEventCreate", Result.OUT_OF_MEMORY, 3),
    Failure("cuEventRecord", Result.UNKNOWN),
    Failure("cuEventRecord", Result.UNKNOWN, 2),
    Failure("cuEventRecord", Result.UNKNOWN, 3),
    Failure("cuStreamWaitEvent", Result.UNKNOWN),
    Failure("cuMemcpyDtoHAsync", Result.INVALID_VALUE),
    Failure("cuMemcpyDtoHAsync", Result.INVALID_VALUE, 3),
    Failure("cuMemcpy2DAsync", Result.INVALID_VALUE, kernels=False),
    Failure("cuMemcpy2DAsync", Result.INVALID_VALUE, 2, kernels=False),
    Failure("cuEventSynchronize", Result.UNKNOWN),
    Failure("cuEventSynchronize", Result.UNKNOWN, 2),
]
KERNEL_FAILURES = [
    Failure("cuModuleLoadData", Result.OUT_OF_MEMORY),
    Failure("cuModuleGetFunction", Result.OUT_OF_MEMORY),
    Failure("cuLaunchKernel", Result.OUT_OF_MEMORY),
]


@pytest.mark.parametrize(
    "failure",
    [*FAILURES, *[pytest.param(failure, marks=needs_kernel) for failure in KERNEL_FAILURES]],
    ids=str,
)
def test_driver_call_fails(sim: SimCuda, new_engine: NewEngine, path: Path, failure: Failure) -> None:
    path.write_bytes(b"old")
    engine, files = new_engine(), {path: varied(sim)}
    if not failure.kernels:
        without_kernels(sim)
    sim.fail(failure.function, failure.result, failure.nth)
    with pytest.raises(RuntimeError, match=f"^{failure.function} failed: CUDA_ERROR_{failure.result.name} "):
        save(engine, files)
    assert os.listdir(path.parent) == [path.name]
    assert path.read_bytes() == b"old"
    # It was the one call: engine, kernels and all slots still work.
    assert save(engine, files).staging_nbytes > SLOT


@pytest.mark.parametrize(
    "function",
    [
        "cuEventCreate",
        "cuEventRecord",
        "cuMemcpyDtoHAsync",
        "cuMemcpy2DAsync",
        "cuLaunchKernel",
        "cuEventSynchronize",
    ],
)
def test_any_of_the_calls_may_fail(
    sim: SimCuda, new_engine: NewEngine, tmp_path: Path, function: str
) -> None:
    """All files or none, whichever call it is."""
    if function == "cuMemcpy2DAsync":
        without_kernels(sim)
    engine = new_engine()
    files = {tmp_path / "0.part": varied(sim), tmp_path / "1.part": varied(sim, 1)}
    calls = -sim.count(function)
    save(engine, files)
    calls += sim.count(function)
    for path in files:
        path.unlink()
    for nth in range(1, min(calls, 12) + 1):
        sim.fail(function, Result.UNKNOWN, nth)
        with pytest.raises(RuntimeError, match=f"^{function} failed: CUDA_ERROR_UNKNOWN "):
            submit(engine, files).result()
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize(
    "function", ["cuMemcpyDtoHAsync", "cuMemcpy2DAsync", pytest.param("cuLaunchKernel", marks=needs_kernel)]
)
def test_copies_that_fail_late(
    sim: SimCuda, new_engine: NewEngine, path: Path, function: str, nth: int
) -> None:
    """The call succeeds and its work does not: nothing more can be had from the context in this process."""
    path.write_bytes(b"old")
    engine = new_engine()
    if function == "cuMemcpy2DAsync":
        without_kernels(sim)
    sim.fail(function, Result.ILLEGAL_ADDRESS, nth, late=True)
    files = {path: [source for i in range(3) for source in varied(sim, seed=i)]}
    with pytest.raises(RuntimeError, match="^cu[A-Za-z0-9]+ failed: CUDA_ERROR_ILLEGAL_ADDRESS "):
        save(engine, files)
    assert os.listdir(path.parent) == [path.name]
    assert path.read_bytes() == b"old"
    assert sim.violations() == []
    with pytest.raises(RuntimeError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        save(engine, files)
    save(engine, {path: [on_device(sim, noise(3 * SLOT), device=1)]})  # whose context lives
    engine.close()
    sim.new_process()
    assert save(new_engine(), {path: varied(sim)}).staging_nbytes > SLOT


def test_failed_context_fails_other_saves_too(sim: SimCuda, new_engine: NewEngine, tmp_path: Path) -> None:
    engine, files = new_engine(), {tmp_path / "0.part": varied(sim)}
    sim.fail("cuMemcpyDtoHAsync", Result.LAUNCH_FAILED, late=True)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="CUDA_ERROR_LAUNCH_FAILED"):
            save(engine, files)
    save(engine, {tmp_path / "1.part": varied(sim, device=1)})  # the other device's is another context


def test_slots_are_kept_until_copies_beside_a_failed_one_are_done(
    sim: SimCuda, new_engine: NewEngine, path: Path
) -> None:
    sources = [on_device(sim, noise(100_000, seed=seed)) for seed in range(2)]  # two copies in one chunk
    sim.fail("cuMemcpyDtoHAsync", Result.UNKNOWN, nth=2)
    with sim.paused():
        future = submit(new_engine(), {path: sources})
        wait_until(lambda: sim.count("cuMemcpyDtoHAsync") == 2 and sim.count("cuStreamSynchronize") > 0)
        assert stays_unfinished(future)
    with pytest.raises(RuntimeError, match="cuMemcpyDtoHAsync failed: CUDA_ERROR_UNKNOWN"):
        future.result()


def test_no_such_device(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    view = on_device(sim, noise(8)).view._replace(device=2)
    with pytest.raises(RuntimeError, match="no CUDA device 2: the driver sees 2"):
        submit(new_engine(), {path: [Source(view, noise(8))]})
    assert os.listdir(path.parent) == []


WITHOUT_DRIVER = """
import ctypes
import sys
from pathlib import Path
from fastshard.engine.engine import Engine
from fastshard.engine.plan import CASTS, HOST, FilePlan, Memory, TensorView
path = Path(sys.argv[1])
data = bytearray(b"from the host")
address = ctypes.addressof(ctypes.c_char.from_buffer(data))
with Engine() as engine:
    try:
        engine.submit([FilePlan(bytes(path), b"", [TensorView(4096, 8, 0)])], keep_alive=None)
    except RuntimeError as error:
        print(error)
    assert not path.exists()
    plan = FilePlan(bytes(path), b"", [TensorView(address, len(data), HOST)])
    engine.submit([plan], keep_alive=data).result()
assert path.read_bytes() == data
"""


@pytest.mark.parametrize(
    ("library", "reason"),
    [
        ("/nonexistent/libcuda.so", "no CUDA driver: /nonexistent/libcuda.so"),
        ("libc.so.6", "libc.so.6 has no cuInit"),
    ],
)
def test_no_driver(path: Path, library: str, reason: str) -> None:
    environment = {**os.environ, DRIVER_VARIABLE: library}
    command = [sys.executable, "-c", WITHOUT_DRIVER, str(path)]
    done = subprocess.run(
        command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(reason)


# Giving up.


@pytest.mark.parametrize("progress", [0, SLOT])
def test_cancel(sim: SimCuda, new_engine: NewEngine, path: Path, progress: int) -> None:
    path.write_bytes(b"old")
    engine = new_engine()
    sim.set_bandwidth(8 * MIB)
    future = submit(engine, {path: [on_device(sim, noise(8 * MIB))]})
    wait_until(lambda: future._native.nbytes_written >= progress)
    future.cancel()
    with pytest.raises(CancelledError):
        future.result()
    assert future._native.nbytes_written < 8 * MIB  # it stopped, it was not only forgotten
    assert os.listdir(path.parent) == [path.name]
    assert path.read_bytes() == b"old"
    # Copies that had begun must not land in the slots of the next save.
    sim.set_bandwidth(0)
    save(engine, {path: [on_device(sim, noise(2 * MIB, seed=5))]})


def test_slots_are_kept_until_copies_of_a_cancelled_save_are_done(
    sim: SimCuda, new_engine: NewEngine, path: Path
) -> None:
    with sim.paused():
        future = submit(new_engine(), {path: [on_device(sim, noise(2 * MIB))]})
        wait_until(lambda: sim.count("cuEventSynchronize") > 0)
        future.cancel()
        assert stays_unfinished(future)
    with pytest.raises(CancelledError):
        future.result()


def test_cancel_after_the_end_changes_nothing(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    sources = varied(sim)
    future = submit(new_engine(), {path: sources})
    wait_until(future.done)
    future.cancel()
    assert future.result().files == 1  # the file stands, so the save has not been cancelled
    assert_same(path.read_bytes(), contents(sources))


def test_future_dropped_without_waiting(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    sim.set_bandwidth(16 * MIB)
    sources = [on_device(sim, noise(2 * MIB))]
    submit(new_engine(), {path: sources})
    assert_same(path.read_bytes(), contents(sources))


# Device scratch.


def gathered(sim: SimCuda, device: int = 0, seed: int = 0, count: int = 24) -> list[Source]:
    """All of it for the kernel: several slots of it, no two alike."""
    return [
        on_device(sim, noise(300 + i, 400 + 7 * i, seed=seed + i)[:, : 150 + i].T, device)
        for i in range(count)
    ]


def test_scratch_holds_what_the_option_allows(sim: SimCuda, new_engine: NewEngine, tmp_path: Path) -> None:
    """The driver's units are counted, and one of them for the kernel's code, which is there without scratch, too."""
    files = {tmp_path / f"{i}.part": gathered(sim, i % 2, seed=i) for i in range(4)}
    tensors = sim.live()["allocated_bytes"]
    sim.set_delay(0, 0)  # many launches, or tens of thousands of copies, a row each
    for option, block in [
        (0, 0),
        (100_000, 0),
        (6 * MIB - 1, 0),
        (6 * MIB, 2 * MIB),
        (9 * MIB, 2 * MIB),
        (64 * MIB, 8 * MIB),
    ]:
        engine = new_engine(memory_budget=4 * MIB, threads=4, device_scratch=option)
        stats = save(engine, files)
        used = sim.live()["allocated_bytes"] - tensors
        assert sim.peak("allocated_bytes") - tensors == used <= 2 * max(option, UNIT)
        if _native.kernels_compiled_in():
            assert stats.device_scratch_nbytes == used
            assert (used - 2 * UNIT) % (block or 1) == 0
            assert (used > 2 * UNIT) == (block > 0)
        assert stats.fallbacks == ()
        engine.close()
        assert sim.live()["allocated_bytes"] == tensors
        for path in files:
            path.unlink()
        sim.forget_peaks()


@needs_kernel
def test_no_memory_for_scratch(sim: SimCuda, new_engine: NewEngine, tmp_path: Path) -> None:
    sources, engine = gathered(sim), new_engine(threads=1)
    sim.fail("cuMemAlloc", Result.OUT_OF_MEMORY, nth=0)
    calls = -sim.count("cuMemAlloc")
    stats = save(engine, {tmp_path / "0.part": sources})
    assert stats.device_scratch_nbytes == UNIT  # the kernel's code
    assert "device memory" in stats.fallbacks[0]
    calls += sim.count("cuMemAlloc")
    assert calls == 1  # asked once a save
    sim.reset_failures()
    (tmp_path / "0.part").unlink()
    stats = save(engine, {tmp_path / "1.part": sources})
    assert stats.device_scratch_nbytes > UNIT
    assert stats.fallbacks == ()


@needs_kernel
def test_memory_for_one_block_of_scratch(sim: SimCuda, new_engine: NewEngine, tmp_path: Path) -> None:
    engine = new_engine(memory_budget=8 * MIB, threads=4)
    files = {tmp_path / f"{i}.part": gathered(sim, seed=i) for i in range(4)}
    sim.fail("cuMemAlloc", Result.OUT_OF_MEMORY, nth=2)
    assert save(engine, files).device_scratch_nbytes > UNIT


@needs_kernel
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scratch", [3 * UNIT, 4 * UNIT])
def test_scratch_shared_by_saves_late_and_out_of_order(
    sim: SimCuda, new_engine: NewEngine, tmp_path: Path, seed: int, scratch: int
) -> None:
    """Few blocks for many chunks: each wait of packing and copying is needed."""
    sim.set_delay(0, 5000, seed)
    engine = new_engine(memory_budget=8 * MIB, threads=4, device_scratch=scratch)
    saves = []
    for i in range(3):
        folder = tmp_path / str(i)
        folder.mkdir()
        files = {folder / f"{j}.part": gathered(sim, seed=30 * i + 10 * j, count=8) for j in range(2)}
        saves.append((files, submit(engine, files)))
    for files, future in saves:
        future.result()
        assert_saved(files)


@needs_kernel
def test_packing_waits_for_the_callers_stream(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    stale, fresh = noise(300, 400, seed=1), noise(300, 400, seed=2)
    view = on_device(sim, stale[:, :99].T).view
    stream = sim.stream(0)
    whole = fresh[:, :99].T
    low, high = byte_bounds(whole)
    sim.enqueue_write(stream, view.data, ctypes.string_at(low, high - low), delay=0.1)
    save(new_engine(), {path: [Source(view, whole)]}, streams={0: stream})
    assert_counts(sim, launches=1, copies=1)


@needs_kernel
def test_the_next_chunk_is_packed_beside_a_copy(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    with sim.paused():
        future = submit(new_engine(memory_budget=8 * MIB), {path: gathered(sim, count=60)})
        wait_until(lambda: sim.count("cuEventSynchronize") > 0)
        assert sim.count("cuLaunchKernel") > 1
        assert sim.live()["streams"] == 2
    future.result()


@needs_kernel
def test_neighbours_are_copied_together(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    large = [on_device(sim, noise(100_000, seed=i)) for i in range(2)]
    small = [on_device(sim, noise(50, 9, seed=i).T) for i in range(200)]
    save(new_engine(memory_budget=16 * MIB), {path: [*small[:60], large[0], *small[60:], large[1]]})
    assert sim.count("cuLaunchKernel") == 1
    assert sim.count("cuMemcpyDtoHAsync") == 2 + 2


@needs_kernel
@pytest.mark.parametrize(
    ("function", "result"),
    [
        ("cuMemAlloc", Result.UNKNOWN),
        ("cuLaunchKernel", Result.OUT_OF_MEMORY),
        ("cuStreamWaitEvent", Result.UNKNOWN),
        ("cuEventRecord", Result.UNKNOWN),
        ("cuEventCreate", Result.OUT_OF_MEMORY),
        ("cuEventQuery", Result.UNKNOWN),
        ("cuMemcpyDtoHAsync", Result.UNKNOWN),
    ],
)
def test_blocks_come_back_after_any_failure(
    sim: SimCuda, new_engine: NewEngine, path: Path, function: str, result: Result
) -> None:
    sources = gathered(sim, count=12)
    engine = new_engine(memory_budget=4 * MIB, device_scratch=3 * UNIT)
    failed = 0
    for nth in range(1, 12):
        sim.fail(function, result, nth)
        try:
            save(engine, {path: sources})
        except RuntimeError:
            failed += 1
        sim.reset_failures()
        path.unlink(missing_ok=True)
    assert failed > 0
    save(engine, {path: sources})


@needs_kernel
@pytest.mark.parametrize(
    ("function", "nth"), [("cuEventRecord", 2), ("cuEventRecord", 3), ("cuMemcpyDtoHAsync", 1)]
)
def test_slots_are_kept_until_packing_beside_a_failure_is_done(
    sim: SimCuda, new_engine: NewEngine, path: Path, function: str, nth: int
) -> None:
    """The table of the kernel lies in the slot, and its target is a block that another chunk may get."""
    sources = gathered(sim, count=1)
    sim.fail(function, Result.UNKNOWN, nth)
    with sim.paused():
        future = submit(new_engine(), {path: sources})
        wait_until(lambda: sim.count("cuLaunchKernel") == 1 and sim.count("cuStreamSynchronize") > 0)
        assert stays_unfinished(future)
    with pytest.raises(RuntimeError, match=f"{function} failed: CUDA_ERROR_UNKNOWN"):
        future.result()


# Memory next to the device.


def fake_sysfs(folder: Path, online: str) -> Path:
    nodes = folder / "devices" / "system" / "node"
    nodes.mkdir(parents=True)
    (nodes / "online").write_text(online + "\n")
    for node, address in enumerate(("0000:0a:00.0", "0000:8b:00.0")):  # as the simulator says, in lower case
        device = folder / "bus" / "pci" / "devices" / address
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{node}\n")
    return folder


@pytest.mark.parametrize(("online", "nodes"), [("0", [-1, -1]), ("0-1", [0, 1]), ("0,3", [0, 1])])
def test_slots_next_to_their_device(
    sim: SimCuda,
    new_engine: NewEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    online: str,
    nodes: list[int],
) -> None:
    """This machine may have one node only: what is asked for beyond it is refused, and that is all right."""
    monkeypatch.setenv("FASTSHARD_SYSFS", str(fake_sysfs(tmp_path / "sys", online)))
    engine = new_engine(memory_budget=2 * MIB)
    files = {tmp_path / f"{i}.part": varied(sim, i % 2, seed=i) for i in range(4)}
    save(engine, files)
    (native,) = engine._natives.values()
    assert [native.numa_node(ordinal) for ordinal in (0, 1)] == nodes


# Several devices, and memory of every origin.


@pytest.mark.parametrize("threads", [1, 4])
def test_two_devices_in_many_files(
    sim: SimCuda, new_engine: NewEngine, tmp_path: Path, mode: str, threads: int
) -> None:
    files = {
        tmp_path / f"{i}.part": [*gathered(sim, i % 2, seed=i, count=5), *varied(sim, 1 - i % 2, seed=i)]
        for i in range(4)
    }
    save(new_engine(memory_budget=2 * MIB, threads=threads), files)
    assert_way(sim, mode)


def test_memory_mapped_piece_by_piece(sim: SimCuda, new_engine: NewEngine, path: Path, mode: str) -> None:
    """As torch's expandable segments: what lies behind an address is several allocations, side by side."""
    data = noise(700_000)
    address = sim.alloc_pieces(0, [49 * 4096, 4096, 122 * 4096])
    sim.write(address, data.tobytes())
    array = data.reshape(700, 1000)
    sources = [
        Source(TensorView(address, data.nbytes, 0), data),
        Source(view_of(array.T, address, 0), array.T),
        Source(view_of(array[:, 10:510], address + 10, 0), array[:, 10:510]),
    ]
    save(new_engine(), {path: sources})
    assert_way(sim, mode)


def test_nobody_asks_what_is_behind_an_address() -> None:
    """The driver's answers are wrong for such memory, and for what other allocators made."""
    header = (HERE.parent / "csrc" / "device" / "cuda_driver.h").read_text()
    assert "cuMemcpyDtoHAsync" in header
    assert "cuMemGetAddressRange" not in header
    assert "cuPointerGetAttribute" not in header


# The public functions, with tensors that torch believes to be on a GPU.


class SimTensor(torch.Tensor):
    """Reports a CUDA device and simulated memory there. What torch has beneath is never to be read."""

    places: ClassVar[dict[int, tuple[int, int]]] = {}
    """Address of the storage beneath -> device, address there; so that views of views know it, too."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.places[self.untyped_storage().data_ptr()][0])

    is_cpu = False
    is_cuda = True

    def data_ptr(self) -> int:
        beneath = self.untyped_storage().data_ptr()
        return super().data_ptr() - beneath + self.places[beneath][1] if beneath else 0


class Uploader:
    """Moves torch tensors to the simulator; views of one storage stay views of one storage."""

    def __init__(self, sim: SimCuda) -> None:
        self.sim = sim
        self.storages: dict[tuple[int, int], tuple[torch.Tensor, torch.UntypedStorage]] = {}

    def __call__(self, tensor: torch.Tensor, ordinal: int = 0) -> SimTensor:
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), ordinal)
        if key not in self.storages:
            address = self.sim.alloc(ordinal, max(storage.nbytes(), 1))
            self.sim.write(address, ctypes.string_at(storage.data_ptr(), storage.nbytes()))
            beneath = torch.full((storage.nbytes(),), 0xEE, dtype=torch.uint8)
            SimTensor.places[beneath.data_ptr()] = ordinal, address
            self.storages[key] = beneath, storage
        beneath, _ = self.storages[key]
        beneath = beneath.view(tensor.dtype).as_strided(
            tensor.shape, tensor.stride(), tensor.storage_offset()
        )
        return torch.Tensor._make_subclass(SimTensor, beneath)

    def all(self, tensors: Mapping[str, torch.Tensor], ordinal: int = 0) -> dict[str, torch.Tensor]:
        return {name: self(tensor, ordinal) for name, tensor in tensors.items()}


@pytest.fixture
def upload(sim: SimCuda) -> Uploader:
    return Uploader(sim)


@pytest.fixture
def current_streams(sim: SimCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, int]]:
    """What torch says is current on each device."""
    streams: dict[int, int] = {}

    def current(ordinal: int) -> SimpleNamespace:
        return SimpleNamespace(cuda_stream=streams.get(ordinal, 0))

    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield streams


def model() -> dict[str, torch.Tensor]:
    dtypes = "float32 bfloat16 float16 float64 int64 uint8 bool complex64 float8_e4m3fn float8_e5m2".split()
    tensors = {
        f"{name}.{rows}": filled((rows, 33), getattr(torch, name), seed=rows)
        for name in dtypes
        for rows in (1, 40)
    }
    large = filled((700, 501), torch.bfloat16)
    return {**tensors, "large": large, "scalar": torch.tensor(1.5), "empty": torch.empty(0, 4)}


def slices() -> dict[str, torch.Tensor]:
    base = filled((96, 200))
    return {
        "left": base[:, :100],
        "right": base[:, 100:],
        "transposed": filled((300, 170), torch.float16).t(),
        "swapped": filled((5, 6, 7), torch.int64).permute(2, 0, 1),
        "bytes": filled((41, 43), torch.uint8)[::2, 3:40],
        "plain": filled((10,)),
    }


def reference_bytes(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    return bytes(reference.save(on_cpu, metadata))


def test_save_file(
    upload: Uploader, current_streams: dict[int, int], new_engine: NewEngine, path: Path
) -> None:
    fastshard.save_file(upload.all(model()), path, {"format": "pt"}, engine=new_engine())
    assert_same(path.read_bytes(), reference_bytes(model(), {"format": "pt"}))
    assert fastshard.stats().staging == "pinned"


def test_save_file_of_slices(
    upload: Uploader, current_streams: dict[int, int], new_engine: NewEngine, path: Path
) -> None:
    engine = new_engine()
    fastshard.save_file(upload.all(slices()), path, allow_strided=True, engine=engine)
    assert_same(path.read_bytes(), reference_bytes(slices()))
    path.unlink()
    with pytest.raises(ValueError, match="non contiguous tensor: `transposed`"):
        fastshard.save_file(upload.all({"transposed": slices()["transposed"]}), path, engine=engine)
    assert not path.exists()


def test_save_files_from_both_devices_and_the_host(
    upload: Uploader, current_streams: dict[int, int], new_engine: NewEngine, tmp_path: Path
) -> None:
    mixed = {name: upload(t, i % 2) if i % 3 else t for i, (name, t) in enumerate(model().items())}
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    fastshard.save_files(
        {first: mixed, second: upload.all(slices(), 1)}, allow_strided=True, durable=True, engine=new_engine()
    )
    assert_same(first.read_bytes(), reference_bytes(model()))
    assert_same(second.read_bytes(), reference_bytes(slices()))


def test_save_to_bytes(upload: Uploader, current_streams: dict[int, int], new_engine: NewEngine) -> None:
    data = fastshard.save(upload.all(model()), {"format": "pt"}, engine=new_engine())
    assert_same(data, reference_bytes(model(), {"format": "pt"}))


def test_save_file_after_pending_work(
    sim: SimCuda, upload: Uploader, current_streams: dict[int, int], new_engine: NewEngine, path: Path
) -> None:
    stale, fresh = filled((300, 301), seed=1), filled((300, 301), seed=2)
    tensors = {"0": upload(stale, 0), "1": upload(stale, 1)}
    for name, tensor in tensors.items():
        current_streams[int(name)] = sim.stream(int(name))
        sim.enqueue_write(current_streams[int(name)], tensor.data_ptr(), fresh.numpy().tobytes(), delay=0.08)
    fastshard.save_file(tensors, path, engine=new_engine())
    assert_same(path.read_bytes(), reference_bytes({"0": fresh, "1": fresh.clone()}))


def test_nothing_is_saved_while_a_graph_is_captured(
    sim: SimCuda,
    upload: Uploader,
    current_streams: dict[int, int],
    new_engine: NewEngine,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    current_streams[1] = sim.stream(1)
    tensors = upload.all(model(), 1)
    with sim.capture(current_streams[1]) as capture, pytest.raises(RuntimeError, match=r"cuda:1.*graph"):
        fastshard.save_file(tensors, path, engine=new_engine())
    assert capture.ended == Result.SUCCESS
    assert not path.exists()


@pytest.mark.parametrize("allow_strided", [False, True])
def test_shared_memory_is_refused(
    upload: Uploader, current_streams: dict[int, int], new_engine: NewEngine, path: Path, allow_strided: bool
) -> None:
    tensor = upload(filled((10, 10)))
    with pytest.raises(RuntimeError, match="share memory"):
        fastshard.save_file(
            {"a": tensor, "b": tensor}, path, allow_strided=allow_strided, engine=new_engine()
        )
    assert not path.exists()


def test_save_file_fails(
    sim: SimCuda, upload: Uploader, current_streams: dict[int, int], new_engine: NewEngine, path: Path
) -> None:
    sim.fail("cuMemcpyDtoHAsync", Result.UNKNOWN)
    with pytest.raises(RuntimeError, match="cuMemcpyDtoHAsync failed: CUDA_ERROR_UNKNOWN"):
        fastshard.save_file(upload.all(model()), path, engine=new_engine())
    assert os.listdir(path.parent) == []


# Cast on the way out (test_casts.py has the numbers).

CASTABLE = [
    getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
]


def castable() -> dict[str, torch.Tensor]:
    """Of every type, by every way: many small ones, more than a slot, strided, and what is not cast."""
    generator = torch.Generator().manual_seed(3)

    def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 9).to(dtype)

    return {
        **{f"{dtype}.{n}": numbers(n, 3, dtype=dtype) for dtype in CASTABLE for n in (1, 2, 50)},
        "large": numbers(400, 501),
        "large double": numbers(90_001, dtype=torch.float64),
        "half": numbers(300, 200, dtype=torch.float16)[:, :77],
        "transposed": numbers(200, 301).t(),
        "every other": numbers(20_001, dtype=torch.bfloat16)[::2],
        "int": torch.arange(100),
        "bytes": torch.arange(100, dtype=torch.uint8),
        "empty": torch.empty(0, 2),
        "scalar": torch.tensor(0.1),
    }


def cast_bytes(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> bytes:
    on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
    return reference_bytes({n: t.to(dtype) if t.is_floating_point() else t for n, t in on_cpu.items()})


@pytest.mark.parametrize("dtype", CASTABLE[1:], ids=str)
def test_casts(
    sim: SimCuda,
    upload: Uploader,
    current_streams: dict[int, int],
    new_engine: NewEngine,
    path: Path,
    mode: str,
    dtype: torch.dtype,
) -> None:
    fastshard.save_file(upload.all(castable()), path, dtype=dtype, allow_strided=True, engine=new_engine())
    assert_same(path.read_bytes(), cast_bytes(castable(), dtype))
    if mode in KERNEL_MODES:
        assert_counts(sim, launches=range(1, 40), pitched=0, syncs=0)


def test_casts_of_what_no_kernel_can_load(
    upload: Uploader, current_streams: dict[int, int], new_engine: NewEngine, path: Path
) -> None:
    """Floats at an odd address."""
    floats = torch.randn(3000)
    odd = torch.frombuffer(bytearray(b"." + floats.numpy().tobytes()), dtype=torch.uint8)
    plan = TensorView(upload(odd).data_ptr() + 1, 6000, 0, cast=(CASTS["F32"], CASTS["BF16"]))
    new_engine().submit([FilePlan(os.fsencode(path), HEADER, [plan])], keep_alive=None).result()
    assert_same(path.read_bytes(), HEADER + bytes(floats.to(torch.bfloat16).view(torch.uint8).numpy()))


def test_failing_casts_leave_nothing(
    sim: SimCuda,
    upload: Uploader,
    current_streams: dict[int, int],
    new_engine: NewEngine,
    path: Path,
    mode: str,
) -> None:
    launches = mode in KERNEL_MODES
    sim.fail("cuLaunchKernel" if launches else "cuMemcpyDtoHAsync", Result.LAUNCH_FAILED, nth=1)
    with pytest.raises(RuntimeError, match="LAUNCH_FAILED"):
        fastshard.save_file(
            upload.all(castable()), path, dtype=torch.bfloat16, allow_strided=True, engine=new_engine()
        )
    assert os.listdir(path.parent) == []


# A real GPU, where there is one; what needs no stream is done on the CPU, too.


def to(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Copies that keep strides and shared storages."""
    storages: dict[int, torch.Tensor] = {}
    moved = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            flat = torch.empty(0, dtype=torch.uint8).set_(storage)
            storages[storage.data_ptr()] = flat.to(device, copy=True)
        base = storages[storage.data_ptr()].view(tensor.dtype)
        moved[name] = base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return moved


def test_real_contiguous(device: torch.device, new_engine: NewEngine, path: Path) -> None:
    fastshard.save_file(to(model(), device), path, {"format": "pt"}, engine=new_engine())
    assert_same(path.read_bytes(), reference_bytes(model(), {"format": "pt"}))
    assert device.type == "cpu" or fastshard.stats().staging == "pinned"


def test_real_large(device: torch.device, new_engine: NewEngine, path: Path) -> None:
    tensors = {str(i): filled((3, MIB + i), torch.bfloat16, seed=i) for i in range(2)}
    fastshard.save_file(to(tensors, device), path, engine=new_engine(memory_budget=4 * MIB))
    assert_same(path.read_bytes(), reference_bytes(tensors))
    assert fastshard.stats().staging_nbytes <= 4 * MIB


@pytest.mark.parametrize("write_path", ["buffered", "mapped"])
def test_real_strided(device: torch.device, new_engine: NewEngine, path: Path, write_path: str) -> None:
    fastshard.save_file(
        to(slices(), device), path, allow_strided=True, engine=new_engine(write_path=write_path)
    )
    assert_same(path.read_bytes(), reference_bytes(slices()))


@pytest.mark.parametrize("kind", STRIDED)
def test_real_strided_kinds(device: torch.device, new_engine: NewEngine, path: Path, kind: str) -> None:
    array = STRIDED[kind]
    low, high = byte_bounds(array)
    memory = torch.tensor(list(ctypes.string_at(low, high - low)), dtype=torch.uint8, device=device)
    synchronize(device)
    save(new_engine(), {path: [Source(view_of(array, memory.data_ptr(), device_number(device)), array)]})
    del memory


def test_real_many_small(device: torch.device, new_engine: NewEngine, path: Path) -> None:
    tensors = {f"layer.{i}": filled((i % 50 + 1,), seed=i) for i in range(2000)}
    fastshard.save_file(to(tensors, device), path, engine=new_engine())
    assert_same(path.read_bytes(), reference_bytes(tensors))


def test_real_bytes(device: torch.device, new_engine: NewEngine) -> None:
    data = fastshard.save(to(slices(), device), allow_strided=True, engine=new_engine())
    assert_same(data, reference_bytes(slices()))


def test_real_and_host_tensors_in_one_file(device: torch.device, new_engine: NewEngine, path: Path) -> None:
    moved = to(model(), device)
    mixed = {name: tensor if i % 2 else moved[name] for i, (name, tensor) in enumerate(model().items())}
    fastshard.save_file(mixed, path, engine=new_engine())
    assert_same(path.read_bytes(), reference_bytes(model()))


@pytest.mark.parametrize("dtype", CASTABLE[1:], ids=str)
def test_real_casts(device: torch.device, new_engine: NewEngine, path: Path, dtype: torch.dtype) -> None:
    fastshard.save_file(to(castable(), device), path, dtype=dtype, allow_strided=True, engine=new_engine())
    assert_same(path.read_bytes(), cast_bytes(castable(), dtype))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_number(device: torch.device) -> int:
    return HOST if device.type == "cpu" else device.index


def fill_late(tensor: torch.Tensor, value: float) -> None:
    """On the current stream: a long computation, and only then the value."""
    torch.cuda._sleep(100_000_000)
    tensor.fill_(value)


@pytest.mark.parametrize("side_stream", [False, True])
def test_real_pending_work_is_in_the_file(
    real_cuda: torch.device, new_engine: NewEngine, path: Path, side_stream: bool
) -> None:
    tensors = {"small": torch.zeros(100, device=real_cuda), "large": torch.zeros(3 * MIB, device=real_cuda)}
    torch.cuda.synchronize(real_cuda)
    stream = torch.cuda.Stream(real_cuda) if side_stream else torch.cuda.default_stream(real_cuda)
    with torch.cuda.stream(stream):
        for value, tensor in enumerate(tensors.values()):
            fill_late(tensor, value + 1.5)
        fastshard.save_file(tensors, path, engine=new_engine())
    expected = {"small": torch.full((100,), 1.5), "large": torch.full((3 * MIB,), 2.5)}
    assert_same(path.read_bytes(), reference_bytes(expected))


def test_real_saves_from_two_streams_at_once(
    real_cuda: torch.device, new_engine: NewEngine, tmp_path: Path
) -> None:
    engine = new_engine(memory_budget=4 * MIB)
    tensors = [torch.zeros(MIB, device=real_cuda) for _ in range(2)]
    torch.cuda.synchronize(real_cuda)

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream(real_cuda)):
            fill_late(tensors[i], i + 0.25)
            fastshard.save_file({"w": tensors[i]}, tmp_path / str(i), engine=engine)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    for i in range(2):
        expected = reference_bytes({"w": torch.full((MIB,), i + 0.25)})
        assert_same((tmp_path / str(i)).read_bytes(), expected)


EXPANDABLE = """
import sys, torch, fastshard
from safetensors.torch import load_file
tensors = {str(i): torch.randn(3000 + i, 1001, device="cuda") for i in range(8)}
tensors = {**tensors, **{f"{name}.t": tensor.clone().t() for name, tensor in tensors.items()}}
fastshard.save_file(tensors, sys.argv[1], allow_strided=True)
loaded = load_file(sys.argv[1])
assert all(torch.equal(loaded[name], tensor.cpu()) for name, tensor in tensors.items())
"""


def test_real_expandable_segments(real_cuda: torch.device, path: Path) -> None:
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    command = [sys.executable, "-c", EXPANDABLE, str(path)]
    done = subprocess.run(
        command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("gather", ["", "link", "pitched"])
def test_real_ways_of_gathering(
    real_cuda: torch.device, new_engine: NewEngine, path: Path, monkeypatch: pytest.MonkeyPatch, gather: str
) -> None:
    monkeypatch.setenv(GATHER_VARIABLE, gather)
    tensors = {
        **slices(),
        "transposed large": filled((1500, 3001), torch.bfloat16).t(),
        "channels last": filled((30, 3, 3, 700), torch.float16).permute(0, 3, 1, 2),
    }
    fastshard.save_file(to(tensors, real_cuda), path, allow_strided=True, engine=new_engine())
    assert_same(path.read_bytes(), reference_bytes(tensors))


def test_real_capture_is_refused(real_cuda: torch.device, new_engine: NewEngine, path: Path) -> None:
    tensor = torch.zeros(100, device=real_cuda)
    torch.cuda.synchronize(real_cuda)
    graph = torch.cuda.CUDAGraph()
    refused = []
    with torch.cuda.graph(graph):
        tensor += 1
        try:
            fastshard.save_file({"w": tensor}, path, engine=new_engine())
        except RuntimeError as error:
            refused.append(str(error))
    assert len(refused) == 1
    assert "graph" in refused[0]
    assert os.listdir(path.parent) == []


def test_real_memory_of_the_device_is_left_alone(
    real_cuda: torch.device, new_engine: NewEngine, path: Path
) -> None:
    tensor = torch.zeros(8 * MIB, device=real_cuda)
    fastshard.save_file({"w": tensor}, path, engine=new_engine())  # whatever the driver allocates once
    free, _ = torch.cuda.mem_get_info(real_cuda)
    fastshard.save_file({"w": tensor}, path, engine=new_engine())
    assert free - torch.cuda.mem_get_info(real_cuda)[0] <= 64 * MIB


def test_a_required_gpu_is_not_skipped(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if real_gpu():
        pytest.skip("there is a GPU")
    monkeypatch.setenv(REQUIRE_VARIABLE, "1")
    with pytest.raises(pytest.fail.Exception, match="no real GPU"):
        request.getfixturevalue("real_cuda")


@pytest.mark.skipif(not real_gpu(), reason="without a real GPU the simulator's tests run in this process")
def test_the_simulator_beside_a_real_gpu() -> None:
    """All tests of the simulator, in a process whose driver it is."""
    import simcuda

    environment = {**os.environ, DRIVER_VARIABLE: str(simcuda.build(os.environ[CACHE_VARIABLE]))}
    environment.pop(REQUIRE_VARIABLE, None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(
        command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
