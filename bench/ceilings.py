# SPDX-License-Identifier: Apache-2.0
"""What the hardware allows: the same bytes moved with nothing else done to them.

A saver that reaches its ceiling has no more to win. They run in the same rounds as the rivals, since
the machine's speed changes from minute to minute.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .job import SOURCES, Job, Prepare, Rival, Shard, fsync_tree
from .machine import cpu_count
from .samples import DURABLE, GIB, MIB, MODES, RETURN, STALL

CHUNK_NBYTES = 16 * MIB
DIRECT_CHUNK_NBYTES = 4 * MIB
DIRECT_DEPTH = 4
"""Writes in flight; more gains nothing, and the disk is idle between them with one."""
IOV_MAX = 1024
COPY_NBYTES = 256 * MIB
"""Destination of the memcpy ceilings: beyond any cache, and small enough to stay beside the case."""
LINK_CHUNK_NBYTES = 32 * MIB
LINK_NBYTES = GIB
"""Page-locked destination of the link's ceilings: locking more takes seconds and shows nothing new."""

Batch = list[memoryview]


@functools.cache
def _stand_in() -> torch.Tensor:
    return torch.ones(COPY_NBYTES, dtype=torch.uint8)


def _raw(job: Job, tensor: torch.Tensor) -> torch.Tensor:
    """As much of the tensor's own memory as it has bytes in the file, as 1-D uint8.

    For a strided tensor these are bytes of its storage one after the other, for one that is cast the first
    of them: a ceiling neither gathers nor computes.
    """
    nbytes, storage = job.nbytes_of(tensor), tensor.untyped_storage()
    first = min(tensor.storage_offset() * tensor.element_size(), storage.nbytes() - nbytes)
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, first, (nbytes,), (1,))


def _pieces(job: Job, tensor: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
    """The same in pieces of at most ``most`` bytes, in order, in host memory.

    Device memory cannot be written from; there other host memory stands in for it.
    """
    if tensor.device.type == "cpu":
        yield from _raw(job, tensor).split(most)
    else:
        nbytes = job.nbytes_of(tensor)
        for start in range(0, nbytes, most):
            yield _stand_in()[: min(most, nbytes - start)]


def _batches(job: Job, shard: Shard) -> list[Batch]:
    """The shard's bytes as arguments of ``pwritev``: at most 16 MiB and 1024 pieces each."""
    batches: list[Batch] = []
    free = 0
    for tensor in shard.values():
        for source in _pieces(job, tensor, CHUNK_NBYTES):
            piece = source.numpy().data
            if len(piece) > free or len(batches[-1]) == IOV_MAX:
                batches.append([])
                free = CHUNK_NBYTES
            batches[-1].append(piece)
            free -= len(piece)
    return batches


def _write_fully(fd: int, batch: Batch, offset: int) -> int:
    """pwritev until all is written; returns the bytes. os.pwritev lets the GIL go."""
    total = sum(len(piece) for piece in batch)
    done = os.pwritev(fd, batch, offset)
    while done < total:  # a signal or a nearly full disk cuts a write short
        done += os.pwrite(fd, memoryview(b"".join(batch))[done:], offset + done)
    return total


def _write_buffered(path: Path, batches: list[Batch], preallocate: bool) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        if preallocate:
            os.posix_fallocate(fd, 0, sum(len(piece) for batch in batches for piece in batch))
        offset = 0
        for batch in batches:
            offset += _write_fully(fd, batch, offset)
    finally:
        os.close(fd)


def _pwrite_one(job: Job) -> Callable[[], None]:
    """One thread, one file: what any single buffered writer can reach."""
    batches = [batch for shard in job.shards for batch in _batches(job, shard)]

    def write() -> None:
        _write_buffered(job.paths[0], batches, job.preallocate)
        if job.durable:
            fsync_tree(job.out)

    return write


def _pwrite_many(job: Job) -> Callable[[], None]:
    """A thread for each file, as many at a time as there are CPUs."""
    files = [_batches(job, shard) for shard in job.shards]

    def write() -> None:
        with ThreadPoolExecutor(min(len(files), cpu_count())) as pool:
            list(pool.map(lambda path, file: _write_buffered(path, file, job.preallocate), job.paths, files))
        if job.durable:
            fsync_tree(job.out)

    return write


def _direct(job: Job) -> Callable[[], None]:
    """O_DIRECT from aligned memory: the disk's own rate, past the page cache.

    The sources are not page-aligned, so one aligned buffer is written again and again.
    """
    per_file = [sum(map(job.nbytes_of, shard.values())) for shard in job.shards]
    buffer = mmap.mmap(-1, DIRECT_CHUNK_NBYTES)
    buffer.write(os.urandom(DIRECT_CHUNK_NBYTES))
    fd = os.open(job.out, os.O_TMPFILE | os.O_DIRECT | os.O_WRONLY)  # fails here, if it must
    os.close(fd)

    def write() -> None:
        fds: list[int] = []
        try:
            tasks: list[tuple[int, int, int]] = []
            for path, nbytes in zip(job.paths, per_file):
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o644)
                fds.append(fd)
                rounded = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
                if job.preallocate:
                    os.posix_fallocate(fd, 0, rounded)
                for start in range(0, rounded, DIRECT_CHUNK_NBYTES):
                    tasks.append((fd, start, min(DIRECT_CHUNK_NBYTES, rounded - start)))
            source = memoryview(buffer)
            with ThreadPoolExecutor(DIRECT_DEPTH) as pool:
                list(pool.map(lambda t: os.pwrite(t[0], source[: t[2]], t[1]), tasks))
        finally:
            for fd in fds:
                os.close(fd)
        fsync_tree(job.out)

    return write


@functools.lru_cache(maxsize=1)
def _touched(nbytes: int) -> torch.Tensor:
    """A destination whose pages are there, so that no fault is timed. The newest is kept: it can be large."""
    return torch.empty(nbytes, dtype=torch.uint8).fill_(1)


def _pairs(job: Job, target: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(to, from): the case's bytes, one after the other into ``target``, which is begun again when full."""
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    at = 0
    for shard in job.shards:
        for tensor in shard.values():
            for piece in _pieces(job, tensor, target.numel()):
                at = at if at + piece.numel() <= target.numel() else 0
                pairs.append((target[at : at + piece.numel()], piece))
                at += piece.numel()
    return pairs


def _memcpy(threads: int, most: int | None = COPY_NBYTES) -> Prepare:
    def prepare(job: Job) -> Callable[[], None]:
        pairs = _pairs(job, _touched(min(most or job.nbytes, job.nbytes)))

        def copy() -> None:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                for to, source in pairs:
                    to.copy_(source)
            finally:
                torch.set_num_threads(before)

        return copy

    return prepare


def _memmove_all(job: Job) -> Callable[[], None]:
    """The C library's own copy, a thread for each CPU."""
    moves = [
        (to.data_ptr(), source.data_ptr(), source.numel())
        for pair_to, pair_from in _pairs(job, _touched(job.nbytes))
        for to, source in zip(pair_to.split(CHUNK_NBYTES), pair_from.split(CHUNK_NBYTES))
    ]

    def copy() -> None:
        with ThreadPoolExecutor(cpu_count()) as pool:  # ctypes lets the GIL go
            list(pool.map(lambda move: ctypes.memmove(*move), moves, chunksize=1))

    return copy


def forget() -> None:
    """Gives back the large destinations of the ceilings."""
    _touched.cache_clear()


@functools.cache
def page_locked(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _link(job: Job) -> Callable[[], None]:
    """Device to page-locked host memory and nothing else: what no saver of device tensors can pass."""
    target = page_locked(min(LINK_NBYTES, max(job.nbytes, LINK_CHUNK_NBYTES)))
    places = target.split(LINK_CHUNK_NBYTES)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for shard in job.shards:
        for tensor in shard.values():
            for piece in _raw(job, tensor).split(LINK_CHUNK_NBYTES):
                pairs.append((places[len(pairs) % len(places)][: piece.numel()], piece))

    def copy() -> None:
        for to, source in pairs:
            to.copy_(source, non_blocking=True)
        torch.cuda.synchronize()

    return copy


def _link_whole(job: Job) -> Callable[[], None]:
    """The same in copies as large as they come; small tensors and their number play no part."""
    device = next(iter(job.shards[0].values())).device
    target = page_locked(min(LINK_NBYTES, max(job.nbytes, LINK_CHUNK_NBYTES)))
    source = torch.ones(target.numel(), dtype=torch.uint8, device=device)
    sizes = [min(target.numel(), job.nbytes - start) for start in range(0, job.nbytes, target.numel())]

    def copy() -> None:
        for nbytes in sizes:
            target[:nbytes].copy_(source[:nbytes], non_blocking=True)
        torch.cuda.synchronize()

    return copy


def _sha256sum(job: Job) -> Callable[[], None]:
    """Two processes of ``sha256sum``, which share out the same bytes in the page cache."""
    from safetensors.torch import save_file

    folder = job.out.with_name(SOURCES) / f"{job.nbytes}-in-{len(job.shards)}"
    paths = [folder / path.name for path in job.paths]
    if not folder.exists():
        folder.mkdir(parents=True)
        for path, shard in zip(paths, job.contiguous()):
            save_file(shard, path)

    def digest() -> None:
        shares = [paths[i::2] for i in range(2) if paths[i::2]]
        running = [subprocess.Popen(["sha256sum", *share], stdout=subprocess.DEVNULL) for share in shares]
        if any([process.wait() for process in running]):
            raise RuntimeError("sha256sum has failed")

    return digest


def _ceiling(name: str, about: str, prepare: Prepare, **fields: Any) -> Rival:
    return Rival(name, about, prepare, writes=None, **fields)


_ALL = (
    _ceiling(
        "memcpy-1",
        "memory to memory, one thread",
        _memcpy(1),
        modes=(RETURN, STALL),
        devices=("cpu",),
        footprint=0.0,
    ),
    _ceiling(
        "memcpy-n",
        "memory to memory, all CPUs",
        _memcpy(cpu_count()),
        modes=(RETURN, STALL),
        devices=("cpu",),
        footprint=0.0,
    ),
    _ceiling(
        "memcpy-all",
        "into as large a touched buffer, all CPUs (torch's copy_: ordinary stores, none non-temporal)",
        _memcpy(cpu_count(), most=None),
        modes=(RETURN,),
        devices=("cpu",),
        footprint=0.0,
    ),
    _ceiling(
        "memmove-all",
        "the same, libc's memmove of 16 MiB (non-temporal stores where libc thinks that large)",
        _memmove_all,
        modes=(RETURN,),
        devices=("cpu",),
        footprint=0.0,
    ),
    _ceiling(
        "link",
        "device to pinned memory, 32 MiB at a time, non_blocking",
        _link,
        modes=(RETURN,),
        devices=("cuda",),
        footprint=0.0,
    ),
    _ceiling(
        "link-whole",
        "device to pinned memory, 1 GiB at a time",
        _link_whole,
        modes=(RETURN,),
        devices=("cuda",),
        footprint=0.0,
    ),
    _ceiling("pwrite-1", "pwritev of 16 MiB, one thread, one file", _pwrite_one, modes=MODES),
    _ceiling(
        "pwrite-n",
        "pwritev of 16 MiB, a thread for each file",
        _pwrite_many,
        modes=MODES,
        many_files_only=True,
    ),
    _ceiling("direct", "O_DIRECT writes of 4 MiB, 4 in flight", _direct, modes=(DURABLE,)),
    _ceiling(
        "sha256sum-2",
        "sha256sum in two processes over the same bytes in files",
        _sha256sum,
        modes=(RETURN,),
        devices=("cpu",),
    ),
    _ceiling(
        "no-save",
        "no save: the job's ten steps, of which what the others lose is counted",
        lambda job: lambda: None,
        modes=(STALL,),
        footprint=0.0,
    ),
)
CEILINGS: dict[str, Rival] = {ceiling.name: ceiling for ceiling in _ALL}
