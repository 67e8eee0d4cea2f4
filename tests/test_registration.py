# SPDX-License-Identifier: Apache-2.0
"""What a driver may refuse, over the simulated one: page-locking, whole or in part, and kernels. Bytes are right, the
reason is named, and nothing stays page-locked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import SLOT, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from simcuda import Result, SimCuda
from test_cuda_path import (
    MIB,
    NewEngine,
    Source,
    contents,
    needs_kernel,
    noise,
    on_device,
    on_host,
    save,
    varied,
)
from test_cuda_prepared import HEADER, IN_TARGET
from test_schedule import PAGE, PRODUCTION, Chunk, contiguous, file_of

from fastshard import _native
from fastshard.engine.engine import Engine
from fastshard.engine.plan import HOST, FilePlan

PART = 256 * MIB
"""What is page-locked at once when the whole has been refused."""
LOST = [Result.LAUNCH_FAILED, Result.ILLEGAL_ADDRESS, Result.CONTEXT_IS_DESTROYED, Result.INVALID_CONTEXT]
"""After these nothing more can be had from a context."""


# Boundaries between registrations.


@given(
    views=st.lists(
        st.tuples(st.integers(1, 40 * PAGE), st.sampled_from([HOST, 0, 1])), min_size=1, max_size=12
    ),
    boundary=st.integers(1, 8),
    slot=st.integers(1, 9),
    header=st.integers(1, 2 * PAGE),
)
@settings(deadline=None)
def test_no_chunk_reaches_across_a_boundary(
    views: list[tuple[int, int]], boundary: int, slot: int, header: int
) -> None:
    plan = file_of(*[contiguous(*view) for view in views], header=bytes(header))
    limits = {
        **PRODUCTION,
        "in_place": False,
        "slot_nbytes": slot * PAGE,
        "packed_nbytes": 3 * PAGE,
        "boundary_nbytes": boundary * PAGE,
    }
    (found,) = _native.schedule([plan], **limits)
    chunks = [Chunk(*chunk) for chunk in found]
    end = 0
    for chunk in chunks:
        assert chunk.file_offset == end
        end += chunk.nbytes
        assert chunk.file_offset // (boundary * PAGE) == (end - 1) // (boundary * PAGE)
        assert chunk.nbytes == sum(op[3] for op in chunk.ops)
    assert end == header + sum(nbytes for nbytes, _ in views)


@pytest.mark.parametrize("boundary", [1, PAGE - 1, PAGE + 512])
def test_a_boundary_is_one_of_pages(boundary: int) -> None:
    with pytest.raises(ValueError, match="boundaries"):
        _native.schedule([file_of(contiguous(9))], **PRODUCTION, boundary_nbytes=boundary)


# Files that are page-locked whole, in parts, or not at all.


@pytest.fixture
def large(sim: SimCuda, memory: Path) -> list[Source]:
    """A little more than a part, most of it zeros of the host; what comes from the device lies on both sides."""
    if shutil.disk_usage(memory).free < 3 * PART:
        pytest.skip("too little room in /dev/shm")
    zeros = np.zeros(PART - 3 * MIB, np.uint8)
    return [
        *[on_device(sim, noise(500 + i, 90, seed=i).T) for i in range(9)],
        on_host(zeros),
        on_device(sim, noise(4 * MIB, seed=1)),
        *[on_device(sim, noise(i + 1, seed=i)) for i in range(300)],
    ]


def prepare(engine: Engine, path: Path, sources: list[Source]) -> _native.Prepared:
    return engine.prepare(FilePlan(os.fsencode(path), HEADER, [s.view for s in sources]), 2)


def fill(engine: Engine, prepared: _native.Prepared, path: Path, sources: list[Source]):  # type: ignore[no-untyped-def]
    future = engine.submit_prepared(prepared, keep_alive=sources, streams={}, durable=False, fetch=None)
    assert future is not None
    stats = future.result()
    assert_same(path.read_bytes(), contents(sources))
    return stats


def test_a_large_file_is_locked_in_parts_where_the_whole_is_refused(
    sim: SimCuda, new_engine: NewEngine, memory: Path, large: list[Source]
) -> None:
    engine, path = new_engine(memory_budget=8 * MIB), memory / "m"
    for nth in (1, 4):  # of both generations
        sim.fail("cuMemHostRegister", Result.NOT_SUPPORTED, nth=nth)
    before = sim.live()["registrations"]
    prepared = prepare(engine, path, large)
    assert sim.count("cuMemHostRegister") == 2 * (1 + 2)
    assert sim.live()["registrations"] == before + 2 * 2
    for _ in range(2):
        stats = fill(engine, prepared, path, large)
        assert stats.staging == "in place"
        assert [text for text in stats.fallbacks if "page-locking" in text] == []
    prepared.close()
    assert sim.count("cuMemHostUnregister") == 2 * 2


def test_one_part_refused_is_all_refused(
    sim: SimCuda, new_engine: NewEngine, memory: Path, large: list[Source]
) -> None:
    engine, path = new_engine(memory_budget=8 * MIB), memory / "m"
    before = sim.live()
    for nth in (1, 3, 4, 6):  # of both generations: the whole, then the second part
        sim.fail("cuMemHostRegister", Result.OUT_OF_MEMORY, nth=nth)
    prepared = prepare(engine, path, large)
    sim.reset_failures()
    assert sim.count("cuMemHostRegister") == 6
    assert sim.live()["registrations"] == before["registrations"]  # the first parts have been let go
    stats = fill(engine, prepared, path, large)
    assert stats.staging == "pinned"
    (refused,) = [text for text in stats.fallbacks if "page-locking" in text]
    assert "the file" in refused and "CUDA_ERROR_OUT_OF_MEMORY" in refused
    prepared.close()


@pytest.mark.parametrize("result", LOST, ids=lambda result: result.name)
def test_a_lost_context_is_no_refusal(
    sim: SimCuda, new_engine: NewEngine, memory: Path, result: Result
) -> None:
    sources = [on_device(sim, noise(3 * SLOT))]
    sim.fail("cuMemHostRegister", result)
    with pytest.raises(RuntimeError, match=f"cuMemHostRegister failed: CUDA_ERROR_{result.name}"):
        prepare(new_engine(), memory / "m", sources)
    sim.fail("cuMemHostRegister", result)
    with pytest.raises(RuntimeError, match=f"cuMemHostRegister failed: CUDA_ERROR_{result.name}"):
        save(new_engine(), {memory / "m": sources})
    assert os.listdir(memory) == []


# Staging memory.


@pytest.mark.parametrize("nth", [0, 1, 2])
def test_refused_staging_memory_is_named_once(
    sim: SimCuda, new_engine: NewEngine, path: Path, nth: int
) -> None:
    engine, files = new_engine(), {path: [*varied(sim), *varied(sim, 1)]}
    sim.fail("cuMemHostRegister", Result.OUT_OF_MEMORY, nth=nth)
    for _ in range(2):  # it is not asked again
        refused = [text for text in save(engine, files).fallbacks if "page-locking" in text]
        assert len(refused) == 1
        assert "staging memory" in refused[0] and "CUDA_ERROR_OUT_OF_MEMORY (out of memory)" in refused[0]
    assert sim.count("cuMemHostRegister") == 2


# Files that are page-locked window by window.


def test_windows_stay_locked_until_the_file_is_complete(
    sim: SimCuda, new_engine: NewEngine, memory: Path
) -> None:
    path, nbytes = memory / "m", 9 * IN_TARGET
    sources = [on_host(noise(PAGE - len(HEADER))), on_device(sim, noise(nbytes))]
    stats = save(new_engine(write_path="registered", threads=3), {path: sources})
    assert (stats.staging, stats.write_path) == ("in place", "registered")
    assert sim.peak("registered_bytes") == nbytes + PAGE  # one page asks whether it may be
    assert sim.count("cuMemHostRegister") == sim.count("cuMemHostUnregister") == 9 + 1
    assert sim.count("cuMemcpyDtoHAsync") == 9


@pytest.mark.parametrize("nth", [1, 2, 5])
def test_refused_windows(sim: SimCuda, new_engine: NewEngine, memory: Path, nth: int) -> None:
    """From the first on they are staged in slots; later ones are pageable."""
    sources = [on_host(noise(PAGE - len(HEADER))), on_device(sim, noise(7 * IN_TARGET + 5))]
    engine = new_engine(write_path="registered", threads=1)
    sim.fail("cuMemHostRegister", Result.NOT_SUPPORTED, nth=nth)
    stats = save(engine, {memory / "m": sources})
    (refused,) = [text for text in stats.fallbacks if "page-locking" in text]
    assert "the file" in refused and "CUDA_ERROR_NOT_SUPPORTED" in refused
    assert (stats.staging, stats.staging_nbytes > 0) == (
        ("pinned", True) if nth == 1 else ("in place", False)
    )


# Kernels.


REFUSALS = [
    ("cuModuleLoadData", code)
    for code in (200, 209, 218, 221, 222, 300, Result.UNKNOWN, Result.NOT_SUPPORTED)
] + [("cuModuleGetFunction", code) for code in (Result.NOT_FOUND, Result.UNKNOWN)]


@needs_kernel
@pytest.mark.parametrize(("function", "result"), REFUSALS)
def test_whatever_the_driver_says_of_kernels_they_are_done_without(
    sim: SimCuda, new_engine: NewEngine, path: Path, function: str, result: int
) -> None:
    sim.set_delay(0, 50)
    modules = sim.live()["modules"]
    sim.fail(function, result, nth=0)
    engine, files = new_engine(), {path: [*varied(sim), *varied(sim, 1)]}
    for _ in range(2):
        stats = save(engine, files)
        (refused,) = stats.fallbacks  # once for both devices
        assert refused.startswith("kernels refused: CUDA")
        if isinstance(result, Result):
            assert f"CUDA_ERROR_{result.name}" in refused
    assert sim.count(function) == 2  # each device once
    assert sim.count("cuLaunchKernel") == 0
    engine.close()
    assert sim.live()["modules"] == modules


@needs_kernel
@pytest.mark.parametrize("function", ["cuModuleLoadData", "cuModuleGetFunction"])
@pytest.mark.parametrize("result", [Result.OUT_OF_MEMORY, *LOST], ids=lambda result: result.name)
def test_no_memory_for_kernels_and_a_lost_context_end_the_save(
    sim: SimCuda, new_engine: NewEngine, path: Path, function: str, result: Result
) -> None:
    engine, files = new_engine(), {path: varied(sim)}
    sim.fail(function, result)
    with pytest.raises(RuntimeError, match=f"{function} failed: CUDA_ERROR_{result.name}"):
        save(engine, files)
    stats = save(engine, files)  # asked again
    assert stats.fallbacks == ()
    assert sim.count("cuLaunchKernel") > 0
    assert sim.peak("modules") == 1


def test_a_build_without_kernels_is_named(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    sim.set_delay(0, 50)
    stats = save(new_engine(), {path: varied(sim)})
    expected = () if _native.kernels_compiled_in() else ("built without kernels: gathered by pitched copies",)
    assert stats.fallbacks == expected
    contiguous_only = save(new_engine(), {path: [on_device(sim, noise(2 * SLOT - len(HEADER)))]})
    assert contiguous_only.fallbacks == ()  # nothing was to be gathered


@needs_kernel
def test_no_device_address(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    sim.set_delay(0, 50)
    sim.fail("cuMemHostGetDevicePointer", Result.INVALID_VALUE, nth=0)
    (text,) = save(new_engine(), {path: varied(sim)}).fallbacks
    assert "device address" in text
    assert sim.count("cuLaunchKernel") == 0


@needs_kernel
@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("result", LOST, ids=lambda result: result.name)
def test_a_context_lost_before_addresses_are_asked_for_is_named(
    sim: SimCuda, new_engine: NewEngine, path: Path, result: Result, nth: int
) -> None:
    """A copy of another chunk may have failed by then: the save says so, and gathers nothing in another way."""
    path.write_bytes(b"old")
    sim.fail("cuMemHostGetDevicePointer", result, nth)
    with pytest.raises(RuntimeError, match=f"^cuMemHostGetDevicePointer failed: CUDA_ERROR_{result.name}"):
        save(new_engine(), {path: [source for i in range(3) for source in varied(sim, seed=i)]})
    assert os.listdir(path.parent) == [path.name]
    assert path.read_bytes() == b"old"
