# SPDX-License-Identifier: Apache-2.0
"""Saves that a forked process writes, in scripts whose every write can be held."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastshard.engine.engine import Engine, SaveFuture
from fastshard.engine.parts import Served
from fastshard.engine.plan import HOST, FilePlan, SaveOptions, TensorView, WriteItem
from fastshard.engine.tensors import describe

MIB = 1 << 20
HEADER = b"a header of 32 bytes, aligned.  "


def view(tensor: torch.Tensor) -> TensorView:
    nbytes, itemsize = tensor.numel() * tensor.element_size(), tensor.element_size()
    if tensor.is_contiguous():
        return TensorView(tensor.data_ptr(), nbytes, HOST)
    return TensorView(tensor.data_ptr(), nbytes, HOST, itemsize, tuple(tensor.shape), tuple(tensor.stride()))


def views(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> list[TensorView]:
    """In the order of a safetensors file."""
    return [entry.view for entry in describe(tensors, allow_strided=True, dtype=dtype)]


def large(count: int = 4) -> list[torch.Tensor]:
    """Tensors of 16 MiB each."""
    return [torch.arange(4 * MIB, dtype=torch.float32) + seed for seed in range(count)]


def plan(path: Path | str, items: Sequence[TensorView | WriteItem | torch.Tensor], **more: Any) -> FilePlan:
    found = [view(item) if isinstance(item, torch.Tensor) else item for item in items]
    return FilePlan(os.fsencode(path), HEADER, found, **more)


def submit(engine: Engine, plans: list[FilePlan], keep: object = None, **options: Any) -> SaveFuture:
    served = Served(amend=options.pop("amend", None))
    asked = SaveOptions({}, forked=True, amended=served.amend is not None, **options)
    return engine.start(plans, asked, keep, served)


def process_of(future: SaveFuture) -> int:
    """The process that writes; 0 when it has gone."""
    assert future._native.forked is not None
    return future._native.forked[0]


def dropped(future: SaveFuture) -> int:
    assert future._native.forked is not None
    return future._native.forked[1]


def children() -> list[int]:
    """All processes that this one has made and that are not waited for yet."""
    found = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/children") as file:
            found += [int(pid) for pid in file.read().split()]
    return found


def resident(process: int) -> int:
    """Bytes of memory that the process sees at this moment, shared ones too."""
    with open(f"/proc/{process}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


@contextlib.contextmanager
def busy_allocators() -> Iterator[None]:
    """Threads that hold the locks of the allocator, the dynamic loader and the standard streams much of the time."""
    import threading

    stop = threading.Event()
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]

    def allocate() -> None:
        while not stop.is_set():
            for nbytes in (24, 5000, 200_000):
                libc.free(libc.malloc(nbytes))

    def load() -> None:
        while not stop.is_set():
            handle = ctypes.CDLL("libm.so.6")._handle
            libc.dlclose(ctypes.c_void_p(handle))
            libc.fflush(None)

    threads = [threading.Thread(target=work) for work in (allocate, allocate, load)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
