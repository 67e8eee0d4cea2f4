# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a run: which are complete, which is the newest, which are deleted, and what they occupy."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import by_one_worker, without_mounts
from helpers import filled, names

import fastshard
from fastshard.cli import command as cli
from fastshard.formats.manifest import FileEntry, Manifest
from fastshard.formats.naming import MANIFEST_NAME, SUMS_NAME
from fastshard.tools import run_folder, usage
from fastshard.tools.structure import problems_of
from fastshard.tools.usage import OTHERS, Extent, usage_of

STEPS = (2, 4, 6, 8)


def trained(folder: Path, **options: Any) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    data = [{"input_ids": torch.arange(4), "labels": torch.arange(4)} for _ in range(16)]
    arguments = transformers.TrainingArguments(
        str(folder),
        **{
            "max_steps": STEPS[-1],
            "save_steps": 2,
            "per_device_train_batch_size": 2,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        },
    )
    trainer = transformers.Trainer(transformers.LlamaForCausalLM(config), arguments, train_dataset=data)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the real Trainer with four checkpoints."""

    def run(folder: Path) -> Path:
        trained(folder / "run")
        return folder / "run"

    return by_one_worker(tmp_path_factory, "trainer", run)


@pytest.fixture
def run(real_run: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(real_run, folder)
    return folder


def of_shards(folder: Path, factor: float = 1.0) -> Path:
    """The real output of save_torch_state_dict: three shards and an index."""
    folder.mkdir(parents=True)
    state = {f"layer.{i}.weight": torch.full((100, 10), factor * i) for i in range(3)}
    fastshard.save_torch_state_dict(state, folder, max_shard_size=5000)
    assert len(names(folder)) == 4
    return folder


def checkpoint_names(folder: Path) -> list[str]:
    return sorted(name for name in names(folder) if name.startswith("checkpoint-"))


def states(folder: Path) -> dict[int, bool]:
    return {found.step: found.complete for found in fastshard.list_checkpoints(folder)}


# Complete ------------------------------------------------------------------------------------------------


def test_checkpoints_of_trainer_are_complete_in_the_order_of_their_steps(real_run: Path) -> None:
    found = fastshard.list_checkpoints(real_run)
    assert [checkpoint.step for checkpoint in found] == list(STEPS)
    assert [checkpoint.problems for checkpoint in found] == [()] * 4
    assert fastshard.latest_checkpoint(real_run) == str(real_run / "checkpoint-8")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_what_trainer_needs_is_missed_if_it_is_gone_cut_or_empty(run: Path, name: str) -> None:
    file = run / "checkpoint-8" / name
    data = file.read_bytes()
    for left in (None, data[:-1], data[: len(data) // 2], data[:12], data[:3], b""):
        if left is None:
            file.unlink()
        else:
            file.write_bytes(left)
        assert states(run) == {2: True, 4: True, 6: True, 8: False}, left and len(left)
        assert fastshard.latest_checkpoint(run) == str(run / "checkpoint-6")
    file.write_bytes(data)
    assert states(run)[8]


@pytest.mark.parametrize("name", ["config.json", "trainer_state.json"])
def test_texts_that_are_cut_empty_or_zeros_after_a_crash_are_noticed(run: Path, name: str) -> None:
    file = run / "checkpoint-8" / name
    data = file.read_bytes()
    for left in (data[: len(data) // 2].rstrip(b'}]"'), b"", bytes(len(data))):
        file.write_bytes(left)
        assert not states(run)[8]
        [problem] = fastshard.list_checkpoints(run)[-1].problems[:1]
        assert problem.startswith(name)


def test_a_checkpoint_that_trainer_was_killed_in_is_not_complete(run: Path) -> None:
    """It writes model, optimizer, scheduler, random numbers and its state, one after the other."""
    order = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
    for count in range(len(order)):
        stopped = run / f"checkpoint-{10 + count}"
        shutil.copytree(run / "checkpoint-8", stopped)
        for name in order[count:]:
            (stopped / name).unlink()
    assert states(run) == {**dict.fromkeys(STEPS, True), **dict.fromkeys(range(10, 15), False)}
    (run / "checkpoint-8" / "checkpoint-is-incomplete.txt").write_text("")
    assert fastshard.latest_checkpoint(run) == str(run / "checkpoint-6")


def test_checkpoints_of_the_model_only_are_complete_without_an_optimizer(tmp_path: Path) -> None:
    trained(tmp_path / "run", save_only_model=True, max_steps=2)
    assert "optimizer.pt" not in names(tmp_path / "run" / "checkpoint-2")
    assert states(tmp_path / "run") == {2: True}


def test_index_and_shards_have_to_agree(tmp_path: Path) -> None:
    folder = of_shards(tmp_path / "checkpoint-1")
    assert problems_of(str(folder)) == []
    index = folder / "model.safetensors.index.json"
    one, two, three = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
    data, text = (folder / two).read_bytes(), index.read_text()
    (folder / two).unlink()
    assert problems_of(str(folder)) == [f"{two} is missing, and {index.name} names it"]
    index.unlink()
    assert problems_of(str(folder)) == ["1 of 3 shards are missing, and their index"]
    (folder / two).write_bytes(data)
    assert problems_of(str(folder)) == ["the index of 3 shards is missing"]
    index.write_text(text)
    (folder / two).write_bytes((folder / three).read_bytes())
    [problem] = problems_of(str(folder))
    assert "layer.1.weight" in problem and two in problem
    (folder / two).write_bytes(data + b"\0")
    [problem] = problems_of(str(folder))
    assert problem.startswith(two) and "the file has" in problem
    (folder / two).unlink()
    (folder / two).symlink_to("nowhere")
    assert two in problems_of(str(folder))[0]


def test_a_folder_without_weights_is_no_checkpoint(run: Path) -> None:
    (run / "checkpoint-8" / "model.safetensors").unlink()
    assert problems_of(str(run / "checkpoint-8")) == ["it holds no weights"]
    (run / "checkpoint-9").mkdir()
    assert fastshard.list_checkpoints(run)[-1].problems == ("it holds no weights",)


def test_files_and_sizes_of_a_manifest_are_compared(run: Path) -> None:
    folder = run / "checkpoint-8"
    files = {name: FileEntry(os.path.getsize(folder / name)) for name in names(folder)}
    (folder / MANIFEST_NAME).write_text(Manifest(files=files).to_json())
    assert states(run)[8]
    (folder / "config.json").write_text("{}")
    (folder / "generation_config.json").unlink()
    assert [problem.partition(" ")[0] for problem in problems_of(str(folder))] == [
        "config.json",
        "generation_config.json",
    ]
    (folder / MANIFEST_NAME).unlink()
    made = subprocess.run("sha256sum *", shell=True, cwd=folder, check=True, capture_output=True)
    (folder / SUMS_NAME).write_bytes(made.stdout)
    assert problems_of(str(folder)) == []
    (folder / "config.json").unlink()
    assert problems_of(str(folder)) == [f"config.json is missing, and {SUMS_NAME} names it"]
    (folder / MANIFEST_NAME).write_text("{}")
    assert any(problem.startswith(MANIFEST_NAME) for problem in problems_of(str(folder)))


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_of_many_ranks_need_their_metadata_and_all_files(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    inner = tmp_path / "step-5" / "pytorch_model_fsdp_0"  # as accelerate names it
    dcp.save({"w": filled((100,))}, checkpoint_id=inner, no_dist=True)
    [found] = fastshard.list_checkpoints(tmp_path, prefix="step-")
    assert found.complete and fastshard.list_checkpoints(tmp_path) == []
    [file] = [name for name in names(inner) if name.endswith(".distcp")]
    data = (inner / file).read_bytes()
    (inner / file).write_bytes(data[:100])
    assert f"{inner.name}/{file}" in problems_of(str(inner.parent))[0]
    (inner / file).write_bytes(data)
    (inner / ".metadata").unlink()
    assert "metadata is missing" in problems_of(str(inner.parent))[0]


# The command -----------------------------------------------------------------------------------------------


def test_the_newest_complete_one_for_scripts(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoints", str(run), "--latest"]) == 0
    assert capfd.readouterr().out == f"{run / 'checkpoint-8'}\n"
    (run / "checkpoint-8" / "optimizer.pt").unlink()
    assert cli.main(["checkpoints", str(run), "--latest"]) == 0
    assert capfd.readouterr().out == f"{run / 'checkpoint-6'}\n"
    assert cli.main(["checkpoints", str(run), "--complete"]) == 0
    assert capfd.readouterr().out.splitlines() == [str(run / f"checkpoint-{n}") for n in (2, 4, 6)]
    assert cli.main(["checkpoints", str(run)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["complete", "complete", "complete", "not"]
    assert "the optimizer's state is missing" in lines[-1]
    assert cli.main(["checkpoints", str(run), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)["checkpoints"]
    assert [(c["step"], c["complete"]) for c in found] == [(2, True), (4, True), (6, True), (8, False)]
    for name in checkpoint_names(run):
        (run / name / "model.safetensors").write_bytes(b"")
    assert cli.main(["checkpoints", str(run), "--latest"]) == 1
    assert capfd.readouterr().out == ""
    assert cli.main(["checkpoints", str(run / "nowhere"), "--latest"]) == 1


def test_paths_are_printed_as_the_bytes_that_they_are(tmp_path: Path) -> None:
    run = os.fsencode(tmp_path) + b"/run \xff"
    of_shards(Path(os.fsdecode(run)) / "checkpoint-1")
    for option in ("--latest", "--complete"):
        command = [sys.executable, "-m", "fastshard", "checkpoints", run, option]
        assert subprocess.check_output(command, cwd=Path(__file__).parent) == run + b"/checkpoint-1\n"


def test_wrong_arguments_are_told_apart(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--delete"], ["--keep-last", "0"], ["--keep-last", "1", "--latest"], ["--keep", "a"]):
        assert cli.main(["checkpoints", str(run), *wrong]) == 2
    with pytest.raises(ValueError, match="keep_last or keep_every"):
        fastshard.prune_checkpoints(run)
    with pytest.raises(ValueError, match="of at least 1"):
        fastshard.prune_checkpoints(run, keep_last=0)
    assert checkpoint_names(run) == [f"checkpoint-{step}" for step in STEPS]


# Retention ---------------------------------------------------------------------------------------------------


def test_the_last_and_every_so_many_are_kept(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoints", str(run), "--keep-last", "1", "--keep-every", "4"]) == 0
    assert capfd.readouterr().out.count("would be deleted") == 2
    assert checkpoint_names(run) == [f"checkpoint-{step}" for step in STEPS]
    arguments = ["checkpoints", str(run), "--keep-last", "1", "--keep-every", "4", "--delete", "--json"]
    assert cli.main(arguments) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["deleted"] == [str(run / "checkpoint-2"), str(run / "checkpoint-6")]
    assert checkpoint_names(run) == ["checkpoint-4", "checkpoint-8"]
    done = fastshard.prune_checkpoints(run, keep_last=1, durable=True)
    assert done.deleted == [str(run / "checkpoint-4")] and states(run) == {8: True}
    assert fastshard.prune_checkpoints(run, keep_last=1).deleted == []


def test_nothing_goes_before_the_new_one_stands_and_never_the_last_complete_one(run: Path) -> None:
    (run / "checkpoint-8" / "optimizer.pt").unlink()
    done = fastshard.prune_checkpoints(run, keep_last=2)
    assert done.deleted == [str(run / "checkpoint-2")]
    assert states(run) == {4: True, 6: True, 8: False}  # 8 may be being written
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    assert fastshard.prune_checkpoints(run, keep_last=1).deleted == []
    assert fastshard.prune_checkpoints(run, keep_last=1, incomplete=True).deleted == [
        str(run / "checkpoint-4")
    ]
    (run / "checkpoint-6" / "optimizer.pt").unlink()
    done = fastshard.prune_checkpoints(run, keep_last=1, incomplete=True)
    assert done.deleted == [] and states(run) == {6: False, 8: False}


def test_the_best_one_and_what_is_pointed_to_are_kept(run: Path) -> None:
    state = json.loads((run / "checkpoint-8" / "trainer_state.json").read_text())
    state["best_model_checkpoint"] = "/another/machine/run/checkpoint-2"
    (run / "checkpoint-8" / "trainer_state.json").write_text(json.dumps(state))
    (run / "good").symlink_to("checkpoint-4")
    done = fastshard.prune_checkpoints(run, keep_last=1, dry_run=True)
    assert done.deleted == [str(run / "checkpoint-6")]
    assert done.kept[str(run / "checkpoint-2")] == "the best"
    file = run / "checkpoint-8" / "config.json"
    file.unlink()
    file.symlink_to("../checkpoint-6/config.json")
    done = fastshard.prune_checkpoints(run, keep_last=1)
    assert done.deleted == [] and "links into it" in done.kept[str(run / "checkpoint-6")]
    file.unlink()
    shutil.copyfile(run / "checkpoint-6" / "config.json", file)
    (run / "good").unlink()
    (run / "latest").write_text("checkpoint-4\n")
    done = fastshard.prune_checkpoints(run, keep_last=1, keep=["checkpoint-6"])
    assert done.deleted == [] and done.kept[str(run / "checkpoint-4")] == "latest leads to it"
    assert [c.step for c in fastshard.list_checkpoints(run)] == list(STEPS)


def test_what_an_earlier_run_has_left_does_not_make_the_new_one_go(run: Path) -> None:
    """Training began anew, in the same folder."""
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-1")
    os.utime(run / "checkpoint-1")
    done = fastshard.prune_checkpoints(run, keep_last=1)
    assert states(run) == {1: True, 8: True} and "written" in done.kept[str(run / "checkpoint-1")]


def test_a_checkpoint_whose_files_are_hard_links_into_a_deleted_one_loads(run: Path) -> None:
    from safetensors.torch import load_file

    old, new = (run / f"checkpoint-{step}" / "model.safetensors" for step in (6, 8))
    new.unlink()
    os.link(old, new)
    before = {name: tensor.clone() for name, tensor in load_file(old).items()}
    fastshard.prune_checkpoints(run, keep_last=1)
    found = load_file(new)
    assert checkpoint_names(run) == ["checkpoint-8"] and found.keys() == before.keys()
    assert all(torch.equal(found[name], before[name]) for name in before)


KILLED = """
    import os, shutil, signal, sys
    import fastshard
    from fastshard.tools import run_folder
    number, calls = int(sys.argv[2]), 0

    def dying(function):
        def call(*args, **kwargs):
            global calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call

    os.rename, os.unlink, os.rmdir = map(dying, (os.rename, os.unlink, os.rmdir))
    fastshard.prune_checkpoints(sys.argv[1], keep_last=1)
    sys.exit(calls)
"""


def test_a_kill_leaves_no_checkpoint_in_part_and_the_next_call_goes_on(run: Path, tmp_path: Path) -> None:
    def prune(folder: Path, number: int) -> int:
        command = [sys.executable, "-c", textwrap.dedent(KILLED), str(folder), str(number)]
        return subprocess.run(command, timeout=300, cwd=Path(__file__).parent).returncode

    for number in (2, 5):
        folder = tmp_path / f"killed at {number}"
        shutil.copytree(run, folder)
        assert prune(folder, number) == -signal.SIGKILL
        assert all(states(folder).values()) and states(folder)[8]  # all that is seen is complete
        assert any(name.endswith(".deleted") for name in names(folder))
        fastshard.prune_checkpoints(folder, keep_last=1)
        assert states(folder) == {8: True}
        assert [name for name in names(folder) if name.startswith(".fastshard")] == []


def test_two_processes_may_prune_at_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Callable[..., Any] = run_folder._delete

    def twice(folder: str, name: str) -> None:
        plain(folder, name)
        plain(folder, name)

    monkeypatch.setattr(run_folder, "_delete", twice)
    assert len(fastshard.prune_checkpoints(run, keep_last=1).deleted) == 3
    assert states(run) == {8: True}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_training_code_prunes_after_each_save(tmp_path: Path, asynchronous: bool) -> None:
    import transformers

    folder, seen = tmp_path / "run", []

    class Keep(transformers.TrainerCallback):
        def prune(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            fastshard.prune_checkpoints(args.output_dir, keep_last=2)
            seen.append(states(folder))

    # Who is called for a save may look at it, so it would not be asynchronous.
    setattr(Keep, "on_step_begin" if asynchronous else "on_save", Keep.prune)
    with fastshard.installed(asynchronous=asynchronous):
        trained_with(folder, Keep())
    assert all(all(found.values()) for found in seen)
    # One may appear between the call and the look.
    assert max(len(found) for found in seen) <= 2 + asynchronous
    assert not fastshard.status().on_the_spot and max(states(folder)) == 8
    if not asynchronous:
        assert [sorted(found) for found in seen] == [[2], [2, 4], [4, 6], [6, 8]]
    fastshard.prune_checkpoints(folder, keep_last=2)
    assert states(folder) == {6: True, 8: True}


def trained_with(folder: Path, callback: Any) -> Any:
    import transformers

    with pytest.MonkeyPatch.context() as patch:
        plain = transformers.Trainer.__init__
        patch.setattr(
            transformers.Trainer,
            "__init__",
            lambda self, *args, **kwargs: plain(self, *args, callbacks=[callback], **kwargs),
        )
        return trained(folder)


# What they occupy ----------------------------------------------------------------------------------------------


def test_links_count_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As checkpoints have them of which most files did not change."""
    run, mib = tmp_path / "run", 1 << 20
    for step in (1, 2, 3):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        (run / f"checkpoint-{step}" / "changed").write_bytes(os.urandom(mib))
        if step > 1:
            os.link(run / "checkpoint-1" / "frozen", run / f"checkpoint-{step}" / "frozen")
        else:
            (run / "checkpoint-1" / "frozen").write_bytes(os.urandom(4 * mib))
    (run / "log").write_bytes(os.urandom(mib))
    os.sync()
    found = usage_of([run])
    folder = (run / "checkpoint-1").stat().st_blocks * 512
    assert [one.name for one in found.checkpoints] == [*checkpoint_names(run), OTHERS]
    assert [one.nbytes for one in found.checkpoints] == [5 * mib] * 3 + [mib]
    assert [one.occupied for one in found.checkpoints] == [5 * mib + folder] * 3 + [mib]
    assert [one.frees for one in found.checkpoints] == [mib + folder] * 3 + [mib]
    assert found.nbytes == 16 * mib and found.occupied == 8 * mib + 3 * folder
    for step in (1, 2):
        shutil.rmtree(run / f"checkpoint-{step}")
    assert usage_of([run]).checkpoints[0].frees == 5 * mib + folder
    os.link(run / "checkpoint-3" / "frozen", tmp_path / "elsewhere")
    assert usage_of([run]).checkpoints[0].frees == mib + folder
    assert usage_of([run, tmp_path / "elsewhere"]).checkpoints[2].occupied == 4 * mib
    assert cli.main(["du", str(run)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["checkpoint-3", "2", "5.00", "MiB"] and lines[-1].startswith("together")
    assert cli.main(["du", str(run), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["occupied"] == 6 * mib + folder
    assert cli.main(["du", str(tmp_path / "nowhere")]) == 1


def test_blocks_that_files_share_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FIEMAP would tell of copies that a filesystem has made without copying."""
    mib = 1 << 20
    told = {
        "checkpoint-1": [Extent(0, 4 * mib)],
        "checkpoint-2": [Extent(0, 3 * mib)],
        "checkpoint-3": [Extent(mib, mib), Extent(100 * mib, mib)],  # the second with a file elsewhere
    }
    for name in told:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(os.urandom(4 * mib))
    os.sync()
    monkeypatch.setattr(
        usage, "_shared_extents", lambda path: told[Path(path).parent.name] if "weights" in path else []
    )
    folder = (tmp_path / "checkpoint-1").stat().st_blocks * 512
    found = usage_of([tmp_path])
    # 0-1: of 1 and 2; 1-2: of all; 2-3: of 1 and 2; 3-4: said to be shared, but with nobody here.
    assert [one.occupied - folder for one in found.checkpoints] == [4 * mib] * 3
    assert [one.frees - folder for one in found.checkpoints] == [0, mib, 2 * mib]
    assert found.occupied == (4 + 1 + 2 + 1) * mib + 3 * folder


def test_extents_are_read_as_the_kernel_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real call, of a file with holes: here nothing is shared, so all placed extents are taken for shared."""
    path = tmp_path / "holes"
    with open(path, "wb") as file:
        for at in range(700):  # more than one call tells
            file.seek(at * 16384)
            file.write(b"x" * 4096)
        file.flush()
        os.fsync(file.fileno())
    with open(path, "rb") as file:
        try:
            assert list(usage._shared_in(file.fileno())) == []
        except OSError as error:
            pytest.skip(f"no FIEMAP here: {error}")
        monkeypatch.setattr(usage, "_EXTENT", AllFlagged)
        found = list(usage._shared_in(file.fileno()))
    assert len(found) == 700 and sum(extent.nbytes for extent in found) == 700 * 4096
    assert len({extent.begin for extent in found}) == 700


class AllFlagged:
    """The struct of an extent, which is said to be shared."""

    size = usage._EXTENT.size

    @staticmethod
    def unpack_from(buffer: bytearray, at: int, plain: Any = usage._EXTENT) -> tuple[int, int, int, int]:
        logical, physical, nbytes, flags = plain.unpack_from(buffer, at)
        return logical, physical, nbytes, flags | 0x2000


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_reflinks_of_a_real_filesystem_count_once(tmp_path: Path, kind: str) -> None:
    mkfs = shutil.which(f"mkfs.{kind}", path=f"{os.environ['PATH']}:/sbin:/usr/sbin")
    if mkfs is None:
        pytest.skip(f"no mkfs.{kind} here")
    image, mount, mib = tmp_path / "image", tmp_path / "mount", 1 << 20
    image.write_bytes(b"")
    os.truncate(image, 400 * mib)
    mount.mkdir()
    subprocess.run([mkfs, "-q", image], check=True, capture_output=True)
    if subprocess.run(["mount", "-o", "loop", image, mount], capture_output=True).returncode != 0:
        without_mounts("mounting a filesystem is not allowed here")
    try:
        for step in (1, 2, 3):
            (mount / f"checkpoint-{step}").mkdir()
        first, *others = (mount / f"checkpoint-{step}" / "weights" for step in (1, 2, 3))
        first.write_bytes(os.urandom(20 * mib))
        for other in others:
            subprocess.run(["cp", "--reflink=always", first, other], check=True)
        with open(others[1], "r+b") as file:
            file.seek(5 * mib)
            file.write(os.urandom(8 * mib))
        os.sync()
        found = usage_of([mount])
        assert [one.nbytes for one in found.checkpoints[:3]] == [20 * mib] * 3
        assert [one.frees // mib for one in found.checkpoints[:3]] == [0, 0, 8]
        assert sum(one.occupied for one in found.checkpoints[:3]) // mib == 60 and found.occupied // mib == 28
    finally:
        subprocess.run(["umount", "-l", mount], check=True)
