# SPDX-License-Identifier: Apache-2.0
"""A job that fills the device holds up what has to be packed, and nothing else; and it is not held up itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import assert_same
from simcuda import PRIORITIES, Result, SimCuda
from test_cuda_path import (
    MIB,
    SLOT,
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

FIRST = PRIORITIES[0]
FEW = 32
"""From so many pieces of a chunk on, they are packed by a launch."""


def small(sim: SimCuda, count: int) -> list[Source]:
    return [on_device(sim, noise(3000 + i, seed=i), lead=i % 5) for i in range(count)]


def test_few_pieces_are_copied_without_a_launch(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    large = on_device(sim, noise(100_000))
    save(new_engine(), {path: [*small(sim, FEW - 1), large]})
    assert sim.count("cuMemcpyDtoHAsync") == FEW
    assert sim.count("cuLaunchKernel") == sim.count("cuModuleLoadData") == sim.count("cuMemAlloc") - FEW == 0
    assert sim.streams_made() == {0: 1}


@needs_kernel
@pytest.mark.parametrize("kind", ["many", "strided"])
def test_many_and_strided_pieces_are_packed_with_priority(
    sim: SimCuda, new_engine: NewEngine, path: Path, kind: str
) -> None:
    sources = small(sim, FEW) if kind == "many" else [*small(sim, 2), *gathered(sim, count=1)]
    save(new_engine(), {path: sources})
    assert sim.count("cuMemcpyDtoHAsync") == 1
    assert sim.launches() == {FIRST: 1}
    assert sim.streams_made() == {FIRST: 1, 0: 1}  # nothing was copied out of the tensors themselves


@needs_kernel
@pytest.mark.parametrize("scratch", [0, 64 * MIB])
def test_copies_do_not_wait_for_kernels(
    sim: SimCuda, new_engine: NewEngine, tmp_path: Path, scratch: int
) -> None:
    """One file needs the kernel, which the job leaves no room; all of the other gets written meanwhile."""
    sim.set(implicit_sync=0)
    nbytes = 16 * MIB
    files = {tmp_path / "packed": gathered(sim), tmp_path / "copied": [on_device(sim, noise(nbytes))]}
    with sim.job(priority=FIRST):
        with sim.paused():
            future = submit(new_engine(memory_budget=8 * MIB, device_scratch=scratch), files)
            wait_until(lambda: sim.count("cuLaunchKernel") > 0)
        wait_until(lambda: sim.waiting_kernels() == 1)
        wait_until(lambda: future._native.nbytes_written >= nbytes)
        assert stays_unfinished(future)
    future.result()
    assert_saved(files)


@needs_kernel
def test_packing_goes_first_when_a_kernel_of_the_job_ends(
    sim: SimCuda, new_engine: NewEngine, path: Path
) -> None:
    sim.set(implicit_sync=0)
    sources = gathered(sim)
    with sim.job() as job:
        future = submit(new_engine(), {path: sources})
        while not future.done():
            wait_until(lambda: sim.waiting_kernels() > 0 or future.done())
            job.step()
    future.result()
    assert_same(path.read_bytes(), contents(sources))


@needs_kernel
def test_a_chunk_of_several_blocks(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    """Chunks of nearly 4 MiB through two blocks of 2 MiB, each of which is packed while the other is emptied."""
    sources = [on_device(sim, noise(3000, 6000, seed=i)[:, :3000].T) for i in range(2)]
    stats = save(new_engine(memory_budget=32 * MIB, device_scratch=6 * MIB, threads=1), {path: sources})
    assert stats.device_scratch_nbytes == 6 * MIB
    assert sim.count("cuLaunchKernel") >= 2 * 3000 * 3000 // (2 * MIB)
    assert sim.streams_made() == {FIRST: 1, 0: 1}


@needs_kernel
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_all_of_a_chunk_is_waited_for_when_an_event_fails(
    sim: SimCuda, new_engine: NewEngine, path: Path, nth: int
) -> None:
    """Copied, packed and emptied, each on a stream of its own: the buffer is not given back before all of it."""
    sim.fail("cuEventSynchronize", Result.UNKNOWN, nth)
    with sim.paused():
        future = submit(new_engine(), {path: [on_device(sim, noise(SLOT // 2)), *gathered(sim, count=1)]})
        wait_until(lambda: sim.count("cuEventSynchronize") >= 1)
        assert stays_unfinished(future)
    with pytest.raises(RuntimeError, match="cuEventSynchronize failed: CUDA_ERROR_UNKNOWN"):
        future.result()
    assert sim.count("cuStreamSynchronize") == 3
