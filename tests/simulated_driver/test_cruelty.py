# SPDX-License-Identifier: Apache-2.0
"""Where the simulated driver is as unkind as real ones are."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import driver_tools
import pytest
from driver_tools import (
    ENTRY_NBYTES,
    PORTABLE,
    Host,
    Kernel,
    call_elsewhere,
    new_event,
    pack_entry,
    pattern,
    wait_until,
)
from simcuda import GRANULE, POISON, SETTINGS, UNLOADABLE, Counts, Result, SimCuda, SimCudaError

MIB = 1 << 20

library, driver, sim = driver_tools.library, driver_tools.driver, driver_tools.sim
others = driver_tools.others


def test_settings(sim: SimCuda) -> None:
    for name in SETTINGS:
        sim.set(**{name: 1})
    with pytest.raises(ValueError, match="other"):
        sim.set(other=1)


# Multiprocessors.


def launch(sim: SimCuda, kernel: Kernel, stream: int, host: Host, source: int, place: int) -> None:
    """Copies 16 bytes to `place` of the host memory, whose front is the table."""
    host.memory[:ENTRY_NBYTES] = pack_entry(source, 0, 16, 16)
    assert kernel.launch(stream, host.device_address(), 1, host.device_address(place)) == Result.SUCCESS


def test_kernels_wait_for_a_job(sim: SimCuda) -> None:
    data = pattern(4096)
    high, low, copies, source = sim.stream(0, -5), sim.stream(0), sim.stream(0), sim.alloc(0, 4096)
    sim.write(source, data)
    with Host(sim, 8192) as host, sim.current(0), Kernel(sim) as kernel:
        with sim.job() as job:
            launch(sim, kernel, low, host, source, 4096)
            launch(sim, kernel, high, host, source, 5120)
            wait_until(lambda: sim.waiting_kernels() == 2)
            # Copies go on meanwhile.
            sim.check("cuMemcpyDtoHAsync", host.address + 6144, source, 64, copies)
            sim.synchronize(copies)
            assert host.memory[6144 : 6144 + 64] == data[:64]
            assert host.memory[5120 : 5120 + 16] == bytes([POISON]) * 16
            # Between two kernels of the job come those of higher priority, and only those.
            job.step()
            sim.synchronize(high)
            assert host.memory[5120 : 5120 + 16] == data[:16]
            job.step()
            assert sim.waiting_kernels() == 1
            assert sim.call("cuStreamQuery", low) == Result.NOT_READY
            # What comes after a kernel waits with it.
            sim.check("cuMemcpyDtoHAsync", host.address + 6400, source, 64, low)
            assert sim.call("cuStreamQuery", low) == Result.NOT_READY
        sim.synchronize(low)
        assert host.memory[4096 : 4096 + 16] == data[:16]
        assert sim.waiting_kernels() == 0
    assert sim.launches() == {-5: 1, 0: 1}
    assert sim.violations() == []


def test_a_job_is_one_devices(sim: SimCuda) -> None:
    source = sim.alloc(1, 4096)
    with sim.job(0), sim.job(1) as job:
        with pytest.raises(ValueError, match="has a job"), sim.job(0):
            pass
        stream = sim.stream(1, -1)
        sim.enqueue_write(stream, source, b"12345678")
        wait_until(lambda: sim.waiting_kernels(1) == 1)
        assert sim.waiting_kernels(0) == 0
        job.step()
        sim.synchronize(stream)
    with pytest.raises(ValueError, match="ended"):
        job.step()


# Module images.


@pytest.mark.parametrize("result", UNLOADABLE)
def test_modules_that_do_not_load(sim: SimCuda, result: Result) -> None:
    sim.fail("cuModuleLoadData", result, nth=0)
    with sim.current(0), pytest.raises(SimCudaError, match=result.name):
        Kernel(sim)
    name, text = ctypes.c_char_p(), ctypes.c_char_p()
    assert sim.call("cuGetErrorName", int(result), ctypes.byref(name)) == Result.SUCCESS
    assert sim.call("cuGetErrorString", int(result), ctypes.byref(text)) == Result.SUCCESS
    assert name.value == f"CUDA_ERROR_{result.name}".encode()
    assert text.value
    assert sim.counts().modules == 1
    assert sim.live()["modules"] == 0


# Calls that wait for the device.


def registering(sim: SimCuda, host: Host) -> Callable[[], None]:
    return lambda: sim.check("cuMemHostRegister", host.address, 4096, PORTABLE)


def freeing(sim: SimCuda, host: Host) -> Callable[[], None]:
    address = sim.alloc(0, 64)
    return lambda: sim.free(address)


SYNCHRONIZING: dict[str, Callable[[SimCuda, Host], Callable[[], object]]] = {
    "cuMemHostRegister": registering,
    "cuMemHostUnregister": lambda sim, host: lambda: sim.check("cuMemHostUnregister", host.address + 4096),
    "cuMemAlloc": lambda sim, host: lambda: sim.alloc(0, 64),
    "cuMemFree": freeing,
    "cuModuleLoadData": lambda sim, host: lambda: Kernel(sim).__exit__(),
}


@pytest.mark.parametrize("function", SYNCHRONIZING)
def test_implicit_synchronization(sim: SimCuda, others: ThreadPoolExecutor, function: str) -> None:
    stream, source = sim.stream(0), sim.alloc(0, 64)
    with Host(sim, 8192, registered=False) as host, sim.current(0):
        event = new_event(sim)
        sim.check("cuMemHostRegister", host.address + 4096, 4096, PORTABLE)
        action = SYNCHRONIZING[function](sim, host)

        def act() -> None:
            with sim.current(0):
                action()

        with sim.job() as job:
            before = sim.count(function)
            waits = others.submit(act)
            wait_until(lambda: sim.count(function) == before + 1)
            # Nor can anybody else work with the context meanwhile, but wait.
            enqueues = others.submit(
                call_elsewhere, others, sim, "cuMemcpyDtoHAsync", host.address + 4096, source, 8, stream
            )
            wait_until(lambda: sim.count("cuMemcpyDtoHAsync") == 1)
            assert sim.call("cuEventQuery", event) == Result.SUCCESS
            assert sim.call("cuEventSynchronize", event) == Result.SUCCESS
            sim.synchronize(stream)
            time.sleep(0.02)
            assert not waits.done()
            assert not enqueues.done()
            job.step()  # what ran then has ended
            waits.result()
            assert enqueues.result() in (Result.SUCCESS, Result.INVALID_VALUE)
            sim.set(implicit_sync=0)
            with sim.current(0):
                sim.alloc(0, 64)
        sim.synchronize(stream)
        for place in (host.address, host.address + 4096):
            sim.call("cuMemHostUnregister", place)
        sim.check("cuEventDestroy", event)


def test_nothing_waits_for_what_has_not_begun(sim: SimCuda) -> None:
    """So tests that pause the device do not hang."""
    stream, source = sim.stream(0), sim.alloc(0, 64)
    with sim.paused():
        sim.enqueue_write(stream, source, b"x" * 64)
        with Host(sim, 4096), sim.current(0), Kernel(sim):
            sim.free(sim.alloc(0, 64))
    sim.synchronize(stream)


def test_drivers_that_wait_for_all_that_is_enqueued(sim: SimCuda, others: ThreadPoolExecutor) -> None:
    """Also for what cannot begin yet; and meanwhile nobody else can enqueue what it may wait for."""
    sim.set(implicit_sync=2)
    stream, source, unused = sim.stream(0), sim.alloc(0, 64), sim.alloc(0, 64)
    with Host(sim, 4096) as host, sim.current(0):
        before = sim.count("cuMemFree")
        with sim.paused():
            sim.enqueue_write(stream, source, b"x" * 64)
            frees = others.submit(sim.free, unused)
            wait_until(lambda: sim.count("cuMemFree") == before + 1)
            copies = others.submit(
                call_elsewhere, others, sim, "cuMemcpyDtoHAsync", host.address, source, 8, stream
            )
            time.sleep(0.02)
            assert not frees.done() and not copies.done()
        frees.result()
        assert copies.result() == Result.SUCCESS
        sim.synchronize(stream)
        assert host.memory[:8] == b"x" * 8


# Granules.


def test_memory_is_given_in_granules(sim: SimCuda) -> None:
    free, total = ctypes.c_uint64(), ctypes.c_uint64()
    before = sim.live()
    sim.set(device_nbytes=64 * MIB)

    def used() -> int:
        sim.check("cuMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        allocated = sim.live()["allocated_bytes"] - before["allocated_bytes"]
        assert allocated == total.value - free.value
        return allocated // GRANULE

    with sim.current(0):
        assert used() == 0
        small = [sim.alloc(0, 1000) for _ in range(10)]  # together
        assert used() == 1
        sim.alloc(0, 15 * MIB + MIB // 2)
        assert used() == 1 + 8
        sim.alloc(0, MIB)
        assert used() == 1 + 8 + 1
        with Kernel(sim):
            assert used() == 1 + 8 + 1 + 1
        for address in small[:9]:
            sim.free(address)
        assert used() == 1 + 8 + 1
        sim.free(small[9])
        assert used() == 8 + 1
        assert sim.live()["requested_bytes"] - before["requested_bytes"] == 16 * MIB + MIB // 2
        assert sim.peak("allocated_bytes") == before["allocated_bytes"] + 11 * GRANULE
        used()
        filled = sim.alloc(0, free.value - GRANULE)
        assert sim.call("cuMemAlloc", ctypes.byref(ctypes.c_uint64()), GRANULE + 1) == Result.OUT_OF_MEMORY
        sim.alloc(0, GRANULE)
        with pytest.raises(SimCudaError, match="OUT_OF_MEMORY"):
            Kernel(sim)
        sim.free(filled)


# One queue for all copies to the host.


def test_copies_to_the_host_keep_one_order(sim: SimCuda) -> None:
    slow, fast, source = sim.stream(0), sim.stream(0, -5), sim.alloc(0, 64)
    sim.write(source, b"1" * 64)
    sim.set_delay(0, 20_000)
    with Host(sim, 8192) as host, sim.current(0):
        for round_ in range(10):
            with sim.paused():
                for i in range(4):
                    sim.check("cuMemcpyDtoHAsync", host.address + 64 * i, source, 64, slow)
                sim.check("cuMemcpyDtoHAsync", host.address + 4096, source, 64, fast)
            sim.synchronize(fast)  # the priority of its stream means nothing to a copy
            assert sim.call("cuStreamQuery", slow) == Result.SUCCESS
            assert host.memory[:256] == b"1" * 256, round_


def test_a_copy_that_waits_for_a_kernel_holds_nobody_up(sim: SimCuda) -> None:
    slow, fast, source = sim.stream(0), sim.stream(0), sim.alloc(0, 64)
    with Host(sim, 4096) as host, sim.current(0):
        with sim.job():
            sim.enqueue_write(slow, source, b"1" * 64, delay=0.001)
            sim.check("cuMemcpyDtoHAsync", host.address, source, 64, slow)
            sim.check("cuMemcpyDtoHAsync", host.address + 64, source, 64, fast)
            sim.synchronize(fast)
            assert sim.call("cuStreamQuery", slow) == Result.NOT_READY
        sim.synchronize(slow)


def test_bytes_before_a_jobs_copy(sim: SimCuda) -> None:
    save, second, source = sim.stream(0), sim.stream(0), sim.alloc(0, MIB)
    with Host(sim, MIB) as host, sim.current(0), sim.job(priority=-5) as job:
        job.copy(100)
        wait_until(lambda: sim.call("cuStreamQuery", job.stream) == Result.SUCCESS)
        assert job.most_ahead == 0
        with sim.paused():
            for i in range(4):
                sim.check("cuMemcpyDtoHAsync", host.address + i * 1000, source, 1000, save)
            sim.check("cuMemcpyDtoHAsync", host.address + 8000, source, 500, second)
            job.copy(100)
            job.copy(100)
            assert job.most_ahead == 4500  # its own are not counted
        for stream in (save, second, job.stream):
            sim.synchronize(stream)
        sim.check("cuMemcpyDtoHAsync", host.address, source, 7, save)
        sim.synchronize(save)
        assert sim.peak_enqueued() == 4700
        assert sim.peak_enqueued(1) == 0
    sim.forget_peaks()
    assert sim.peak_enqueued() == 0


def test_counts(sim: SimCuda) -> None:
    stream, source = sim.stream(0), sim.alloc(0, 64)
    with Host(sim, 4096) as host, sim.current(0), Kernel(sim):
        sim.check("cuMemcpyDtoHAsync", host.address, source, 8, stream)
        sim.check("cuMemcpyDtoH", host.address, source, 8)
        sim.synchronize(stream)
    assert sim.counts() == Counts(
        launches=0, copies=2, pitched=0, syncs=1, registrations=1, allocations=1, modules=1
    )


# Errors that stay.


def test_a_context_dies_for_good(sim: SimCuda) -> None:
    stream, source, other = sim.stream(0), sim.alloc(0, 64), sim.stream(1)
    with Host(sim, 4096) as host:
        with sim.current(0):
            event = new_event(sim)
            sim.fail("cuMemcpyDtoHAsync", Result.LAUNCH_FAILED, nth=2, late=True)
            with sim.paused():
                for offset in (0, 64, 128):
                    sim.check("cuMemcpyDtoHAsync", host.address + offset, source, 64, stream)
                sim.check("cuEventRecord", event, stream)
            assert sim.call("cuEventSynchronize", event) == Result.LAUNCH_FAILED
            assert host.memory[64:192] == bytes([POISON]) * 128
            sim.reset()  # is no new process
            out, image = ctypes.byref(ctypes.c_uint64()), b"image"
            for function, *args in [
                ("cuStreamSynchronize", stream),
                ("cuStreamQuery", stream),
                ("cuStreamCreate", out, 1),
                ("cuEventQuery", event),
                ("cuEventRecord", event, stream),
                ("cuMemcpyDtoHAsync", host.address, source, 64, stream),
                ("cuMemAlloc", out, 64),
                ("cuMemGetInfo", out, out),
                ("cuModuleLoadData", out, image),
                ("cuDevicePrimaryCtxRetain", out, 0),
                ("cuCtxPushCurrent", sim._contexts[0]),
                ("cuEventDestroy", event),
                ("cuMemFree", source),
                ("cuMemHostUnregister", host.address),
                ("cuStreamDestroy", stream),
            ]:
                assert sim.call(function, *args) == Result.LAUNCH_FAILED, function
        assert (sim.is_dead(0), sim.is_dead(1)) == (True, False)
        with sim.current(1):
            assert sim.call("cuStreamSynchronize", other) != Result.LAUNCH_FAILED
    sim.new_process()
    with sim.current(0):
        sim.free(sim.alloc(0, 64))
    assert sim.violations() == [
        "unknown or destroyed stream"
    ]  # the reset has destroyed that of the other device


def test_a_new_process_has_nothing_of_a_dead_context(sim: SimCuda) -> None:
    before = sim.live()
    stream, source = sim.stream(0), sim.alloc(0, 64)
    kept = sim.alloc(1, 64)
    with Host(sim, 4096), sim.current(0):
        Kernel(sim)
        new_event(sim)
        sim.fail("cuMemsetD8Async", Result.ILLEGAL_ADDRESS, late=True)
        sim.check("cuMemsetD8Async", source, 0, 64, stream)
        assert sim.call("cuStreamSynchronize", stream) == Result.ILLEGAL_ADDRESS
    sim.new_process()
    assert sim.read(kept, 64) == bytes([POISON]) * 64
    sim.free(kept)
    assert sim.live() == before
    assert sim.violations() == []


# Blocks.


def test_blocks_run_in_no_order(sim: SimCuda) -> None:
    """Two that write the same bytes: who is last differs from launch to launch."""
    stream, source, out = sim.stream(0), sim.alloc(0, 64), sim.alloc(0, 16)
    sim.write(source, bytes(range(64)))
    seen = set()
    with Host(sim, 4096) as host, sim.current(0), Kernel(sim) as kernel:
        host.memory[: 4 * ENTRY_NBYTES] = b"".join(pack_entry(source + 16 * i, 0, 16, 16) for i in range(4))
        for _ in range(30):
            assert kernel.launch(stream, host.device_address(), 4, out) == Result.SUCCESS
            sim.synchronize(stream)
            seen.add(sim.read(out, 16)[0])
    assert seen == {0, 16, 32, 48}
