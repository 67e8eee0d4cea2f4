# SPDX-License-Identifier: Apache-2.0
"""Builds the simulated CUDA driver (tests/simulated_driver) and drives it from tests.

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
import enum
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_SOURCES = Path(__file__).resolve().parent / "simulated_driver"
_CSRC = _SOURCES.parents[1] / "csrc"

WARNINGS_ARE_ERRORS = "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON"
"""Among ``CMAKE_ARGS`` it holds here, too; else a newer compiler's new warning fails no test."""

DEVICES = 2
PRIORITIES = range(-5, 1)
"""Of streams, the one that goes first at the front."""
POISON = 0xDB
KINDS = (
    "streams",
    "events",
    "modules",
    "registrations",
    "allocations",
    "contexts",
    "registered_bytes",
    "allocated_bytes",
)


class Result(enum.IntEnum):
    """The CUresult values that tests inject or expect."""

    SUCCESS = 0
    INVALID_VALUE = 1
    OUT_OF_MEMORY = 2
    NOT_INITIALIZED = 3
    NO_DEVICE = 100
    INVALID_DEVICE = 101
    INVALID_IMAGE = 200
    INVALID_CONTEXT = 201
    NO_BINARY_FOR_GPU = 209
    INVALID_PTX = 218
    JIT_COMPILER_NOT_FOUND = 221
    UNSUPPORTED_PTX_VERSION = 222
    INVALID_SOURCE = 300
    INVALID_HANDLE = 400
    NOT_FOUND = 500
    NOT_READY = 600
    ILLEGAL_ADDRESS = 700
    CONTEXT_IS_DESTROYED = 709
    HOST_MEMORY_ALREADY_REGISTERED = 712
    HOST_MEMORY_NOT_REGISTERED = 713
    MISALIGNED_ADDRESS = 716
    LAUNCH_FAILED = 719
    NOT_SUPPORTED = 801
    STREAM_CAPTURE_UNSUPPORTED = 900
    STREAM_CAPTURE_INVALIDATED = 901
    STREAM_CAPTURE_IMPLICIT = 906
    STREAM_CAPTURE_WRONG_THREAD = 908
    UNKNOWN = 999


UNLOADABLE = (
    Result.INVALID_IMAGE,
    Result.NO_BINARY_FOR_GPU,
    Result.INVALID_PTX,
    Result.JIT_COMPILER_NOT_FOUND,
    Result.UNSUPPORTED_PTX_VERSION,
    Result.INVALID_SOURCE,
)
"""What drivers say of a module image that is not for them."""


class CaptureMode(enum.IntEnum):
    """CUstreamCaptureMode."""

    GLOBAL = 0
    THREAD_LOCAL = 1
    RELAXED = 2


class SimCudaError(RuntimeError):
    """A driver call made by the test itself failed."""

    def __init__(self, function: str, result: int) -> None:
        super().__init__(f"{function}: {Result(result).name if result in list(Result) else result}")
        self.result = result


def cuda_include() -> Path | None:
    """The folder of cuda.h: a toolkit's, or that of the package nvidia-cuda-runtime."""
    candidates = [
        Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)
    ]
    candidates.append(Path("/usr/local/cuda/include"))
    for entry in sys.path:
        packages = Path(entry) / "nvidia"
        candidates += [
            *sorted(packages.glob("cu1*/include"), reverse=True),
            packages / "cuda_runtime" / "include",
        ]
    return next((folder for folder in candidates if (folder / "cuda.h").is_file()), None)


def build(directory: str | os.PathLike[str]) -> Path:
    """Compiles the driver into `directory` unless it is up to date there, and returns its path."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever runs tests beside this process waits for one build
        return _built(directory / "libsimcuda.so")


def _built(library: Path) -> Path:
    ours = [
        _CSRC / name
        for name in ("plan/plan.cc", "device/cast.cc", "device/pack.cc", "device/kernels/table.cc")
    ]
    sources = [*sorted(_SOURCES.glob("*.cc")), *ours]
    inputs = [*sources, *_SOURCES.glob("*.h"), *_CSRC.rglob("*.h"), *_CSRC.glob("device/kernels/*")]
    if library.exists() and library.stat().st_mtime >= max(path.stat().st_mtime for path in inputs):
        return library
    include = cuda_include()
    if include is None:
        raise FileNotFoundError("cuda.h not found: set CUDA_HOME, or pip install nvidia-cuda-runtime")
    compiler = os.environ.get("CXX") or shutil.which("g++") or "g++"
    flags = ["-std=c++20", "-fPIC", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread"]
    flags += [f"-I{_CSRC}", *os.environ.get("CXXFLAGS", "").split()]
    flags.append("-Wno-unknown-pragmas")  # of nvcc's
    if WARNINGS_ARE_ERRORS in os.environ.get("CMAKE_ARGS", "").split():
        flags.append("-Werror")
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:

        def compile_one(source: Path) -> str:
            target = os.path.join(scratch, f"{source.parent.name}.{source.stem}.o")
            _run([compiler, *flags, "-isystem", str(include), "-c", str(source), "-o", target])
            return target

        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile_one, sources))
        # -Bsymbolic: its own cuInit, also where torch has loaded a real driver. nodelete: it has threads.
        linked = os.path.join(scratch, library.name)
        link = [*flags, "-shared", "-Wl,-Bsymbolic,-z,nodelete,-z,defs"]
        _run([compiler, *link, *objects, "-o", linked])
        os.replace(linked, library)
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


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

    def set_capturing(self, stream: int, capturing: bool) -> None:
        """As if a graph capture had begun on the stream."""
        if self._lib.sim_set_capturing(ctypes.c_void_p(stream), int(capturing)) != 0:
            raise ValueError(f"unknown stream {stream:#x}")

    def count(self, function: str) -> int:
        """Calls since the last reset, this object's own included."""
        return int(self._lib.sim_count(function.encode()))

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

    def reset(self) -> None:
        """Waits for all work, forgets what was set, counted and injected, and frees what this object made."""
        self._lib.sim_reset()
        for stream, device in self._streams.items():
            with self.current(device):
                self.check("cuStreamDestroy", stream)
        self._streams.clear()
        for address in list(self._allocations):
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
