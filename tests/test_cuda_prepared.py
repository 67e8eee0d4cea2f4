# SPDX-License-Identifier: Apache-2.0
"""Devices that copy straight into the target use the kernel as all others do: counted, over the simulated driver."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BUDGET, SLOT, assert_same
from simcuda import Result, SimCuda
from test_cuda_path import MIB, NewEngine, Source, contents, needs_kernel, noise, on_device, on_host

from fastshard.engine.engine import Engine, Stats
from fastshard.engine.plan import CASTS, FilePlan

HEADER = b"a header"
SMALL = 2000
COPIES = ("cuMemcpyDtoHAsync", "cuMemcpy2DAsync")
IN_TARGET = 4 * 2 * SLOT
"""Bytes of a chunk that is copied straight into its target, with the budget of these tests."""


def prepared(engine: Engine, path: Path, sources: list[Source]) -> Stats:
    """Of the second save, for which everything is there."""
    made = engine.prepare(FilePlan(os.fsencode(path), HEADER, [s.view for s in sources]), 2)
    stats = None
    for _ in range(2):
        stats = engine.submit_prepared(
            made, keep_alive=sources, streams={}, durable=False, fetch=None
        ).result()
    made.close()
    assert stats is not None
    return stats


def registered(engine: Engine, path: Path, sources: list[Source]) -> Stats:
    plan = FilePlan(os.fsencode(path), HEADER, [s.view for s in sources])
    return engine.submit([plan], keep_alive=sources).result()


TARGETS: dict[str, tuple[Callable[[Engine, Path, list[Source]], Stats], int, str]] = {
    "prepared": (prepared, 2, "auto"),
    "registered": (registered, 1, "registered"),
}
"""What saves, how many saves that is, and the write path."""


def small(sim: SimCuda) -> list[Source]:
    return [on_device(sim, noise(i % 200 + 1, seed=i)) for i in range(SMALL)]


def strided(sim: SimCuda) -> list[Source]:
    return [on_device(sim, noise(400 + i, 300, seed=i)[:, : 150 + i].T) for i in range(6)]


def casts(sim: SimCuda) -> list[Source]:
    """Contiguous, transposed and small tensors, as bfloat16."""
    numbers = torch.randn((500, 300), generator=torch.Generator().manual_seed(1))
    sources = []
    for tensor in (numbers, numbers.t(), numbers[:, ::2], *numbers[:100]):
        source = on_device(sim, tensor.numpy())
        view = source.view._replace(
            nbytes=tensor.numel() * 2,
            itemsize=4,
            shape=tuple(tensor.shape),
            strides=tuple(tensor.stride()),
            cast=(CASTS["F32"], CASTS["BF16"]),
        )
        packed = tensor.contiguous().bfloat16().view(torch.int16).numpy()
        sources.append(Source(view, packed))
    return sources


@needs_kernel
@pytest.mark.parametrize("kind", [small, strided, casts])
@pytest.mark.parametrize("target", TARGETS)
def test_gathers_are_a_handful_of_launches_and_copies(
    sim: SimCuda,
    new_engine: NewEngine,
    memory: Path,
    target: str,
    kind: Callable[[SimCuda], list[Source]],
) -> None:
    save, saves, write_path = TARGETS[target]
    sources = kind(sim)
    stats = save(new_engine(write_path=write_path), memory / "m", sources)
    assert_same((memory / "m").read_bytes(), contents(sources))
    assert (stats.staging, stats.staging_nbytes, stats.fallbacks) == ("in place", 0, ())
    blocks = -(-stats.nbytes // SLOT) + 2  # of device scratch that are filled and emptied
    assert 0 < sim.count("cuLaunchKernel") <= saves * blocks
    assert sum(map(sim.count, COPIES)) <= saves * blocks
    assert sim.count("cuStreamSynchronize") == 0  # what is cast was not cast by the CPU


@needs_kernel
@pytest.mark.parametrize("target", TARGETS)
def test_without_device_scratch_the_kernel_stores_into_the_target(
    sim: SimCuda, new_engine: NewEngine, memory: Path, target: str
) -> None:
    save, saves, write_path = TARGETS[target]
    sources = [*small(sim), *casts(sim)]
    save(new_engine(write_path=write_path, device_scratch=0), memory / "m", sources)
    assert_same((memory / "m").read_bytes(), contents(sources))
    assert sum(map(sim.count, COPIES)) == 0
    assert 0 < sim.count("cuLaunchKernel") <= 4 * saves


def test_large_tensors_need_no_scratch(sim: SimCuda, new_engine: NewEngine, memory: Path) -> None:
    """What the copy engine takes in whole chunks pins no slot, as it would be for nothing."""
    nbytes = 5 * IN_TARGET
    sources = [on_host(noise(4096 - len(HEADER))), on_device(sim, noise(nbytes))]
    prepared(new_engine(threads=3), memory / "m", sources)
    assert_same((memory / "m").read_bytes(), contents(sources))
    assert sim.count("cuMemHostRegister") == 2  # the two generations
    assert sim.count("cuMemcpyDtoHAsync") == 2 * 5  # chunks larger than a slot
    assert sim.count("cuLaunchKernel") == 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("refused", ["cuModuleLoadData", "slots"])
def test_the_bytes_are_right_without_kernel_or_scratch(
    sim: SimCuda, new_engine: NewEngine, memory: Path, target: str, refused: str
) -> None:
    """The target is page-locked; the slot, which lends its scratch, is not."""
    sim.set_delay(0, 50)
    save, _, write_path = TARGETS[target]
    engine = new_engine(write_path=write_path)
    sources = [*small(sim)[:200], *casts(sim), *strided(sim)[:1]]
    if refused == "slots":
        # Both are there already, and refused: of a save into a file on a disk, whose copies go through them.
        sim.fail("cuMemHostRegister", Result.NOT_SUPPORTED, nth=0)
        engine.submit(
            [FilePlan(os.fsencode(memory / "m"), b"", [on_device(sim, noise(6 * MIB)).view])], keep_alive=None
        ).result()
        sim.reset_failures()
    else:
        sim.fail(refused, 218, nth=0)
    stats = save(engine, memory / "m", sources)
    assert_same((memory / "m").read_bytes(), contents(sources))
    assert sim.count("cuLaunchKernel") == 0
    assert stats.staging_nbytes <= BUDGET
    assert len(stats.fallbacks) >= 1


def test_the_slots_are_those_of_the_budget(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    """Slots of 4 MiB with their scratch, 32 of them: a copy and a write for each of many writers."""
    source = on_device(sim, np.zeros(200 * MIB, np.uint8))
    engine = new_engine(memory_budget=128 * MIB, threads=1)
    stats = engine.submit([FilePlan(os.fsencode(path), b"", [source.view])], keep_alive=source).result()
    assert sim.peak("registered_bytes") == 4 * sim.peak("registrations") * MIB
    assert stats.staging_nbytes <= 4 * 4 * MIB  # one thread has no more under way
    assert sim.count("cuMemcpyDtoHAsync") == -(-200 * 1024 // 3840)
