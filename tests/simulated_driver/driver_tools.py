# SPDX-License-Identifier: Apache-2.0
"""What the simulated driver's own tests have in common: the driver, host memory, and the kernel."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import simcuda
from simcuda import Result, SimCuda

PORTABLE = 1
BLOCK = (256, 1, 1)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simcuda.build(os.environ.get("FASTSHARD_SIMCUDA_CACHE") or tmp_path_factory.mktemp("simcuda"))


@pytest.fixture(scope="session")
def driver(library: Path) -> SimCuda:
    return SimCuda(library)


@pytest.fixture
def sim(driver: SimCuda) -> Iterator[SimCuda]:
    before = driver.live()
    yield driver
    driver.new_process()
    driver.reset()
    assert driver.live() == before


class Host:
    """Page-aligned host memory, registered with the driver unless told otherwise."""

    def __init__(self, sim: SimCuda, nbytes: int, *, registered: bool = True, flags: int = PORTABLE) -> None:
        self.sim = sim
        self.memory = mmap.mmap(-1, nbytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.registered = registered
        if registered:
            with sim.current(0):
                sim.check("cuMemHostRegister", self.address, nbytes, flags)

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        if self.registered and not self.sim.is_dead(0):
            with self.sim.current(0):
                self.sim.call("cuMemHostUnregister", self.address)

    def device_address(self, offset: int = 0) -> int:
        out = ctypes.c_uint64()
        with self.sim.current(0):
            self.sim.check("cuMemHostGetDevicePointer", ctypes.byref(out), self.address + offset, 0)
        return out.value


def new_event(sim: SimCuda) -> int:
    out = ctypes.c_uint64()
    sim.check("cuEventCreate", ctypes.byref(out), 2)
    return out.value


def pattern(nbytes: int, seed: int = 1) -> bytes:
    return bytes((i * 31 + seed * 97 + (i >> 8)) % 199 for i in range(nbytes))


class Kernel:
    def __init__(self, sim: SimCuda) -> None:
        self.sim = sim
        module, function = ctypes.c_uint64(), ctypes.c_uint64()
        sim.check("cuModuleLoadData", ctypes.byref(module), b"image")
        assert (
            sim.call("cuModuleGetFunction", ctypes.byref(function), module.value, b"other")
            == Result.NOT_FOUND
        )
        sim.check("cuModuleGetFunction", ctypes.byref(function), module.value, b"fastshard_pack")
        self.module, self.function = module.value, function.value

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        self.sim.call("cuModuleUnload", self.module)

    def launch(
        self, stream: int, table: int, count: int, out: int, block: tuple[int, int, int] = BLOCK
    ) -> int:
        """The dimensions lie right behind the entries."""
        dims = table + count * ENTRY_NBYTES
        values = (ctypes.c_uint64(table), ctypes.c_uint32(count), ctypes.c_uint64(dims), ctypes.c_uint64(out))
        parameters = (ctypes.c_void_p * 4)(*(ctypes.addressof(value) for value in values))
        result = self.sim.call("cuLaunchKernel", self.function, 4, 1, 1, *block, 0, stream, parameters, None)
        for value in values:
            value.value = 0  # the launch has its own copy
        return result


ENTRY_NBYTES = 32
COPY, GATHER, TILES = range(3)


def pack_entry(source: int, out: int, count: int, unit: int, kind: int = COPY, dims: int = 0) -> bytes:
    """An entry of csrc/device/kernels/table.h; tests/test_kernels.py has all kinds of them."""
    return struct.pack(
        "<QIIIHBBBBBBB??B", source, out, 0, count, 0, dims, kind, unit, 0, 0, 1, 1, False, False, 0
    )


def pack_dim(stride: int, size: int, out_stride: int = 0) -> bytes:
    return struct.pack("<qIIII", stride, size, 0, 0, out_stride)


def register(sim: SimCuda, memory: mmap.mmap, flags: int = PORTABLE) -> int:
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with sim.current(0):
        result = sim.call("cuMemHostRegister", address, len(memory), flags)
        if result == Result.SUCCESS:
            sim.check("cuMemHostUnregister", address)
    return result


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.001)


@pytest.fixture
def others() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def call_elsewhere(
    pool: ThreadPoolExecutor, sim: SimCuda, function: str, *args: object, device: int = 0
) -> int:
    def call() -> int:
        with sim.current(device):
            return sim.call(function, *args)

    return pool.submit(call).result()
