# SPDX-License-Identifier: Apache-2.0
"""Tensors that lie in files: values, private changes, memory while they are saved, files that were cut."""

from __future__ import annotations

import gc
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import DTYPES, crc32, filled, names, open_descriptors, run, same
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save_file as reference_save_file

import fastshard
from fastshard import Engine, Options, SaveError, _native
from fastshard.engine.mapped import MappedFile, load_mapped, same_bytes
from fastshard.formats.safetensors import CODES


def several(seed: int = 0) -> dict[str, torch.Tensor]:
    """More than one chunk, many small tensors, nothing aligned to pages."""
    tensors = {f"small.{i:03}": filled((i + 1,), seed=seed + i) for i in range(200)}
    tensors["large"] = filled((2500, 1001), seed=seed)
    tensors["empty"] = torch.empty(0, 3)
    tensors["scalar"] = filled((), torch.float64, seed=seed)
    return tensors


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    reference_save_file(several(), path)
    return path


def mappings() -> int:
    """Of files called source, in this process."""
    return Path("/proc/self/maps").read_text().count("source.safetensors")


def test_tensors_of_every_dtype(tmp_path: Path) -> None:
    path = tmp_path / "all.safetensors"
    fastshard.save_file({f"t.{dtype}": filled((6, 4), dtype) for dtype in DTYPES}, path)
    loaded = load_mapped(path)
    assert loaded.keys() == {f"t.{dtype}" for dtype in DTYPES}
    for dtype in DTYPES:
        tensor = loaded[f"t.{dtype}"]
        assert tensor.dtype == dtype and tensor.shape == (6, 4)
        assert crc32(tensor) == crc32(filled((6, 4), dtype))


def test_each_tensor_has_a_storage_of_its_own_and_the_mapping_goes_with_the_last(source: Path) -> None:
    gc.collect()
    before = mappings()
    first, second = load_mapped(source), load_mapped(source)
    assert mappings() == before + 2, "one file, mapped for the tensors and for the engine"
    storages = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in first.values()}
    assert len(storages) == len(first)
    assert first["large"].data_ptr() == second["large"].data_ptr()
    assert _native.SourceFile.at(first["large"].data_ptr()) == os.fsencode(source)
    assert _native.SourceFile.at(torch.ones(1).data_ptr()) is None
    kept = second["small.199"]
    del first, second
    assert mappings() == before + 2
    assert torch.equal(kept, several()["small.199"])
    del kept
    assert mappings() == before


def test_no_descriptor_is_kept(source: Path) -> None:
    before = open_descriptors()
    loaded = load_mapped(source)
    assert open_descriptors() == before and loaded


PATHS: dict[str, Callable[[dict[str, torch.Tensor], Path, Engine], None]] = {
    "save_file": lambda tensors, path, engine: fastshard.save_file(tensors, path, engine=engine),
    "memory": lambda tensors, path, engine: path.write_bytes(fastshard.save(tensors, engine=engine)) and None,
    "prepared": lambda tensors, path, engine: fastshard.prepare(tensors, path, engine=engine).save() and None,
}


@pytest.mark.parametrize("write_path", ["buffered", "direct", "mapped"])
@pytest.mark.parametrize("how", PATHS)
def test_every_write_path(source: Path, tmp_path: Path, how: str, write_path: str) -> None:
    out = tmp_path / "out.safetensors"
    with Engine(Options(write_path=write_path)) as engine:
        PATHS[how](load_mapped(source), out, engine)
    assert out.read_bytes() == source.read_bytes()


def test_over_the_file_it_lies_in(source: Path) -> None:
    before = source.read_bytes()
    loaded = load_mapped(source)
    fastshard.save_file(loaded, source)
    fastshard.save_file(loaded, source)
    assert source.read_bytes() == before
    assert same(source, several())
    assert names(source.parent) == [source.name]


def test_a_replaced_file_is_mapped_anew(source: Path) -> None:
    old = load_mapped(source)
    fastshard.save_file(several(seed=5), source)
    assert torch.equal(load_mapped(source)["large"], several(seed=5)["large"])
    assert torch.equal(old["large"], several()["large"])


def test_checksums_casts_and_strides(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    loaded = load_mapped(source)
    fastshard.save_file(loaded, out, checksums=True)
    stats = fastshard.stats()
    assert stats is not None
    assert stats.checksums[str(out)] == {name: crc32(tensor) for name, tensor in several().items()}

    fastshard.save_file(loaded, out, dtype=torch.bfloat16)
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in several().items()}
    assert {n: crc32(t) for n, t in load_file(out).items()} == {n: crc32(t) for n, t in expected.items()}

    large, plain = loaded["large"], several()["large"]
    views: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "columns": lambda t: t[:, 300:900],
        "few columns": lambda t: t[:, 7:9],
        "rows": lambda t: t[3:2000],
        "long rows, far apart": lambda t: t[::400],
        "transposed": lambda t: t.t(),
    }
    for write_path in ("buffered", "direct", "mapped"):
        for cast in (None, torch.float16):
            for view in views.values():
                fastshard.save_file(
                    {"v": view(large)},
                    out,
                    allow_strided=True,
                    dtype=cast,
                    engine=Options(write_path=write_path),
                )
                assert crc32(load_file(out)["v"]) == crc32(view(plain).to(cast or plain.dtype))


@pytest.mark.parametrize("prepared", [False, True])
def test_what_was_changed_is_saved_and_stays_changed(source: Path, tmp_path: Path, prepared: bool) -> None:
    before = source.read_bytes()
    loaded, expected = load_mapped(source), several()
    out = tmp_path / "out.safetensors"
    saver = fastshard.prepare(loaded, out) if prepared else None
    for name in ("large", "small.100"):
        for tensors in (loaded, expected):
            tensors[name].view(-1)[5:7] = 4.5
        if saver:
            saver.save()
        else:
            fastshard.save_file(loaded, out)
        assert same(out, expected)
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    if saver:
        saver.close()
    assert source.read_bytes() == before


def test_comparing(source: Path) -> None:
    loaded, plain = load_mapped(source), several()
    assert same_bytes(loaded["large"], plain["large"]) and same_bytes(plain["large"], loaded["large"])
    loaded["large"][-1, -1] = -1
    assert not same_bytes(loaded["large"], plain["large"])


@pytest.fixture(scope="module")
def half_a_gib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tensor of it, and some small ones; a hole but for the last page of the tensor."""
    path = tmp_path_factory.mktemp("large") / "source.safetensors"
    nbytes = (512 << 20) + 12
    header = {
        "w": {"dtype": "F32", "shape": [nbytes // 4], "data_offsets": [0, nbytes]},
        "x": {"dtype": "U8", "shape": [3], "data_offsets": [nbytes, nbytes + 3]},
    }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(nbytes - 4, os.SEEK_CUR)
        file.write(struct.pack("<f", 2.5) + b"abc")
    return path


def test_memory_is_bounded(half_a_gib: Path, tmp_path: Path) -> None:
    code = """
        import json
        from fastshard.engine.mapped import load_mapped

        def kib(field):
            lines = open("/proc/self/status").read().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

        def peak(act):
            open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again from here
            before = kib("VmRSS")
            act()
            return kib("VmHWM") - before >> 10

        tensors = load_mapped(sys.argv[1])
        columns = {"w": tensors["w"][:-3].view(-1, 1 << 14)[:, 5000:10000]}
        disk, memory = sys.argv[2:]
        print(json.dumps({
            "plain": peak(lambda: save_file(tensors, disk)),
            "cast": peak(lambda: save_file(tensors, memory, dtype=torch.float8_e5m2, checksums=True)),
            "direct": peak(lambda: save_file(columns, disk + ".2", allow_strided=True, engine=Options(write_path="direct"))),
            "mapped": peak(lambda: save_file(columns, memory, allow_strided=True, engine=Options(write_path="mapped", threads=8))),
            "looked at": peak(tensors["w"].sum),
        }))
        """
    out = tmp_path / "out.safetensors"
    in_memory = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) / f"fastshard-{os.getpid()}"
    try:
        done = run(code, half_a_gib, out, in_memory)
    finally:
        in_memory.unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    assert peaks.pop("looked at") > 500, "the measure sees what a tensor takes that is read"
    assert max(peaks.values()) < 150, f"MiB: {peaks}"
    with out.open("rb") as saved:
        length = int.from_bytes(saved.read(8), "little")
        assert json.loads(saved.read(length)).keys() == {"w", "x"}
        assert not any(saved.read(1 << 20))
        saved.seek(-7, os.SEEK_END)
        assert saved.read() == struct.pack("<f", 2.5) + b"abc"


@pytest.mark.skipif(
    tuple(map(int, os.uname().release.split(".")[:2])) < (5, 14),
    reason="MADV_POPULATE_READ came with Linux 5.14",
)
def test_a_file_that_was_cut(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    fastshard.save_file({"old": torch.ones(1)}, out)
    before = out.read_bytes()
    code = """
        from fastshard.engine.mapped import load_mapped, same_bytes
        source, out = sys.argv[1:]
        large = load_mapped(source)["large"]
        copy = large.clone()
        os.truncate(source, 4 << 20)
        views = {"whole": large, "cast": large, "strided": large[:, 5:400], "transposed": large.t()}

        def tried(act):
            try:
                act()
            except OSError as error:
                print(type(error).__name__, error.errno, error.filename)

        for write_path in "buffered", "direct", "mapped":
            for name, view in views.items():
                dtype = torch.float16 if name == "cast" else None
                options = Options(write_path=write_path)
                tried(lambda: save_file({"x": view}, out, allow_strided=True, dtype=dtype, engine=options))
        tried(lambda: save({"x": large}))
        tried(lambda: same_bytes(large, copy))
        """
    done = run(code, source, out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"SaveError 5 {source}"] * 13 + [f"OSError 5 {source}"]
    assert out.read_bytes() == before
    assert names(tmp_path) == ["out.safetensors", "source.safetensors"]


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}


@pytest.mark.parametrize(
    "stored, text",
    [
        (entry(dtype="F6_E2M3", shape=[4, 8]), "no dtype for F6_E2M3"),
        (entry(dtype="Q9"), "tensor 'w': no dtype 'Q9' is known"),
        (entry(shape=[2, 2]), "not the size of F32"),
        (entry(shape=[-2, -3]), "whole number"),
        (entry(shape=[2.0, 3]), "whole number"),
        (entry(shape=["2", 3]), "whole number"),
        (entry(shape=[3], data_offsets=[0, 12]), "accounts for"),
        (entry(shape=[5], data_offsets=[4, 24]), "expected at 0"),
        (entry(data_offsets=None), "not that of a safetensors file"),
        (entry(dtype="F4", shape=[48]), None),
        (entry(dtype="F4", shape=[47]), "not the size"),
        (entry(dtype="F4", shape=[16, 3]), "splits a byte"),
        (entry(shape=[2**63, 0], data_offsets=[0, 0]), "accounts for"),
    ],
)
def test_headers_that_do_not_hold(tmp_path: Path, stored: dict[str, object], text: str | None) -> None:
    path = tmp_path / "bad.safetensors"
    head = json.dumps({"w": stored}).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(24))
    if text is None:
        if "F4" in {CODES.get(str(dtype).removeprefix("torch.")) for dtype in DTYPES}:
            assert load_mapped(path)["w"].shape == (24,)
        return
    with pytest.raises(SafetensorError, match=text) as caught:
        load_mapped(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("shape", [[0, 2**40, 2**40], [2**63, 0, 1], [0, 2**64 - 1]])
def test_shapes_that_torch_does_not_have(tmp_path: Path, shape: list[int]) -> None:
    """safetensors takes such a header."""
    path = tmp_path / "bad.safetensors"
    entry_of_it = {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}
    head = json.dumps({"w": entry_of_it}).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head)
    try:
        loaded = load_mapped(path)
    except SafetensorError as error:
        assert "'w'" in str(error)
    else:
        assert list(loaded["w"].shape) == shape


def test_files_that_cannot_be_mapped(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        MappedFile(tmp_path / "absent")
    with pytest.raises(SafetensorError, match=r"does not contain tensor nothing.*source\.safetensors"):
        MappedFile(source).tensor("nothing")
    (tmp_path / "empty").touch()
    with pytest.raises(SafetensorError, match="too few for a header.*empty"):
        load_mapped(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"source\.safetensors' has \d+ bytes: no torch.float32"):
        MappedFile(source).view(torch.float32, (1 << 40,))
    with pytest.raises(ValueError, match="no torch.float32"):
        MappedFile(source).view(torch.float32, (1,), -4)
    os.mkfifo(tmp_path / "pipe")
    for irregular in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match=f"{irregular.name}' is not a regular"):
            MappedFile(irregular)
    assert issubclass(SaveError, OSError)
