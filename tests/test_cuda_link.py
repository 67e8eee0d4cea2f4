# SPDX-License-Identifier: Apache-2.0
"""How much of a save is on its way from a device at once: a running job's own copies queue behind all of it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from conftest import assert_same
from simcuda import PRIORITIES, SimCuda
from test_cuda_path import (
    HEADER,
    MIB,
    NewEngine,
    Source,
    assert_saved,
    contents,
    gathered,
    needs_kernel,
    noise,
    on_device,
    save,
    stays_unfinished,
    submit,
    wait_until,
)

from fastshard.engine.plan import FilePlan

LIMIT = 8 * MIB


def many(sim: SimCuda, folder: Path, count: int, device: int = 0) -> dict[Path, list[Source]]:
    """Files of one chunk each."""
    return {folder / f"{i}.part": [on_device(sim, noise(MIB, seed=i), device)] for i in range(count)}


def test_a_job_waits_for_little(sim: SimCuda, new_engine: NewEngine, tmp_path: Path) -> None:
    """Of all writers together, which would have twice as much under way."""
    files = many(sim, tmp_path, 16)
    engine = new_engine(memory_budget=256 * MIB, threads=16)
    sim.set(implicit_sync=0)
    with sim.job() as job:
        with sim.paused():
            future = submit(engine, files)
            wait_until(lambda: sim.count("cuMemcpyDtoHAsync") == LIMIT // MIB)
            assert stays_unfinished(future)
        sim.set_bandwidth(64 * MIB)
        while not future.done():
            job.copy(4)
            time.sleep(0.005)
        future.result()
        assert MIB <= job.most_ahead <= LIMIT
    assert_saved(files)


def test_saves_share_the_link_of_a_device(sim: SimCuda, new_engine: NewEngine, tmp_path: Path) -> None:
    engine = new_engine(memory_budget=256 * MIB, threads=24)
    sim.set(implicit_sync=0)
    with sim.paused():
        futures = []
        for device in (0, 0, 1):
            folder = tmp_path / str(len(futures))
            folder.mkdir()
            futures.append(submit(engine, many(sim, folder, 8, device)))
        wait_until(lambda: sim.count("cuMemcpyDtoHAsync") == 2 * LIMIT // MIB)
        assert stays_unfinished(futures[0])
    for future in futures:
        future.result()
    assert [sim.peak_enqueued(device) for device in (0, 1)] == [LIMIT, LIMIT]


@pytest.mark.parametrize("seed", range(3))
def test_peak_of_all_kinds_of_copies(sim: SimCuda, new_engine: NewEngine, tmp_path: Path, seed: int) -> None:
    sim.set_delay(0, 4000, seed)
    files = {
        tmp_path / f"{i}.part": [
            on_device(sim, noise(9 * MIB, seed=i), i % 2),
            *gathered(sim, 1 - i % 2, seed=i),
            on_device(sim, noise(5 * MIB, seed=i), 1 - i % 2),
        ]
        for i in range(6)
    }
    save(new_engine(memory_budget=128 * MIB, threads=6), files)
    assert 0 < sim.peak_enqueued(0) <= 2 * LIMIT
    assert 0 < sim.peak_enqueued(1) <= 2 * LIMIT


@needs_kernel
def test_a_kernel_that_waits_takes_no_place_from_copies(
    sim: SimCuda, new_engine: NewEngine, tmp_path: Path
) -> None:
    """Many writers that need the kernel would have all of the link between them, and none of it is in use."""
    sim.set(implicit_sync=0)
    packed = {
        tmp_path / f"{i}": [on_device(sim, noise(2048, 2 * 1024, seed=i)[:, :1024].T)] for i in range(12)
    }
    copied = [on_device(sim, noise(20 * MIB))]
    engine = new_engine(memory_budget=128 * MIB, threads=14)
    with sim.job(priority=PRIORITIES[0]):
        first = submit(engine, packed)
        wait_until(lambda: sim.count("cuLaunchKernel") == LIMIT // (2 * MIB))
        save(engine, {tmp_path / "copied": copied})
        assert sim.count("cuLaunchKernel") == LIMIT // (2 * MIB)
        assert stays_unfinished(first)
    first.result()
    assert_saved(packed)


@needs_kernel
def test_a_writer_writes_what_it_has_before_it_waits_for_the_link(
    sim: SimCuda, new_engine: NewEngine, tmp_path: Path
) -> None:
    """Kernels of others, which wait, have all places for what is packed; its own first chunks need none."""
    sim.set(implicit_sync=0)
    engine = new_engine(memory_budget=128 * MIB, threads=8)
    others = {
        tmp_path / f"{i}": [on_device(sim, noise(2048, 2 * 1024, seed=i)[:, :1024].T)] for i in range(4)
    }
    sources = [on_device(sim, noise(8 * MIB)), on_device(sim, noise(2048, 2 * 1024)[:, :1024].T)]
    with sim.job(priority=PRIORITIES[0]):
        first = submit(engine, others)
        wait_until(lambda: sim.count("cuLaunchKernel") == LIMIT // (2 * MIB))
        second = submit(engine, {tmp_path / "weights": sources})
        wait_until(lambda: second._native.nbytes_written >= 7 * MIB)
        assert stays_unfinished(second)
    first.result()
    second.result()
    assert_same((tmp_path / "weights").read_bytes(), contents(sources))


def test_copies_into_the_target_have_all_of_the_link(
    sim: SimCuda,
    new_engine: NewEngine,
    memory: Path,
) -> None:
    source = on_device(sim, noise(64 * MIB))
    engine = new_engine(memory_budget=128 * MIB, threads=2)
    made = engine.prepare(FilePlan(os.fsencode(memory / "m"), HEADER, [source.view]), 2)
    with sim.paused():
        future = engine.submit_prepared(made, keep_alive=source, streams={}, durable=False, fetch=None)
        wait_until(lambda: sim.peak_enqueued() > 2 * LIMIT)
    future.result()
    made.close()
    assert_same((memory / "m").read_bytes(), contents([source]))
