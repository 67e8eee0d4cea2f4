# SPDX-License-Identifier: Apache-2.0
"""The words of simcuda.py: results, settings, counts."""

from __future__ import annotations

import enum
from typing import NamedTuple

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
    "requested_bytes",
)
"""What there can be of. Bytes are allocated in granules of 2 MiB, a module among them, and requested to the byte."""
GRANULE = 2 << 20

SETTINGS = {
    "implicit_sync": "1, or 0 for not: page-locking, allocating, what gives these back, and loading a module wait for "
    "what runs in the context, or with 2 for all that is enqueued; all calls but those about events and streams wait for "
    "them",
    "copy_fifo": "1, or 0 for not: a device takes its copies to the host one by one, in the order in which they became "
    "possible, whatever the priorities of their streams",
    "disk_pinning": "0, or 1 for allowed: shared mappings of files on disks are page-locked, as before driver 550.67",
    "interior_pointers": "1, or 0 for not: cuMemHostGetDevicePointer takes any address of a registration",
    "registration_nbytes": "0 for no limit, or the most bytes of one registration",
    "registrations": "0 for no limit, or the most registrations at a time",
    "device_nbytes": "8 GiB, or another size of each device's memory",
}
"""Of `SimCuda.set`, and what they are at first."""


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
    STREAM_CAPTURE_UNJOINED = 904
    STREAM_CAPTURE_ISOLATION = 905
    STREAM_CAPTURE_IMPLICIT = 906
    CAPTURED_EVENT = 907
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


class Counts(NamedTuple):
    """Calls since the last reset, those that tests made included."""

    launches: int
    copies: int
    """To the host, in one piece."""
    pitched: int
    """To the host, with rows."""
    syncs: int
    """Waits for all of a stream."""
    registrations: int
    allocations: int
    modules: int
