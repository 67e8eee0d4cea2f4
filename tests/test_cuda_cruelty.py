# SPDX-License-Identifier: Apache-2.0
"""The CUDA path over a driver that is as unkind as real ones: see SETTINGS in simcuda_values.py."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import BUDGET, SLOT, assert_same
from simcuda import CaptureMode, Result, SimCuda
from test_cuda_path import (
    HEADER,
    NewEngine,
    Source,
    contents,
    noise,
    on_device,
    on_host,
    save,
    submit,
    varied,
)

from fastshard import _native
from fastshard.engine.plan import FilePlan

MIB = 1 << 20


@contextlib.contextmanager
def running_job(sim: SimCuda, device: int = 0, kernels: int = 10**9) -> Iterator[None]:
    """A job whose kernels take a millisecond each, `kernels` of them at most."""
    ended = threading.Event()

    def run() -> None:
        with sim.job(device) as job:
            begun.set()
            for _ in range(kernels):
                if ended.wait(0.001):
                    break
                job.copy(4)  # as the loss of a step
                job.step()

    begun = threading.Event()
    thread = threading.Thread(target=run)
    thread.start()
    begun.wait()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# Beside a job.


def test_copies_need_no_multiprocessors(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    engine, sources = new_engine(), [on_device(sim, noise(9 * SLOT + 4321))]
    save(engine, {path: sources})  # page-locks the slots
    path.unlink()
    with sim.job():  # a kernel that never ends
        save(engine, {path: sources})
    assert sim.launches() == {}
    assert sim.counts().copies == 2 * 10


@pytest.mark.parametrize("threads", [1, 4])
def test_first_save_beside_a_job(sim: SimCuda, new_engine: NewEngine, tmp_path: Path, threads: int) -> None:
    """What page-locks, allocates and loads waits for a kernel of the job each time, and that is all."""
    sim.set_delay(0, 200)
    files = {
        tmp_path / f"{i}.part": [*varied(sim, i % 2, seed=i), on_host(noise(70_000)), *varied(sim, 1 - i % 2)]
        for i in range(3)
    }
    with running_job(sim, 0, kernels=200), running_job(sim, 1, kernels=200):
        save(new_engine(memory_budget=2 * MIB, threads=threads), files)
    assert sim.violations() == []


def test_bytes_before_a_jobs_copy(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    source = on_device(sim, noise(12 * BUDGET))
    with sim.job() as job:
        sim.set_bandwidth(64 * MIB)
        future = submit(new_engine(), {path: [source]})
        while not future.done():
            job.copy(4)
            sim.synchronize(job.stream)
            job.step()
        future.result()
    assert 0 < job.most_ahead <= BUDGET
    assert sim.peak_enqueued() <= BUDGET + 4
    assert_same(path.read_bytes(), contents([source]))


@pytest.mark.parametrize("seed", range(3))
def test_copy_engines_that_overtake(sim: SimCuda, new_engine: NewEngine, tmp_path: Path, seed: int) -> None:
    """Devices have several, and what each of them takes first is not ours to say."""
    sim.set(copy_fifo=0)
    sim.set_delay(0, 5000, seed)
    files = {tmp_path / f"{i}.part": [*varied(sim, i % 2, seed=i), *varied(sim, seed=9)] for i in range(3)}
    save(new_engine(memory_budget=2 * MIB, threads=3), files)


# Refusals.

REFUSALS = {
    "too large": {"registration_nbytes": 4096},
    "too many": {"registrations": 1},
    "addresses inside": {"interior_pointers": 0},
}


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("write_path", ["buffered", "mapped", "registered"])
def test_refusals(sim: SimCuda, new_engine: NewEngine, path: Path, refusal: str, write_path: str) -> None:
    sim.set_delay(0, 200)
    sim.set(**REFUSALS[refusal])
    sources = [*varied(sim), on_host(noise(70_000)), *varied(sim, 1)]
    save(new_engine(memory_budget=2 * MIB, write_path=write_path), {path: sources})
    limit = REFUSALS[refusal].get("registration_nbytes", 2 * MIB)
    assert all(nbytes <= limit for nbytes in sim.registered())
    if refusal == "too many":
        assert sim.peak("registrations") == 1
    if refusal == "addresses inside" and _native.kernels_compiled_in():
        assert sim.count("cuLaunchKernel") > 0


def test_a_disks_file_is_not_page_locked(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    kind = subprocess.run(
        ["stat", "-fc", "%T", path.parent], capture_output=True, text=True, check=True
    ).stdout
    if kind.strip() in ("tmpfs", "ramfs"):
        pytest.skip("temporary files are in memory here")
    sources = [*varied(sim), on_host(noise(70_000))]
    save(new_engine(write_path="registered"), {path: sources})
    assert sim.peak("registered_bytes") <= BUDGET


# Captures.


@pytest.mark.parametrize("mode", CaptureMode)
def test_captures_of_other_threads_are_left_alone(
    sim: SimCuda, new_engine: NewEngine, path: Path, mode: CaptureMode
) -> None:
    captured, sources = sim.stream(0), varied(sim)
    with sim.capture(captured, mode, elsewhere=True) as capture:
        save(new_engine(), {path: sources})
    assert capture.ended == Result.SUCCESS


# Contexts that have died.


def test_what_a_dead_context_leaves(sim: SimCuda, new_engine: NewEngine, tmp_path: Path) -> None:
    engine = new_engine()
    prepared_path, path = tmp_path / "prepared", tmp_path / "m"
    on_0, on_1, here = (
        on_device(sim, noise(3 * SLOT)),
        on_device(sim, noise(3 * SLOT), 1),
        on_host(noise(5000)),
    )
    plan = FilePlan(os.fsencode(prepared_path), HEADER, [on_0.view])
    prepared = engine.prepare(plan, 2)
    save(engine, {path: [on_0, on_1, here]})
    path.unlink()
    sim.fail("cuMemcpyDtoHAsync", Result.LAUNCH_FAILED, late=True)

    def fails(files: dict[Path, list[Source]]) -> None:
        with pytest.raises(RuntimeError, match="CUDA_ERROR_LAUNCH_FAILED"):
            submit(engine, files).result()
        assert not path.exists()

    fails({path: [on_0]})
    assert sim.is_dead(0)
    fails({path: [here, on_0]})
    fails({path: [on_1, on_0]})
    with pytest.raises(RuntimeError, match="CUDA_ERROR_LAUNCH_FAILED"):
        engine.submit_prepared(prepared, keep_alive=None, streams={}, durable=False, fetch=None).result()
    with pytest.raises(RuntimeError, match="CUDA_ERROR_LAUNCH_FAILED"):
        submit(new_engine(), {path: [on_0]}).result()  # which has not seen the device before
    submit(engine, {path: [on_1, here]}).result()
    assert_same(path.read_bytes(), contents([on_1, here]))
    prepared.close()
    engine.close()
    assert sim.violations() == []
