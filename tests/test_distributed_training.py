# SPDX-License-Identifier: Apache-2.0
"""Training on two ranks: what accelerate and ``Trainer`` save under DDP and FSDP2 is theirs, and is resumed from with the
same bits."""

from __future__ import annotations

import contextlib
import os
import random
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed.checkpoint as dcp
from conftest import by_one_worker
from helpers import names, release
from safetensors.torch import load_file
from test_manifest_saves import check

import fastshard
from fastshard.base import activity
from fastshard.cli import main

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("no_hang")]

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "LOCAL_WORLD_SIZE": "2",
    "HF_HUB_OFFLINE": "1",
    "ACCELERATE_TORCH_DEVICE": "cpu",  # else "cpu:0", to which torch 2.4 loads nothing
}
SHARDED, FULL = "SHARDED_STATE_DICT", "FULL_STATE_DICT"
WHY_NOT = {
    SHARDED: "accelerate before 1.13 does not find the optimizer that it has saved in this way"
    if release("accelerate") < (1, 13)
    else "",
    FULL: "accelerate before 1.10 is not known to save full state dicts of FSDP2 on the CPU; 1.6 refuses to"
    if release("accelerate") < (1, 10)
    else "",
}
"""Why a kind of FSDP's state dicts cannot be tried with the installed versions, which are of one time: torch is newer than
FSDP2 wherever accelerate is."""
BY_FSDP2 = [
    pytest.param(kind, marks=pytest.mark.skipif(bool(reason), reason=reason))
    for kind, reason in WHY_NOT.items()
]
DCP_IS_OURS = release("torch") >= (2, 13)
"""Whether the engine writes what torch's own writers of distributed checkpoints are given."""


def use_fsdp_on_the_cpu() -> None:
    """Lets accelerate take FSDP for possible on the CPU.

    It asks for FSDP where several processes have a GPU each, and else ignores it. Of this only the kind of processes is
    told here; the device is the CPU's, and so is the backend of the group, gloo.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def local(value: Any) -> Any:
    """A copy of this rank's part of what may be a ``DTensor``, as something to compare."""
    if isinstance(value, dict):
        return {key: local(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [local(inner) for inner in value]
    if isinstance(value, torch.Tensor):
        value = value.to_local() if hasattr(value, "to_local") else value
        return str(value.dtype), value.tolist()
    return value


def tree(folder: Path) -> dict[str, Any]:
    """What is in the files of a folder.

    Metadata of DCP has a number of the save in it, and the optimizer of a full state dict has lists for tuples when it has
    been loaded on ranks: of these only what was saved.
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == ".metadata":
            said = dcp.FileSystemReader(path.parent).read_metadata()
            found[name] = said.storage_data, said.state_dict_metadata, said.planner_data
        elif path.name == "optimizer.bin":
            with zipfile.ZipFile(path) as archive:
                found[name] = {n: archive.read(n) for n in archive.namelist() if "/data/" in n}
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def saved() -> dict[str, int]:
    """How many saves of each function the engine has made in this process. It has left nothing."""
    left = {(call, reason) for call, reasons in fastshard.status().left.items() for reason in reasons}
    assert left <= {("torch.save", "a BytesIO")}, left  # parts of files of DCP
    counts = {call: total.saves for call, total in fastshard.status().saved.items()}
    activity._forget()
    return counts


# accelerate


def save_and_load_states(folder: Path, kind: str) -> tuple[dict[str, int], dict[str, Any]]:
    """Saves with fastshard and without, and loads either with either. Returns what the engine has saved, and the weights."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import merge_fsdp_weights

    use_fsdp_on_the_cpu()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type=kind, auto_wrap_policy="size_based_wrap", min_num_params=1
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert accelerator.is_fsdp2 and accelerator.device.type == "cpu"
    torch.manual_seed(accelerator.process_index)
    model = torch.nn.Sequential(torch.nn.Linear(11, 7), torch.nn.Dropout(0.3), torch.nn.Linear(7, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

    def step() -> None:
        random.random()
        accelerator.backward(model(torch.rand(2, 11)).square().mean())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    def state() -> Any:
        states = model.state_dict(), optimizer.state_dict(), scheduler.state_dict()
        return local([*states, torch.get_rng_state(), list(random.getstate())])

    step()
    before = state()
    accelerator.save_state(str(folder / "stock"))
    with fastshard.installed():
        accelerator.save_state(str(folder / "ours"))
    counts = saved()
    assert state() == before
    for name, installed in (("ours", True), ("ours", False), ("stock", True)):
        step()
        assert all(now != then for now, then in zip(state(), before))
        with fastshard.installed() if installed else contextlib.nullcontext():
            accelerator.load_state(str(folder / name))
        assert state() == before, (name, installed)
    if kind == SHARDED:
        merge_fsdp_weights(str(folder / "stock" / "pytorch_model_fsdp_0"), str(folder / "stock-merged"))
        with fastshard.installed():
            merge_fsdp_weights(str(folder / "ours" / "pytorch_model_fsdp_0"), str(folder / "merged"))
    return counts, {name: value.full_tensor().tolist() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", BY_FSDP2)
def test_states_of_accelerate(tmp_path: Path, kind: str) -> None:
    (counts, weights), (others, _) = ranks.run(
        2, save_and_load_states, tmp_path, kind, environment=ENVIRONMENT
    )
    if kind == FULL:
        files = {"pytorch_model_fsdp.bin", "optimizer.bin"}
        assert (counts, others) == ({"torch.save": 4}, {"torch.save": 1})
    else:
        files = {
            f"{folder}/{name}"
            for folder in ("pytorch_model_fsdp_0", "optimizer_0")
            for name in (".metadata", "__0_0.distcp", "__1_0.distcp")
        }
        by_dcp = {"dcp.save": 2} if DCP_IS_OURS else {}
        assert (counts, others) == ({"torch.save": 2, **by_dcp}, {"torch.save": 1, **by_dcp})
    found = tree(tmp_path / "ours")
    assert found.keys() == {*files, "scheduler.bin", "random_states_0.pkl", "random_states_1.pkl"}
    assert found == tree(tmp_path / "stock")
    if kind == SHARDED:
        source = tmp_path / "ours" / "pytorch_model_fsdp_0"
        assert main(["convert", str(source), str(tmp_path / "converted.safetensors"), "--quiet"]) == 0
        for path in ("merged/model.safetensors", "stock-merged/model.safetensors", "converted.safetensors"):
            merged = load_file(tmp_path / path)
            assert {name: tensor.tolist() for name, tensor in merged.items()} == weights, path
    assert ranks.leftovers(tmp_path) == []


# Trainer

TRAINER_NAMES_IT = release("transformers") >= (5,)
"""Whether ``fsdp_config`` says which FSDP it is; transformers 4 leaves that to ``accelerate launch``."""
KINDS: dict[str, dict[str, Any]] = {"DDP": {}}
for _kind in (kind for kind, reason in WHY_NOT.items() if not reason and TRAINER_NAMES_IT):
    how = {"version": 2, "state_dict_type": _kind, "transformer_layer_cls_to_wrap": ["Linear"]}
    KINDS[_kind] = {"fsdp": "full_shard", "fsdp_config": how}


class Stopped(Exception):
    """The end of a job that is to go on later."""


def trainer_of(**options: Any) -> Any:
    """One in the current folder, whose files say nothing of where that is."""
    import transformers
    from accelerate.state import AcceleratorState

    class Model(transformers.PreTrainedModel):  # type: ignore[name-defined,misc]
        config_class = transformers.PretrainedConfig

        def __init__(self) -> None:
            super().__init__(transformers.PretrainedConfig())
            torch.manual_seed(0)
            self.inner, self.head = torch.nn.Linear(9, 7), torch.nn.Linear(7, 1)

        def get_input_embeddings(self) -> None: ...

        def get_output_embeddings(self) -> None: ...

        def forward(self, x: torch.Tensor, **_: object) -> dict[str, torch.Tensor]:
            return {"loss": self.head(torch.dropout(self.inner(x), 0.3, self.training)).square().mean()}

    transformers.utils.logging.set_verbosity_error()
    AcceleratorState._reset_state(True)
    if "logging_dir" in transformers.TrainingArguments.__dataclass_fields__:  # else it names the time
        options["logging_dir"] = "logs"
    fixed = {"per_device_train_batch_size": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    arguments = transformers.TrainingArguments("run", save_total_limit=2, **fixed, **options)
    if "fsdp" in options:
        use_fsdp_on_the_cpu()
    data = [{"x": torch.arange(9) * 0.1 - number} for number in range(16)]
    return transformers.Trainer(Model(), arguments, train_dataset=data)


def stop_after(trainer: Any, steps: int) -> None:
    step = trainer.training_step

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == steps:
            raise Stopped
        return step(*args, **kwargs)

    trainer.training_step = stopping


def train(folder: Path, resumes: bool) -> dict[str, Any]:
    """Trains to the end without fastshard, and with it until the job is stopped; or goes on with what was stopped.
    Returns the weights and what the engine has saved, by kind and name."""
    found: dict[str, Any] = {}
    for kind, options in KINDS.items():
        for name in ("ours",) if resumes else ("stock", "ours"):
            (folder / kind / name).mkdir(parents=True, exist_ok=True)
            os.chdir(folder / kind / name)
            trainer = trainer_of(max_steps=6, save_steps=2, **options)
            assert trainer.accelerator.num_processes == 2
            assert kind == "DDP" or trainer.accelerator.is_fsdp2
            with contextlib.ExitStack() as stack:
                if name == "ours":
                    stack.enter_context(fastshard.installed())
                if name == "ours" and not resumes:
                    stop_after(trainer, 3)
                    stack.enter_context(pytest.raises(Stopped))
                trainer.train(resume_from_checkpoint=resumes or None)
            found[f"{kind} {name}"] = local(trainer.model_wrapped.state_dict()), saved()
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Where all kinds of jobs have run, and what :func:`train` has returned in each rank."""
    return by_one_worker(tmp_path_factory, "training", all_jobs)


def all_jobs(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    first = ranks.run(2, train, folder, False, environment=ENVIRONMENT)
    for kind in KINDS:
        assert names(folder / kind / "ours" / "run") == ["checkpoint-2"]
    second = ranks.run(2, train, folder, True, environment=ENVIRONMENT)
    return folder, [
        {**{name: found for name, found in one.items() if "stock" in name}, **other}
        for one, other in zip(first, second)
    ]


@pytest.mark.parametrize("kind", ["DDP", *BY_FSDP2])
def test_a_job_of_a_trainer_goes_on(kind: str, trained: Any) -> None:
    """It ends with the weights of one that was not stopped, and the files are those that are saved without fastshard."""
    folder, found = trained
    if kind not in KINDS:
        pytest.skip("fsdp_config of transformers 4 does not say which FSDP it is")
    for one in found:
        assert one[f"{kind} ours"][0] == one[f"{kind} stock"][0]
    assert names(folder / kind / "ours" / "run") == ["checkpoint-4", "checkpoint-6"]
    ours, stock = (tree(folder / kind / name) for name in ("ours", "stock"))
    assert len(ours) >= 2 * 7 and ours == stock
    counts = [one[f"{kind} ours"][1] for one in found]
    assert all("torch.save" in count for count in counts)
    if kind == SHARDED:
        assert [count.get("dcp.save") for count in counts] == [4 if DCP_IS_OURS else None] * 2
    else:
        assert [count.get("PreTrainedModel.save_pretrained") for count in counts] == [2, None]
    assert ranks.leftovers(folder) == []


# Manifests


def in_turn(save: Callable[..., Any], done: Path, comes_last: bool) -> Callable[..., Any]:
    """The function, which makes a file when it is done, or waits for that file first."""

    def saving(*args: Any, **kwargs: Any) -> Any:
        deadline = time.monotonic() + 60
        while comes_last and not done.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        result = save(*args, **kwargs)
        done.touch()
        return result

    return saving


def save_late(folder: Path) -> dict[str, dict[str, int]]:
    """The second rank writes its random states when the first one has returned from its save."""
    from accelerate import Accelerator, accelerator

    os.chdir(folder)
    with fastshard.installed(asynchronous=True, manifest="sha256"):
        trainer = trainer_of(max_steps=1, save_steps=1)
        if trainer.args.process_index == 0:
            trainer._save_checkpoint = in_turn(trainer._save_checkpoint, folder / "done", False)
        else:
            trainer._save_rng_state = in_turn(trainer._save_rng_state, folder / "done", True)
        trainer.train()
        made = Accelerator(cpu=True)
        made.prepare(torch.nn.Linear(30, 30))
        save = accelerator.save_accelerator_state
        for number in range(2):  # into the same folder
            torch.rand(3)
            done = folder / f"done-{number}"
            if made.is_main_process:
                in_turn(made.save_state, done, False)("state")
            else:
                accelerator.save_accelerator_state = in_turn(save, done, True)
                made.save_state("state")
            made.wait_for_everyone()
    return fastshard.status().on_the_spot


def test_manifests_have_what_a_rank_saves_last(tmp_path: Path) -> None:
    for spots in ranks.run(2, save_late, tmp_path, environment=ENVIRONMENT):
        for call in ("Trainer._save_checkpoint", "Accelerator.save_state"):
            assert "several processes save together" in spots[call]
    for folder, last in (("run/checkpoint-1", "rng_state_1.pth"), ("state", "random_states_1.pkl")):
        assert last in names(tmp_path / folder)
        check(tmp_path / folder, "sha256")
