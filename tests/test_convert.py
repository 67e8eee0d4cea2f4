# SPDX-License-Identifier: Apache-2.0
"""`fastshard convert`: checkpoints of torch.save become safetensors files, or the reason why not is said."""

from __future__ import annotations

import errno
import io
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import DTYPES, FLOAT4, filled, names, saved_by_torch
from safetensors import safe_open
from safetensors.torch import load_file, save_model

from fastshard.cli import command as cli
from fastshard.formats import file_kinds as whatis
from fastshard.formats import hf_index as checkpoint
from fastshard.tools import convert

STATE = {
    "embed": filled((50, 8)),
    "half": filled((7,), torch.bfloat16, 1),
    "count": torch.tensor(5),
    "turned": filled((6, 9), torch.int16, 2).t(),
    "part": filled((100,))[10:20],
    "empty": torch.empty(0, 3),
}


def converted(
    tmp_path: Path, obj: object, *options: str, old_format: bool = False
) -> dict[str, torch.Tensor]:
    torch.save(obj, tmp_path / "m.pt", _use_new_zipfile_serialization=not old_format)
    assert cli.main(["convert", str(tmp_path / "m.pt"), str(tmp_path / "m.safetensors"), *options]) == 0
    return load_file(tmp_path / "m.safetensors")


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], obj: object, *options: str) -> str:
    tmp_path.mkdir(exist_ok=True)
    torch.save(obj, tmp_path / "m.pt")
    assert cli.main(["convert", str(tmp_path / "m.pt"), str(tmp_path / "m.safetensors"), *options]) == 1
    assert names(tmp_path) == ["m.pt"]
    shown = capsys.readouterr()
    assert shown.out == ""
    prefix = f"fastshard: {tmp_path / 'm.pt'}: "
    assert shown.err.startswith(prefix)
    return shown.err.removeprefix(prefix).strip()


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("old_format", [False, True])
def test_same_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str], old_format: bool) -> None:
    loaded = converted(tmp_path, STATE, old_format=old_format)
    assert loaded.keys() == STATE.keys()
    assert all(torch.equal(loaded[name], STATE[name]) for name in STATE)
    assert [tensor.dtype for tensor in loaded.values()] == [STATE[name].dtype for name in loaded]
    assert metadata(tmp_path / "m.safetensors") == {"format": "pt"}
    size = os.stat(tmp_path / "m.safetensors").st_size / 1024
    assert capsys.readouterr().out == f"{tmp_path / 'm.safetensors'}: 6 tensors, {size:.2f} KiB\n"


def test_every_dtype(tmp_path: Path) -> None:
    dtypes = [dtype for dtype in DTYPES if dtype != FLOAT4]
    state = {str(dtype): filled((4, 6), dtype) for dtype in dtypes if saved_by_torch(dtype)}
    loaded = converted(tmp_path, state)
    for name, tensor in state.items():
        assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8))


def test_cast(tmp_path: Path) -> None:
    loaded = converted(tmp_path, STATE, "--dtype", "bf16")
    assert torch.equal(loaded["embed"], STATE["embed"].to(torch.bfloat16))
    assert torch.equal(loaded["count"], STATE["count"])


def test_tied_names_are_kept_once_as_by_save_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.nn.ModuleDict({"z": torch.nn.Linear(3, 3), "a": torch.nn.Linear(3, 3)})
    model["z"].weight = model["a"].weight
    loaded = converted(tmp_path, model.state_dict())
    save_model(model, str(tmp_path / "reference"), {"format": "pt"})
    expected = load_file(tmp_path / "reference")
    assert loaded.keys() == expected.keys() == {"a.weight", "a.bias", "z.bias"}
    assert metadata(tmp_path / "m.safetensors") == metadata(tmp_path / "reference")
    assert capsys.readouterr().out.splitlines()[1:] == ["z.weight is a.weight"]


def test_overlapping_views_become_tensors_of_their_own(tmp_path: Path) -> None:
    base = filled((20, 20))
    state = {"whole": base, "rows": base[3:9], "turned": base.t(), "same": base, "cut": base[:, 5:]}
    loaded = converted(tmp_path, state)
    assert loaded.keys() == {"same", "rows", "turned", "cut"}
    assert all(torch.equal(loaded[name], state[name]) for name in loaded)
    assert metadata(tmp_path / "m.safetensors") == {"format": "pt", "whole": "same"}


def test_a_dict_inside(tmp_path: Path) -> None:
    loaded = converted(tmp_path, {"model": STATE, "epoch": 5}, "--key", "model")
    assert loaded.keys() == STATE.keys()


def test_what_is_no_dict_of_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(tmp_path, capsys, {"epoch": 5, "model": STATE, "w": torch.ones(1)})
    assert text == "it holds not only tensors: 'epoch', 'model'; --key model takes the tensors in there"
    text = refused(tmp_path, capsys, {str(i): i for i in range(9)})
    assert text == "it holds not only tensors: '0', '1', '2', '3', '4' and 4 more"
    assert refused(tmp_path, capsys, {"a": STATE}, "--key", "b") == "it has no entry 'b', but 'a'"
    assert refused(tmp_path, capsys, torch.ones(3)) == "it must hold a dict of tensors, not Tensor"
    assert refused(tmp_path, capsys, [1], "--key", "b") == "it has no entry 'b'"
    assert refused(tmp_path, capsys, {3: torch.ones(1)}) == "names of tensors must be strings: 3"
    state = {"good": torch.ones(1), "bad": torch.ones(1, dtype=torch.complex128)}
    assert refused(tmp_path, capsys, state) == "safetensors has no torch.complex128: 'bad'"
    text = refused(tmp_path, capsys, {"a": torch.ones(2).to_sparse()})
    assert "sparse" in text
    assert refused(tmp_path, capsys, STATE, "--dtype", "int3").startswith(
        "dtype must be one of float32 (fp32), "
    )


class Code:
    pass


def test_nothing_is_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(tmp_path, capsys, {"a": torch.ones(1), "code": Code()})
    assert text.startswith("torch.load(weights_only=True) cannot read it: ")


@pytest.mark.parametrize("data", [b"", b"nonsense", b"PK\x03\x04 nonsense", b"\x80\x02."])
def test_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes) -> None:
    (tmp_path / "m.pt").write_bytes(data)
    assert cli.main(["convert", str(tmp_path / "m.pt"), str(tmp_path / "out")]) == 1
    assert "neither a checkpoint of torch.save nor a safetensors file" in capsys.readouterr().err
    assert names(tmp_path) == ["m.pt"]


def test_an_existing_file_is_replaced_only_by_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted(tmp_path, STATE)
    before = (tmp_path / "m.safetensors").read_bytes()
    arguments = ["convert", str(tmp_path / "m.pt"), str(tmp_path / "m.safetensors")]
    torch.save({"other": torch.ones(3)}, tmp_path / "m.pt")
    capsys.readouterr()
    assert cli.main(arguments) == 1
    assert (
        capsys.readouterr().err
        == f"fastshard: {tmp_path / 'm.safetensors'}: it exists already; --force replaces it\n"
    )
    assert (tmp_path / "m.safetensors").read_bytes() == before
    assert cli.main([*arguments, "--force"]) == 0
    assert load_file(tmp_path / "m.safetensors").keys() == {"other"}


def test_over_itself(tmp_path: Path) -> None:
    """Mapped while it is replaced."""
    torch.save(STATE, tmp_path / "m")
    assert cli.main(["convert", str(tmp_path / "m"), str(tmp_path / "m"), "--force"]) == 0
    assert load_file(tmp_path / "m").keys() == STATE.keys()


def test_files_that_cannot_be_read_or_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", str(tmp_path / "no"), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"fastshard: {tmp_path / 'no'}: No such file or directory\n"
    assert cli.main(["convert", str(tmp_path), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith(
        f"fastshard: {tmp_path}: an empty folder: no pytorch_model.bin, "
    )
    torch.save(STATE, tmp_path / "m.pt")
    target = tmp_path / "no" / "out"
    assert cli.main(["convert", str(tmp_path / "m.pt"), str(target)]) == 1
    assert capsys.readouterr().err == f"fastshard: {target}: No such file or directory\n"


def checkpoint_folder(folder: Path, **changes: object) -> dict[str, torch.Tensor]:
    """As transformers wrote them before safetensors: two pickled shards, an index, a configuration."""
    folder.mkdir()
    shards: list[dict[str, torch.Tensor]] = [
        {"a": filled((100, 8)), "b": filled((3,))},
        {"c": filled((50, 8), seed=1)},
    ]
    shards[0]["tied"] = shards[0]["a"]
    weight_map = {}
    for i, shard in enumerate(shards):
        name = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        torch.save(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
    weight_map.update(changes)  # type: ignore[arg-type]
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text("{}")
    return {**shards[0], **shards[1]}


def loaded_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "ckpt", "PT"])
@pytest.mark.parametrize("old_format", [False, True])
def test_back_to_an_archive_of_torch(tmp_path: Path, suffix: str, old_format: bool) -> None:
    """With the names that were tied, from whatever it was."""
    state = {**STATE, "tied": STATE["embed"]}
    converted(tmp_path, state, old_format=old_format)
    for source in ("m.safetensors", "m.pt"):
        target = tmp_path / f"back from {source}.{suffix}"
        assert cli.main(["convert", str(tmp_path / source), str(target)]) == 0
        loaded = torch.load(target, weights_only=True)
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], state[name]) for name in state)
        assert [t.dtype for t in loaded.values()] == [state[name].dtype for name in loaded]
        assert loaded["tied"].data_ptr() == loaded["embed"].data_ptr()


def test_back_and_forth_it_is_the_same_file(tmp_path: Path) -> None:
    converted(tmp_path, {**STATE, "tied": STATE["embed"]})
    for source, target in (
        ("m.safetensors", "1.pt"),
        ("1.pt", "2.safetensors"),
        ("2.safetensors", "3.safetensors"),
    ):
        assert cli.main(["convert", str(tmp_path / source), str(tmp_path / target), "--quiet"]) == 0
    assert (
        len({(tmp_path / name).read_bytes() for name in ("m.safetensors", "2.safetensors", "3.safetensors")})
        == 1
    )


def test_an_archive_is_cast_with_what_is_tied(tmp_path: Path) -> None:
    torch.save({**STATE, "tied": STATE["embed"]}, tmp_path / "m.pt")
    assert cli.main(["convert", str(tmp_path / "m.pt"), str(tmp_path / "m.bin"), "--dtype", "float16"]) == 0
    loaded = torch.load(tmp_path / "m.bin", weights_only=True)
    assert loaded["embed"].dtype == torch.float16 and torch.equal(loaded["embed"], STATE["embed"].half())
    assert loaded["tied"].data_ptr() == loaded["embed"].data_ptr() and loaded["count"].dtype == torch.int64
    assert (
        cli.main(["convert", str(tmp_path / "m.bin"), str(tmp_path / "m.bin"), "--force", "--dtype", "fp32"])
        == 0
    )
    assert torch.load(tmp_path / "m.bin", weights_only=True)["embed"].dtype == torch.float32


@pytest.mark.parametrize(
    "name", ["m.gguf", "m.onnx", "m.h5", "m.npz", "m.json", "m.msgpack", "m.zip", "M.GGUF"]
)
def test_formats_that_are_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    torch.save(STATE, tmp_path / "m.pt")
    assert cli.main(["convert", str(tmp_path / "m.pt"), str(tmp_path / name)]) == 1
    assert f"{tmp_path / name}: no " in capsys.readouterr().err
    assert names(tmp_path) == ["m.pt"]


def test_folders_become_files_and_files_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = checkpoint_folder(tmp_path / "in")
    for target in ("one.safetensors", "one.pt"):
        assert cli.main(["convert", str(tmp_path / "in"), str(tmp_path / target)]) == 0
        assert (tmp_path / target).is_file()
    assert torch.load(tmp_path / "one.pt", weights_only=True).keys() == tensors.keys()
    shards = tmp_path / "shards"
    assert (
        cli.main(["convert", str(tmp_path / "one.safetensors"), str(shards), "--max-shard-size", "2KB"]) == 0
    )
    assert len(list(shards.glob("*.safetensors"))) == 2
    for source in (shards, shards / "model.safetensors.index.json"):
        target = tmp_path / f"again from {source.name}.safetensors"
        assert cli.main(["convert", str(source), str(target), "--dtype", "bfloat16"]) == 0
        assert all(t.dtype == torch.bfloat16 for t in load_file(target).values())
    shards2 = tmp_path / "shards2"
    assert cli.main(["convert", str(shards), str(shards2)]) == 0  # no suffix: a folder, as the source is one
    assert names(shards2) == ["model.safetensors"]
    (tmp_path / "there").mkdir()
    assert cli.main(["convert", str(tmp_path / "one.pt"), str(tmp_path / "there")]) == 0
    assert names(tmp_path / "there") == ["model.safetensors"]
    capsys.readouterr()
    arguments = [
        "convert",
        str(tmp_path / "one.pt"),
        str(tmp_path / "x.safetensors"),
        "--max-shard-size",
        "2KB",
    ]
    assert cli.main(arguments) == 1
    assert "with --max-shard-size DST is a folder" in capsys.readouterr().err
    assert cli.main(["convert", str(tmp_path / "one.safetensors"), str(tmp_path / "x"), "--key", "a"]) == 1
    assert "has no entries for --key to name" in capsys.readouterr().err


def test_archives_that_unfold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compressed records, and tensors that repeat a few bytes."""
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "m.pt", "w", 8) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert cli.main(["convert", str(tmp_path / "m.pt"), str(tmp_path / "out")]) == 1
    assert "its records are compressed" in capsys.readouterr().err
    text = refused(tmp_path / "two", capsys, {"a": torch.zeros(1).expand(1 << 40)})
    assert (
        text == f"'a' has 4 bytes, which its strides repeat to {1 << 42}: a file that is made to fill a disk?"
    )


@pytest.mark.parametrize("what", ["", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("size", ["5GB", "2KB"])
def test_folders(tmp_path: Path, size: str, what: str) -> None:
    tensors = checkpoint_folder(tmp_path / "in")
    source, out = str(tmp_path / "in" / what), tmp_path / "out"
    assert cli.main(["convert", source, str(out), "--max-shard-size", size]) == 0
    assert {name: t.tolist() for name, t in loaded_folder(out).items()} == {
        name: t.tolist() for name, t in tensors.items() if name != "tied"
    }
    sharded = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    others = [] if what else ["config.json"]
    assert names(out) == sorted([*others, *(["model.safetensors"] if size == "5GB" else sharded)])
    assert cli.main(["convert", source, str(out)]) == 1  # it exists
    assert cli.main(["convert", source, str(out), "--force", "--dtype", "bf16"]) == 0
    assert names(out) == sorted([*others, "model.safetensors"])
    assert loaded_folder(out)["c"].dtype == torch.bfloat16


def test_a_folder_into_itself(tmp_path: Path) -> None:
    checkpoint_folder(tmp_path / "in")
    before = names(tmp_path / "in")
    assert cli.main(["convert", str(tmp_path / "in"), str(tmp_path / "in")]) == 0
    assert names(tmp_path / "in") == sorted([*before, "model.safetensors"])


def test_one_file_in_shards(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "m.bin")
    options = ["--max-shard-size", "0.5KB", "--dtype", "fp16"]
    assert cli.main(["convert", str(tmp_path / "m.bin"), str(tmp_path / "out"), *options]) == 0
    assert len(names(tmp_path / "out")) > 2
    loaded = loaded_folder(tmp_path / "out")
    assert loaded.keys() == STATE.keys()
    assert loaded["embed"].dtype == torch.float16 and loaded["count"].dtype == torch.int64


@pytest.mark.parametrize("name", ["../elsewhere.bin", "/etc/passwd.bin", "pytorch_model.txt", 3, "sub/x.bin"])
def test_an_index_that_leads_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: object
) -> None:
    checkpoint_folder(tmp_path / "in", c=name)
    assert cli.main(["convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 1
    assert "tensor 'c' cannot lie in" in capsys.readouterr().err
    assert names(tmp_path) == ["in"]


def test_an_index_that_does_not_fit_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint_folder(tmp_path / "in", d="pytorch_model-00001-of-00002.bin")
    assert cli.main(["convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 1
    assert "its tensors are not those of the index: 'd'" in capsys.readouterr().err
    checkpoint_folder(tmp_path / "missing", c="pytorch_model-00003-of-00003.bin")
    assert cli.main(["convert", str(tmp_path / "missing"), str(tmp_path / "out")]) == 1
    assert names(tmp_path) == ["in", "missing"]


def test_positions_that_cannot_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unseekable(io.FileIO):
        def seekable(self) -> bool:
            return False

    (tmp_path / "m.pt").touch()
    monkeypatch.setattr(checkpoint, "open", Unseekable, raising=False)
    for opening in (checkpoint.open_file, convert._check_records):
        with pytest.raises(OSError) as info:
            opening(str(tmp_path / "m.pt"))
        assert (info.value.errno, info.value.filename) == (errno.EIO, str(tmp_path / "m.pt"))


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (io.UnsupportedOperation("File or stream is not seekable."), errno.EIO),
        (OSError(errno.EACCES, "no", "/proc/self/fd/3"), errno.EACCES),
        (RuntimeError("unable to mmap 3000 bytes from file </m>: Cannot allocate memory (12)"), errno.ENOMEM),
        (RuntimeError("unable to open file </m> in read-only mode: Input/output error (5)"), errno.EIO),
    ],
)
def test_system_calls_that_fail_inside_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, number: int
) -> None:
    def load(*_: object, **__: object) -> None:
        raise error

    torch.save(STATE, tmp_path / "m.pt")
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(OSError) as info:
        convert.convert(str(tmp_path / "m.pt"), str(tmp_path / "m.safetensors"))
    assert (info.value.errno, info.value.filename) == (number, str(tmp_path / "m.pt"))
    assert info.value.strerror == os.strerror(number)


def test_what_cannot_be_looked_at_is_no_absence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: object, *_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    absent = str(tmp_path / "absent")
    assert not checkpoint.same_file(absent, absent)
    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint.same_file(tmp_path, tmp_path)


@pytest.mark.parametrize("call", ["read", "seek"])
def test_a_zip_archive_that_cannot_be_read(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    torch.save(STATE, tmp_path / "m.pt")
    data = (tmp_path / "m.pt").read_bytes()
    unreadable = type("Unreadable", (io.BytesIO,), {call: fails})
    with pytest.raises(OSError) as info:
        whatis._of_zip(unreadable(data), True)
    assert info.value.errno == errno.EIO
    monkeypatch.setattr(convert, "open_file", lambda *_: unreadable(data))
    with pytest.raises(OSError) as info, convert._read_errors(str(tmp_path / "m.pt")):
        convert._check_records(str(tmp_path / "m.pt"))
    assert (info.value.errno, info.value.filename) == (errno.EIO, str(tmp_path / "m.pt"))


def test_a_new_file_that_cannot_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "stat", fails)
    with pytest.raises(OSError, match="Input/output error; the new file is in place") as info:
        convert._size_of(str(tmp_path))
    assert info.value.errno == errno.EIO and info.value.published  # type: ignore[attr-defined]
