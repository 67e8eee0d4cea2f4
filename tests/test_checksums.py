# SPDX-License-Identifier: Apache-2.0
"""CRC-32 of the tensors, taken as they pass: that of zlib, whichever way the bytes went and in whatever pieces."""

from __future__ import annotations

import os
import platform
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import BUDGET
from helpers import crc32, filled
from hypothesis import given, settings
from hypothesis import strategies as st
from simcuda import SimCuda
from test_cuda_path import on_host, varied

import fastshard
from fastshard import Engine, Options, _native, save_file, save_files, save_model, stats
from fastshard.engine.mapped import load_mapped
from fastshard.engine.plan import FilePlan
from fastshard.formats.safetensors import read_header

NewEngine = Callable[..., Engine]
MIB = 1 << 20


def varied_tensors() -> dict[str, torch.Tensor]:
    wide = filled((257, 5000), torch.float32)
    return {
        "large": filled((5 * MIB + 3,), torch.uint8),
        "odd": filled((77, 13), torch.int16, 1),
        "one": filled((1,), torch.uint8, 2),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "long runs": wide[:, :2000],
        "short runs": wide[:, 2000:2007],
        "transposed": filled((300, 500), torch.float16, 3).t(),
        **{f"small.{i}": filled((i,), torch.uint8, i) for i in range(1, 70)},
        **{
            f"folded.{i}": filled((i,), torch.uint8, i)
            for i in (255, 256, 271, 272, 319, 511, 513, 1040, 4099)
        },
    }


def recorded(path: Path) -> dict[str, int]:
    figures = stats()
    assert figures is not None
    return dict(figures.checksums[str(path)])


def found(path: Path) -> dict[str, int]:
    """Of what is in the file."""
    data = path.read_bytes()
    with path.open("rb") as file:
        header = read_header(file, len(data))
    return {t.name: zlib.crc32(data[header.nbytes + t.begin : header.nbytes + t.end]) for t in header.tensors}


@pytest.mark.parametrize("write_path", ["buffered", "mapped", "direct"])
@pytest.mark.parametrize("threads", [1, 3])
def test_whichever_way_they_go(tmp_path: Path, new_engine: NewEngine, write_path: str, threads: int) -> None:
    tensors, path = varied_tensors(), tmp_path / "m.safetensors"
    engine = new_engine(write_path=write_path, threads=threads)
    save_file(tensors, path, allow_strided=True, checksums=True, engine=engine)
    assert recorded(path) == {name: crc32(tensor) for name, tensor in tensors.items()} == found(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2])
def test_of_what_is_in_the_file_when_it_is_cast(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.randn(3000, 7), "n": torch.arange(9)}, path, dtype=dtype, checksums=True)
    assert recorded(path) == found(path)


def test_many_files_and_a_model(tmp_path: Path) -> None:
    files = {tmp_path / f"{i}.safetensors": {"a": filled((1000 * i + 1,), torch.uint8, i)} for i in range(5)}
    save_files(files, checksums=True)
    assert [recorded(path) for path in files] == [found(path) for path in files]
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Linear(5, 5))
    model[1].weight = model[0].weight
    path = tmp_path / "model.safetensors"
    save_model(model, path, checksums=True)
    assert recorded(path) == found(path) and len(recorded(path)) == 3


def test_none_unless_asked_for(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "m.safetensors")
    figures = stats()
    assert figures is not None and figures.checksums == {}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.binary(max_size=3000), cut=st.integers(0, 3000))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes, cut: int) -> None:
    path = tmp_path_factory.mktemp("crc") / "m"
    parts = {"a": data[:cut], "b": data[cut:]}
    tensors = {name: torch.tensor(list(part), dtype=torch.uint8) for name, part in parts.items()}
    save_file(tensors, path, checksums=True, engine=Options(threads=1))
    assert recorded(path) == {name: zlib.crc32(part) for name, part in parts.items()}


@pytest.mark.parametrize("write_path", ["buffered", "direct", "mapped", "registered"])
def test_from_devices(sim: SimCuda, new_engine: NewEngine, path: Path, write_path: str) -> None:
    sim.set_delay(0, 2000)
    sources = [*varied(sim), on_host(varied_tensors()["large"].numpy()), *varied(sim, 1)]
    engine = new_engine(threads=3, memory_budget=2 * BUDGET, write_path=write_path)
    plan = FilePlan(os.fsencode(path), b"a header", [source.view for source in sources])
    future = engine.submit([plan], keep_alive=sources, checksums=True)
    future.result()
    assert future.checksums() == [[zlib.crc32(source.packed) for source in sources]]


def test_a_failed_save_has_none(tmp_path: Path) -> None:
    before = save_file({"a": torch.ones(3)}, tmp_path / "m", checksums=True)
    assert before is None
    with pytest.raises(fastshard.SaveError):
        save_file({"a": torch.zeros(3)}, tmp_path / "missing" / "m", checksums=True)
    assert recorded(tmp_path / "m") == found(tmp_path / "m")


def test_of_tensors_that_lie_in_files(tmp_path: Path) -> None:
    save_file(varied_tensors(), tmp_path / "source", allow_strided=True)
    save_file(load_mapped(tmp_path / "source"), tmp_path / "m", checksums=True)
    assert recorded(tmp_path / "m") == found(tmp_path / "m") == found(tmp_path / "source")


def test_the_processors_instructions_are_known() -> None:
    """Whatever the compiler: the runtime of Zig, by which wheels are built, knows of none, so casts and checksums were
    slow in wheels."""
    with open("/proc/cpuinfo") as file:
        lines = file.read().splitlines()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    used = ["pclmulqdq", "sse4_1", "avx2", "f16c", "avx512f", "vpclmulqdq"]
    expected = [name for name in used if name in flags] if platform.machine() == "x86_64" else []
    assert _native.processor_features() == expected
