# SPDX-License-Identifier: Apache-2.0
"""The simulated driver keeps its own promises: what tests of fastshard conclude from it rests on these."""

from __future__ import annotations

import ctypes
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import driver_tools
import pytest
import simcuda
import simcuda_build
from driver_tools import PORTABLE, Host, new_event, pattern
from simcuda import GRANULE, POISON, Result, SimCuda

MIB = 1 << 20

library, driver, sim = driver_tools.library, driver_tools.driver, driver_tools.sim


# Streams.


def test_stream_keeps_order(sim: SimCuda) -> None:
    stream, source = sim.stream(0), sim.alloc(0, 64)
    with Host(sim, 4096) as host, sim.current(0):
        for i in range(8):
            sim.enqueue_write(stream, source, bytes([i]) * 64)
            sim.check("cuMemcpyDtoHAsync", host.address + 64 * i, source, 64, stream)
        sim.synchronize(stream)
        assert host.memory[: 8 * 64] == b"".join(bytes([i]) * 64 for i in range(8))
    assert sim.violations() == []


def test_target_is_poisoned_until_the_copy_happens(sim: SimCuda) -> None:
    stream, source = sim.stream(0), sim.alloc(0, 256)
    sim.write(source, b"a" * 256)
    with Host(sim, 4096) as host, sim.current(0):
        with sim.paused():
            sim.check("cuMemcpyDtoHAsync", host.address + 100, source, 256, stream)
            assert sim.call("cuStreamQuery", stream) == Result.NOT_READY
            assert host.memory[:400] == b"\0" * 100 + bytes([POISON]) * 256 + b"\0" * 44
            sim.write(source, b"b" * 256)  # the source is read by the copy, not by the call
        sim.synchronize(stream)
        assert sim.call("cuStreamQuery", stream) == Result.SUCCESS
        assert host.memory[100:356] == b"b" * 256


def test_pageable_copies_are_complete_when_they_return(sim: SimCuda) -> None:
    stream, source = sim.stream(0), sim.alloc(0, 256)
    sim.enqueue_write(stream, source, b"x" * 256, delay=0.02)
    with Host(sim, 4096, registered=False) as host, sim.current(0):
        sim.check("cuMemcpyDtoHAsync", host.address, source, 256, stream)
        assert host.memory[:256] == b"x" * 256


def test_memory_registered_for_another_device_is_pageable(sim: SimCuda) -> None:
    stream, source = sim.stream(1), sim.alloc(1, 64)
    sim.write(source, b"y" * 64)
    with Host(sim, 4096, flags=0) as host, sim.current(1):
        sim.check("cuMemcpyDtoHAsync", host.address, source, 64, stream)
        assert host.memory[:64] == b"y" * 64
        assert sim.call("cuMemHostGetDevicePointer", ctypes.byref(ctypes.c_uint64()), host.address, 0) != 0


def test_streams_overtake_each_other(sim: SimCuda) -> None:
    slow, fast, source = sim.stream(0), sim.stream(0), sim.alloc(0, 64)
    with Host(sim, 4096) as host, sim.current(0):
        sim.enqueue_write(slow, source, b"s" * 64, delay=0.3)
        sim.check("cuMemcpyDtoHAsync", host.address, source, 64, fast)
        sim.synchronize(fast)
        assert host.memory[:64] == bytes([POISON]) * 64  # nobody ordered it behind `slow`
        assert sim.call("cuStreamQuery", slow) == Result.NOT_READY


@pytest.mark.parametrize("producer", ["stream", "legacy"])
def test_event_orders_streams(sim: SimCuda, producer: str) -> None:
    first, second, source = sim.stream(0) if producer == "stream" else 0, sim.stream(0), sim.alloc(0, 64)
    with Host(sim, 4096) as host, sim.current(0):
        ready, done = new_event(sim), new_event(sim)
        assert sim.call("cuEventQuery", ready) == Result.SUCCESS  # never recorded
        with sim.paused():
            sim.enqueue_write(first, source, b"1" * 64, delay=0.03)
            sim.check("cuEventRecord", ready, first)
            sim.check("cuStreamWaitEvent", second, ready, 0)
            # Recorded again and destroyed: the wait is for what it found.
            sim.check("cuEventRecord", ready, second)
            sim.check("cuEventDestroy", ready)
            sim.check("cuMemcpyDtoHAsync", host.address, source, 64, second)
            sim.check("cuEventRecord", done, second)
            assert sim.call("cuEventQuery", done) == Result.NOT_READY
        sim.check("cuEventSynchronize", done)
        assert sim.call("cuEventQuery", done) == Result.SUCCESS
        assert host.memory[:64] == b"1" * 64
        sim.check("cuEventDestroy", done)
    assert sim.violations() == []


def test_destroyed_stream_finishes_its_work(sim: SimCuda) -> None:
    source = sim.alloc(0, 64)
    sim.write(source, b"z" * 64)
    out = ctypes.c_uint64()
    with Host(sim, 4096) as host, sim.current(0):
        sim.check("cuStreamCreate", ctypes.byref(out), 0)
        event = new_event(sim)
        sim.check("cuMemcpyDtoHAsync", host.address, source, 64, out.value)
        sim.check("cuEventRecord", event, out.value)
        sim.check("cuStreamDestroy", out.value)
        sim.check("cuEventSynchronize", event)
        assert host.memory[:64] == b"z" * 64
        assert sim.violations() == []
        assert sim.call("cuStreamSynchronize", out.value) == Result.INVALID_HANDLE
        assert len(sim.violations()) == 1
        sim.check("cuEventDestroy", event)


def test_delays(sim: SimCuda) -> None:
    def delayed_us(min_us: int, max_us: int, seed: int) -> int:
        sim.reset()
        sim.set_delay(min_us, max_us, seed)
        streams, target = [sim.stream(0), sim.stream(0)], sim.alloc(0, 16)
        begin = time.perf_counter()
        for _ in range(3):
            for place, stream in enumerate(streams):
                sim.enqueue_write(stream, target + 8 * place, b"12345678")
        for stream in streams:
            sim.synchronize(stream)
        assert time.perf_counter() - begin >= 3 * min_us / 1e6
        return sim.delayed_us()

    assert delayed_us(10_000, 10_000, 0) == 60_000
    totals = [delayed_us(100, 2000, seed) for seed in range(5)]
    assert len(set(totals)) == 5
    assert [delayed_us(100, 2000, seed) for seed in range(5)] == totals  # nothing but the seed decides


def test_bandwidth(sim: SimCuda) -> None:
    sim.set_delay(0, 0)
    sim.set_bandwidth(5 * MIB)
    streams, source = [sim.stream(0), sim.stream(0)], sim.alloc(0, MIB)
    with Host(sim, MIB) as host, sim.current(0):
        begin = time.perf_counter()
        for i, stream in enumerate(streams):
            sim.check("cuMemcpyDtoHAsync", host.address + i * MIB // 2, source, MIB // 2, stream)
        assert sim.call("cuStreamQuery", streams[0]) == Result.NOT_READY
        for stream in streams:
            sim.synchronize(stream)
        assert time.perf_counter() - begin >= 0.199  # the streams share the link


def test_priorities(sim: SimCuda) -> None:
    with sim.current(0):
        least, greatest = ctypes.c_int(9), ctypes.c_int(9)
        sim.check("cuCtxGetStreamPriorityRange", ctypes.byref(least), ctypes.byref(greatest))
        assert (least.value, greatest.value) == (0, -5)
        for asked, got in [(0, 0), (-3, -3), (-5, -5), (-9, -5), (4, 0)]:
            priority = ctypes.c_int(9)
            sim.check("cuStreamGetPriority", sim.stream(0, asked), ctypes.byref(priority))
            assert priority.value == got
    assert sim.streams_made() == {-5: 2, -3: 1, 0: 2}
    assert sim.launches() == {}


# Contexts, handles, addresses.


def test_calls_need_a_current_context(sim: SimCuda) -> None:
    stream = sim.stream(0)
    assert sim.call("cuStreamSynchronize", stream) == Result.INVALID_CONTEXT
    assert sim.call("cuCtxPopCurrent", None) == Result.INVALID_CONTEXT
    with sim.current(0):
        answers: list[int] = []
        thread = threading.Thread(target=lambda: answers.append(sim.call("cuStreamQuery", stream)))
        thread.start()
        thread.join()
        assert answers == [Result.INVALID_CONTEXT]  # current on one thread is not on another
    assert len(sim.violations()) == 3


def test_copies_outside_of_an_allocation_are_refused(sim: SimCuda) -> None:
    stream, source, other = sim.stream(0), sim.alloc(0, 100), sim.alloc(1, 100)
    with Host(sim, 4096) as host, sim.current(0):

        def copy(target: int, address: int, nbytes: int) -> int:
            return sim.call("cuMemcpyDtoHAsync", target, address, nbytes, stream)

        alias = host.device_address()
        assert alias != host.address
        assert copy(host.address, source + 1, 100) == Result.INVALID_VALUE
        assert copy(host.address, host.address, 8) == Result.INVALID_VALUE
        assert copy(host.address, other, 8) == Result.INVALID_VALUE  # another device's
        assert copy(alias, source, 8) == Result.INVALID_VALUE
        assert copy(host.address + 4000, source, 100) == Result.INVALID_VALUE  # beyond the registration
        assert len(sim.violations()) == 5
        assert copy(host.address, source, 100) == Result.SUCCESS
        sim.synchronize(stream)


def test_registration(sim: SimCuda) -> None:
    with Host(sim, 8192) as host, sim.current(0):
        registered = Result.HOST_MEMORY_ALREADY_REGISTERED
        assert sim.call("cuMemHostRegister", host.address + 4096, 4096, PORTABLE) == registered
        assert sim.call("cuMemHostRegister", host.address + 1, 8, PORTABLE) == Result.INVALID_VALUE
        assert sim.call("cuMemHostRegister", sim.alloc(0, 4096), 4096, PORTABLE) == Result.INVALID_VALUE
        assert sim.peak("registered_bytes") >= 8192
        assert sim.violations() == []
        assert sim.call("cuMemHostUnregister", host.address + 4096) == Result.HOST_MEMORY_NOT_REGISTERED
        assert len(sim.violations()) == 1


@pytest.mark.parametrize("victim", ["host", "device"])
def test_memory_given_up_with_copies_pending(sim: SimCuda, victim: str) -> None:
    stream, source = sim.stream(0), sim.alloc(0, 64)
    with Host(sim, 4096) as host, sim.current(0):
        with sim.paused():
            sim.check("cuMemcpyDtoHAsync", host.address, source, 64, stream)
            if victim == "host":
                sim.check("cuMemHostUnregister", host.address)
                host.registered = False
            else:
                sim.free(source)
        assert sim.call("cuStreamSynchronize", stream) == Result.ILLEGAL_ADDRESS
    assert "with copies pending" in sim.violations()[0]


def test_freed_memory_is_gone(sim: SimCuda) -> None:
    freed = sim.alloc(0, 64)
    sim.free(freed)
    assert sim.alloc(0, 64) != freed
    with pytest.raises(ValueError):
        sim.read(freed, 64)
    with sim.current(0):
        free, total = ctypes.c_uint64(), ctypes.c_uint64()
        sim.check("cuMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        assert total.value - free.value == GRANULE
        out = ctypes.byref(ctypes.c_uint64())
        assert sim.call("cuMemAlloc", out, total.value) == Result.OUT_OF_MEMORY


def test_pitched_copy(sim: SimCuda) -> None:
    data = pattern(1000)
    stream, source = sim.stream(0), sim.alloc(0, 1000)
    sim.write(source, data)
    with Host(sim, 4096) as host, sim.current(0):

        def copy(pitch: int, height: int) -> int:
            # x, y, type (padded), host, device, array, pitch of source and target; width, height
            fields = struct.pack(
                "16Q", 0, 0, 2, 0, source + 8, 0, pitch, 0, 0, 1, host.address, 0, 0, 12, 12, height
            )
            return sim.call("cuMemcpy2DAsync", fields, stream)

        assert copy(100, 9) == Result.SUCCESS
        sim.synchronize(stream)
        assert host.memory[: 9 * 12] == b"".join(data[8 + 100 * row : 20 + 100 * row] for row in range(9))
        assert host.memory[9 * 12] == 0
        assert copy(100, 11) == Result.INVALID_VALUE  # beyond the allocation
        assert copy(8, 2) == Result.INVALID_VALUE  # rows that overlap
        assert copy(1 << 31, 1) == Result.INVALID_VALUE  # more than the largest pitch


def test_entry_points(driver: SimCuda) -> None:
    """All that the driver table of fastshard asks for is there."""
    header = (simcuda_build.CSRC / "device" / "cuda_driver.h").read_text()
    wanted = re.findall(r"\bX\((cu\w+)\)", header)
    assert wanted
    for name in wanted:
        driver._function(name)
    with pytest.raises(AttributeError):
        driver._function("cuMemAlloc_v2")  # cuGetProcAddress knows base names only


# Failures.


def test_injected_failures(sim: SimCuda) -> None:
    sim.fail("cuMemHostRegister", Result.OUT_OF_MEMORY, nth=2)
    with Host(sim, 4096):
        with pytest.raises(simcuda.SimCudaError, match="OUT_OF_MEMORY"):
            Host(sim, 4096)
        with Host(sim, 4096):
            pass
    assert sim.count("cuMemHostRegister") == 3
    sim.fail("cuMemAlloc", Result.OUT_OF_MEMORY, nth=0)
    for _ in range(2):
        with pytest.raises(simcuda.SimCudaError):
            sim.alloc(0, 64)
    with pytest.raises(ValueError):
        sim.fail("cuMemAllocate", Result.OUT_OF_MEMORY)
    with pytest.raises(ValueError):
        sim.fail("cuMemAlloc", Result.OUT_OF_MEMORY, late=True)


# Processes.


def run_python(library: Path, body: str) -> subprocess.CompletedProcess[str]:
    begin = (
        f"import ctypes, os, sys; sys.path.insert(0, {str(simcuda_build.SOURCES.parent)!r}); import simcuda\n"
    )
    command = [sys.executable, "-c", begin + body, str(library)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("kind", ["allocation", "registration"])
def test_the_host_cannot_read_device_addresses(library: Path, kind: str) -> None:
    body = """
import mmap
sim = simcuda.SimCuda(sys.argv[1])
out = ctypes.c_uint64(sim.alloc(0, 64))
if KIND == "registration":
    memory = mmap.mmap(-1, 4096)
    host = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with sim.current(0):
        sim.check("cuMemHostRegister", host, 4096, 1)
        sim.check("cuMemHostGetDevicePointer", ctypes.byref(out), host, 0)
print("alive", flush=True)
ctypes.string_at(out.value, 1)
"""
    done = run_python(library, f"KIND = {kind!r}\n{body}")
    assert (done.stdout, done.returncode) == ("alive\n", -signal.SIGSEGV), done.stderr


def test_before_init_and_after_fork(library: Path) -> None:
    body = """
lib = ctypes.CDLL(sys.argv[1])
assert lib.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == 3
sim = simcuda.SimCuda(sys.argv[1])
assert sim.call("cuStreamQuery", 0) == 201
child = os.fork()
if child == 0:
    os._exit(sim.call("cuInit", 0) * 16 + sim.call("cuStreamQuery", 0))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = run_python(library, body)
    assert done.stdout == "51\n", done.stderr  # NOT_INITIALIZED, twice


def test_exit_with_work_pending(library: Path) -> None:
    body = """
sim = simcuda.SimCuda(sys.argv[1])
address = sim.alloc(0, 64)
for _ in range(8):
    sim.enqueue_write(sim.stream(0), address, b"x" * 64, delay=5)
"""
    begin = time.perf_counter()
    done = run_python(library, body)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.perf_counter() - begin < 4


def test_last_release_takes_the_context_away(library: Path) -> None:
    body = """
sim = simcuda.SimCuda(sys.argv[1])
stream, address = sim.stream(0), sim.alloc(0, 64)
sim.check("cuCtxPushCurrent", sim._contexts[0])
sim.enqueue_write(stream, address, b"x" * 64, delay=0.01)
sim.check("cuDevicePrimaryCtxRelease", 0)
print(sim.call("cuStreamQuery", stream), len(sim.violations()), sim.live()["streams"], sim.live()["allocations"])
"""
    done = run_python(library, body)
    assert done.stdout == "709 2 0 0\n", done.stderr


def test_many_threads(sim: SimCuda) -> None:
    sim.set_delay(0, 200)
    source = sim.alloc(0, 4096)
    sim.write(source, pattern(4096))
    errors: list[str] = []

    def save(host: Host, stream: int) -> None:
        with sim.current(0):
            for i in range(40):
                event = new_event(sim)
                sim.check("cuMemcpyDtoHAsync", host.address, source + i, 1024, stream)
                sim.check("cuEventRecord", event, stream)
                sim.check("cuEventSynchronize", event)
                if host.memory[:1024] != pattern(4096)[i : i + 1024]:
                    errors.append(f"copy {i}")
                sim.check("cuEventDestroy", event)

    hosts = [Host(sim, 4096) for _ in range(6)]
    threads = [threading.Thread(target=save, args=(host, sim.stream(0))) for host in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for host in hosts:
        host.__exit__()
    assert errors == []
    assert sim.violations() == []
