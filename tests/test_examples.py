# SPDX-License-Identifier: Apache-2.0
"""The examples, as a user runs them."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from conftest import by_one_worker
from helpers import names
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
SHARDED = ROOT / "examples" / "fsdp2_checkpoint.py"
TRAINING = ROOT / "examples" / "async_training.py"
FINETUNING = ROOT / "examples" / "finetune_trainer.py"
SERVING = ROOT / "examples" / "save_for_serving.py"
SYNC = ROOT / "examples" / "weight_sync.py"
STEPS = 60


@contextmanager
def training(directory: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(TRAINING), "--dir", str(directory), "--steps", str(STEPS)]
    # Not from the checkout's top: its package would come before the installed one.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent, **options
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def trained(directory: Path) -> tuple[str, bytes]:
    """Trains to the end: the first line that was printed, and the weights' file."""
    with training(directory) as process:
        printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return printed.splitlines()[0], (directory / "model.safetensors").read_bytes()


def kill_at(directory: Path, line: str) -> None:
    """Trains until it prints that line, and kills it then."""
    with training(directory) as process:
        assert process.stdout
        assert any(printed.startswith(line) for printed in process.stdout), "it ended before"
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(timeout=300) == -signal.SIGKILL


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return by_one_worker(tmp_path_factory, "uninterrupted", never_killed)


def never_killed(directory: Path) -> bytes:
    first, weights = trained(directory)
    assert first == "begins after step 0"
    # The former checkpoint is kept until the newest one stands.
    assert names(directory) == ["model.safetensors", "step-00000050.pt", "step-00000060.pt"]
    return weights


def test_a_training_that_is_killed_again_and_again_ends_with_the_same_bits(
    tmp_path: Path, uninterrupted: bytes
) -> None:
    # Before the first save, right before or in one, after its call, and between two.
    for step in (5, 20, 31, 47):
        kill_at(tmp_path, f"step {step}:")
        for path in tmp_path.iterdir():  # each checkpoint that can be seen is complete
            assert torch.load(path, weights_only=True)["step"] == int(path.stem.removeprefix("step-"))
    first, weights = trained(tmp_path)
    # The newest save may have been in flight; before it began the former one had ended.
    assert int(first.removeprefix("begins after step ")) in (30, 40)
    assert weights == uninterrupted


def test_a_save_that_fails_ends_the_training(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    with training(tmp_path, preexec_fn=limit, stderr=subprocess.PIPE) as process:
        printed, told = process.communicate(timeout=300)
    assert process.returncode == 1
    assert printed.splitlines()[-1].startswith(("step 10:", "step 20:"))
    assert os.strerror(errno.EFBIG) in told.splitlines()[-1]
    assert names(tmp_path) == []


@contextmanager
def sharded_training(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Two ranks, as ``torchrun`` starts them, in a process group of the system's that can be killed at once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(SHARDED), "--dir", str(directory), "--steps", "12", "--every", "4"]
    with subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    ) as process:
        ranks = f"/proc/{process.pid}/task/{process.pid}/children"
        try:
            yield process
        finally:
            with suppress(OSError):
                for rank in Path(ranks).read_text().split():
                    os.kill(int(rank), signal.SIGKILL)
            process.kill()


def sharded_trained(directory: Path) -> tuple[str, bytes]:
    with sharded_training(directory) as process:
        printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return printed.splitlines()[0], (directory / "final" / "model.safetensors").read_bytes()


def test_ranks_that_are_killed_go_on_and_end_with_the_same_bits(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="4.50")
    pytest.importorskip("torch", minversion="2.6")  # fully_shard is public
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    first, weights = sharded_trained(whole)
    assert first == "begins after step 0"
    with sharded_training(killed) as process:  # kill -9 of all ranks, while a save may be in flight
        assert process.stdout
        assert any(line.startswith("step 10") for line in process.stdout), "it ended before"
    first, resumed = sharded_trained(killed)
    assert first in (
        "begins after step 4",
        "begins after step 8",
    )  # the save of step 4 had ended before the next
    assert resumed == weights
    saved = load_file(whole / "final" / "model.safetensors")
    model, told = transformers.AutoModelForCausalLM.from_pretrained(whole / "final", output_loading_info=True)
    assert not any(told.values()), told
    assert model.num_parameters() == sum(t.numel() for t in saved.values())


def test_a_trainer_links_what_is_frozen_and_every_checkpoint_is_sound(tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5")
    script = "import gc, runpy, sys; gc.unfreeze(); sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = (FINETUNING, "--dir", tmp_path, "--steps", "6", "--every", "2")
    done = forked.run(script, *arguments, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    first, *rest = [line for line in done.stdout.splitlines() if not line.startswith("{")]
    assert first == "begins with the first step"
    assert rest == [
        *(f"checkpoint-{step}: sound, 11 files, 1 linked" for step in (2, 4, 6)),
        "not made by fastshard: nothing",
    ]
    shards = [sorted((tmp_path / f"checkpoint-{step}").glob("model-*.safetensors")) for step in (2, 4, 6)]
    same = [[one.samefile(other) for one, other in zip(shards[0], later)] for later in shards[1:]]
    assert [sorted(pair) for pair in same] == [[False, True]] * 2


def test_parts_for_serving_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, str(SERVING), "--dir", str(tmp_path / "work"), "--width", "64"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    *ranks, last = done.stdout.splitlines()
    held = 4 * (64 + 2 * 4 * 4 * 64 * 64 // 2)  # bytes: the norm whole, half of each matrix
    assert sorted(ranks) == [f"rank {rank}: 9 tensors, {held:,} bytes" for rank in range(2)]
    assert last.startswith("put together again: ") and last.endswith(" files, all the same")
    assert names(tmp_path / "work" / "served") == [
        *(f"fastshard-model-rank-{rank}.json" for rank in range(2)),
        *(f"model-rank-{rank}-part-0.safetensors" for rank in range(2)),
    ]


def synced(directory: Path, *arguments: str) -> list[str]:
    """What the example prints. It compares the server's answers with the trainer's, and ends with an error if they
    differ."""
    command = [sys.executable, str(SYNC), "--dir", str(directory), *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert names(directory) == []
    return [line for line in done.stdout.splitlines() if line.startswith("round ")]


def test_a_server_gets_the_weights_of_each_round(tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="4.50")
    rounds = synced(tmp_path, "--server", "transformers", "--rounds", "2")
    assert rounds == [
        f"round {number}: prepare, transformers answers as the trainer does" for number in (1, 2)
    ]


def test_vllm_gets_the_weights_of_each_round(tmp_path: Path) -> None:
    pytest.importorskip(
        "vllm",
        reason="vLLM is not installed: it is no part of the test extra, as it brings a torch of its own",
    )
    rounds = synced(tmp_path, "--server", "vllm", "--rounds", "6", "--compare")
    ways = ("prepare", "save_file", "transfer") * 2
    assert rounds == [
        f"round {number}: {way}, vllm answers as the trainer does" for number, way in enumerate(ways, 1)
    ]
