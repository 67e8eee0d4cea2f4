# SPDX-License-Identifier: Apache-2.0
"""A save beside a graph that another thread captures: neither notices the other."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from simcuda import CaptureMode, Result, SimCuda
from test_cuda_path import MODES, NewEngine, noise, on_device, save, varied


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("mode", ["scratch", "no kernel", "pageable"])
def test_a_graph_that_is_captured_meanwhile_stays_valid(
    sim: SimCuda, new_engine: NewEngine, path: Path, mode: str, elsewhere: bool
) -> None:
    """From the first call of an engine to the last: opening, page-locking, loading, waiting, and all releases."""
    MODES[mode](sim)
    sources = [*varied(sim), *varied(sim, 1)]
    with sim.capture(sim.stream(0), CaptureMode.GLOBAL, elsewhere=elsewhere) as capture:
        engine = new_engine()
        save(engine, {path: sources})
        engine.close()
        gc.collect()
    assert capture.ended == Result.SUCCESS


@pytest.mark.parametrize("failing", ["cuMemcpyDtoHAsync", "cuEventRecord", "cuEventSynchronize"])
def test_a_save_that_fails_leaves_it_valid_too(
    sim: SimCuda, new_engine: NewEngine, path: Path, failing: str
) -> None:
    sources = varied(sim)
    with sim.capture(sim.stream(0), elsewhere=True) as capture:
        engine = new_engine()
        sim.fail(failing, Result.UNKNOWN, nth=3)
        with pytest.raises(RuntimeError, match=failing):
            save(engine, {path: sources})
        engine.close()
    assert capture.ended == Result.SUCCESS


def test_a_threads_own_mode_is_as_it_was(sim: SimCuda, new_engine: NewEngine, path: Path) -> None:
    """The thread that saves captures later: its own unsafe calls must still be refused to it."""
    save(new_engine(), {path: [on_device(sim, noise(100))]})
    with sim.capture(sim.stream(0)) as capture, sim.current(0):
        assert sim.call("cuMemAlloc", None, 64) == Result.STREAM_CAPTURE_UNSUPPORTED
    assert capture.ended == Result.STREAM_CAPTURE_INVALIDATED
