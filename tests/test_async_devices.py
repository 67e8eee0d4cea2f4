# SPDX-License-Identifier: Apache-2.0
"""Snapshots of device memory, over the simulated driver: copies go straight into page-locked memory that stays so
between saves, and streams wait for them where the host does not."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BUDGET, DRIVER_VARIABLE, SLOT, assert_same
from helpers import filled
from simcuda import Result, SimCuda
from test_cuda_path import (
    HEADER,
    HERE,
    MIB,
    NewEngine,
    SimTensor,
    Source,
    Uploader,
    contents,
    current_streams,
    gathered,
    needs_kernel,
    noise,
    on_device,
    on_host,
    reference_bytes,
    stays_unfinished,
    upload,
    varied,
    wait_until,
)
from test_cuda_prepared import casts, small
from test_fetch import fetched

import fastshard
from fastshard import _native
from fastshard.engine.engine import Engine, SaveFuture
from fastshard.engine.plan import FilePlan, Memory
from fastshard.engine.staged_event import StagedEvent

__all__ = ["current_streams", "upload"]  # fixtures
PAGE = mmap.PAGESIZE
IN_TARGET = 4 * 2 * SLOT
"""Bytes of a chunk that is copied straight into its target, with the budget of these tests."""
Block = Callable[..., "Arena"]


class Arena:
    """Memory for snapshots, page-locked by an engine; files begin at any page of it."""

    def __init__(self, engine: Engine, nbytes: int, *, lead: int = 0) -> None:
        whole = -(-(lead + nbytes + len(HEADER)) // PAGE) * PAGE
        self.memory = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.address = begin + lead
        native = engine._natives[None]
        self.lock = native.page_lock(begin, len(self.memory), 0)
        self.engine = engine

    def target(self, nbytes: int, offset: int = 0) -> Memory:
        locked = None if isinstance(self.lock, str) else self.lock
        return Memory(self.address + offset, nbytes, True, locked)

    def save(
        self, sources: Sequence[Source], streams: dict[int, int] | None = None, **more: Any
    ) -> SaveFuture:
        plan = FilePlan(self.target(len(contents(list(sources)))), HEADER, [s.view for s in sources])
        return self.engine.submit([plan], keep_alive=sources, streams=streams, **more)

    def holds(self, sources: Sequence[Source], offset: int = 0) -> None:
        expected = contents(list(sources))
        assert_same(ctypes.string_at(self.address + offset, len(expected)), expected)

    def release(self) -> None:
        if not isinstance(self.lock, str):
            self.lock.release()


@pytest.fixture
def arena() -> Iterator[Block]:
    with contextlib.ExitStack() as stack:

        def make(engine: Engine, nbytes: int, **more: Any) -> Arena:
            made = Arena(engine, nbytes, **more)
            stack.callback(made.release)
            return made

        yield make


def event_of(future: SaveFuture) -> StagedEvent:
    return StagedEvent([future._native], future.done, lambda: future.wait(300))


def stream_like(handle: int, device: int = 0) -> Any:
    """A ``torch.cuda.Stream``, as far as events look at it."""
    return SimpleNamespace(cuda_stream=handle, device=torch.device("cuda", device))


# Where the copies go.


def test_copies_go_straight_into_the_memory(sim: SimCuda, new_engine: NewEngine, arena: Block) -> None:
    """Without staging buffers, in chunks larger than one of these; page-locked once for all saves."""
    engine = new_engine()
    block = arena(engine, 6 * IN_TARGET)
    for seed in range(3):
        sources = [on_host(noise(PAGE - len(HEADER))), on_device(sim, noise(5 * IN_TARGET, seed=seed))]
        copies = sim.count("cuMemcpyDtoHAsync")
        stats = block.save(sources).result()
        block.holds(sources)
        assert (stats.staging, stats.staging_nbytes, stats.fallbacks) == ("in place", 0, ())
        assert sim.count("cuMemcpyDtoHAsync") - copies == 5
    assert sim.registered() == [len(block.memory)]
    assert (sim.count("cuLaunchKernel"), sim.count("cuStreamSynchronize")) == (0, 0)


@needs_kernel
@pytest.mark.parametrize("kind", [small, casts, gathered])
def test_the_device_holds_no_second_copy(
    sim: SimCuda, new_engine: NewEngine, arena: Block, kind: Callable[[SimCuda], list[Source]]
) -> None:
    engine = new_engine()
    sources = kind(sim)
    block = arena(engine, len(contents(sources)))
    before = sim.live()["allocated_bytes"]
    sim.forget_peaks()
    stats = block.save(sources).result()
    block.holds(sources)
    assert 0 < sim.peak("allocated_bytes") - before <= engine.options.device_scratch
    assert (stats.staging, stats.staging_nbytes, stats.fallbacks) == ("in place", 0, ())
    assert sim.registered() == [len(block.memory), 2 * SLOT]  # the kernels' tables have one slot
    assert sim.count("cuStreamSynchronize") == 0


@needs_kernel
def test_the_tables_of_many_files_share_a_slot(sim: SimCuda, new_engine: NewEngine, arena: Block) -> None:
    engine = new_engine()
    files = [gathered(sim, seed=i, count=2) for i in range(12)]
    block = arena(engine, 12 * MIB)
    plans = [
        FilePlan(block.target(len(contents(sources)), place * MIB), HEADER, [s.view for s in sources])
        for place, sources in enumerate(files)
    ]
    producer = sim.stream(0)
    with sim.paused():
        future = engine.submit(plans, keep_alive=files, streams={0: producer})
        assert future._native.hold_stream(0, producer) is None
    assert future.result().fallbacks == ()
    for place, sources in enumerate(files):
        block.holds(sources, place * MIB)
    assert sim.registered() == [len(block.memory), 2 * SLOT]


@pytest.mark.parametrize("lead", [0, 3 * PAGE, 200 * PAGE])
def test_no_copy_reaches_across_parts(sim: SimCuda, new_engine: NewEngine, arena: Block, lead: int) -> None:
    """What is refused whole is page-locked in parts of 256 MiB, wherever in them the file begins."""
    sim.set(registration_nbytes=256 * MIB, interior_pointers=0)
    part = 256 * MIB
    engine = new_engine()
    block = arena(engine, part + 8 * MIB, lead=lead)
    assert len(sim.registered()) == 2
    assert isinstance(block.lock, _native.PageLock) and block.lock.part_nbytes == part
    sources = [
        on_device(sim, np.zeros(part - lead - 2 * MIB, np.uint8)),
        *varied(sim),
        on_device(sim, noise(3 * MIB)),
        *gathered(sim),
    ]
    block.save(sources).result()
    block.holds(sources)  # and the simulator notes a copy that reaches beyond a registration


@pytest.mark.parametrize("lead", [0, 5 * PAGE])
@pytest.mark.parametrize("first", range(0, 3 * PAGE, 1000))
def test_chunks_end_at_boundaries(lead: int, first: int) -> None:
    boundary = 16 * PAGE
    plan = FilePlan(Memory(PAGE, first + 60 * PAGE), bytes(first), [on_host(noise(60 * PAGE)).view])
    chunks = _native.schedule(
        [plan], MIB, MIB, MIB, 1024, False, boundary_nbytes=boundary, begin_nbytes=lead
    )[0]
    for offset, nbytes, _, _ in chunks:
        assert (lead + offset) // boundary == (lead + offset + nbytes - 1) // boundary
    assert sum(nbytes for _, nbytes, _, _ in chunks) == first + 60 * PAGE
    with pytest.raises(ValueError, match="boundaries between chunks"):
        _native.schedule([plan], MIB, MIB, MIB, 1024, False, boundary_nbytes=boundary, begin_nbytes=lead + 1)


@pytest.mark.parametrize("checksums", [False, True])
def test_host_and_device_memory(sim: SimCuda, new_engine: NewEngine, arena: Block, checksums: bool) -> None:
    """Several devices and the host, in one chunk and in many; the checksums are those of a save into a file."""
    engine = new_engine(memory_budget=8 * MIB)
    sources = [
        *varied(sim),
        on_host(noise(3 * MIB)),
        *varied(sim, 1, seed=1),
        on_host(noise(90, 70, dtype="uint16").T),
        on_device(sim, noise(300_000)),
        *[on_host(noise(100 + i)) for i in range(20)],
        *casts(sim),
    ]
    block = arena(engine, len(contents(sources)))
    saved = block.save(sources, checksums=checksums)
    saved.result()
    block.holds(sources)
    assert saved.progress() == (len(contents(sources)),) * 2
    if checksums:
        plain = ctypes.create_string_buffer(len(contents(sources)))
        target = Memory(ctypes.addressof(plain), len(plain))
        other = engine.submit(
            [FilePlan(target, HEADER, [s.view for s in sources])], keep_alive=sources, checksums=True
        )
        other.result()
        assert saved.checksums() == other.checksums()


def test_pageable_memory_takes_staging_buffers(sim: SimCuda, new_engine: NewEngine, arena: Block) -> None:
    sim.fail("cuMemHostRegister", Result.OUT_OF_MEMORY, nth=0)
    engine = new_engine()
    block = arena(engine, 8 * MIB)
    assert block.lock == "CUDA_ERROR_OUT_OF_MEMORY (out of memory)"
    sim.reset_failures()
    sources = varied(sim)
    stats = block.save(sources).result()
    block.holds(sources)
    assert stats.staging == "pinned"


# Page-locking.


def fork_leaves_out(address: int) -> bool:
    """By /proc: whether a forked child does not have the mapping there."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(" ", 1)[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and line.startswith("VmFlags:"):
            return "dc" in line.split()
    raise ValueError(f"nothing is mapped at {address:#x}")


def test_memory_is_page_locked_until_it_is_released(
    sim: SimCuda, new_engine: NewEngine, arena: Block
) -> None:
    engine = new_engine()
    before = sim.live()
    block = arena(engine, MIB)
    assert sim.live()["registered_bytes"] - before["registered_bytes"] == len(block.memory)
    assert fork_leaves_out(block.address)
    block.release()
    assert sim.live()["registered_bytes"] == before["registered_bytes"]
    assert not fork_leaves_out(block.address)
    block.release()
    with pytest.raises(ValueError, match="has been released"):
        block.save([on_device(sim, noise(10))])
    refused = arena(engine, MIB)
    refused.release()
    sim.fail("cuMemHostRegister", Result.NOT_SUPPORTED, nth=0)
    assert isinstance(arena(engine, MIB).lock, str) and not fork_leaves_out(refused.address)


def test_a_lock_may_outlive_its_engine(sim: SimCuda, new_engine: NewEngine, arena: Block) -> None:
    engine = new_engine()
    block = arena(engine, MIB)
    block.save([on_device(sim, noise(10))]).result()
    engine.close()
    assert sim.live()["registrations"] == 1
    block.release()
    assert sim.live()["registrations"] == 0


def test_only_whole_pages_are_page_locked(sim: SimCuda, new_engine: NewEngine) -> None:
    native = new_engine()._natives[None]
    for address, nbytes in ((0, PAGE), (PAGE, 0), (PAGE + 8, PAGE), (PAGE, 100)):
        with pytest.raises(ValueError, match="whole pages"):
            native.page_lock(address, nbytes, 0)
    with pytest.raises(RuntimeError, match="no CUDA device 7"):
        native.page_lock(PAGE, PAGE, 7)


def test_a_target_lies_in_what_is_locked(sim: SimCuda, new_engine: NewEngine, arena: Block) -> None:
    engine = new_engine()
    block = arena(engine, MIB)
    source = on_device(sim, noise(MIB))
    for address in (block.address - PAGE, block.address + 2 * PAGE):
        block.address = address
        with pytest.raises(ValueError, match="outside of what is page-locked"):
            block.save([source])


# Streams that wait.


def stale_and_fresh(sim: SimCuda, nbytes: int = 3 * IN_TARGET + 5) -> tuple[Source, bytes]:
    return on_device(sim, noise(nbytes, seed=1)), noise(nbytes, seed=2).tobytes()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("waits", [True, False])
def test_a_change_behind_the_event_is_not_in_the_file(
    sim: SimCuda, new_engine: NewEngine, arena: Block, waits: bool, seed: int
) -> None:
    """Without the event it is, which shows that the event is what keeps it out."""
    engine = new_engine()
    source, fresh = stale_and_fresh(sim)
    block = arena(engine, source.view.nbytes)
    producer = sim.stream(0)
    sim.set_delay(2000, 9000, seed)
    with sim.paused():
        future = block.save([source], {0: producer})
        if waits:
            event_of(future).wait(stream_like(producer))
        # Without a delay of its own: it would be there first.
        sim.enqueue_write(producer, source.view.data, fresh)
        assert not future.done()
    sim.synchronize(producer)
    assert sim.read(source.view.data, len(fresh)) == fresh
    future.result()
    if waits:
        block.holds([source])
    else:
        found = ctypes.string_at(block.address + len(HEADER), len(fresh))
        assert found != source.packed
    assert (sim.count("cuStreamWaitEvent") > 1) == waits


@needs_kernel
@pytest.mark.parametrize("scratch", [0, 8 * MIB])
@pytest.mark.parametrize("kind", [small, casts, gathered, varied])
def test_what_the_kernel_reads_is_waited_for(
    sim: SimCuda, new_engine: NewEngine, arena: Block, kind: Callable[[SimCuda], list[Source]], scratch: int
) -> None:
    engine = new_engine(memory_budget=8 * MIB, device_scratch=scratch)
    sources = kind(sim)
    block = arena(engine, len(contents(sources)))
    producer = sim.stream(0)
    with sim.paused():
        future = block.save(sources, {0: producer})
        event_of(future).wait(stream_like(producer))
        for address, (_, nbytes) in list(sim._allocations.items()):
            if any(address <= source.view.data < address + nbytes for source in sources):
                sim.enqueue_write(producer, address, bytes(nbytes))
    future.result()
    block.holds(sources)


def test_a_stream_of_one_device_waits_for_all(
    sim: SimCuda, new_engine: NewEngine, arena: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default the current streams of all devices that are read do."""
    engine = new_engine()
    first, second = on_device(sim, noise(MIB, seed=1)), on_device(sim, noise(MIB, seed=2), 1)
    block = arena(engine, 2 * MIB)
    producers = {device: sim.stream(device) for device in (0, 1)}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream_like(producers[device], device))
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    before = sim.count("cuStreamWaitEvent")
    with sim.paused():
        future = block.save([first, second], producers)
        made = sim.count("cuStreamWaitEvent") - before
        event_of(future).wait()
        assert sim.count("cuStreamWaitEvent") - before - made == 4
        for source, producer in zip((first, second), producers.values(), strict=True):
            sim.enqueue_write(producer, source.view.data, bytes(MIB))
    future.result()
    block.holds([first, second])


def test_the_host_does_not_wait(sim: SimCuda, new_engine: NewEngine, arena: Block) -> None:
    """Neither in the call nor for the event, while nothing on the device moves; all copies are enqueued."""
    engine = new_engine(threads=1)
    sources = [on_device(sim, noise(5 * IN_TARGET - len(HEADER))), on_host(noise(1000))]
    block = arena(engine, 6 * IN_TARGET)
    producer = sim.stream(0)
    with sim.paused():
        future = block.save(sources, {0: producer})
        assert sim.count("cuMemcpyDtoHAsync") == 5
        event = event_of(future)
        event.wait(stream_like(producer))
        assert not event.query() and stays_unfinished(future)
        waits = sim.count("cuStreamWaitEvent")
    event.synchronize()
    assert event.query()
    event.wait(stream_like(producer))
    assert sim.count("cuStreamWaitEvent") == waits  # nothing to wait for any more
    assert sim.count("cuStreamSynchronize") == 0
    block.holds(sources)


def test_it_waits_behind_busy_writers(sim: SimCuda, new_engine: NewEngine, arena: Block, path: Path) -> None:
    """The copies are enqueued by the caller, so a stream is held no longer because all writers write files."""
    engine = new_engine(threads=1)
    busy = on_device(sim, noise(4 * MIB, seed=3))
    source, fresh = stale_and_fresh(sim)
    block = arena(engine, source.view.nbytes)
    producer = sim.stream(0)
    with sim.paused():
        other = engine.submit([FilePlan(os.fsencode(path), HEADER, [busy.view])], keep_alive=busy)
        wait_until(lambda: sim.count("cuMemcpyDtoHAsync") == BUDGET // (2 * SLOT))
        future = block.save([source, on_host(noise(70))], {0: producer})
        assert sim.count("cuMemcpyDtoHAsync") == BUDGET // (2 * SLOT) + 4
        event_of(future).wait(stream_like(producer))
        sim.enqueue_write(producer, source.view.data, fresh)
    other.result()
    future.result()
    block.holds([source, on_host(noise(70))])


def test_host_memory_is_copied_when_the_event_lets_the_host_go_on(
    sim: SimCuda, new_engine: NewEngine, arena: Block
) -> None:
    """Counters of an optimizer, and more than the caller's thread packs."""
    engine = new_engine()
    producer = sim.stream(0)
    for nbytes in (8, 5 * MIB):
        kept, changed = noise(nbytes), noise(nbytes).copy()
        sources = [on_device(sim, noise(MIB)), on_host(changed), on_device(sim, noise(300_000))]
        block = arena(engine, 8 * MIB)
        with sim.paused():
            future = block.save(sources, {0: producer})
            event_of(future).wait(stream_like(producer))
            changed[:] = 0
            assert not future.done()
        future.result()
        changed[:] = kept
        block.holds(sources)


@pytest.mark.parametrize("action", ["alloc", "free", "register", "module", "synchronize"])
def test_the_caller_may_do_anything_behind_it(
    sim: SimCuda, new_engine: NewEngine, arena: Block, action: str
) -> None:
    """Calls that wait for all that is enqueued, and let no other call pass, do not keep the save from its end: the
    stream waits for nothing that is yet to be enqueued."""
    sim.set(implicit_sync=2)
    engine = new_engine()
    source, fresh = stale_and_fresh(sim)
    block = arena(engine, source.view.nbytes)
    producer, other = sim.stream(0), sim.alloc(0, MIB)
    sim.set_delay(1000, 4000)
    future = block.save([source], {0: producer})
    event_of(future).wait(stream_like(producer))
    sim.enqueue_write(producer, source.view.data, fresh)
    if action == "alloc":
        sim.alloc(0, MIB)
    elif action == "free":
        sim.free(other)
    elif action == "register":
        arena(engine, MIB).release()
    elif action == "module":
        engine.warm_up(0)
    else:
        sim.synchronize(producer)
        assert sim.read(source.view.data, len(fresh)) == fresh
    future.result()
    block.holds([source])


@pytest.mark.parametrize("how", ["cancelled", "failed", "closed", "dropped"])
def test_a_stream_goes_on_however_the_save_ends(
    sim: SimCuda, new_engine: NewEngine, arena: Block, how: str
) -> None:
    engine = new_engine()
    source, fresh = stale_and_fresh(sim)
    block = arena(engine, source.view.nbytes)
    producer = sim.stream(0)
    sim.set_delay(1000, 4000)
    if how == "failed":
        sim.fail("cuEventSynchronize", Result.UNKNOWN)
    with sim.paused():
        future = block.save([source], {0: producer})
        event_of(future).wait(stream_like(producer))
        sim.enqueue_write(producer, source.view.data, fresh)
        native = future._native
        if how == "cancelled":
            assert native.cancel()
    if how == "closed":
        engine.close()
    if how == "dropped":
        del native, future
    sim.synchronize(producer)
    assert sim.read(source.view.data, len(fresh)) == fresh
    if how == "cancelled":
        with pytest.raises(CancelledError):
            future.result()
    if how == "failed":
        with pytest.raises(RuntimeError, match="cuEventSynchronize failed: CUDA_ERROR_UNKNOWN"):
            future.result()
    if how in ("closed", "dropped"):
        block.holds([source])


@pytest.mark.parametrize("nth", [1, 2])
def test_copies_that_cannot_be_enqueued(sim: SimCuda, new_engine: NewEngine, arena: Block, nth: int) -> None:
    """The save fails with that, and nothing is under way in the memory any more."""
    engine = new_engine()
    source, _ = stale_and_fresh(sim)
    block = arena(engine, source.view.nbytes)
    producer = sim.stream(0)
    sim.fail("cuMemcpyDtoHAsync", Result.INVALID_VALUE, nth)
    future = block.save([source], {0: producer})
    with pytest.raises(RuntimeError, match="cuMemcpyDtoHAsync failed: CUDA_ERROR_INVALID_VALUE"):
        future.result()
    block.release()  # the simulator notes copies that are pending in there
    assert future._native.hold_stream(0, producer) is None  # there is nothing to wait for


def test_a_save_that_has_not_begun_holds_nobody(sim: SimCuda, new_engine: NewEngine, arena: Block) -> None:
    engine = new_engine()
    block = arena(engine, MIB)
    source = on_device(sim, noise(1000))
    plan = FilePlan(block.target(len(contents([source]))), HEADER, [source.view])
    from fastshard.engine.plan import SaveOptions

    save = engine._natives[None].submit([plan], SaveOptions({}, held=True), [source])
    refusal = save.hold_stream(0, sim.stream(0))
    assert refusal is not None and "not begun" in refusal
    assert sim.count("cuMemcpyDtoHAsync") == 0
    save.begin()
    while not save.wait(1):
        pass
    block.holds([source])


# Where the host has to wait.


def pageable(sim: SimCuda, engine: Engine, block: Arena) -> list[Source]:
    block.release()
    block.lock = "refused"
    return varied(sim)


def without_kernels(sim: SimCuda, engine: Engine, block: Arena) -> list[Source]:
    sim.fail("cuModuleLoadData", 218, nth=0)
    return casts(sim)


def without_tables(sim: SimCuda, engine: Engine, block: Arena) -> list[Source]:
    sim.fail("cuMemHostRegister", Result.OUT_OF_MEMORY, nth=0)
    return gathered(sim)


REFUSALS: dict[str, tuple[Callable[[SimCuda, Engine, Arena], list[Source]], str]] = {
    "pageable": (pageable, "not page-locked"),
    "no kernels": (without_kernels, "the CPU casts"),
    "no tables": (without_tables, "tables are not page-locked"),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_the_host_waits_where_streams_cannot(
    sim: SimCuda, new_engine: NewEngine, arena: Block, why: str
) -> None:
    engine = new_engine()
    block = arena(engine, 8 * MIB)
    prepare, text = REFUSALS[why]
    sources = prepare(sim, engine, block)
    producer = sim.stream(0)
    sim.set_delay(0, 200)
    future = block.save(sources, {0: producer})
    notes: list[str] = []
    event = StagedEvent([future._native], future.done, lambda: future.wait(300), notes.append)
    event.wait(stream_like(producer))
    assert event.query()
    assert len(notes) == 1 and text in notes[0] and notes[0].startswith("the host waits")
    future.result()
    block.holds(sources)


@needs_kernel
def test_no_slot_is_waited_for(sim: SimCuda, new_engine: NewEngine, arena: Block, path: Path) -> None:
    """The tables take staging memory that is free. Where others have it all, the writers do as always."""
    engine = new_engine(threads=2)
    block = arena(engine, 8 * MIB)
    busy = on_device(sim, noise(4 * MIB))
    sources = gathered(sim)
    producer = sim.stream(0)
    with sim.paused():
        other = engine.submit([FilePlan(os.fsencode(path), HEADER, [busy.view])], keep_alive=busy)
        wait_until(lambda: sim.count("cuMemcpyDtoHAsync") == BUDGET // (2 * SLOT))
        future = block.save(sources, {0: producer})
        refusal = future._native.hold_stream(0, producer)
        assert refusal is not None and "no staging memory was free" in refusal
    other.result()
    future.result()
    block.holds(sources)


@needs_kernel
def test_writers_keep_a_slot(sim: SimCuda, new_engine: NewEngine, arena: Block, path: Path) -> None:
    """Tables are kept until a writer has waited for their copies. Writers that wait for a slot must not wait for
    them."""
    engine = new_engine(threads=1)
    sources = gathered(sim)
    blocks = [arena(engine, 8 * MIB) for _ in range(BUDGET // (2 * SLOT))]
    producer = sim.stream(0)
    with sim.paused():
        futures = [block.save(sources, {0: producer}) for block in blocks]
        *first, last = [future._native.hold_stream(0, producer) for future in futures]
        assert first == [None] * len(first)
        assert last is not None and "no staging memory was free" in last
    for block, future in zip(blocks, futures, strict=True):
        future.result()
        block.holds(sources)


def test_bytes_that_python_brings(sim: SimCuda, new_engine: NewEngine, arena: Block) -> None:
    engine = new_engine()
    block = arena(engine, 8 * MIB)
    brought, copied = noise(MIB), on_device(sim, noise(MIB))
    plan = FilePlan(block.target(len(HEADER) + 2 * MIB), HEADER, [copied.view, fetched(brought)])

    def fetch(file: int, item: int, first: int, nbytes: int, address: int) -> None:
        ctypes.memmove(address, brought.ctypes.data + first, nbytes)

    future = engine.submit([plan], keep_alive=copied, fetch=fetch)
    refusal = future._native.hold_stream(0, sim.stream(0))
    assert refusal is None or "only be fetched by Python" in refusal
    future.result()
    block.holds([copied, Source(copied.view, brought)])


def test_a_stream_of_a_device_that_is_not_read(sim: SimCuda, new_engine: NewEngine, arena: Block) -> None:
    engine = new_engine()
    source, _ = stale_and_fresh(sim)
    block = arena(engine, source.view.nbytes)
    with sim.paused():
        future = block.save([source])
        assert future._native.devices == [0]
        refusal = future._native.hold_stream(1, sim.stream(1))
        assert refusal == "the save reads nothing on device 1"
    future.result()


def test_an_event_of_host_memory(new_engine: NewEngine) -> None:
    """No stream can be held for it: the host waits, and for any of several saves."""
    waited: list[int] = []
    event = StagedEvent([], lambda: False, lambda: not waited.append(1))
    event.wait()
    assert waited == [1]
    source = on_host(noise(3 * MIB))
    target = ctypes.create_string_buffer(len(contents([source])))
    plan = FilePlan(Memory(ctypes.addressof(target), len(target)), HEADER, [source.view])
    future = new_engine().submit([plan], keep_alive=source)
    event = event_of(future)
    event.wait(stream_like(1))
    assert event.query()
    assert target.raw == contents([source])


def test_streams_that_are_captured(
    sim: SimCuda, new_engine: NewEngine, arena: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph cannot wait for work that is not part of it; CUDA says so, and the save goes on."""
    engine = new_engine()
    source, _ = stale_and_fresh(sim)
    block = arena(engine, source.view.nbytes)
    producer = sim.stream(0)
    with sim.paused():
        future = block.save([source])
        isolation = pytest.raises(RuntimeError, match="STREAM_CAPTURE_ISOLATION")
        with sim.capture(producer) as capture, isolation:
            event_of(future).wait(stream_like(producer))
        assert capture.ended == Result.STREAM_CAPTURE_INVALIDATED
        with sim.capture(sim.stream(0)) as capture:  # another one is not touched
            event_of(future).wait(stream_like(producer))
        assert capture.ended == Result.SUCCESS
    future.result()
    block.holds([source])


IN_A_CHILD = """
import gc, os, sys
sys.path.insert(0, sys.argv[1])
import simcuda
from simcuda import SimCuda
from test_async_devices import MIB, Arena, StagedEvent, event_of, noise, on_device, stream_like
from fastshard.engine.engine import Engine, Options

sim = SimCuda(sys.argv[2])
engine = Engine(Options(memory_budget="1MiB", threads=2))
block = Arena(engine, 4 * MIB)
source = on_device(sim, noise(3 * MIB))
producer = sim.stream(0)
block.save([source]).result()
with sim.paused():
    future = block.save([source], {0: producer})
    event = event_of(future)
    event.wait(stream_like(producer))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for ask in (event.wait, event.query, event.synchronize):
                try:
                    ask()
                except RuntimeError as error:
                    assert "parent process" in str(error), error
                else:
                    raise AssertionError("it has answered")
            mapped = [line.split("-", 1)[0] for line in open("/proc/self/maps")]
            assert f"{block.address:x}" not in mapped
            block.release()
            del block, event
            gc.collect()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
future.result()
block.holds([source])
block.release()
engine.close()
assert sim.live()["registrations"] == 0
assert sim.violations() == []
print("both")
"""


def test_a_forked_child_touches_none_of_it(sim: SimCuda, tmp_path: Path) -> None:
    variables = {**os.environ, DRIVER_VARIABLE: str(sim.path)}
    command = [sys.executable, "-c", textwrap.dedent(IN_A_CHILD), str(HERE), str(sim.path)]
    done = subprocess.run(
        command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.stdout, done.returncode) == ("both\n", 0), done.stderr


def test_saves_that_follow_one_another(sim: SimCuda, new_engine: NewEngine, arena: Block) -> None:
    """A job that trains: each step changes all tensors on its stream, behind the event of the save before."""
    engine = new_engine(memory_budget=8 * MIB)
    sources = [*varied(sim), *casts(sim)] if _native.kernels_compiled_in() else varied(sim)
    blocks = [arena(engine, len(contents(sources))) for _ in range(2)]
    producer = sim.stream(0)
    sim.set_delay(0, 3000)
    memory = {address: sim.read(address, nbytes) for address, (_, nbytes) in sim._allocations.items()}
    futures: list[SaveFuture] = []
    for step in range(6):
        block = blocks[step % 2]
        if step > 1:
            futures[step - 2].result()
            block.holds(sources) if step % 3 == 2 else None
        for address, data in memory.items():  # as they are in the saves that are looked at
            sim.enqueue_write(producer, address, data if step % 3 == 0 else bytes(len(data)))
        futures.append(block.save(sources, {0: producer}))
        event_of(futures[-1]).wait(stream_like(producer))
    for future in futures:
        future.result()
    assert len(sim.registered()) <= 2 + 2  # the blocks, and slots for tables


# The public functions, with tensors that torch believes to be on a GPU.


def model(seed: int) -> dict[str, torch.Tensor]:
    """Large, small, strided and empty tensors, and a counter of an optimizer on the host."""
    base = filled((600, 500), seed=seed)
    return {
        "large": filled((900, 700), seed=seed),
        "left": base[:, :200],
        "right": base[:, 200:].t(),
        **{f"small.{i}": filled((3 + i,), torch.bfloat16, seed=seed + i) for i in range(40)},
        "empty": torch.empty(0, 4),
    }


class Training:
    """A model on simulated devices, whose steps change all of it on the producer's stream."""

    def __init__(self, sim: SimCuda, upload: Uploader, streams: dict[int, int], devices: int) -> None:
        self.sim = sim
        self.streams = streams
        self.step = 0
        self.counter = torch.tensor(0)
        streams.update({device: sim.stream(device) for device in range(devices)})
        self.states = [
            {f"{device}.{n}": t for device in range(devices) for n, t in model(s).items()} for s in (1, 2)
        ]
        self.tensors = {
            name: upload(tensor, int(name[0])) if tensor.numel() else tensor
            for name, tensor in self.states[0].items()
        }
        self.images: list[dict[str, tuple[int, bytes]]] = []
        for state in self.states:
            image = {}
            for name, tensor in state.items():
                if tensor.numel() == 0:
                    continue
                storage = tensor.untyped_storage()
                there = SimTensor.places[self.tensors[name].untyped_storage().data_ptr()][1]
                image[name] = there, ctypes.string_at(storage.data_ptr(), storage.nbytes())
            self.images.append(image)

    def advance(self) -> None:
        """Enqueues what makes the other state of this one, and counts on the host at once."""
        self.step += 1
        self.counter += 1
        for name, (address, data) in self.images[self.step % 2].items():
            self.sim.enqueue_write(self.streams[int(name[0])], address, data)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {**self.tensors, "counter": self.counter}

    def expected(self, step: int) -> bytes:
        return reference_bytes({**self.states[step % 2], "counter": torch.tensor(step)})


@pytest.mark.parametrize("devices", [1, 2])
def test_a_training_loop(
    sim: SimCuda,
    upload: Uploader,
    current_streams: dict[int, int],
    new_engine: NewEngine,
    tmp_path: Path,
    devices: int,
) -> None:
    """Each step is enqueued behind the event of the save before; no host has waited, and each file is of its step."""
    sim.set(implicit_sync=2)
    engine = new_engine(memory_budget=16 * MIB, snapshot_budget="64MiB")
    training = Training(sim, upload, current_streams, devices)
    sim.set_delay(0, 600)
    futures = []
    for step in range(5):
        future = fastshard.save_file_async(
            training.state_dict(), tmp_path / str(step), allow_strided=True, engine=engine, wait_staged=False
        )
        future.staged_event().wait()
        training.advance()
        futures.append(future)
    for step, future in enumerate(futures):
        stats = future.result()
        assert_same((tmp_path / str(step)).read_bytes(), training.expected(step))
        assert (stats.snapshot, stats.staging, stats.fallbacks) == ("copy", "in place", ())
    # Blocks of the arena, of as many saves as are in flight, and slots that the kernels' tables are in: all of them once.
    blocks = [block.nbytes for block in engine.arena._blocks]
    slots = [nbytes for nbytes in sim.registered() if nbytes not in blocks]
    assert len(blocks) <= engine.options.max_in_flight
    assert sorted(sim.registered()) == sorted([*blocks, *slots])
    assert len(slots) <= engine.options.max_in_flight
    assert sim.count("cuStreamSynchronize") == 0
    assert engine.arena.peak <= 64 * MIB


@pytest.mark.parametrize("waits", [True, False])
def test_a_change_right_after_the_event(
    sim: SimCuda,
    upload: Uploader,
    current_streams: dict[int, int],
    new_engine: NewEngine,
    path: Path,
    waits: bool,
) -> None:
    """The file has what the tensors were at the call. Without the event it has changed bytes: this test would fail."""
    engine = new_engine(memory_budget=16 * MIB)
    training = Training(sim, upload, current_streams, 1)
    sim.set_delay(2000, 6000)
    with sim.paused():
        future = fastshard.save_file_async(
            training.state_dict(), path, allow_strided=True, engine=engine, wait_staged=False
        )
        if waits:
            future.staged_event().wait()
        training.advance()
        assert not future.staged()
        training.counter.zero_()
    future.result()
    found = path.read_bytes()
    if waits:
        assert_same(found, training.expected(0))
    else:
        assert found != training.expected(0)


IN_A_CHILD_OF_AN_ENGINE = """
import ctypes, gc, mmap, os, sys
sys.path.insert(0, sys.argv[1])
import torch
import fastshard
from simcuda import SimCuda
from test_async_devices import FilePlan, HEADER, MIB, noise, on_device, on_host, contents
from fastshard.engine.background import Wanted
from fastshard.engine.engine import Engine, Options

torch.set_num_threads(1)  # its other threads would be missing in the child
sim = SimCuda(sys.argv[2])
engine = Engine(Options(memory_budget="1MiB", threads=2, snapshot_budget="64MiB"))

def save(name, source):
    plan = FilePlan(name.encode(), HEADER, [source.view])
    wanted = Wanted("copy", paths=frozenset([os.path.abspath(name)]))
    future = engine.submit([plan], keep_alive=source, streams={}, wanted=wanted)
    future.result()
    assert open(name, "rb").read() == contents([source])
    return future

kept = save("parent", on_device(sim, noise(6 * MIB)))
[block] = engine.arena._blocks
begin, nbytes = block.address, block.nbytes
child = os.fork()
if child == 0:
    status = 1
    try:
        # What comes to lie in the place of the parent's block is not the arena's to take away.
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        at = libc.mmap(begin, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, 0x100022, -1, 0)  # MAP_FIXED_NOREPLACE
        assert at == begin
        ctypes.memset(begin, 7, nbytes)
        del kept, block
        gc.collect()
        save("child", on_host(noise(7 * MIB)))
        engine.close()
        gc.collect()
        assert ctypes.string_at(begin, 1) == ctypes.string_at(begin + nbytes - 1, 1) == bytes([7])
        status = 0
    finally:
        os._exit(status)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
save("again", on_device(sim, noise(6 * MIB, seed=1)))
assert [block.address for block in engine.arena._blocks] == [begin]
engine.close()
assert sim.live()["registrations"] == 0
assert sim.violations() == []
print("both")
"""


def test_a_forked_child_has_an_arena_of_its_own(sim: SimCuda, tmp_path: Path) -> None:
    variables = {**os.environ, DRIVER_VARIABLE: str(sim.path)}
    command = [sys.executable, "-c", textwrap.dedent(IN_A_CHILD_OF_AN_ENGINE), str(HERE), str(sim.path)]
    done = subprocess.run(
        command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.stdout, done.returncode) == ("both\n", 0), done.stderr


def test_by_default_the_host_waits_for_the_snapshot(
    sim: SimCuda, upload: Uploader, current_streams: dict[int, int], new_engine: NewEngine, path: Path
) -> None:
    engine = new_engine(memory_budget=16 * MIB)
    training = Training(sim, upload, current_streams, 2)
    sim.set_delay(1000, 4000)
    future = fastshard.save_file_async(training.state_dict(), path, allow_strided=True, engine=engine)
    assert future.staged()
    waits = sim.count("cuStreamWaitEvent")
    event = future.staged_event()
    event.wait()
    assert event.query() and sim.count("cuStreamWaitEvent") == waits
    training.advance()
    future.result()
    assert_same(path.read_bytes(), training.expected(0))


def test_what_is_refused_is_a_fallback(
    sim: SimCuda, upload: Uploader, current_streams: dict[int, int], new_engine: NewEngine, path: Path
) -> None:
    """Without page-locking, and without room for a snapshot, the event is waited for on the host."""
    training = Training(sim, upload, current_streams, 1)
    sim.set_delay(0, 300)
    sim.fail("cuMemHostRegister", Result.OUT_OF_MEMORY, nth=0)
    for options, texts in (
        ({}, ("page-locking the snapshot's memory refused", "the host waits for the snapshot")),
        ({"snapshot_budget": "1MiB"}, ("no snapshot: ",)),
    ):
        engine = new_engine(memory_budget=16 * MIB, **options)
        future = fastshard.save_file_async(
            training.state_dict(), path, allow_strided=True, engine=engine, wait_staged=False
        )
        future.staged_event().wait()
        assert future.staged()
        before = training.step
        training.advance()
        stats = future.result()
        assert_same(path.read_bytes(), training.expected(before))
        for text in texts:
            assert any(text in fallback for fallback in stats.fallbacks), stats.fallbacks
        sim.synchronize(current_streams[0])


def test_memory_of_snapshots_is_unlocked_before_it_goes(
    sim: SimCuda, upload: Uploader, current_streams: dict[int, int], new_engine: NewEngine, path: Path
) -> None:
    """Also while a handle of an old save is kept."""
    engine = new_engine(memory_budget=16 * MIB)
    training = Training(sim, upload, current_streams, 1)
    before = sim.live()["registrations"]
    future = fastshard.save_file_async(training.state_dict(), path, allow_strided=True, engine=engine)
    future.result()
    assert sim.live()["registrations"] > before
    engine.close()
    assert sim.live()["registrations"] == before
    assert future.stats.snapshot == "copy"


def test_a_forked_process_writes_what_it_does_not_share(
    sim: SimCuda,
    upload: Uploader,
    current_streams: dict[int, int],
    new_engine: NewEngine,
    tmp_path: Path,
) -> None:
    """By way of the arena, from a block that was page-locked before, which processes do not inherit. What devices
    have is copied as ever."""
    engine = new_engine(memory_budget=16 * MIB, snapshot_budget="6MiB")
    training = Training(sim, upload, current_streams, 1)
    state = training.state_dict()
    future = fastshard.save_file_async(
        state, tmp_path / "1", allow_strided=True, engine=engine, snapshot="fork"
    )
    assert future.result().snapshot == "copy"
    assert any("by a forked process: tensors of devices" in text for text in future.stats.fallbacks)
    [block] = engine.arena._blocks
    assert isinstance(block.locked, _native.PageLock)
    values = filled((900, 900), seed=3)
    tensors = {"own": filled((500, 600), seed=4), "shared": values.clone().share_memory_()}
    future = fastshard.save_file_async(tensors, tmp_path / "2", engine=engine, snapshot="fork")
    tensors["shared"].zero_()
    stats = future.result()
    assert (stats.snapshot, stats.fallbacks) == ("fork", ())
    assert engine.arena._blocks == [block]
    expected = reference_bytes({"own": filled((500, 600), seed=4), "shared": values})
    assert_same((tmp_path / "2").read_bytes(), expected)
