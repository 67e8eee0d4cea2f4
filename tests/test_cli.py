# SPDX-License-Identifier: Apache-2.0
"""The command line."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastshard import __version__, save_file
from fastshard.cli import command as cli
from fastshard.engine.planning import why_not_native

TENSORS = {
    "wide": torch.zeros(300, 1000),
    "half": torch.zeros(2, 3, dtype=torch.bfloat16),
    "s": torch.tensor(True),
}


def test_inspect_shows_header_tensors_and_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.safetensors"
    save_file(TENSORS, path, {"format": "pt"})
    assert cli.main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    header_nbytes = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert lines[0].split() == ["tensor", "dtype", "shape", "offset", "size"]
    assert lines[1].split() == ["wide", "F32", "[300,", "1000]", str(header_nbytes), "1.14", "MiB"]
    assert lines[2].split() == ["half", "BF16", "[2,", "3]", str(header_nbytes + 1_200_000), "12", "B"]
    assert lines[3].split()[:3] == ["s", "BOOL", "[]"]
    assert lines[-2].startswith(f"3 tensors, 1.14 MiB ({path.stat().st_size} bytes)")
    assert lines[-1] == 'metadata: {"format": "pt"}'


def test_inspect_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.safetensors"
    save_file(TENSORS, path)
    assert cli.main(["inspect", "--json", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nbytes"] == path.stat().st_size and found["metadata"] is None
    assert [tensor["name"] for tensor in found["tensors"]] == ["wide", "half", "s"]
    assert found["tensors"][0] == {
        "name": "wide",
        "code": "F32",
        "shape": [300, 1000],
        "begin": 0,
        "end": 1_200_000,
    }


def test_inspect_does_not_print_control_characters_of_a_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"a\x1b[2Jb": torch.ones(1)}, tmp_path / "m.safetensors")
    assert cli.main(["inspect", str(tmp_path / "m.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\\u001b[2Jb" in shown


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"abc", "3 bytes are too few for a header"),
        (b"\xff" * 8 + b"{}", "a header of 18446744073709551615 bytes in a file of 10"),
        (b"\x08" + bytes(7) + b"nonsense", "the header is not that of a safetensors file"),
        (b"\x02" + bytes(7) + b"[]", "the header is not that of a safetensors file"),
        (b"\x08" + bytes(7) + b"{}      more", "the header accounts for 16 bytes, the file has 20"),
    ],
)
def test_inspect_says_what_is_wrong_with_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes, reason: str
) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    assert cli.main(["inspect", str(path)]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith(f"fastshard: {path}: {reason}")


def test_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(tmp_path / "no")]) == 1
    assert capsys.readouterr().err == f"fastshard: {tmp_path / 'no'}: No such file or directory\n"


def test_env_tells_of_machine_and_filesystem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    rows = dict(line.split("  ", 1) for line in shown.splitlines() if "  " in line)
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["fastshard"] == __version__
    assert torch.__version__.startswith(rows["torch"])  # which local part is in the metadata differs
    assert rows["tensors are laid out"] == (f"in Python: {why}" if (why := why_not_native()) else "natively")
    assert rows["CUDA kernels"].startswith(("compiled in", "not compiled in"))
    assert rows["CUDA driver"]
    assert rows["filesystem"].endswith(os.path.realpath(tmp_path))
    assert rows["a save here"].startswith("buffered: ")
    assert rows["a durable save here"].startswith(("buffered: ", "direct: "))
    assert rows["asynchronous direct I/O (io_uring)"].startswith(("yes", "no: "))
    assert rows["new files"] == rows["rename"] == "yes"
    assert os.listdir(tmp_path) == []


def test_env_of_a_place_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", str(tmp_path / "no" / "where")]) == 1
    assert "No such file or directory" in capsys.readouterr().err


def test_env_of_a_place_that_cannot_be_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = tmp_path / ("n" * 300)
    assert cli.main(["env", str(long)]) == 1
    assert "File name too long" in capsys.readouterr().err  # its parent is not what was asked for


def test_command_is_installed_and_quick_to_start(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("fastshard")
    shown = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == __version__
    script = "import sys; from fastshard import cli; cli.main(['inspect', sys.argv[1]]); print('torch' in sys.modules)"
    save_file({"a": torch.ones(3)}, tmp_path / "m")
    shown = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "m"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    ).stdout
    assert shown.splitlines()[-1] == "False"


def test_output_into_a_closed_pipe(tmp_path: Path) -> None:
    save_file({f"tensor {i}": torch.ones(3) for i in range(20_000)}, tmp_path / "m")
    command = [sys.executable, "-m", "fastshard", "inspect", tmp_path / "m"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait() == 0


def test_bench_is_reached(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--list"]) == 0
    assert "four-files" in capsys.readouterr().out


def test_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["inspect"], ["nonsense"]):
        with pytest.raises(SystemExit) as raised:
            cli.main(arguments)
        assert raised.value.code == 2
    capsys.readouterr()


def test_a_new_checkpoint_that_cannot_be_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: str) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    save_file(TENSORS, source / "model.safetensors", {"format": "pt"})
    described = cli.cli_checkpoints._described
    shown = lambda folder: fails(folder) if folder == str(out) else described(folder)  # noqa: E731
    monkeypatch.setattr(cli.cli_checkpoints, "_described", shown)
    assert cli.main(["reshard", str(source), "-o", str(out), "--max-shard-size", "1GB"]) == 0
    assert "in place after" in capsys.readouterr().out and (out / "model.safetensors").exists()
