# SPDX-License-Identifier: Apache-2.0
"""``Engine.warm_up``: what saves share is made before a job runs, over the simulated driver. And what becomes of the
page-locked memory in a forked child."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CACHE_VARIABLE, DRIVER_VARIABLE
from simcuda import GRANULE, Result, SimCuda
from test_cuda_path import HERE, MIB, NewEngine, needs_kernel, noise, on_device, save, varied

import fastshard
from fastshard import _native
from fastshard.engine.engine import Engine, Options

MADE = ("cuModuleLoadData", "cuModuleGetFunction", "cuMemAlloc", "cuMemHostRegister")
FORMS = [1, "cuda:1", torch.device("cuda", 1), torch.device("cuda:1")]


def made(sim: SimCuda) -> dict[str, int]:
    return {function: sim.count(function) for function in MADE}


@pytest.mark.parametrize("budget", [MIB, 9 * MIB, 24 * MIB])
def test_a_save_makes_nothing_any_more(sim: SimCuda, new_engine: NewEngine, path: Path, budget: int) -> None:
    engine = new_engine(memory_budget=budget, threads=3)
    engine.warm_up(0)
    sources = [*varied(sim), on_device(sim, noise(2 * budget))]
    before = made(sim)
    stats = save(engine, {path: sources})
    assert made(sim) == before
    assert stats.staging == "pinned"
    if _native.kernels_compiled_in():
        assert before["cuModuleLoadData"] == 1
        assert stats.device_scratch_nbytes > 0


def test_what_is_ready_is_left_alone(sim: SimCuda, new_engine: NewEngine) -> None:
    engine = new_engine(memory_budget=4 * MIB)
    engine.warm_up(0)
    before, live = made(sim), sim.live()
    for _ in range(2):
        engine.warm_up("cuda:0")
    assert (made(sim), sim.live()) == (before, live)
    assert live["registered_bytes"] == 4 * MIB
    engine.warm_up(1)  # staging memory serves all devices
    assert sim.count("cuMemHostRegister") == before["cuMemHostRegister"]


@needs_kernel
def test_device_scratch_is_that_of_the_options(sim: SimCuda, new_engine: NewEngine) -> None:
    for option in (0, 8 * MIB, 64 * MIB):
        before = sim.live()["allocated_bytes"]
        engine = new_engine(device_scratch=option, memory_budget=128 * MIB)
        engine.warm_up(0)
        taken = sim.live()["allocated_bytes"] - before
        assert (GRANULE < taken <= option) if option else taken == GRANULE  # the kernel's code
        engine.close()
        assert sim.live()["allocated_bytes"] == before


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_forms_of_a_device(sim: SimCuda, new_engine: NewEngine, form: torch.device | str | int) -> None:
    contexts = sim.live()["contexts"]
    engine = new_engine()
    engine.warm_up(form)
    assert sim.live()["contexts"] == contexts + 1
    engine.warm_up(1)
    assert sim.live()["contexts"] == contexts + 1  # it was this one
    engine.warm_up(torch.device("cuda"))
    assert sim.live()["contexts"] == contexts + 2


@pytest.mark.parametrize("form", ["cpu", torch.device("cpu"), "meta", "mps"])
def test_others_need_nothing(
    sim: SimCuda, new_engine: NewEngine, path: Path, form: torch.device | str
) -> None:
    engine, before = new_engine(), sim.live()
    engine.warm_up(form)
    assert (made(sim), sim.live()) == (dict.fromkeys(MADE, 0), before)
    fastshard.save_file({"t": torch.ones(300, 300).t()}, path, allow_strided=True, engine=engine)
    assert path.stat().st_size > 300 * 300 * 4


@pytest.mark.parametrize("form", [2, "cuda:2", torch.device("cuda", 7)])
def test_no_such_device(sim: SimCuda, new_engine: NewEngine, form: torch.device | str | int) -> None:
    engine = new_engine()
    with pytest.raises(RuntimeError, match=r"no CUDA device [27]: the driver sees 2"):
        engine.warm_up(form)
    engine.warm_up(0)


def test_no_device_at_all(sim: SimCuda, new_engine: NewEngine) -> None:
    engine = new_engine()
    for nonsense in ("a device", -1):
        with pytest.raises(RuntimeError):
            engine.warm_up(nonsense)
    with pytest.raises(TypeError):
        engine.warm_up(1.5)  # type: ignore[arg-type]
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.warm_up(0)


def test_what_is_refused_stays_a_fallback(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    sim.set_delay(0, 50)
    engine, sources = new_engine(), varied(sim)
    sim.fail("cuMemHostRegister", Result.OUT_OF_MEMORY, nth=0)
    sim.fail("cuModuleLoadData", 218, nth=0)
    engine.warm_up(0)
    stats = save(engine, {path: sources})
    assert stats.staging == "pageable"
    assert any("staging memory" in text for text in stats.fallbacks)
    assert any("kernels" in text for text in stats.fallbacks)
    sim.fail("cuModuleLoadData", Result.OUT_OF_MEMORY)
    if _native.kernels_compiled_in():
        with pytest.raises(RuntimeError, match="cuModuleLoadData failed: CUDA_ERROR_OUT_OF_MEMORY"):
            new_engine().warm_up(0)


def test_while_a_save_runs(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    """It waits for none of its slots, and takes none of them away for good."""
    engine = new_engine(memory_budget=8 * MIB)
    sources = [on_device(sim, noise(20 * MIB)), *varied(sim)]
    plan = fastshard.engine.plan.FilePlan(os.fsencode(path), b"a header", [s.view for s in sources])
    with sim.paused():
        future = engine.submit([plan], keep_alive=sources)
        engine.warm_up(0)
        assert not future.done()
    future.result()
    before = made(sim)
    save(engine, {path: sources})
    assert made(sim) == before


# Memory that is page-locked.


def page_locked() -> list[tuple[int, int]]:
    """Mappings of this process that a fork leaves out, by /proc: where they begin and end."""
    found, place = [], (0, 0)
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(" ", 1)[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            place = begin, end
        elif line.startswith("VmFlags:") and "dc" in line.split():
            found.append(place)
    return found


def test_page_locked_memory_is_aligned_and_no_more_than_the_budget(
    sim: SimCuda, new_engine: NewEngine
) -> None:
    before = set(page_locked())
    engine = new_engine(memory_budget=24 * MIB + 12345)
    engine.warm_up(0)
    ring = set(page_locked()) - before
    assert sum(end - begin for begin, end in ring) == sim.live()["registered_bytes"] == 24 * MIB
    assert all(begin % (2 * MIB) == 0 for begin, _ in ring if sim.live()["registrations"] == 8)
    engine.close()
    assert set(page_locked()) == before


IN_A_CHILD = """
import ctypes, gc, mmap, os, sys
sys.path.insert(0, sys.argv[1])
import torch
import fastshard
from fastshard import _native
from fastshard.engine.engine import Engine, Options
from test_warm_up import page_locked

torch.set_num_threads(1)  # its other threads would be missing in the child
MIB = 1 << 20
tensors = {"t": torch.arange(3 * MIB, dtype=torch.float32).reshape(3, MIB).t()}

def save(path):
    fastshard.save_file(tensors, path, allow_strided=True, engine=engine)
    return fastshard.load_file(path)["t"].equal(tensors["t"])

before = set(page_locked())
engine = Engine(Options(memory_budget="16MiB", threads=2))
engine.warm_up(0)
bare = _native.Engine(MIB * 16, 1, "auto", 0)
bare.warm_up(0)
ring = sorted(set(page_locked()) - before)
assert sum(end - begin for begin, end in ring) == 32 * MIB
assert save("parent")

child = os.fork()
if child == 0:
    status = 1
    try:
        # Nothing of it is there, and what comes to lie in its place is not the engine's to take away.
        mapped = {int(line.split("-", 1)[0], 16) for line in open("/proc/self/maps")}
        assert not mapped & {begin for begin, _ in ring}
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        for begin, end in ring:
            at = libc.mmap(begin, end - begin, mmap.PROT_READ | mmap.PROT_WRITE, 0x100022, -1, 0)  # MAP_FIXED_NOREPLACE
            assert at == begin
            ctypes.memset(begin, 7, end - begin)
        assert save("child")
        engine.close()
        bare.close()
        del bare
        gc.collect()
        assert all(ctypes.string_at(begin, 1) == ctypes.string_at(end - 1, 1) == bytes([7]) for begin, end in ring)
        status = 0
    finally:
        os._exit(status)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert save("again")
engine.close()
bare.close()
assert set(page_locked()) == before
print("both")
"""


def test_a_forked_child_has_none_of_it(sim: SimCuda, tmp_path: Path) -> None:
    variables = {**os.environ, DRIVER_VARIABLE: str(sim.path)}
    command = [sys.executable, "-c", textwrap.dedent(IN_A_CHILD), str(HERE)]
    done = subprocess.run(
        command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.stdout, done.returncode) == ("both\n", 0), done.stderr
    files = [np.frombuffer((tmp_path / name).read_bytes(), np.uint8) for name in ("parent", "child", "again")]
    assert all(np.array_equal(files[0], other) for other in files[1:])


def test_names_are_public() -> None:
    assert CACHE_VARIABLE and fastshard.Engine is Engine and fastshard.Options is Options
