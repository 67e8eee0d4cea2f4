# SPDX-License-Identifier: Apache-2.0
"""What a prepared save says of the changes since the one before: exactly those, whatever way the bytes take."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from conftest import SLOT
from helpers import filled
from simcuda import Result, SimCuda
from test_cuda_path import noise, on_device, on_host, varied
from test_prepared import MIB, NewEngine, interrupted, model

import fastshard
from fastshard import Changed, prepare
from fastshard.engine.plan import FilePlan

BLOCK = 4096


def blocks_that_differ(before: bytes, now: bytes) -> set[int]:
    assert len(before) == len(now)
    return {at for at in range(0, len(now), BLOCK) if before[at : at + BLOCK] != now[at : at + BLOCK]}


def blocks_of(ranges: tuple[tuple[int, int], ...], nbytes: int) -> set[int]:
    """Also checks that the ranges are whole blocks, in order, and as few as can be."""
    last = -1
    for offset, length in ranges:
        assert offset % BLOCK == 0 and offset > last and length > 0
        assert length % BLOCK == 0 or offset + length == nbytes
        last = offset + length
    return {at for offset, length in ranges for at in range(offset, offset + length, BLOCK)}


def random_change(tensors: dict[str, torch.Tensor], chance: random.Random) -> set[str]:
    """Changes single elements of some tensors, and returns the names of these."""
    names = chance.sample([name for name, t in tensors.items() if t.numel()], chance.choice((0, 1, 3, 20)))
    for name in names:
        tensor = tensors[name]
        place = tuple(chance.randrange(size) for size in tensor.shape)
        tensor[place] = 1 - tensor[place]  # of these values another
    return set(names)


def sources(kind: str) -> tuple[dict[str, torch.Tensor], torch.dtype | None]:
    tensors = model(0)
    if kind == "strided":
        tensors = {name: torch.zeros(*t.shape, 2, dtype=t.dtype)[..., 0] for name, t in tensors.items()}
        tensors["turned"] = torch.zeros(700, 300).t()
    return tensors, torch.bfloat16 if kind == "cast" else None


@pytest.mark.parametrize("kind", ["dense", "strided", "cast"])
@pytest.mark.parametrize("threads", [1, 3])
def test_exactly_what_differs(folder: Path, new_engine: NewEngine, kind: str, threads: int) -> None:
    path, chance = folder / "m.safetensors", random.Random(threads)
    tensors, dtype = sources(kind)
    engine = new_engine(threads=threads)
    with prepare(tensors, path, allow_strided=True, dtype=dtype, engine=engine, generations=3) as prepared:
        stats = prepared.save(changed=True)
        assert stats.changed == Changed(
            first=True, tensors=stats.changed.tensors, ranges=((0, prepared.nbytes),)
        )
        assert sorted(stats.changed.tensors) == sorted(tensors)
        before = path.read_bytes()
        for _ in range(20):
            names = random_change(tensors, chance)
            changed = prepared.save(changed=True).changed
            now = path.read_bytes()
            assert changed is not None and not changed.first
            assert set(changed.tensors) == names
            assert blocks_of(changed.ranges, len(now)) == blocks_that_differ(before, now)
            assert changed.nbytes <= len(names) * 2 * BLOCK
            before = now
        assert fastshard.stats().changed == changed


def test_it_is_the_save_before_whether_that_asked_or_not(folder: Path) -> None:
    path, tensors = folder / "m.safetensors", model(0)
    with prepare(tensors, path) as prepared:
        assert prepared.save().changed is None
        tensors["scalar"].fill_(1)
        assert prepared.save().changed is None
        tensors["half"][0, 0] = 1
        future = prepared.save_async(changed=True)
        future.result()
        assert future.stats.changed.tensors == ("half",)
        assert prepared.save(changed=True).changed.ranges == ()


@pytest.mark.usefixtures("planned_in_python")
def test_a_failed_save_is_not_the_one_before(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that Python brings fail in the middle of a generation."""
    from fastshard.engine import tensors as module

    path, tensors = memory / "m.safetensors", model(1)
    monkeypatch.setattr(module, "device_number", lambda device: -2)
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False))
    with prepare(tensors, path) as prepared:
        prepared.save()
        tensors["half"][0, 0] = 5
        with monkeypatch.context() as patch:
            patch.setattr(module, "fetch", interrupted)
            with pytest.raises(KeyboardInterrupt):
                prepared.save(changed=True)
        assert prepared.save(changed=True).changed.tensors == ("half",)
        assert prepared.save(changed=True).changed.tensors == ()


@pytest.mark.parametrize("how", ["removed", "replaced", "cut"])
def test_a_published_file_that_somebody_else_has_changed(memory: Path, how: str) -> None:
    path, tensors = memory / "m.safetensors", {"t": filled((MIB,), torch.float32)}
    with prepare(tensors, path) as prepared:
        prepared.save()
        if how == "cut":
            os.truncate(path, 100)
        else:
            path.unlink()
        if how == "replaced":
            path.write_bytes(b"another")
        changed = prepared.save(changed=True).changed
        assert changed == (
            Changed(first=True, tensors=("t",), ranges=((0, prepared.nbytes),))
            if how == "cut"
            else Changed(first=False, tensors=(), ranges=())
        )


@pytest.mark.parametrize("place", ["in the file", "in staging buffers"])
def test_bytes_of_devices(sim: SimCuda, new_engine: NewEngine, memory: Path, place: str) -> None:
    if place == "in staging buffers":
        sim.fail("cuMemHostRegister", Result.NOT_SUPPORTED, nth=0)
    large = on_device(sim, noise(9 * SLOT))
    given = [*varied(sim), on_host(noise(70_000)), large, *varied(sim, 1)]
    engine = new_engine(threads=3, memory_budget=2 * MIB)
    names = [str(number) for number in range(len(given))]
    plan = FilePlan(os.fsencode(memory / "m"), b"a header", [source.view for source in given])
    prepared = engine.prepare(plan, 2)

    def save() -> Changed:
        stats = engine.submit_prepared(
            prepared, keep_alive=given, streams={}, durable=False, changed=True, fetch=None,
            tensor_names={"m": names},
        ).result()  # fmt: skip
        assert (stats.staging == "in place") == (place == "in the file")
        return stats.changed

    assert save().first
    assert save() == Changed(first=False, tensors=(), ranges=())
    before = (memory / "m").read_bytes()
    fresh = bytearray(large.array.tobytes())
    fresh[3 * SLOT + 5] ^= 1
    sim.write(large.view.data, bytes(fresh))
    changed = save()
    now = (memory / "m").read_bytes()
    assert changed.tensors == (str(given.index(large)),)
    assert blocks_of(changed.ranges, len(now)) == blocks_that_differ(before, now)
    assert len(changed.ranges) == 1
    prepared.close()
