# SPDX-License-Identifier: Apache-2.0
"""Saves by every way out of a device: of a real GPU, of the simulated driver, and of the host.

Small, so that all of it can run under compute-sanitizer. Many small tensors, strided ones, casts and large ones
go into a prepared file, into registered windows, past the page cache, and into several files at once. They ask
for the bytes, and that nothing was refused.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import assert_same
from helpers import names
from test_cuda_path import SimTensor, Uploader, cast_bytes, current_streams, reference_bytes, to, upload

import fastshard
from fastshard import Stats, _native
from fastshard.engine.engine import Engine

__all__ = ["current_streams", "upload"]  # fixtures

MIB = 1 << 20
KERNELS = _native.kernels_compiled_in()
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Tensors = dict[str, torch.Tensor]
NewEngine = Callable[..., Engine]


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 9).to(dtype)


def small(seed: int) -> Tensors:
    """Of all sizes and types in turn, so that their places in the file are odd, too."""
    return {str(i): numbers(seed + i, i % 50 + 1, dtype=FLOATS[i % 3]) for i in range(700)}


def strided(seed: int) -> Tensors:
    base = numbers(seed, 96, 200)
    return {
        "left": base[:, :100],
        "right": base[:, 100:],
        "transposed": numbers(seed + 1, 300, 171, dtype=torch.float16).t(),
        "columns": numbers(seed + 2, 512, 2048, dtype=torch.bfloat16)[:, :1024],
        "every other": numbers(seed + 3, 20_001, dtype=torch.bfloat16)[::2],
        "channels last": numbers(seed + 4, 6, 3, 3, 70, dtype=torch.float16).permute(0, 3, 1, 2),
        "plain": numbers(seed + 5, 10),
    }


def large(seed: int) -> Tensors:
    """More than an engine of the tests has slots for."""
    return {str(i): numbers(seed + i, 3 * MIB // 8 + i) for i in range(3)}


def everything(seed: int) -> Tensors:
    kinds = {"small": small, "strided": strided, "large": large}
    return {f"{kind}.{name}": t for kind, make in kinds.items() for name, t in make(seed).items()}


KINDS: dict[str, tuple[Callable[[int], Tensors], torch.dtype | None]] = {
    "small": (small, None),
    "strided": (strided, None),
    "large": (large, None),
    "cast": (everything, torch.bfloat16),
    "cast to fp8": (strided, torch.float8_e4m3fn),
}


def expected(tensors: Tensors, dtype: torch.dtype | None) -> bytes:
    return cast_bytes(tensors, dtype) if dtype else reference_bytes(tensors)


class Place:
    """Where the tensors of a save are: in the host's memory, or the simulator's, or a GPU's."""

    def __init__(self, device: torch.device | None, upload: Uploader | None = None) -> None:
        self.device, self._upload = device, upload

    def take(self, tensors: Tensors) -> Tensors:
        """Copies that keep strides and shared storages."""
        if self._upload:
            return self._upload.all(tensors)
        assert self.device
        return to(tensors, self.device)

    def put(self, there: Tensors, fresh: Tensors, *, enqueued: bool = False) -> None:
        """Other values into what ``take`` returned, as a step of training does; ``enqueued`` on the current stream,
        which is the legacy one, as torch's default is."""
        for name, tensor in there.items():
            if not self._upload:
                tensor.copy_(fresh[name])
                continue
            _, address = SimTensor.places[tensor.untyped_storage().data_ptr()]
            storage = fresh[name].untyped_storage()
            data = ctypes.string_at(storage.data_ptr(), storage.nbytes())
            if enqueued:
                self._upload.sim.enqueue_write(0, address, data)
            else:
                self._upload.sim.write(address, data)

    def check(self, stats: Stats) -> None:
        """Where all ways are open none was left; without compiled kernels one is not."""
        assert stats.fallbacks == () or not KERNELS
        assert stats.staging != "pageable" or self.is_host

    @property
    def is_host(self) -> bool:
        return self.device is not None and self.device.type == "cpu"


@pytest.fixture(params=["host", "simulated", pytest.param("real", marks=pytest.mark.real_gpu)])
def place(request: pytest.FixtureRequest) -> Place:
    if request.param == "host":
        return Place(torch.device("cpu"))
    if request.param == "real":
        return Place(request.getfixturevalue("real_cuda"))
    request.getfixturevalue("current_streams")
    request.getfixturevalue("sim").set_delay(0, 100)  # there are many pieces
    return Place(None, request.getfixturevalue("upload"))


@pytest.fixture
def engine(place: Place, new_engine: NewEngine) -> NewEngine:
    """After ``place``: what the simulator has looks for leaks when the engines are closed."""
    return new_engine


@pytest.mark.parametrize("kind", KINDS)
def test_real_prepared(place: Place, engine: NewEngine, memory: Path, kind: str) -> None:
    """More saves than there are generations, each with other values at the same addresses."""
    make, dtype = KINDS[kind]
    tensors, path = place.take(make(0)), memory / "m"
    with fastshard.prepare(tensors, path, allow_strided=True, dtype=dtype, engine=engine()) as prepared:
        for seed in (1000, 2000, 3000):
            fresh = make(seed)
            place.put(tensors, fresh)
            stats = prepared.save()
            assert_same(path.read_bytes(), expected(fresh, dtype))
            assert stats.write_path == "standing"
            place.check(stats)
    assert names(memory) == ["m"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write_path", ["registered", "mapped", "buffered"])
def test_real_first_save_into_memory(
    place: Place, engine: NewEngine, memory: Path, kind: str, write_path: str
) -> None:
    make, dtype = KINDS[kind]
    saver = engine(write_path=write_path)
    fastshard.save_file(place.take(make(0)), memory / "m", allow_strided=True, dtype=dtype, engine=saver)
    assert_same((memory / "m").read_bytes(), expected(make(0), dtype))
    stats = fastshard.stats()
    assert stats is not None and stats.write_path == write_path
    place.check(stats)
    assert names(memory) == ["m"]


@pytest.mark.parametrize("kind", KINDS)
def test_real_direct(place: Place, engine: NewEngine, tmp_path: Path, kind: str) -> None:
    """Past the page cache and durable; where that is refused it is said, and the bytes are the same."""
    make, dtype = KINDS[kind]
    saver = engine(write_path="direct")
    path = tmp_path / "m"
    fastshard.save_file(
        place.take(make(0)), path, allow_strided=True, dtype=dtype, durable=True, engine=saver
    )
    assert_same(path.read_bytes(), expected(make(0), dtype))
    stats = fastshard.stats()
    assert stats is not None
    assert stats.write_path == "direct" or any("direct" in text for text in stats.fallbacks)
    assert names(tmp_path) == ["m"]


@pytest.mark.parametrize("kind", ["strided", "cast"])
def test_real_many_files_at_once(place: Place, engine: NewEngine, memory: Path, kind: str) -> None:
    """Several writers share a device's streams, its scratch and the staging memory."""
    make, dtype = KINDS[kind]
    made = {memory / str(i): make(100 * i) for i in range(4)}
    files = {path: place.take(tensors) for path, tensors in made.items()}
    fastshard.save_files(
        files, allow_strided=True, dtype=dtype, engine=engine(threads=4, memory_budget=4 * MIB)
    )
    for path, tensors in made.items():
        assert_same(path.read_bytes(), expected(tensors, dtype))
    stats = fastshard.stats()
    assert stats is not None
    place.check(stats)


@pytest.mark.parametrize("kind", KINDS)
def test_real_changes_behind_an_event(place: Place, engine: NewEngine, tmp_path: Path, kind: str) -> None:
    """Steps are enqueued while the snapshots before them are still being copied; each file is of its own step."""
    make, dtype = KINDS[kind]
    saver = engine(memory_budget=16 * MIB)
    tensors, futures = place.take(make(0)), []
    for seed in (0, 1000, 2000):
        if seed:
            place.put(tensors, make(seed), enqueued=True)
        path = tmp_path / str(seed)
        future = fastshard.save_file_async(
            tensors, path, allow_strided=True, dtype=dtype, engine=saver, wait_staged=False
        )
        future.staged_event().wait()
        futures.append((seed, future))
    for seed, future in futures:
        stats = future.result()
        assert_same((tmp_path / str(seed)).read_bytes(), expected(make(seed), dtype))
        assert stats.snapshot == "copy"
        place.check(stats)
