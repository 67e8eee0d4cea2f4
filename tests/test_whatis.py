# SPDX-License-Identifier: Apache-2.0
"""Files are called what they are, by every command that is given them, in one line and with a status."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastshard import save_file
from fastshard.cli import command as cli
from fastshard.formats.file_kinds import what_is

STATE = {"a": torch.ones(300, 300), "b": torch.zeros(3)}


def torch_bytes(obj: object, old_format: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file, _use_new_zipfile_serialization=not old_format)
    return file.getvalue()


def zip_bytes(**contents: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in contents.items():
            archive.writestr(name, text)
    return file.getvalue()


def program() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    return file.getvalue()


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"

FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "an empty file"),
    "git-LFS": (LFS.encode, "a pointer of git-LFS"),
    "git-annex": (b"/annex/objects/SHA256E-s100--ab.bin\n".__add__, "a pointer of git-annex"),
    "HTML": (b"\n<!DOCTYPE html><html><body>404".__add__, "a page of HTML"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'.__add__, "XML"),
    "an error in JSON": (b'{"error":"Repository not found"}'.__add__, "JSON with an error in it"),
    "JSON": (b'{"hidden_size": 3}'.__add__, "JSON, but not the index of a checkpoint"),
    "text": (b"hello, world".__add__, "a text: 'hello, world'"),
    "GGUF": (b"GGUF\3\0\0\0\0\0\0\0\0\0".__add__, "a GGUF file"),
    "HDF5": (b"\x89HDF\r\n\x1a\n\0\0\0\0".__add__, "an HDF5 file"),
    "npy": (b"\x93NUMPY\1\0v\0{'descr'".__add__, "an array of numpy"),
    "npz": (lambda: zip_bytes(**{"a.npy": "x"}), "arrays of numpy"),
    "zip": (lambda: zip_bytes(readme="hello"), "a zip archive, but not one of torch.save"),
    "a cut zip": (lambda: zip_bytes(readme="hello")[:-30], "a zip archive that has been cut or is damaged"),
    "gzip": (b"\x1f\x8b\x08\0\0\0".__add__, "compressed by gzip"),
    "zeros": (lambda: bytes(100_000), "nothing but zeros at its beginning"),
    "a cut archive": (lambda: torch_bytes(STATE)[:200_000], "an archive of torch.save that has been cut"),
    "TorchScript": (program, "a program of TorchScript"),
    "pickle": (lambda: pickle.dumps({"a": 1}), "a pickle, but not one of torch.save"),
    "noise": (lambda: bytes(range(128, 256)) * 3, "no file of a known kind"),
}
for _name, (_make, _text) in list(FILES.items()):
    if getattr(_make, "__name__", "") == "__add__":  # bytes, written where they are named
        FILES[_name] = (lambda make=_make: make(b""), _text)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(list(arguments)) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("fastshard: ") and shown.err.count("\n") == 1
    return shown.err.removeprefix("fastshard: ").rstrip("\n")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_files_are_named_for_what_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, suffix: str
) -> None:
    make, text = FILES[name]
    path = tmp_path / f"m{suffix}"
    path.write_bytes(make())
    assert text in what_is(path).text
    for target in ("out.safetensors", "out.pt"):
        told = refused(capsys, "convert", str(path), str(tmp_path / target))
        assert told.startswith(f"{path}: {text}"), told
    told = refused(capsys, "inspect", str(path))
    assert told.startswith(f"{path}: ") and (text in told or name == "noise"), told
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("old_format", [False, True])
def test_an_archive_of_torch_under_another_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old_format: bool
) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(torch_bytes(STATE, old_format))
    told = refused(capsys, "inspect", str(path))
    assert "an archive of torch.save" in told and "fastshard convert" in told
    assert cli.main(["convert", str(path), str(tmp_path / "out.safetensors")]) == 0


def test_a_safetensors_file_that_was_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(STATE, tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    for nbytes in (20, 100, len(data) - 1):
        path = tmp_path / "m.safetensors"
        path.write_bytes(data[:nbytes])
        for command in (("inspect", str(path)), ("convert", str(path), str(tmp_path / "out"))):
            told = refused(capsys, *command)
            assert "cut" in told or "a header of" in told or "accounts for" in told
            assert told.count(str(path)) == 1, told


@pytest.mark.parametrize(
    "contents, text",
    [
        ([], "an empty folder"),
        (["readme.md"], "a folder without weights"),
        ([".metadata", "__0_0.distcp"], "a checkpoint of torch.distributed.checkpoint"),
        (["model.gguf"], "a folder with GGUF files"),
        (["tf_model.h5"], "a folder with HDF5 files"),
        (["tensor_parallel.index.json"], "a folder that fastshard shard made"),
    ],
)
def test_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str], contents: list[str], text: str) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for name in contents:
        (folder / name).write_text("{}")
    assert refused(capsys, "inspect", str(folder)).startswith(f"{folder}: {text}")
    said = refused(capsys, "convert", str(folder), str(tmp_path / "out"))
    if ".metadata" in contents:  # such a folder it converts, but not this one
        assert said.startswith(f"{folder}/.metadata: the pickle has an operation")
    else:
        assert said.startswith(f"{folder}: {text}")


def test_what_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "annexed").symlink_to(".git/annex/objects/xx/SHA256E-s1--ab.bin")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("x")
    for name, text in {
        "pipe": "no regular file",
        "socket": "no regular file",
        "/dev/null": "no regular file",
        "link": "a link to 'nowhere', which is missing",
        "annexed": "git-annex has not got it",
        "loop": "Too many levels of symbolic links",
        "missing": "No such file or directory",
        "file/below": "Not a directory",
        "x" * 300: "File name too long",
    }.items():
        path = str(tmp_path / name)
        for command in (("inspect", path), ("convert", path, str(tmp_path / "out"))):
            told = refused(capsys, *command)
            assert told.startswith(path) and text in told, told


def test_paths_and_texts_stay_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a\n\x1b[2Jb.safetensors"
    path.write_text("hello")
    for command in (("inspect", str(path)), ("convert", str(path), str(tmp_path / "out"))):
        assert "\x1b" not in refused(capsys, *command)


def test_inspect_of_several_files_and_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, key in zip(files, STATE):
        save_file({key: STATE[key]}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict(zip(STATE, files))}))
    save_file(STATE, tmp_path / "one.safetensors")
    for path in (folder, index):
        assert cli.main(["inspect", str(path)]) == 0
        shown = capsys.readouterr().out
        assert all(f"{folder / name}:" in shown for name in files) and "together: 2 files, 2 tensors" in shown
        assert cli.main(["inspect", "--json", str(path)]) == 0
        told = json.loads(capsys.readouterr().out)
        assert [what["file"] for what in told] == [str(folder / name) for name in files]
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"GGUF")
    assert cli.main(["inspect", str(bad), str(tmp_path / "one.safetensors"), str(folder)]) == 1
    shown_all = capsys.readouterr()
    assert "together: 3 files, 4 tensors" in shown_all.out
    assert shown_all.err.count("\n") == 1 and "a GGUF file" in shown_all.err
    (folder / files[0]).unlink()
    assert cli.main(["inspect", str(folder)]) == 1
    assert f"{folder / files[0]}: No such file" in capsys.readouterr().err


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise OSError(5, os.strerror(5), str(tmp_path))

    monkeypatch.setattr(os, "scandir", failing)
    assert "Input/output error" in refused(capsys, "inspect", str(tmp_path))


_BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED: raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
from fastshard.cli import command as cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        "shard m -o out --tp 2",
        "merge m -o out",
        "reshard m -o out --max-shard-size 1GB",
        "convert m/m.bin out",
        "bench --list",
    ],
)
def test_without_torch(tmp_path: Path, arguments: str) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "m.bin").write_bytes(torch_bytes(STATE))
    code = _BLOCKED.replace("BLOCKED", "{'torch'}")
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments.split()], capture_output=True, text=True, cwd=tmp_path
    )
    command = arguments.split()[0]
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"fastshard: {command} needs torch: No module named 'torch'\n"


def test_inspect_needs_no_torch(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "m.safetensors")
    code = _BLOCKED.replace("BLOCKED", "{'torch', 'numpy'}")
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", "m.safetensors", "."],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    code = _BLOCKED.replace("BLOCKED", "{'matplotlib'}")
    arguments = ["bench", "--plot", "out.png", "--case", "four-files"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.endswith("--plot needs matplotlib\n") and done.stdout == ""


def test_an_interrupt_is_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    save_file(STATE, tmp_path / "m.safetensors")
    monkeypatch.setattr("fastshard.cli.files.read_header", interrupted)
    assert cli.main(["inspect", str(tmp_path / "m.safetensors")]) == 130
    assert capsys.readouterr().err == "fastshard: interrupted\n"
