# SPDX-License-Identifier: Apache-2.0
"""Which tensors of two checkpoints differ."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DTYPES, FLOAT4, filled, names

import fastshard
from fastshard.cli import command as cli
from fastshard.formats.hf_index import read_stored
from fastshard.formats.manifest import FileEntry, Manifest, TensorEntry
from fastshard.formats.naming import MANIFEST_NAME
from fastshard.tools import diff as diff_module
from fastshard.tools.diff import BYTES, CRC32, DTYPE, ONLY_A, ONLY_B, SAME_FILE, SHA256, SHAPE

STATE = {f"layers.{i}.weight": filled((40, 30), seed=i) for i in range(8)} | {
    "empty": torch.empty(0, 5),
    "scalar": torch.tensor(3),
}


def saved(folder: Path, state: dict[str, torch.Tensor], max_shard_size: int | str = "5GB") -> Path:
    folder.mkdir(parents=True)
    fastshard.save_torch_state_dict(state, folder, max_shard_size=max_shard_size)
    return folder


def changed(name: str, index: tuple[int, ...], value: float) -> dict[str, torch.Tensor]:
    state = dict(STATE)
    state[name] = STATE[name].clone()
    state[name][index] = value
    return state


def with_manifest(folder: Path) -> Path:
    files = {}
    for name in names(folder):
        if name.endswith(".safetensors"):
            stored, data = read_stored(str(folder / name)), (folder / name).read_bytes()
            tensors = {}
            for tensor in stored.header.tensors:
                begin, nbytes = stored.header.nbytes + tensor.begin, tensor.end - tensor.begin
                crc32 = zlib.crc32(data[begin : begin + nbytes])
                tensors[tensor.name] = TensorEntry(begin, nbytes, crc32)
            files[name] = FileEntry(len(data), zlib.crc32(data[: stored.header.nbytes]), tensors)
        else:
            data = (folder / name).read_bytes()
            files[name] = FileEntry(len(data), zlib.crc32(data))
    (folder / MANIFEST_NAME).write_text(Manifest(files=files).to_json())
    return folder


def told(found: Any) -> dict[str, str]:
    return {difference.name: difference.kind for difference in found.differences}


def test_the_same_tensors_in_other_files_are_the_same(tmp_path: Path) -> None:
    one, other = saved(tmp_path / "a", STATE), saved(tmp_path / "b", STATE, 10_000)
    assert len(names(other)) > 4
    found = fastshard.diff_checkpoints(one, other)
    assert found.same and found.tensors == len(STATE) and found.equal == {BYTES: len(STATE)}
    found = fastshard.diff_checkpoints(other / "model.safetensors.index.json", one / "model.safetensors")
    assert found.same and found.equal == {BYTES: len(STATE)}


def test_names_dtypes_shapes_and_bytes_that_differ_are_told(tmp_path: Path) -> None:
    state = changed("layers.3.weight", (39, 29), -7.0)
    state["new"] = state.pop("layers.0.weight")
    state["layers.1.weight"] = STATE["layers.1.weight"].double()
    state["layers.2.weight"] = STATE["layers.2.weight"].view(30, 40)
    found = fastshard.diff_checkpoints(saved(tmp_path / "a", STATE), saved(tmp_path / "b", state))
    assert told(found) == {
        "layers.0.weight": ONLY_A,
        "new": ONLY_B,
        "layers.1.weight": DTYPE,
        "layers.2.weight": SHAPE,
        "layers.3.weight": BYTES,
    }
    assert not found.same and found.tensors == len(STATE) - 1 and found.equal == {BYTES: len(STATE) - 4}
    [shape] = [difference for difference in found.differences if difference.kind == SHAPE]
    assert (shape.a, shape.b) == ("F32 [40, 30]", "F32 [30, 40]")


@pytest.mark.parametrize("at", [0, 1, 4095, (1 << 20) - 1, (1 << 20), (5 << 20) + 3, (9 << 20) - 1])
def test_one_changed_byte_is_found_wherever_it_lies(tmp_path: Path, at: int, monkeypatch: Any) -> None:
    """Also where stretches and windows meet."""
    monkeypatch.setattr(diff_module, "_WINDOW_NBYTES", 1 << 18)
    monkeypatch.setattr(diff_module, "_STRETCH_NBYTES", 2 << 20)
    monkeypatch.setattr(diff_module, "_WINDOW_ELEMENTS", 1 << 15)
    big = torch.zeros(9 << 20, dtype=torch.uint8)
    rest = {f"small.{i}": filled((100,), seed=i) for i in range(20)}
    fastshard.save_file({"big": big, **rest}, tmp_path / "a.safetensors")
    big[at] = 1
    fastshard.save_file({"big": big, **rest}, tmp_path / "b.safetensors")
    found = fastshard.diff_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert told(found) == {"big": BYTES} and found.equal == {BYTES: 20}
    [difference] = fastshard.diff_checkpoints(found.a, found.b, max_abs=True).differences
    assert (difference.differing, difference.max_abs, difference.at) == (1, 1.0, [at])


def test_where_manifests_stand_on_both_sides_no_tensor_is_read(tmp_path: Path, monkeypatch: Any) -> None:
    one = with_manifest(saved(tmp_path / "a", STATE))
    state = changed("layers.3.weight", (0, 0), -7.0)
    other = with_manifest(saved(tmp_path / "b", state, 10_000))
    with monkeypatch.context() as patch:
        patch.setattr(diff_module.os, "preadv", lambda *_: pytest.fail("a tensor is read"))
        found = fastshard.diff_checkpoints(one, other)
    assert told(found) == {"layers.3.weight": CRC32} and found.read_nbytes == 0
    assert found.equal == {CRC32: len(STATE) - 2, BYTES: 1}  # one is empty
    [difference] = fastshard.diff_checkpoints(one, other, max_abs=True).differences
    assert (difference.kind, difference.differing, difference.at) == (CRC32, 1, [0, 0])
    found = fastshard.diff_checkpoints(one, other, digests=False)
    assert told(found) == {"layers.3.weight": BYTES} and found.equal == {BYTES: len(STATE) - 1}


def test_files_of_the_same_sha256_are_not_read(tmp_path: Path, monkeypatch: Any) -> None:
    """As sha256sum itself writes the sums, of folders within, too."""
    state = changed("layers.3.weight", (0, 0), -7.0)
    for side, tensors in (("a", STATE), ("b", state)):
        inner = saved(tmp_path / side / "inner", tensors, 10_000)
        (inner / "same.txt").write_text("same")
        made = subprocess.run(
            "sha256sum inner/*", shell=True, cwd=inner.parent, check=True, capture_output=True
        )
        (inner.parent / "SHA256SUMS").write_bytes(made.stdout)
    read = []
    plain = os.preadv
    monkeypatch.setattr(diff_module.os, "preadv", lambda *given: read.append(given[2]) or plain(*given))
    found = fastshard.diff_checkpoints(tmp_path / "a", tmp_path / "b")
    assert told(found) == {"inner/layers.3.weight": BYTES} and found.files == {}
    assert found.equal[SHA256] > 5 and len(read) == 2 * found.equal[BYTES]  # one is empty, and one differs


def test_a_manifest_of_other_files_is_not_believed(tmp_path: Path) -> None:
    """One that was left lying when files of another layout took their names."""
    one, other = (with_manifest(saved(tmp_path / name, STATE)) for name in ("a", "b"))
    fastshard.save_file(
        changed("layers.3.weight", (0, 0), -7.0) | {"more": torch.ones(1)}, other / "model.safetensors"
    )
    found = fastshard.diff_checkpoints(one, other)
    assert told(found) == {"layers.3.weight": BYTES, "more": ONLY_B}
    (other / MANIFEST_NAME).write_text("{")
    assert told(fastshard.diff_checkpoints(one, other)) == told(found)


def test_files_that_are_linked_are_not_read(tmp_path: Path, monkeypatch: Any) -> None:
    one = saved(tmp_path / "a", STATE, 10_000)
    shutil.copytree(one, tmp_path / "b", copy_function=os.link)
    monkeypatch.setattr(diff_module.os, "preadv", lambda *_: pytest.fail("a tensor is read"))
    found = fastshard.diff_checkpoints(one, tmp_path / "b")
    assert found.same and found.equal == {SAME_FILE: len(STATE)}


def test_other_files_of_folders_are_compared(tmp_path: Path) -> None:
    one, other = saved(tmp_path / "a", STATE), saved(tmp_path / "b", STATE, 10_000)
    for folder, text in ((one, "{1}"), (other, "{2}")):
        (folder / "config.json").write_text(text)
        (folder / "same.txt").write_text("same")
        (folder / "longer.txt").write_text(text * len(text) * len(folder.name))
        (folder / f"only.{folder.name}").write_text("")
    (one / "longer.txt").write_text("long")
    found = fastshard.diff_checkpoints(one, other)
    assert found.files == {"config.json": BYTES, "longer.txt": BYTES, "only.a": ONLY_A, "only.b": ONLY_B}
    assert not found.same and fastshard.diff_checkpoints(one, other, weights_only=True).same


def test_folders_of_folders_and_names_in_several_files(tmp_path: Path) -> None:
    """As diffusers has them, and variants of a model."""
    for side, value in (("a", 1.0), ("b", 2.0)):
        for part in ("unet", "vae"):
            (tmp_path / side / part).mkdir(parents=True)
            tensors = {"w": torch.full((3,), value if part == "vae" else 0.0)}
            fastshard.save_file(tensors, tmp_path / side / part / "model.safetensors")
            fastshard.save_file(tensors, tmp_path / side / part / "model.fp16.safetensors", dtype="fp16")
    found = fastshard.diff_checkpoints(tmp_path / "a", tmp_path / "b")
    assert told(found) == dict.fromkeys(("vae/model.safetensors: w", "vae/model.fp16.safetensors: w"), BYTES)
    assert found.tensors == 4 and found.equal == {BYTES: 2}


def test_other_files_are_told_by_manifests_and_links_too(tmp_path: Path, monkeypatch: Any) -> None:
    one, other = (saved(tmp_path / name, STATE) for name in ("a", "b"))
    for name, text in (("same", "1"), ("other", "2"), ("longer", "2" * 20)):
        (one / name).write_text("1")
        (other / name).write_text(text)
    for folder in (one, other):
        os.link(one / "same", folder / "linked")
    for folder in (one, other):
        with_manifest(folder)
    expected = {"longer": BYTES, "other": BYTES}
    assert fastshard.diff_checkpoints(one, other, digests=False).files == expected
    monkeypatch.setattr(diff_module.os, "preadv", lambda *_: pytest.fail("a file is read"))
    assert fastshard.diff_checkpoints(one, other).files == expected | {"other": CRC32}


# How far apart ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != FLOAT4], ids=str)
def test_values_of_all_dtypes_are_compared(tmp_path: Path, dtype: torch.dtype, monkeypatch: Any) -> None:
    monkeypatch.setattr(diff_module, "_WINDOW_ELEMENTS", 64)
    one = filled((20, 30), dtype)
    if dtype.is_floating_point:
        one = torch.ones(20, 30).to(dtype)
    other = one.clone()
    raw = other.view(-1).view(torch.uint8)
    raw[7 * dtype.itemsize - 1] ^= 1
    raw[421 * dtype.itemsize - 1] ^= 1
    fastshard.save_file({"w": one}, tmp_path / "a.safetensors")
    fastshard.save_file({"w": other}, tmp_path / "b.safetensors")
    [found] = fastshard.diff_checkpoints(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", max_abs=True
    ).differences
    wide = [t.to(torch.complex128 if dtype.is_complex else torch.float64) for t in (one, other)]
    distance = (wide[0] - wide[1]).abs()
    assert (found.elements, found.differing, found.nans) == (600, 2, 0)
    assert found.max_abs == distance.max().item()
    assert found.at == [int(n) for n in (distance == distance.max()).nonzero()[0]]


@pytest.mark.skipif(FLOAT4 is None, reason="this torch has no float4")
def test_values_of_float4(tmp_path: Path) -> None:
    one = torch.tensor([[0x00, 0x21]], dtype=torch.uint8)
    other = torch.tensor([[0x80, 0x2F]], dtype=torch.uint8)  # 0, -0; and 0.5, -6
    for name, tensor in (("a", one), ("b", other)):
        fastshard.save_file({"w": tensor.view(FLOAT4)}, tmp_path / f"{name}.safetensors")
    [found] = fastshard.diff_checkpoints(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", max_abs=True
    ).differences
    assert (found.elements, found.differing, found.max_abs, found.at) == (4, 1, 6.5, [0, 2])


def test_a_cast_is_compared_by_values(tmp_path: Path) -> None:
    state = {"w": torch.randn(100, generator=torch.Generator().manual_seed(0)), "i": torch.arange(5)}
    fastshard.save_file(state, tmp_path / "a.safetensors")
    fastshard.save_file(state, tmp_path / "b.safetensors", dtype="bf16")
    [found] = fastshard.diff_checkpoints(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", max_abs=True
    ).differences
    cast = (state["w"].double() - state["w"].bfloat16().double()).abs()
    assert (found.kind, found.max_abs) == (DTYPE, cast.max().item())
    assert found.differing == int((cast > 0).sum())


def test_nan_infinities_and_large_integers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    nan, inf = float("nan"), float("inf")
    one = {"f": torch.tensor([nan, nan, inf, inf, 0.0, 1.0]), "i": torch.tensor([2**62, 2**62 + 2])}
    other = {"f": torch.tensor([nan, 1.0, inf, -inf, -0.0, 1.0]), "i": torch.tensor([2**62, 2**62 + 1])}
    paths = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    for path, tensors in zip(paths, (one, other), strict=True):
        fastshard.save_file(tensors, path)
    floats, integers = fastshard.diff_checkpoints(*paths, max_abs=True).differences
    assert (floats.differing, floats.nans, floats.max_abs, floats.at) == (2, 1, inf, [3])
    assert (integers.differing, integers.max_abs, integers.at) == (1, 1.0, [1])
    assert cli.main(["diff", *paths, "--max-abs", "--json"]) == 1
    told = json.loads(capfd.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert [difference["max_abs"] for difference in told["differences"]] == ["inf", 1.0]


# The command -----------------------------------------------------------------------------------------------


def test_exit_status_is_that_of_diff(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one = saved(tmp_path / "a", STATE)
    other = saved(tmp_path / "b", changed("layers.3.weight", (1, 2), -7.0))
    assert cli.main(["diff", str(one), str(one)]) == 0
    assert (
        capfd.readouterr().out
        == "0 tensors differ, 10 are equal (10 in the same file); 0 B of each side read\n"
    )
    assert cli.main(["diff", str(one), str(other)]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[1].split()[0] == "layers.3.weight" and lines[1].endswith("bytes")
    assert lines[-1].startswith("1 tensor differs, 9 are equal (9 by bytes)")
    assert cli.main(["diff", str(one), str(other), "--max-abs"]) == 1
    assert "1 of 1200 elements, at most" in capfd.readouterr().out
    assert cli.main(["diff", str(one), str(other), "--quiet"]) == 1
    assert capfd.readouterr() == ("", "")
    assert cli.main(["diff", str(one), str(other), "--json"]) == 1
    found = json.loads(capfd.readouterr().out)
    assert not found["same"] and [d["name"] for d in found["differences"]] == ["layers.3.weight"]
    data = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(data[:-1])
    for trouble in (tmp_path / "nowhere", other, Path(__file__)):
        assert cli.main(["diff", str(one), str(trouble)]) == 2
        assert str(trouble) in capfd.readouterr().err


def test_neither_command_needs_torch(tmp_path: Path) -> None:
    one = saved(tmp_path / "checkpoint-1", STATE)
    script = f"""
import sys
sys.modules["torch"] = None
from fastshard.cli import main
assert main(["diff", {str(one)!r}, {str(one)!r}]) == 0
assert main(["checkpoints", {str(tmp_path)!r}]) == 0
assert main(["diff", "--max-abs", {str(one)!r}, {str(one)!r}]) == 2
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300, cwd=tmp_path, capture_output=True)
