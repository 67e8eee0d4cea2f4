# SPDX-License-Identifier: Apache-2.0
"""``fastshard serve``, the entry point of a container: what it starts, and what it refuses to start on.

The server is a shell script here. ``tests/serving_image.py`` has the real vLLM, in what stands in for its image.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import fastshard
from fastshard.cli import command as cli

TIMEOUT_SECONDS = 60

SERVER = """#!/bin/sh
trap 'echo terminated; exit 7' TERM
echo "$$ started" "$@"
test -z "$WAIT" || while :; do sleep 0.05; done
exit ${STATUS:-0}
"""
PROGRAM = """
import sys
sys.executable = sys.argv.pop(1)  # the servers are looked for beside it
from fastshard.cli import main
sys.exit(main(["serve", *sys.argv[1:]]))
"""


@pytest.fixture
def bin(tmp_path: Path) -> Path:
    """A folder with a Python, which is to start SGLang, and a vLLM."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("python", "vllm"):
        (folder / name).write_text(SERVER)
        (folder / name).chmod(0o755)
    return folder


def shards(folder: Path, ranks: int = 2, **options: object) -> Path:
    given = {"tp_size": ranks, "writer": ("vllm", "0.0"), "manifest": True, **options}
    for rank in range(ranks):
        tensors = {"a": torch.arange(4096.0) + rank, "b": torch.ones(3)}
        fastshard.save_sharded_state(tensors, folder, tp_rank=rank, **given)  # type: ignore[arg-type]
    (folder / "config.json").write_text("{}")
    return folder


def started(bin: Path, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(bin / "python"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).parent,
    )


Served = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def serve(bin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Served]:
    """Calls the command without being replaced: exit status, the server's arguments, and what was said."""
    monkeypatch.setattr(sys, "executable", str(bin / "python"))
    before = signal.getsignal(signal.SIGTERM)
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, command: commands.append(command[1:]))

    def call(*arguments: object) -> tuple[int, list[str], str]:
        commands.clear()
        try:
            status = cli.main(["serve", *map(str, arguments)])
        except SystemExit as exit:  # argparse's
            status = int(str(exit.code))
        out, err = capsys.readouterr()
        return status, commands[0] if commands else [], out + err

    yield call
    signal.signal(signal.SIGTERM, before)


def served(bin: Path, *arguments: object, **environment: str) -> tuple[int, list[str], str]:
    """Does the same in a process that becomes the server."""
    with started(bin, *arguments, **environment) as process:
        out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    lines = [line for line in out.splitlines() if " started " in line]
    assert all(line.startswith(f"{process.pid} ") for line in lines)  # it has taken this process's place
    return process.returncode, lines[0].split(" started ")[1].split() if lines else [], out + err


def test_the_server_takes_this_process_and_gets_the_arguments(bin: Path, tmp_path: Path) -> None:
    folder = shards(tmp_path / "two")
    status, arguments, said = served(bin, folder, "--port", "80", STATUS="3")
    begin = f"serve {folder} --load-format sharded_state --tensor-parallel-size 2".split()
    assert (status, arguments) == (3, [*begin, "--port", "80"])
    assert f"{folder}: sound" in said
    assert "the shards are from vllm 0.0, and this is " in said


def test_other_arguments_engines_and_names(serve: Served, tmp_path: Path) -> None:
    folder = shards(tmp_path / "two")
    begin = f"serve {folder} --load-format sharded_state".split()
    for given in (["--tensor-parallel-size", "2"], ["-tp", "2"], ["--tensor-parallel-size=2"]):
        assert serve(folder, *given)[1] == [*begin, *given]
    one = shards(tmp_path / "one", 1, pattern="part-{part}-of-{rank}.safetensors")
    config = json.dumps({"pattern": "part-{part}-of-{rank}.safetensors"})
    assert serve(one)[1][-2:] == ["--model-loader-extra-config", config]
    of_sglang = shards(tmp_path / "sglang", writer=("sglang", "0.5.23"))
    assert serve(of_sglang)[1] == (
        f"-m sglang.launch_server --model-path {of_sglang} --load-format sharded_state --tensor-parallel-size 2".split()
    )
    nobodys = shards(tmp_path / "nobodys", writer=None)
    status, command, said = serve(nobodys)
    assert (status, command) == (1, []) and "which engine they are for: --engine" in said
    assert serve("--engine", "vllm", nobodys)[1][0] == "serve"


def test_signals_reach_the_server(bin: Path, tmp_path: Path) -> None:
    with started(bin, shards(tmp_path / "two"), WAIT="1") as process:
        assert process.stdout
        assert any(line.startswith(f"{process.pid} started") for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=TIMEOUT_SECONDS) == 7
        assert process.stdout.read() == "terminated\n"


def flip_a_byte(folder: Path) -> None:
    with open(folder / "model-rank-1-part-0.safetensors", "r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(bytes([file.read(1)[0] ^ 1]))


def cut(folder: Path) -> None:
    os.truncate(folder / "model-rank-1-part-0.safetensors", 1000)


def lose_a_part(folder: Path) -> None:
    (folder / "model-rank-0-part-0.safetensors").unlink()


def lose_a_rank(folder: Path) -> None:
    (folder / "fastshard.manifest.json").unlink()
    for name in ("model-rank-1-part-0.safetensors", "fastshard-model-rank-1.json"):
        (folder / name).unlink()


def mix(folder: Path) -> None:
    fastshard.save_sharded_state(
        {"c": torch.ones(3)}, folder, tp_rank=2, tp_size=3, writer=("vllm", "0.0"), manifest=True
    )


def change_the_config(folder: Path) -> None:
    fastshard.write_manifest(folder, force=True)
    (folder / "config.json").write_text('{"hidden_size": 1}')


def forget_the_digests(folder: Path) -> None:
    shards(folder, manifest=False)


DAMAGE = [
    (flip_a_byte, "model-rank-1-part-0.safetensors: tensor a: "),
    (cut, "model-rank-1-part-0.safetensors: "),
    (lose_a_part, "model-rank-0-part-0.safetensors: "),
    (lose_a_rank, "the shards of 1 of 2 ranks are missing"),
    (mix, "shards of several saves, for 2 x 1 and 3 x 1 ranks"),
    (change_the_config, "config.json: "),
    (forget_the_digests, "no digests are known of 2 files"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_what_is_not_what_was_saved_is_not_served(
    serve: Served, tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    folder = shards(tmp_path / "two")
    damage(folder)
    status, arguments, said = serve(folder)
    assert (status, arguments) == (1, []) and reason in said, said
    assert said.splitlines()[-1].startswith("fastshard: ")


def test_quick_looks_at_no_bytes_but_at_sizes(serve: Served, tmp_path: Path) -> None:
    folder = shards(tmp_path / "two")
    flip_a_byte(folder)
    assert serve("--check", "quick", folder)[1][0] == "serve"
    cut(folder)
    assert serve("--check", "quick", folder)[:2] == (1, [])


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (["two", "-tp", "4"], 1, "its shards are for --tensor-parallel-size 2, not 4"),
        (["two", "--pipeline-parallel-size=2"], 1, "its shards are for --pipeline-parallel-size 1, not 2"),
        (["nothing"], 1, "No such file or directory"),
        (["empty"], 1, "it holds neither weights nor digests"),
        (["model"], 1, "it holds no rank shards: `fastshard vllm-save` makes them"),
        ([], 2, "FOLDER"),
        (["--check", "not", "two"], 2, "invalid choice"),
    ],
)
def test_refusals(serve: Served, tmp_path: Path, arguments: list[str], status: int, reason: str) -> None:
    shards(tmp_path / "two")
    (tmp_path / "empty").mkdir()
    fastshard.save_file({"a": torch.ones(3)}, _made(tmp_path / "model") / "model.safetensors", manifest=True)
    given = [tmp_path / one if one in ("two", "nothing", "empty", "model") else one for one in arguments]
    found, started_with, said = serve(*given)
    assert (found, started_with) == (status, []) and reason in said, said


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_server_that_is_not_there_or_cannot_be_run(bin: Path, tmp_path: Path) -> None:
    folder = shards(tmp_path / "two")
    (bin / "vllm").chmod(0o644)
    assert served(bin, folder, PATH="/nowhere")[0] == 127
    (bin / "vllm").write_bytes(b"\0")
    (bin / "vllm").chmod(0o755)
    status, _, said = served(bin, folder)
    assert status == 126 and f"{bin / 'vllm'}: Exec format error" in said
