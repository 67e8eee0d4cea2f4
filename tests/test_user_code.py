# SPDX-License-Identifier: Apache-2.0
"""A save that has returned is done, and somebody's own code in the middle of one sees what it sees without fastshard."""

from __future__ import annotations

import collections
import inspect
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import names
from safetensors.torch import load_file

import fastshard
from fastshard.base import activity

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import accelerate  # noqa: E402
import transformers  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore")]

FOUR = transformers.__version__.startswith("4.")
COUNTS = "num_parameters" in inspect.getsource(transformers.PreTrainedModel.save_pretrained)


class Config(transformers.PretrainedConfig):
    model_type = "own"


class Model(transformers.PreTrainedModel):
    config_class = Config

    def __init__(self, config: Config | None = None, value: float = 1.0) -> None:
        super().__init__(config or Config())
        self.layers = torch.nn.ParameterList(
            torch.nn.Parameter(torch.full((256,), value), requires_grad=False) for _ in range(4)
        )
        self.head = torch.nn.Parameter(torch.zeros(1))
        self.post_init()

    def _init_weights(self, module: object) -> None: ...

    def forward(self, x: torch.Tensor, labels: object = None) -> dict[str, torch.Tensor]:
        return {"loss": (self.head * x).sum()}


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    activity._forget()
    transformers.utils.logging.disable_progress_bar()
    with fastshard.installed():
        yield
    transformers.utils.logging.enable_progress_bar()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name in names(folder):
        if name.endswith(".safetensors"):
            found.update(load_file(folder / name))
    return found


def left(call: str = "PreTrainedModel.save_pretrained") -> str:
    return " ".join(fastshard.status().left.get(call, {}))


# A checkpoint of Trainer's ------------------------------------------------------------------------------


class Swaps(transformers.Trainer):
    def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
        for parameter in self.model.layers:
            parameter.fill_(42)
        super().save_model(output_dir, _internal_call)
        for parameter in self.model.layers:
            parameter.fill_(1)


class Opens(transformers.Trainer):
    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        assert len(load_file(f"{output_dir}/model.safetensors")) == 5


class Copies(transformers.Trainer):
    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        shutil.copytree(output_dir, Path(output_dir).parent.parent / "copies" / Path(output_dir).name)
        os.rename(f"{output_dir}/model.safetensors", f"{output_dir}/renamed.safetensors")
        os.rename(f"{output_dir}/renamed.safetensors", f"{output_dir}/model.safetensors")


class SavesTwice(transformers.Trainer):
    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        torch.save({"version": 1, "t": self.model.layers[0]}, f"{output_dir}/x.pt")
        torch.save({"version": 2}, f"{output_dir}/x.pt")


class Reuses(transformers.Trainer):
    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        buffer = torch.zeros(1000)
        for number in range(3):
            torch.save(buffer.fill_(number), f"{output_dir}/{number}.pt")


class Removes(transformers.Trainer):
    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        torch.save(self.model.layers[0], f"{output_dir}/x.pt")
        os.unlink(f"{output_dir}/x.pt")


class OnSave(transformers.TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = f"{args.output_dir}/checkpoint-{state.global_step}"
        assert load_file(f"{folder}/model.safetensors") and torch.load(f"{folder}/scheduler.pt")
        control.seen = True


@pytest.mark.parametrize("kind", [Swaps, Opens, Copies, SavesTwice, Reuses, Removes])
def test_what_a_subclass_of_trainer_does_next_meets_finished_files(tmp_path, kind):
    data = [{"x": torch.ones(1), "labels": torch.ones(1)} for _ in range(4)]
    options = transformers.TrainingArguments(
        str(tmp_path / "out"),
        max_steps=2,
        save_steps=1,
        save_total_limit=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        optim="sgd",
    )
    trainer = kind(Model(), options, train_dataset=data, callbacks=[OnSave()])
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-2"
    assert not (tmp_path / "out" / "checkpoint-1").exists()
    expected = 42.0 if kind is Swaps else 1.0
    saved = [tensor for name, tensor in weights(folder).items() if name.startswith("layers")]
    assert len(saved) == 4 and all(bool((tensor == expected).all()) for tensor in saved)
    if kind is SavesTwice:
        assert torch.load(folder / "x.pt") == {"version": 2}
    if kind is Removes:
        assert not (folder / "x.pt").exists()
    if kind is Copies:
        assert weights(tmp_path / "copies" / "checkpoint-2").keys() == weights(folder).keys()
    if kind is Reuses:
        assert [float(torch.load(folder / f"{n}.pt")[0]) for n in range(3)] == [0.0, 1.0, 2.0]


def test_save_state_hooks_meet_finished_files(tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(4, 4))
    seen: list[object] = []

    def hook(models: list[Any], states: list[Any], folder: str) -> None:
        fastshard.save_file({"a": states[0]["weight"]}, f"{folder}/ema.safetensors")
        states[0]["weight"].fill_(5)
        seen.append(load_file(f"{folder}/ema.safetensors")["a"].clone())

    accelerator.register_save_state_pre_hook(hook)
    before = model.weight.detach().clone()
    accelerator.save_state(str(tmp_path))
    assert torch.equal(seen[0], before)
    assert bool((load_file(tmp_path / "model.safetensors")["weight"] == 5).all())


# Own code inside save_pretrained ------------------------------------------------------------------------


def looks(folder: object, seen: list[Any]) -> None:
    seen.append((str(folder), sorted(os.listdir(folder))))  # type: ignore[call-overload]


def saved_by_both(tmp_path: Path, save: Callable[[Path, list[Any]], None]) -> list[Any]:
    """What own code has seen, without fastshard and with it; the same, apart from the folder's name."""
    seen: dict[str, list[Any]] = {}
    for which in ("plain", "ours"):
        seen[which] = []
        folder = tmp_path / which
        folder.mkdir()
        (folder / "before.txt").write_text("of somebody")
        if which == "plain":
            entered = fastshard.integrations.patching._state.blocks
            fastshard.integrations.patching._state.blocks = 0
            try:
                save(folder, seen[which])
            finally:
                fastshard.integrations.patching._state.blocks = entered
        else:
            save(folder, seen[which])
    text = [str(seen[which]).replace(str(tmp_path / which), "FOLDER") for which in ("plain", "ours")]
    assert text[1] == text[0]
    files = [
        {p.name: p.read_bytes() for p in (tmp_path / which).iterdir() if p.is_file()}
        for which in ("plain", "ours")
    ]
    assert files[0] == files[1]
    return seen["ours"]


def test_a_config_with_a_save_of_its_own(tmp_path):
    class Own(Config):
        def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
            super().save_pretrained(save_directory, **kwargs)
            looks(save_directory, self.__class__.seen)

    def save(folder: Path, seen: list[Any]) -> None:
        Own.seen = seen
        Model(Own()).save_pretrained(folder)

    assert saved_by_both(tmp_path, save)
    assert "Own.save_pretrained is not transformers' own" in left()


@pytest.mark.skipif(not COUNTS, reason="this transformers calls no method after the shards")
def test_a_method_that_is_called_after_the_shards(tmp_path):
    class Own(Model):
        def num_parameters(self, *args: Any, **kwargs: Any) -> int:
            looks(self.folder, self.seen)
            return super().num_parameters(*args, **kwargs)

    def save(folder: Path, seen: list[Any]) -> None:
        model = Own()
        model.folder, model.seen = folder, seen
        model.save_pretrained(folder, max_shard_size="1KB")

    assert saved_by_both(tmp_path, save)


@pytest.mark.parametrize("first", ["wrapper", "install"])
def test_a_wrapper_of_the_saver_sees_the_callers_paths(tmp_path, monkeypatch, first):
    def save(folder: Path, seen: list[Any]) -> None:
        Model().save_pretrained(folder, max_shard_size="1KB")

    home = transformers.modeling_utils
    own = home.safe_save_file
    calls: list[str] = []

    def wrapper(tensors: Any, filename: Any, metadata: Any = None) -> None:
        calls.append(str(filename))
        own(tensors, filename, metadata)
        assert load_file(filename)

    monkeypatch.setattr(home, "safe_save_file", wrapper)
    if first == "wrapper":
        fastshard.install()
        fastshard.uninstall()
    saved_by_both(tmp_path, save)
    assert len(calls) > 2 and not any(".fastshard" in call for call in calls)
    assert "somebody else's save_file" in left()


@pytest.mark.skipif(not FOUR, reason="transformers 5 has no save_function")
def test_a_save_function_of_the_callers(tmp_path):
    def save(folder: Path, seen: list[Any]) -> None:
        def function(shard: Any, filename: str) -> None:
            torch.save(shard, filename)
            seen.append((filename, sorted(torch.load(filename))))

        Model().save_pretrained(
            folder, max_shard_size="1KB", safe_serialization=False, save_function=function
        )

    assert len(saved_by_both(tmp_path, save)) > 1
    assert "save_function" in left()


class Lazy(collections.UserDict):
    """Gives its tensors from one buffer, as loaders of large models do."""

    buffer = torch.zeros(256)

    def _filled(self, name: str) -> torch.Tensor:
        return self.buffer.fill_(float(name.partition(".")[2] or 9))

    def __getitem__(self, name: str) -> torch.Tensor:
        self.data[name]
        return self._filled(name)

    def pop(self, name: str, *default: Any) -> torch.Tensor:
        self.data.pop(name)
        return self._filled(name)

    def items(self) -> Any:
        return self.data.items()

    def values(self) -> Any:
        return self.data.values()


@pytest.mark.skipif(FOUR, reason="transformers 4 takes all of it at once")
def test_a_state_dict_that_uses_one_buffer_again(tmp_path):
    def save(folder: Path, seen: list[Any]) -> None:
        lazy = Lazy({f"layers.{n}": torch.empty(256) for n in range(4)})
        arguments = {} if FOUR else {"save_original_format": False}
        Model().save_pretrained(folder, state_dict=lazy, max_shard_size=1024, **arguments)

    saved_by_both(tmp_path, save)
    assert {name: float(t[0]) for name, t in weights(tmp_path / "ours").items()} == {
        f"layers.{n}": float(n) for n in range(4)
    }


def test_who_reads_of_a_file_may_open_it(tmp_path):
    """A handler of transformers' messages, as those that upload what was saved."""
    opened: list[int] = []

    class Uploads(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            for part in text.split():
                if part.startswith(str(tmp_path)) and part.endswith((".json", ".safetensors")):
                    opened.append(len(Path(part).read_bytes()))

    handler = Uploads()
    logging.getLogger("transformers").addHandler(handler)
    transformers.utils.logging.set_verbosity_info()
    try:
        Model().save_pretrained(tmp_path)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
        transformers.utils.logging.set_verbosity_warning()
    assert len(opened) >= 2 and all(opened)


def test_a_failed_save_says_of_no_file_that_it_is_there(tmp_path):
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("transformers").addHandler(handler)
    transformers.utils.logging.set_verbosity_info()
    broken = Model()
    broken.layers[0] = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex128))
    try:
        with pytest.raises(KeyError):
            broken.save_pretrained(tmp_path)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
        transformers.utils.logging.set_verbosity_warning()
    assert str(tmp_path) not in stream.getvalue() and names(tmp_path) == []


def test_an_accelerator_with_a_save_of_its_own(tmp_path):
    class Own(accelerate.Accelerator):
        def save(self, obj: Any, f: Any, safe_serialization: bool = False) -> None:
            super().save(obj, f, safe_serialization)
            seen.append(str(f))
            assert Path(f).stat().st_size

    seen: list[str] = []
    Own(cpu=True).save_model(Model(), tmp_path, "2KB")
    assert len(seen) > 1 and all(Path(name).parent == tmp_path for name in seen)
    assert "Own.save is not accelerate's own" in left("Accelerator.save_model")


def test_options_that_are_left_to_transformers_are_counted(tmp_path):
    with pytest.raises(Exception):  # noqa: B017 (nothing to push to)
        Model().save_pretrained(tmp_path, push_to_hub=True)
    assert "push_to_hub=True" in left()


# What is not saved, and who does not save ---------------------------------------------------------------

ODD = {
    "sparse": lambda: torch.eye(4).to_sparse(),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "csc": lambda: torch.eye(4).to_sparse_csc(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr(2),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "mkldnn": lambda: torch.ones(4, 4).to_mkldnn(),
    "uninitialized": torch.nn.parameter.UninitializedBuffer,
    "meta": lambda: torch.ones(4, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_buffer_that_is_not_saved_is_no_matter(tmp_path, kind):
    try:
        buffer = ODD[kind]()
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(str(error))

    def save(folder: Path, seen: list[Any]) -> None:
        model = Model()
        model.register_buffer("odd", buffer, persistent=False)
        model.save_pretrained(folder)

    saved_by_both(tmp_path, save)


@pytest.mark.parametrize("arguments", [{"is_main_process": False}, {"save_config": False}])
def test_another_rank_removes_none_of_the_first_ones_files(tmp_path, arguments):
    if "save_config" in arguments and not FOUR:
        pytest.skip("transformers 4")
    Model().save_pretrained(tmp_path, max_shard_size="2KB")
    before = names(tmp_path)
    Model().save_pretrained(tmp_path, max_shard_size="3KB", **arguments)
    assert set(before) <= set(names(tmp_path))


def test_an_accelerator_that_is_not_the_main_process_removes_nothing(tmp_path, monkeypatch):
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.save_model(Model(), tmp_path, "2KB")
    before = names(tmp_path)
    state = accelerate.state.PartialState._shared_state
    monkeypatch.setattr(accelerator.project_configuration, "save_on_each_node", True)
    monkeypatch.setitem(state, "process_index", 8)  # the first of the second node
    assert not accelerator.is_main_process and accelerator.is_local_main_process
    accelerator.save_model(Model(), tmp_path, "3KB")
    assert set(before) < set(names(tmp_path))
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
