# SPDX-License-Identifier: Apache-2.0
"""While a graph is captured, the simulated driver forbids what real drivers forbid."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import driver_tools
import pytest
from driver_tools import Host, Kernel, call_elsewhere, new_event, register
from simcuda import POISON, CaptureMode, Result, SimCuda, SimCudaError

library, driver, sim = driver_tools.library, driver_tools.driver, driver_tools.sim
others = driver_tools.others


def exchange_mode(sim: SimCuda, mode: CaptureMode) -> CaptureMode:
    value = ctypes.c_int(mode)
    sim.check("cuThreadExchangeStreamCaptureMode", ctypes.byref(value))
    return CaptureMode(value.value)


def test_capture_mode_of_a_thread(sim: SimCuda, others: ThreadPoolExecutor) -> None:
    assert exchange_mode(sim, CaptureMode.RELAXED) == CaptureMode.GLOBAL
    other = others.submit(exchange_mode, sim, CaptureMode.THREAD_LOCAL)
    assert other.result() == CaptureMode.GLOBAL  # each thread has its own
    assert exchange_mode(sim, CaptureMode.GLOBAL) == CaptureMode.RELAXED
    unknown = ctypes.byref(ctypes.c_int(3))
    assert sim.call("cuThreadExchangeStreamCaptureMode", unknown) == Result.INVALID_VALUE


def test_what_is_captured_does_not_happen(sim: SimCuda) -> None:
    stream, other, target = sim.stream(0), sim.stream(0), sim.alloc(0, 64)
    status = ctypes.c_int()
    with sim.current(0), Host(sim, 4096) as host:
        event = new_event(sim)
        assert sim.call("cuStreamBeginCapture", 0, CaptureMode.GLOBAL) == Result.INVALID_VALUE
        with sim.capture(stream) as capture:
            sim.check("cuStreamIsCapturing", stream, ctypes.byref(status))
            assert status.value == 1
            assert sim.call("cuStreamBeginCapture", stream, CaptureMode.GLOBAL) == Result.INVALID_VALUE
            sim.check("cuMemsetD8Async", target, 0, 64, stream)
            sim.check("cuMemcpyDtoHAsync", host.address, target, 64, stream)
            # A stream that waits for the captured one is captured, too, until it is waited for.
            sim.check("cuEventRecord", event, stream)
            sim.check("cuStreamWaitEvent", other, event, 0)
            sim.check("cuMemsetD8Async", target, 0, 64, other)
        assert capture.ended == Result.STREAM_CAPTURE_UNJOINED
        assert sim.read(target, 64) == bytes([POISON]) * 64
        assert host.memory[:64] == bytes(64)
        sim.check("cuStreamIsCapturing", other, ctypes.byref(status))
        assert status.value == 0
        assert sim.call("cuEventQuery", event) == Result.CAPTURED_EVENT
        sim.check("cuEventRecord", event, stream)
        sim.check("cuEventSynchronize", event)
        with sim.capture(stream) as capture:
            sim.check("cuMemsetD8Async", target, 0, 64, stream)
        assert capture.ended == Result.SUCCESS
        sim.check("cuEventDestroy", event)


UNSAFE: dict[str, Callable[[SimCuda, Host, int, int], int]] = {
    "cuStreamSynchronize": lambda sim, host, stream, event: sim.call("cuStreamSynchronize", stream),
    "cuStreamQuery": lambda sim, host, stream, event: sim.call("cuStreamQuery", stream),
    "cuEventQuery": lambda sim, host, stream, event: sim.call("cuEventQuery", event),
    "cuEventSynchronize": lambda sim, host, stream, event: sim.call("cuEventSynchronize", event),
    "cuMemHostRegister": lambda sim, host, stream, event: register(sim, host.memory),
    "cuMemAlloc": lambda sim, host, stream, event: free_new(sim),
    "cuModuleLoadData": lambda sim, host, stream, event: unload_new(sim),
}


def free_new(sim: SimCuda) -> int:
    try:
        sim.free(sim.alloc(0, 64))
    except SimCudaError as error:
        return error.result
    return Result.SUCCESS


def unload_new(sim: SimCuda) -> int:
    try:
        Kernel(sim).__exit__()
    except SimCudaError as error:
        return error.result
    return Result.SUCCESS


@pytest.mark.parametrize("mode", CaptureMode)
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("function", UNSAFE)
def test_unsafe_calls_end_captures(
    sim: SimCuda, others: ThreadPoolExecutor, function: str, elsewhere: bool, mode: CaptureMode
) -> None:
    captured, stream = sim.stream(0), sim.stream(0)
    with sim.current(0), Host(sim, 4096, registered=False) as host:
        event = new_event(sim)

        def act(mode_here: CaptureMode) -> int:
            before = exchange_mode(sim, mode_here)
            with sim.current(0):
                result = UNSAFE[function](sim, host, stream, event)
            exchange_mode(sim, before)
            return result

        for mode_here in CaptureMode:
            with sim.capture(captured, mode, elsewhere=elsewhere) as capture:
                result = act(mode_here)
            if elsewhere:
                forbidden = mode == mode_here == CaptureMode.GLOBAL
            else:
                forbidden = CaptureMode.RELAXED not in (mode, mode_here)
            assert result == (Result.STREAM_CAPTURE_UNSUPPORTED if forbidden else Result.SUCCESS)
            assert capture.ended == (Result.STREAM_CAPTURE_INVALIDATED if forbidden else Result.SUCCESS)
        sim.check("cuEventDestroy", event)
    assert sim.violations() == []


def test_captures_that_are_misused(sim: SimCuda, others: ThreadPoolExecutor) -> None:
    stream, other, target = sim.stream(0), sim.stream(0), sim.alloc(0, 64)
    with sim.current(0):
        event, blocking, graph = new_event(sim), ctypes.c_uint64(), ctypes.c_uint64()
        relaxed = exchange_mode(sim, CaptureMode.RELAXED)
        with sim.capture(stream) as capture:  # to wait for it is forbidden in any mode
            assert sim.call("cuStreamSynchronize", stream) == Result.STREAM_CAPTURE_UNSUPPORTED
            invalid = sim.call("cuMemsetD8Async", target, 0, 64, stream)
            assert invalid == Result.STREAM_CAPTURE_INVALIDATED
        assert capture.ended == Result.STREAM_CAPTURE_INVALIDATED
        with sim.capture(stream) as capture:
            sim.check("cuEventRecord", event, other)
            assert sim.call("cuStreamWaitEvent", stream, event, 0) == Result.STREAM_CAPTURE_ISOLATION
        assert capture.ended == Result.STREAM_CAPTURE_INVALIDATED
        with sim.capture(stream):
            wrong = call_elsewhere(others, sim, "cuStreamEndCapture", stream, ctypes.byref(graph))
            assert wrong == Result.STREAM_CAPTURE_WRONG_THREAD
        # A stream that is ordered with the legacy one.
        sim.check("cuStreamCreate", ctypes.byref(blocking), 0)
        sim.check("cuStreamBeginCapture", blocking.value, CaptureMode.RELAXED)
        assert sim.call("cuEventRecord", event, 0) == Result.STREAM_CAPTURE_IMPLICIT
        ended = sim.call("cuStreamEndCapture", blocking.value, ctypes.byref(graph))
        assert ended == Result.STREAM_CAPTURE_INVALIDATED
        sim.check("cuStreamDestroy", blocking.value)
        exchange_mode(sim, relaxed)
        sim.check("cuEventDestroy", event)
