# SPDX-License-Identifier: Apache-2.0
"""Drives the simulated CUDA driver (tests/simulated_driver) from tests; simcuda_build.py builds it.

Point ``FASTSHARD_LIBCUDA`` at the built library *before* fastshard first looks for CUDA::

    sim = simcuda.SimCuda(simcuda.build(cache_directory))
    os.environ["FASTSHARD_LIBCUDA"] = str(sim.path)
    weights = sim.alloc(device=0, nbytes=4096)
    stream = sim.stream(device=0)
    sim.enqueue_write(stream, weights, payload, delay=0.05)  # the producer: still running when the save begins
    ...                                                      # save `weights`, ordered behind `stream`
    assert sim.violations() == []
    sim.reset()
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from simcuda_build import build
from simcuda_values import (
    DEVICES,
    GRANULE,
    KINDS,
    POISON,
    PRIORITIES,
    SETTINGS,
    UNLOADABLE,
    CaptureMode,
    Counts,
    Result,
    SimCudaError,
)

__all__ = [
    "DEVICES",
    "GRANULE",
    "KINDS",
    "POISON",
    "PRIORITIES",
    "SETTINGS",
    "UNLOADABLE",
    "Capture",
    "CaptureMode",
    "Counts",
    "Job",
    "Result",
    "SimCuda",
    "SimCudaError",
    "build",
]


class Capture:
    """A graph that is being captured; `ended` says what cuStreamEndCapture answered."""

    ended: int | None = None


class Job:
    """Kernels of another program, back to back, each of which fills the device."""

    def __init__(self, sim: SimCuda, device: int, priority: int) -> None:
        self._sim = sim
        self._device = device
        self.stream = sim.stream(device, priority)

    def step(self) -> None:
        """One kernel ends, and the next begins once those of higher priority that wait have begun."""
        if self._sim._lib.sim_step_job(self._device) != 0:
            raise ValueError("the job has ended")

    def copy(self, nbytes: int) -> None:
        """Enqueues a copy to the host, from nowhere to nowhere, on the job's stream."""
        self._sim._lib.sim_enqueue_copy(ctypes.c_void_p(self.stream), ctypes.c_size_t(nbytes))

    @property
    def most_ahead(self) -> int:
        """The most bytes of others that were before one of its copies in the copy engine's queue."""
        return int(self._sim._lib.sim_most_ahead(ctypes.c_void_p(self.stream)))


class SimCuda:
    """The simulated driver of this process; keeps both devices' primary contexts, as torch does."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lib = ctypes.CDLL(str(self.path))
        for name in (
            "sim_count",
            "sim_live",
            "sim_peak",
            "sim_delayed_us",
            "sim_streams_made",
            "sim_launches",
            "sim_waiting_kernels",
            "sim_most_ahead",
            "sim_peak_enqueued",
            "sim_registered",
        ):
            getattr(self._lib, name).restype = ctypes.c_int64
        self._functions: dict[str, Callable[..., int]] = {}
        self._allocations: dict[int, tuple[int, int]] = {}  # address -> device, nbytes
        self._streams: dict[int, int] = {}  # handle -> device
        self.check("cuInit", 0)
        self._contexts = [self._out("cuDevicePrimaryCtxRetain", device) for device in range(DEVICES)]

    # The driver's own functions, by their names without version suffix.

    def call(self, function: str, *args: Any) -> int:
        """Calls an entry point and returns its CUresult. Numbers are passed as 64-bit words."""
        words = (ctypes.c_uint64(arg) if isinstance(arg, int) else arg for arg in args)
        return int(self._function(function)(*words))

    def check(self, function: str, *args: Any) -> None:
        """Like `call`; raises SimCudaError unless it succeeds."""
        result = self.call(function, *args)
        if result != Result.SUCCESS:
            raise SimCudaError(function, result)

    @contextlib.contextmanager
    def current(self, device: int) -> Iterator[None]:
        """Makes the device's context current on this thread."""
        self.check("cuCtxPushCurrent", self._contexts[device])
        try:
            yield
        finally:
            self.check("cuCtxPopCurrent", None)

    def alloc(self, device: int, nbytes: int) -> int:
        """Device memory, full of POISON."""
        with self.current(device):
            address = self._out("cuMemAlloc", nbytes)
        self._allocations[address] = (device, nbytes)
        return address

    def alloc_pieces(self, device: int, nbytes: list[int]) -> int:
        """Allocations side by side, each of whole pages: as memory that was reserved once and mapped in pieces."""
        sizes = (ctypes.c_uint64 * len(nbytes))(*nbytes)
        address = ctypes.c_uint64()
        if self._lib.sim_alloc_pieces(device, sizes, len(nbytes), ctypes.byref(address)) != 0:
            raise ValueError(f"no such pieces: {nbytes}")
        begin = address.value
        for size in nbytes:
            self._allocations[begin] = (device, size)
            begin += size
        return address.value

    def free(self, address: int) -> None:
        device, _ = self._allocations.pop(address)
        with self.current(device):
            self.check("cuMemFree", address)

    def stream(self, device: int, priority: int = 0) -> int:
        """A new stream that, like torch's, does not wait for the legacy one."""
        with self.current(device):
            handle = self._out("cuStreamCreateWithPriority", 1, priority)
        self._streams[handle] = device
        return handle

    def synchronize(self, stream: int, device: int = 0) -> None:
        """Waits for a stream; `device` says whose where it is the legacy one (0)."""
        with self.current(self._streams.get(stream, device)):
            self.check("cuStreamSynchronize", stream)

    def enqueue_write(self, stream: int, address: int, data: bytes, delay: float = 0.0) -> None:
        """A producer: after `delay` seconds of computing on the stream, `data` is at `address`."""
        device = self._device_of(address)
        if (
            self._lib.sim_enqueue_delay(device, ctypes.c_void_p(stream), ctypes.c_uint64(round(delay * 1e6)))
            != 0
        ):
            raise ValueError(f"unknown stream {stream:#x}")
        with self.current(device):
            self.check("cuMemcpyHtoDAsync", address, data, len(data), stream)

    # Beside the driver: immediate, whatever is enqueued.

    def write(self, address: int, data: bytes) -> None:
        if self._lib.sim_poke(ctypes.c_uint64(address), data, ctypes.c_size_t(len(data))) != 0:
            raise ValueError(f"no device memory at {address:#x}")

    def read(self, address: int, nbytes: int) -> bytes:
        out = ctypes.create_string_buffer(max(nbytes, 1))
        if self._lib.sim_peek(ctypes.c_uint64(address), out, ctypes.c_size_t(nbytes)) != 0:
            raise ValueError(f"no device memory at {address:#x}")
        return out.raw[:nbytes]

    # The simulation.

    def fail(self, function: str, result: int, nth: int = 1, *, late: bool = False) -> None:
        """Lets the `nth` next call (0: every call) of a function fail.

        With `late` the call succeeds, its work fails, and so does every later use of the context.
        """
        inject = self._lib.sim_fail_async if late else self._lib.sim_fail
        if inject(function.encode(), nth, int(result)) != 0:
            raise ValueError(f"cannot let {function} fail {'late' if late else ''}")

    def set_delay(self, min_us: int, max_us: int, seed: int = 0) -> None:
        """Range of the random time by which each copy, fill and kernel is late. The default is 0 to 2000."""
        if self._lib.sim_set_delay_us(*map(ctypes.c_uint64, (min_us, max_us, seed))) != 0:
            raise ValueError("min_us > max_us")

    def delayed_us(self) -> int:
        """The sum of all delays since the last reset."""
        return int(self._lib.sim_delayed_us())

    def set_bandwidth(self, bytes_per_second: float) -> None:
        """Of each device's link to the host; 0 is without limit."""
        self._lib.sim_set_bandwidth(ctypes.c_double(bytes_per_second))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Meanwhile no stream begins anything."""
        self._lib.sim_pause(1)
        try:
            yield
        finally:
            self._lib.sim_pause(0)

    def set(self, **settings: int) -> None:
        """Changes SETTINGS until the next reset."""
        for name, value in settings.items():
            if self._lib.sim_set(name.encode(), ctypes.c_int64(value)) != 0:
                raise ValueError(f"no such setting: {name}={value}")

    @contextlib.contextmanager
    def job(self, device: int = 0, priority: int = 0) -> Iterator[Job]:
        """Another program keeps the device busy: other kernels begin between two of its own, or when it has ended."""
        job = Job(self, device, priority)
        if self._lib.sim_begin_job(device, priority) != 0:
            raise ValueError(f"device {device} has a job")
        try:
            yield job
        finally:
            self._lib.sim_end_job(device)

    def waiting_kernels(self, device: int = 0) -> int:
        """Kernels that could begin but for the job."""
        return int(self._lib.sim_waiting_kernels(device))

    @contextlib.contextmanager
    def capture(
        self, stream: int, mode: CaptureMode = CaptureMode.GLOBAL, *, elsewhere: bool = False
    ) -> Iterator[Capture]:
        """Captures a graph from a stream; `elsewhere` on another thread than the caller's."""
        capture, graph = Capture(), ctypes.c_uint64()

        def call(function: str, *args: Any) -> int:
            with self.current(self._streams[stream]):
                return self.call(function, stream, *args)

        with ThreadPoolExecutor(1) as pool:
            there = (lambda *args: pool.submit(call, *args).result()) if elsewhere else call
            if result := there("cuStreamBeginCapture", int(mode)):
                raise SimCudaError("cuStreamBeginCapture", result)
            try:
                yield capture
            finally:
                capture.ended = there("cuStreamEndCapture", ctypes.byref(graph))

    def count(self, function: str) -> int:
        """Calls since the last reset, this object's own included."""
        return int(self._lib.sim_count(function.encode()))

    def counts(self) -> Counts:
        functions = (
            ("cuLaunchKernel",),
            ("cuMemcpyDtoHAsync", "cuMemcpyDtoH"),
            ("cuMemcpy2DAsync",),
            ("cuStreamSynchronize",),
            ("cuMemHostRegister",),
            ("cuMemAlloc",),
            ("cuModuleLoadData",),
        )
        return Counts(*(sum(map(self.count, names)) for names in functions))

    def registered(self) -> list[int]:
        """The size of each registration since the last reset."""
        sizes = (int(self._lib.sim_registered(ctypes.c_size_t(index))) for index in itertools.count())
        return list(itertools.takewhile(lambda size: size >= 0, sizes))

    def peak_enqueued(self, device: int = 0) -> int:
        """The most bytes of copies to the host that were enqueued and not complete at once."""
        return int(self._lib.sim_peak_enqueued(device))

    def streams_made(self) -> dict[int, int]:
        """Priority -> how many streams were made with it since the last reset."""
        return self._by_priority(self._lib.sim_streams_made)

    def launches(self) -> dict[int, int]:
        """Priority of the stream -> launches since the last reset."""
        return self._by_priority(self._lib.sim_launches)

    def violations(self) -> list[str]:
        """What was done since the last reset that a correct program never does."""
        out = ctypes.create_string_buffer(256)
        found = []
        for index in range(self._lib.sim_violations()):
            self._lib.sim_violation(index, out, ctypes.c_size_t(len(out)))
            found.append(out.value.decode())
        return found

    def live(self) -> dict[str, int]:
        """How many of each of KINDS exist now: equal before and after means no leak."""
        return {kind: self._lib.sim_live(kind.encode()) for kind in KINDS}

    def peak(self, kind: str) -> int:
        """How many of a kind existed at once since the last reset."""
        return int(self._lib.sim_peak(kind.encode()))

    def forget_peaks(self) -> None:
        """Peaks are counted from what exists now on."""
        self._lib.sim_forget_peaks()

    def reset_failures(self) -> None:
        """Injected failures that have not happened will not."""
        self._lib.sim_reset_failures()

    def is_dead(self, device: int) -> bool:
        """Whether work in its context has failed: nothing can be done in it any more."""
        return bool(self._lib.sim_is_dead(device))

    def new_process(self) -> None:
        """As in a new process: contexts in which work had failed are as new, and all that was in them is gone."""
        for device in range(DEVICES):
            if self._lib.sim_renew_context(device) == 0:
                continue
            self._streams = {s: other for s, other in self._streams.items() if other != device}
            self._allocations = {a: what for a, what in self._allocations.items() if what[0] != device}

    def reset(self) -> None:
        """Waits for all work, forgets what was set, counted and injected, and frees what this object made.

        A context whose work has failed keeps its error, and all that is in it: see `new_process`.
        """
        self._lib.sim_reset()
        for stream, device in list(self._streams.items()):
            if not self.is_dead(device):
                with self.current(device):
                    self.check("cuStreamDestroy", stream)
                del self._streams[stream]
        for address, (device, _) in list(self._allocations.items()):
            if not self.is_dead(device):
                self.free(address)
        self._lib.sim_reset()

    def _function(self, name: str) -> Callable[..., int]:
        if name not in self._functions:
            address = ctypes.c_void_p()
            self._lib.cuGetProcAddress_v2(
                name.encode(), ctypes.byref(address), 12000, ctypes.c_uint64(0), ctypes.c_void_p()
            )
            if not address.value:
                raise AttributeError(f"the simulated driver has no {name}")
            self._functions[name] = ctypes.CFUNCTYPE(ctypes.c_int)(address.value)
        return self._functions[name]

    def _out(self, function: str, *args: int) -> int:
        """Calls a function whose first parameter is where the answer goes."""
        out = ctypes.c_uint64()
        self.check(function, ctypes.byref(out), *args)
        return out.value

    def _by_priority(self, figure: Callable[[int], int]) -> dict[int, int]:
        return {priority: count for priority in PRIORITIES if (count := figure(priority))}

    def _device_of(self, address: int) -> int:
        for begin, (device, nbytes) in self._allocations.items():
            if begin <= address < begin + nbytes:
                return device
        raise ValueError(f"no device memory at {address:#x}")
