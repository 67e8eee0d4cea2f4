# SPDX-License-Identifier: Apache-2.0
"""``install(asynchronous=True)``: checkpoints of ``Trainer`` appear complete or not at all while training goes on."""

from __future__ import annotations

import _thread
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import names
from safetensors.torch import load_file

import fastshard
from fastshard.api.archive_skeleton import torch_makes_holes
from fastshard.base import activity
from fastshard.engine import background
from fastshard.integrations.report import NOT_YET
from fastshard.publish import checkpoint as checkpoints

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import transformers  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore")]

CALL = "Trainer._save_checkpoint"
FILES = {
    "model.safetensors",
    "config.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
}


class Config(transformers.PretrainedConfig):
    model_type = "own"


class Model(transformers.PreTrainedModel):
    config_class = Config

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(config or Config())
        torch.manual_seed(0)
        self.inner = torch.nn.Linear(200, 200)
        self.head = torch.nn.Linear(200, 1)
        self.post_init()

    def _init_weights(self, module: object) -> None: ...

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        found = self.head(torch.dropout(self.inner(x), 0.1, self.training))
        return {"loss": (found**2).mean(), "logits": found}


DATA = [{"x": torch.full((200,), float(i)), "labels": torch.ones(1)} for i in range(8)]


def trainer_of(folder: Path, kind: type = transformers.Trainer, callbacks: Any = None, **options: Any) -> Any:
    options = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", **options}
    if "logging_dir" in transformers.TrainingArguments.__dataclass_fields__:  # else it names the time
        options["logging_dir"] = str(folder / "logs")
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **options,
    )
    return kind(Model(), arguments, train_dataset=DATA, eval_dataset=DATA[:2], callbacks=callbacks)


def ready(folder: Path, kind: type = transformers.Trainer, callbacks: Any = None, **options: Any) -> Any:
    """A trainer after its first step, that makes checkpoints when it is told to."""
    trainer = trainer_of(folder, kind, callbacks, **options)
    trainer.create_optimizer_and_scheduler(10)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer.optimizer.step()
    trainer.state.global_step = 1
    return trainer


def save(trainer: Any, step: int) -> None:
    trainer.state.global_step = step
    trainer._save_checkpoint(trainer.model, trial=None)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(autouse=True)
def quiet(no_hang: None) -> Iterator[None]:
    activity._forget()
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()
    assert not checkpoints._in_flight
    fastshard.uninstall()


@pytest.fixture
def asynchronous() -> Iterator[None]:
    with fastshard.installed(asynchronous=True):
        yield


class Gate:
    """Stands for an earlier save of the same files, which ends when the event is set."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.relief = self

    def take_over(self, why: str) -> None:
        """It has no writers that could be relieved."""

    @property
    def _settled(self) -> bool:
        return self.go.is_set()

    def _pass(self, seconds: float) -> None:
        self.go.wait(seconds)

    def wait(self) -> None:
        """A save that is not asynchronous is not held up."""


@pytest.fixture
def held(asynchronous: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No asynchronous save writes anything before this event."""
    gate = Gate()
    monkeypatch.setattr(background, "conflicting", lambda paths: [gate])
    yield gate.go
    gate.go.set()
    background.wait_all()


def in_process(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent,
    )


def visible(folder: Path) -> list[str]:
    return [name for name in names(folder) if not name.startswith(".fastshard") and name != "logs"]


def on_the_spot() -> str:
    return " ".join(fastshard.status().on_the_spot.get(CALL, {}))


# The same files -----------------------------------------------------------------------------------------


def train(folder: Path, resume: bool = False, **options: Any) -> Any:
    trainer = trainer_of(folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def by_both(
    tmp_path: Path, act: Callable[[Path], Any]
) -> tuple[dict[str, bytes], dict[str, bytes], Any, Any]:
    """What is in a run folder, and what was returned, without fastshard and with it: the folder has the same name."""
    folder = tmp_path / "run"
    returned = [act(folder)]
    folder.rename(tmp_path / "plain")
    with fastshard.installed(asynchronous=True):
        returned.append(act(folder))
    return tree(tmp_path / "plain"), tree(folder), *returned


def test_every_file_is_the_same_and_training_resumes_to_the_bit(tmp_path):
    plain, ours, *_ = by_both(tmp_path, train)
    assert ours.keys() == plain.keys() and {f"checkpoint-2/{name}" for name in FILES} < ours.keys()
    assert [name for name in plain if plain[name] != ours[name]] == []
    status = fastshard.status()
    assert status.saved[CALL].saves == 2 and not status.on_the_spot and not status.in_flight
    assert "PreTrainedModel.save_pretrained" not in status.saved  # it is part of the checkpoint
    engines = (".safetensors", ".pt", ".pth", ".bin") if torch_makes_holes() else (".safetensors",)
    assert status.saved[CALL].nbytes == sum(len(ours[name]) for name in ours if name.endswith(engines))
    plain, ours, one, other = by_both(tmp_path / "again", lambda folder: train_further(tmp_path, folder))
    assert [name for name in plain if plain[name] != ours[name]] == []
    assert all(torch.equal(v, other.model.state_dict()[n]) for n, v in one.model.state_dict().items())


def train_further(tmp_path: Path, folder: Path) -> Any:
    shutil.copytree(tmp_path / "run", folder)
    return train(folder, resume=True, max_steps=8)


def test_rotation_keeps_what_it_keeps_without_us(tmp_path):
    for limit in (1, 2):
        plain, ours, *_ = by_both(
            tmp_path / str(limit),
            lambda folder, n=limit: train(folder, max_steps=5, save_steps=1, save_total_limit=n),
        )
        assert ours.keys() == plain.keys()
        assert {name.partition("/")[0] for name in ours} == {f"checkpoint-{n}" for n in range(6 - limit, 6)}


def strategy(value: str) -> dict[str, str]:
    fields = transformers.TrainingArguments.__dataclass_fields__
    return {"eval_strategy" if "eval_strategy" in fields else "evaluation_strategy": value}


class Worsens(transformers.Trainer):
    """The second evaluation is the best one."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return {"eval_loss": abs(self.state.global_step - 2.0)}


@pytest.mark.parametrize("limit", [None, 1])
def test_the_best_model_is_found_and_loaded(tmp_path, limit):
    def act(folder: Path) -> Any:
        trainer = trainer_of(
            folder,
            Worsens,
            save_steps=1,
            eval_steps=1,
            save_total_limit=limit,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            **strategy("steps"),
        )
        trainer.train()
        return trainer

    plain, ours, one, other = by_both(tmp_path, act)
    assert (
        one.state.best_model_checkpoint
        == other.state.best_model_checkpoint
        == str(tmp_path / "run" / "checkpoint-2")
    )
    assert ours.keys() == plain.keys()
    assert [name for name in plain if plain[name] != ours[name]] == []
    assert not on_the_spot()
    best = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(value, best[name]) for name, value in other.model.state_dict().items())
    said = json.loads(ours["checkpoint-2/trainer_state.json"])["best_model_checkpoint"]
    assert said == str(tmp_path / "run" / "checkpoint-2")


# Complete or not at all ---------------------------------------------------------------------------------


def test_nothing_is_to_be_seen_before_everything_is_written(tmp_path, held):
    trainer = ready(tmp_path, save_total_limit=1)
    save(trainer, 1)
    assert visible(tmp_path) == [] and fastshard.status().in_flight == (str(tmp_path / "checkpoint-1"),)
    [made] = checkpoints._in_flight
    assert len(made.saves) == 1 + torch_makes_holes()  # weights and moments; nothing of them is written
    assert all(
        save.staged() and not save.done() and not save.progress().nbytes_written for save in made.saves
    )
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    moments = [state["exp_avg"].clone() for state in trainer.optimizer.state.values()]
    with torch.no_grad():
        for tensor in (
            *trainer.model.parameters(),
            *(s["exp_avg"] for s in trainer.optimizer.state.values()),
        ):
            tensor.fill_(7)
    assert CALL not in fastshard.status().saved
    held.set()
    checkpoints.wait_for_earlier()
    folder = tmp_path / "checkpoint-1"
    assert set(names(folder)) > FILES and names(tmp_path) == ["checkpoint-1"]
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in before.items())
    state = torch.load(folder / "optimizer.pt")["state"].values()
    assert all(torch.equal(one["exp_avg"], other) for one, other in zip(state, moments, strict=True))
    assert fastshard.status().in_flight == () and fastshard.status().saved[CALL].saves == 1


def test_older_ones_are_removed_when_the_new_one_stands(tmp_path, held):
    trainer = ready(tmp_path, save_total_limit=1)
    held.set()
    save(trainer, 1)
    checkpoints.wait_for_earlier()
    held.clear()
    save(trainer, 2)
    assert visible(tmp_path) == ["checkpoint-1"]
    held.set()
    checkpoints.wait_for_earlier()
    assert names(tmp_path) == ["checkpoint-2"]


def test_a_checkpoint_that_is_there_is_replaced_at_once_and_other_files_stay(tmp_path, held):
    trainer = ready(tmp_path)
    held.set()
    save(trainer, 1)
    checkpoints.wait_for_earlier()
    folder = tmp_path / "checkpoint-1"
    (folder / "notes.txt").write_text("mine")
    before = tree(folder)
    held.clear()
    with torch.no_grad():
        trainer.model.head.weight.fill_(3)
    save(trainer, 1)
    assert {n: d for n, d in tree(folder).items()} == before
    held.set()
    checkpoints.wait_for_earlier()
    after = tree(folder)
    assert after.keys() == before.keys() and after["notes.txt"] == b"mine"
    assert bool((load_file(folder / "model.safetensors")["head.weight"] == 3).all())
    assert names(tmp_path) == ["checkpoint-1"]


def test_who_looks_for_checkpoints_waits_for_them(tmp_path, held):
    trainer = ready(tmp_path)
    save(trainer, 1)
    threading.Timer(0.2, held.set).start()
    assert transformers.trainer_utils.get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-1")


def test_messages_about_files_come_when_these_stand(tmp_path, held, caplog):
    transformers.utils.logging.set_verbosity_info()
    transformers.utils.logging.enable_propagation()
    try:
        trainer = ready(tmp_path)
        with caplog.at_level(logging.INFO):
            save(trainer, 1)
            assert "checkpoint-1" not in caplog.text
            held.set()
            checkpoints.wait_for_earlier()
    finally:
        transformers.utils.logging.set_verbosity_warning()
        transformers.utils.logging.disable_propagation()
    assert f"Saving model checkpoint to {tmp_path / 'checkpoint-1'}" in caplog.text
    assert ".fastshard" not in caplog.text


# Errors -------------------------------------------------------------------------------------------------


def test_an_error_in_flight_is_raised_by_the_next_checkpoint(tmp_path, held):
    trainer = ready(tmp_path)
    save(trainer, 1)
    (tmp_path / "checkpoint-1").write_text("a file in its place")
    held.set()
    with pytest.raises(OSError) as raised:
        save(trainer, 2)
    assert raised.value.filename == str(tmp_path / "checkpoint-1")
    assert names(tmp_path) == ["checkpoint-1"] and CALL not in fastshard.status().saved
    save(trainer, 2)
    checkpoints.wait_for_earlier()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_one_save_of_a_checkpoint_that_fails_is_the_checkpoints_error(tmp_path, held):
    trainer = ready(tmp_path)
    save(trainer, 1)
    [made] = checkpoints._in_flight
    made.saves[0].cancel()
    held.set()
    with pytest.raises(CancelledError):
        fastshard.wait_all()
    assert names(tmp_path) == []
    save(trainer, 2)  # it has been told
    checkpoints.wait_for_earlier()
    assert names(tmp_path) == ["checkpoint-2"]


def test_a_process_that_ends_waits_for_its_checkpoint(tmp_path):
    script = """
        import sys
        from pathlib import Path
        import fastshard
        import test_async_trainer as tests

        fastshard.install(asynchronous=True)
        trainer = tests.ready(Path(sys.argv[1]))
        tests.save(trainer, 1)
    """
    done = in_process(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == ["checkpoint-1"] and set(names(tmp_path / "checkpoint-1")) > FILES


def test_who_waits_may_be_interrupted_and_nothing_is_left(tmp_path, held):
    trainer = ready(tmp_path)
    save(trainer, 1)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored in what a shell has put in the background
    try:
        threading.Timer(0.3, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            checkpoints.wait_for_earlier()
    finally:
        signal.signal(signal.SIGINT, before)
    assert names(tmp_path) == [] and fastshard.status().in_flight == ()
    held.set()
    save(trainer, 2)
    checkpoints.wait_for_earlier()
    assert names(tmp_path) == ["checkpoint-2"]


def test_an_error_is_raised_where_the_checkpoint_was_made(tmp_path, held):
    """Another thread's trainer waits for it, and is not told."""
    trainer, other = ready(tmp_path / "one"), ready(tmp_path / "other")
    save(trainer, 1)
    (tmp_path / "one" / "checkpoint-1").write_text("a file in its place")
    held.set()
    thread = threading.Thread(target=save, args=(other, 1))
    thread.start()
    thread.join()
    assert names(tmp_path / "one") == ["checkpoint-1"]
    with pytest.raises(OSError, match="checkpoint-1"):
        save(trainer, 2)
    checkpoints.wait_for_earlier()
    assert names(tmp_path / "other") == ["checkpoint-1"]


class Blocks(transformers.TrainerCallback):
    """Puts a file in the place of the newest checkpoint, which is in flight."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            Path(args.output_dir, "checkpoint-3").write_text("a file in its place")
            self.go.set()


def test_an_error_in_flight_is_raised_at_the_end_of_training(tmp_path, held):
    callback = Blocks()
    callback.go = held
    trainer = trainer_of(tmp_path, callbacks=[callback], save_steps=3)
    with pytest.raises(OSError, match="checkpoint-3"):
        trainer.train()
    assert visible(tmp_path) == ["checkpoint-3"]


def test_training_that_fails_waits_for_what_is_in_flight(tmp_path, asynchronous):
    class Fails(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trainer_of(tmp_path, callbacks=[Fails()], save_steps=3).train()
    assert names(tmp_path) == ["checkpoint-3"] and set(names(tmp_path / "checkpoint-3")) > FILES


def test_an_error_of_the_call_is_raised_by_it_and_leaves_nothing(tmp_path, asynchronous):
    trainer = ready(tmp_path)
    save(trainer, 1)
    trainer.model.head.weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex128))
    with pytest.raises(KeyError):
        save(trainer, 2)
    assert names(tmp_path) == ["checkpoint-1"]


# Somebody's own code ------------------------------------------------------------------------------------


class Averages(transformers.Trainer):
    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        kept = [parameter.clone() for parameter in self.model.parameters()]
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(42)
        super()._save(output_dir, state_dict)
        assert load_file(f"{output_dir}/model.safetensors")
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), kept, strict=True):
                parameter.copy_(value)


class Opens(transformers.Trainer):
    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        assert load_file(f"{self.args.output_dir}/checkpoint-{self.state.global_step}/model.safetensors")


class OnSave(transformers.TrainerCallback):
    seen = 0

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = f"{args.output_dir}/checkpoint-{state.global_step}"
        assert load_file(f"{folder}/model.safetensors") and torch.load(f"{folder}/scheduler.pt")
        OnSave.seen += 1


class Tokenizer:
    def save_pretrained(self, folder: Any) -> None:
        assert ".fastshard" not in str(folder) and os.path.exists(f"{folder}/model.safetensors")


@pytest.mark.parametrize("kind", [Averages, Opens, OnSave, Tokenizer])
def test_own_code_that_may_look_finds_finished_files(tmp_path, asynchronous, kind):
    trainer = trainer_of(
        tmp_path,
        kind if issubclass(kind, transformers.Trainer) else transformers.Trainer,
        [kind()] if issubclass(kind, transformers.TrainerCallback) else None,
    )
    if kind is Tokenizer:
        trainer.processing_class = Tokenizer()
        trainer.tokenizer = Tokenizer()
    trainer.train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert fastshard.status().on_the_spot[CALL] == {
        f"{kind.__name__}.{name} may look at what was saved": 2
        for name in [
            {"Averages": "_save", "Opens": "_save_checkpoint", "OnSave": "on_save"}.get(
                kind.__name__, "save_pretrained"
            )
        ]
    }
    assert on_the_spot() in str(fastshard.status())
    if kind is Averages:
        saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
        assert all(bool((tensor == 42).all()) for tensor in saved.values())
    if kind is OnSave:
        assert OnSave.seen == 2


def test_values_are_those_of_the_moment_when_the_call_returned(tmp_path, held):
    """Weights are swapped in before a checkpoint and back after it, as averaged ones are."""
    trainer = ready(tmp_path)
    kept = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for value in trainer.model.state_dict().values():
        value.fill_(42)
    save(trainer, 1)
    trainer.model.load_state_dict(kept)
    held.set()
    checkpoints.wait_for_earlier()
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert all(bool((tensor == 42).all()) for tensor in saved.values())


def test_what_is_pushed_to_the_hub_is_finished(tmp_path, asynchronous, monkeypatch):
    pushed: list[list[str]] = []
    monkeypatch.setattr(
        transformers.Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append(names(Path(folder)))
    )
    trainer = ready(tmp_path)
    trainer.args.push_to_hub = True
    save(trainer, 1)
    assert set(pushed[0]) > FILES and visible(tmp_path) == ["checkpoint-1"]
    assert on_the_spot() == "push_to_hub=True"


def test_modules_that_are_no_models_of_transformers(tmp_path):
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner = torch.nn.Linear(200, 1)

        def forward(self, x: torch.Tensor, labels: object = None) -> dict[str, torch.Tensor]:
            return {"loss": (self.inner(x) ** 2).mean()}

    def act(folder: Path) -> None:
        trainer = trainer_of(folder)
        trainer.model = trainer.model_wrapped = Module()
        trainer.train()

    plain, ours, *_ = by_both(tmp_path, act)
    assert plain == ours and "checkpoint-4/model.safetensors" in ours
    assert fastshard.status().saved[CALL].saves == 2


def test_a_checkpoint_on_a_signal_is_finished_on_the_spot(tmp_path, asynchronous):
    """The process is going to be killed. Transformers marks the folder meanwhile."""
    trainer = ready(tmp_path)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "checkpoint-is-incomplete.txt").write_text("")
    save(trainer, 1)
    assert set(names(tmp_path / "checkpoint-1")) > FILES and not checkpoints._in_flight
    assert "on a signal" in on_the_spot()


def test_workers_that_are_forked_meanwhile_leave_it_alone(tmp_path):
    plain, ours, *_ = by_both(
        tmp_path, lambda folder: train(folder, save_steps=1, dataloader_num_workers=1, num_train_epochs=2)
    )
    assert ours.keys() == plain.keys()
    assert [name for name in plain if plain[name] != ours[name]] == []


# save_pretrained in a block -----------------------------------------------------------------------------

PRETRAINED = "PreTrainedModel.save_pretrained"


def test_save_pretrained_appears_later_as_one_save(tmp_path, held, caplog):
    model = Model()
    model.save_pretrained(tmp_path / "plain", max_shard_size="50KB")
    activity._forget()
    transformers.utils.logging.set_verbosity_info()
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.INFO), fastshard.asynchronous() as saves:
            model.save_pretrained(tmp_path / "ours", max_shard_size="50KB")
            with torch.no_grad():
                model.inner.weight.fill_(3)
            assert not (tmp_path / "ours").exists() and "ours" not in caplog.text
        assert len(saves.futures) == 1 and PRETRAINED not in fastshard.status().saved
        held.set()
        saves.wait()
    finally:
        transformers.utils.logging.set_verbosity_warning()
        transformers.utils.logging.disable_propagation()
    assert tree(tmp_path / "ours") == tree(tmp_path / "plain")
    assert len([name for name in tree(tmp_path / "ours") if name.endswith(".safetensors")]) > 1
    total = fastshard.status().saved[PRETRAINED]
    assert total.saves == 1 and total.files == len(list((tmp_path / "ours").glob("*.safetensors")))
    assert str(tmp_path / "ours" / "config.json") in caplog.text and ".fastshard" not in caplog.text


class SavesItself(Model):
    def save_pretrained(self, folder: Any, **kwargs: Any) -> None:
        super().save_pretrained(folder, **kwargs)
        assert load_file(f"{folder}/model.safetensors")


class Counts(Config):
    def save_pretrained(self, folder: Any, **kwargs: Any) -> None:
        super().save_pretrained(folder, **kwargs)
        assert os.path.exists(f"{folder}/config.json") and ".fastshard" not in str(folder)


@pytest.mark.parametrize(("kind", "config"), [(SavesItself, Config), (Model, Counts)])
def test_own_code_in_save_pretrained_finds_finished_files(tmp_path, asynchronous, kind, config):
    with fastshard.asynchronous() as saves:
        kind(config()).save_pretrained(tmp_path)
        assert load_file(tmp_path / "model.safetensors")
    assert not saves.futures
    [reason] = fastshard.status().on_the_spot[PRETRAINED]
    assert "save_pretrained" in reason


def test_offloaded_weights_are_saved_on_the_spot(tmp_path, asynchronous):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = Model()
    model.save_pretrained(tmp_path / "plain")
    accelerate.dispatch_model(
        model, {"inner": "disk", "head": "cpu"}, main_device="cpu", offload_dir=str(tmp_path / "offload")
    )
    with fastshard.asynchronous() as saves:
        model.save_pretrained(tmp_path / "ours")
        assert tree(tmp_path / "ours") == tree(tmp_path / "plain")
    assert not saves.futures
    assert fastshard.status().on_the_spot == {PRETRAINED: {"weights are offloaded": 1}}


def test_save_model_of_accelerate_appears_later_as_one_save(tmp_path, held):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.save_model(Model(), tmp_path / "plain", "50KB")
    activity._forget()
    with fastshard.asynchronous() as saves:
        accelerator.save_model(Model(), tmp_path / "ours", "50KB")
        assert not (tmp_path / "ours").exists()
        assert fastshard.status().in_flight == (str(tmp_path / "ours"),)
    held.set()
    saves.wait()
    assert tree(tmp_path / "ours") == tree(tmp_path / "plain")
    assert fastshard.status().saved["Accelerator.save_model"].saves == 1


# The switch ---------------------------------------------------------------------------------------------


def test_without_the_switch_nothing_changes(tmp_path):
    own = vars(transformers.Trainer)["_save_checkpoint"]
    with fastshard.installed():
        assert vars(transformers.Trainer)["_save_checkpoint"] is own
        train(tmp_path)
        assert not fastshard.status().asynchronous
    saved = fastshard.status().saved
    assert saved["PreTrainedModel.save_pretrained"].saves == 2 and CALL not in saved
    fastshard.install(asynchronous=True)
    assert vars(transformers.Trainer)["_save_checkpoint"] is not own
    assert fastshard.status().asynchronous and "asynchronously" in str(fastshard.status())
    fastshard.install()  # says nothing against it
    assert fastshard.status().asynchronous
    fastshard.uninstall()
    assert vars(transformers.Trainer)["_save_checkpoint"] is own and not fastshard.status().asynchronous


def test_the_installed_transformers_fits():
    with fastshard.installed(asynchronous=True):
        rest = [r for r in fastshard.status().replacements if not r.replaced and r.why_not != NOT_YET]
        assert {r.library for r in rest if not r.why_not.endswith("is not imported")} == set()
        assert any("Trainer._save_checkpoint" in r.functions for r in fastshard.status().replacements)


@pytest.mark.parametrize(("value", "wanted"), [("1", True), ("0", False)])
def test_the_environment_switches(value, wanted):
    script = "import fastshard.auto; print(fastshard.status().asynchronous)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "FASTSHARD_ASYNC": value},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(wanted), done.stderr


# Killed -------------------------------------------------------------------------------------------------

KILLED = """
    import os, signal, sys
    import fastshard
    import test_async_trainer as tests
    from pathlib import Path
    from fastshard.publish import checkpoint as checkpoints

    fastshard.install(asynchronous=True)
    tests.transformers.utils.logging.disable_progress_bar()
    folder = Path(sys.argv[1])
    trainer = tests.ready(folder, save_total_limit=1)
    tests.save(trainer, 1)
    checkpoints.wait_for_earlier()
    everything = sorted(os.listdir(folder / "checkpoint-1"))

    # Every call of Python's that changes the folder, on either thread, is one step further until the kill.
    for count in range(0, 10000, 2):
        pid = os.fork()
        if pid == 0:
            left = count
            def count_down(event, args):
                global left
                if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree") or (
                        event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax")):
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(count_down)
            tests.save(trainer, 2)
            checkpoints.wait_for_earlier()
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        found = tests.visible(folder)
        for name in found:
            there = sorted(os.listdir(folder / name))
            if name == "checkpoint-1" and "checkpoint-2" in found:
                assert set(there) <= set(everything)  # it is being removed
            else:
                assert there == everything, (name, there)
        print("killed" if os.WIFSIGNALED(status) else "ended", *found, flush=True)
        if not os.WIFSIGNALED(status):
            break
        if "checkpoint-2" in found:
            tests.shutil.rmtree(folder / "checkpoint-2")
            tests.save(trainer, 1)
            checkpoints.wait_for_earlier()
    tests.save(trainer, 3)
    checkpoints.wait_for_earlier()
    print(*sorted(os.listdir(folder)))
"""


def test_killed_at_any_point_there_are_complete_checkpoints_only(tmp_path):
    done = in_process(KILLED, tmp_path)
    assert done.returncode == 0, done.stderr
    *seen, ended, left = done.stdout.split("\n")[:-1]
    assert ended == "ended checkpoint-2" and left == "checkpoint-3"
    assert "killed checkpoint-1" in seen and any("checkpoint-2" in line for line in seen) and len(seen) > 8
