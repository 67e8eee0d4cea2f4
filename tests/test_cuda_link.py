# SPDX-License-Identifier: Apache-2.0
"""How much of a save is on its way from a device at once: a running job's own copies queue behind all of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from conftest import assert_same
from simcuda import SimCuda
from test_cuda_path import (
    MIB,
    contents,
    noise,
    on_device,
    stays_unfinished,
    submit,
    wait_until,
)

from fastshard.engine.engine import Engine

LIMIT = 8 * MIB
NewEngine = Callable[..., Engine]


def many(sim: SimCuda, folder: Path, count: int, device: int = 0) -> dict[Path, list]:
    """Files of one chunk each."""
    return {folder / f"{i}.part": [on_device(sim, noise(MIB, seed=i), device)] for i in range(count)}


def test_all_writers_together_have_little_on_the_link(
    sim: SimCuda, new_engine: NewEngine, tmp_path: Path
) -> None:
    files = many(sim, tmp_path, 16)
    with sim.paused():
        future = submit(new_engine(memory_budget=256 * MIB, threads=16), files)
        wait_until(lambda: sim.count("cuMemcpyDtoHAsync") == LIMIT // MIB)
        assert stays_unfinished(future)
        assert sim.count("cuMemcpyDtoHAsync") == LIMIT // MIB
    future.result()
    for path, sources in files.items():
        assert_same(path.read_bytes(), contents(sources))


def test_saves_share_the_link_of_a_device(sim: SimCuda, new_engine: NewEngine, tmp_path: Path) -> None:
    engine = new_engine(memory_budget=512 * MIB, threads=24)
    with sim.paused():
        futures = []
        for device in (0, 0, 1):
            folder = tmp_path / str(len(futures))
            folder.mkdir()
            futures.append(submit(engine, many(sim, folder, 8, device)))
        wait_until(lambda: sim.count("cuMemcpyDtoHAsync") == 2 * LIMIT // MIB)
        assert stays_unfinished(futures[0])
        assert sim.count("cuMemcpyDtoHAsync") == 2 * LIMIT // MIB  # each device has a link of its own
    for future in futures:
        future.result()


def test_a_writer_writes_what_it_has_before_it_waits_for_the_link(
    sim: SimCuda, new_engine: NewEngine, tmp_path: Path
) -> None:
    """One writer, which could have four chunks under way."""
    source = on_device(sim, noise(32 * MIB))
    with sim.paused():
        future = submit(new_engine(memory_budget=32 * MIB, threads=1), {tmp_path / "weights": [source]})
        wait_until(lambda: sim.count("cuEventSynchronize") > 0)
        assert sim.count("cuMemcpyDtoHAsync") == 2
    future.result()
    assert_same((tmp_path / "weights").read_bytes(), contents([source]))


def test_a_chunk_larger_than_all_of_it_goes_alone(
    sim: SimCuda, new_engine: NewEngine, tmp_path: Path
) -> None:
    source = on_device(sim, noise(40 * MIB))
    with sim.paused():
        future = submit(
            new_engine(memory_budget=256 * MIB, threads=1), {tmp_path / "weights": [source]}, durable=True
        )
        wait_until(lambda: sim.count("cuEventSynchronize") > 0)
        assert sim.count("cuMemcpyDtoHAsync") >= 1
    future.result()
    assert_same((tmp_path / "weights").read_bytes(), contents([source]))
