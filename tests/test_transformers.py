# SPDX-License-Identifier: Apache-2.0
"""Unchanged scripts of transformers and accelerate: the files they write without fastshard, and what they survive."""

from __future__ import annotations

import errno
import io
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import names, release
from side_by_side import both, files_of, same_weights

import fastshard
from fastshard.api import archive
from fastshard.api.archive_errors import archive_error

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import accelerate  # noqa: E402
import transformers  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore")]  # of libraries; ours are errors in every other file

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}


def llama(seed: int = 0, **config: Any) -> Any:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(intermediate_size=48, num_key_value_heads=1, **{**SMALL, **config})
    )


def mixtral(seed: int = 0) -> Any:
    """Its experts are fused in memory, and separate views of two big tensors when saved."""
    torch.manual_seed(seed)
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(intermediate_size=48, num_key_value_heads=1, num_local_experts=4, **SMALL)
    )


def gpt2(seed: int = 0) -> Any:
    """Input and output embeddings are one tensor."""
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32)
    )


MODELS = {"llama": llama, "mixtral": mixtral, "gpt2": gpt2}


@pytest.fixture
def installed() -> Iterator[None]:
    with fastshard.installed():
        yield


@pytest.mark.parametrize("size", ["50GB", "20KB"])
@pytest.mark.parametrize("kind", MODELS)
def test_save_pretrained_writes_the_same_directory(tmp_path: Path, kind: str, size: str) -> None:
    model = MODELS[kind]()
    plain, ours = both(tmp_path, lambda path: model.save_pretrained(path, max_shard_size=size))
    assert ours == plain
    assert ("model.safetensors.index.json" in ours) == (size == "20KB")
    loaded = type(model).from_pretrained(tmp_path / "ours")
    assert same_weights(loaded, model)
    figures = fastshard.stats()
    assert figures is not None and figures.files == sum(name.endswith(".safetensors") for name in ours)


@pytest.mark.parametrize(
    "arguments",
    [
        {"variant": "fp16"},
        {"variant": "fp16", "max_shard_size": "20KB"},
        {"state_dict": "own"},
        {"is_main_process": False},
        {"save_original_format": False, "max_shard_size": "20KB"},
    ],
)
def test_arguments_of_save_pretrained(tmp_path: Path, arguments: dict[str, Any]) -> None:
    left: list[int] = []

    def save(path: Path) -> None:
        model = mixtral()
        given = dict(arguments)
        if "state_dict" in given:
            given["state_dict"] = {name: value + 1 for name, value in model.state_dict().items()}
        model.save_pretrained(path, **given)
        left.append(len(given.get("state_dict", ())))

    plain, ours = both(tmp_path, save)
    assert ours == plain
    assert left[0] == left[1]


def test_a_directory_that_is_a_file_is_refused_as_before(tmp_path: Path, installed: None) -> None:
    (tmp_path / "file").write_text("kept")
    llama().save_pretrained(tmp_path / "file")
    assert files_of(tmp_path) == {"file": b"kept"}


def test_directories_are_made(tmp_path: Path, installed: None) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "a" / "b")
    assert same_weights(llama(1).from_pretrained(tmp_path / "a" / "b"), model)


@pytest.mark.parametrize("first", ["50GB", "20KB", "40KB"])
@pytest.mark.parametrize("second", ["50GB", "20KB"])
def test_the_newest_save_is_what_is_loaded(tmp_path: Path, installed: None, first: str, second: str) -> None:
    """transformers leaves a single file that hides the shards of a later save."""
    kept = {"README.md": "kept", "model.fp16.safetensors": "kept", "optimizer.pt": "kept"}
    for name, text in kept.items():
        (tmp_path / name).write_text(text)
    llama(0).save_pretrained(tmp_path, max_shard_size=first)
    llama(1).save_pretrained(tmp_path, max_shard_size=second)
    assert same_weights(llama(2).from_pretrained(tmp_path), llama(1))
    alone = tmp_path / "alone"
    llama(1).save_pretrained(alone, max_shard_size=second)
    assert names(tmp_path) == sorted([*names(alone), *kept, "alone"])


def test_a_failed_save_leaves_the_old_checkpoint(
    tmp_path: Path, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama(0).save_pretrained(tmp_path, max_shard_size="20KB")
    before = files_of(tmp_path)
    broken = llama(1)
    broken.lm_head.weight = torch.nn.Parameter(broken.lm_head.weight.to(torch.complex128))
    with pytest.raises(KeyError):
        broken.save_pretrained(tmp_path)
    other = llama(1, num_hidden_layers=3)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("fastshard.publish.staged.start", full)
        with pytest.raises(OSError, match="No space"):
            other.save_pretrained(tmp_path, max_shard_size="10KB")
    assert files_of(tmp_path) == before


def test_a_full_disk_leaves_the_old_checkpoint(small_disk: Path, installed: None) -> None:
    model = llama(0, hidden_size=256, vocab_size=2048)
    model.save_pretrained(small_disk, max_shard_size="2MB")
    before = files_of(small_disk)
    with pytest.raises(OSError, match="No space") as caught:
        llama(1, hidden_size=256, vocab_size=20000).save_pretrained(small_disk, max_shard_size="9MB")
    assert ".fastshard" not in str(caught.value)
    assert files_of(small_disk) == before


def test_messages_name_the_final_places(tmp_path: Path, installed: None) -> None:
    stream = io.StringIO()
    logger, handler = logging.getLogger("transformers"), logging.StreamHandler(stream)
    logger.addHandler(handler)
    transformers.utils.logging.set_verbosity_info()
    try:
        llama().save_pretrained(tmp_path, max_shard_size="20KB")
    finally:
        transformers.utils.logging.set_verbosity_warning()
        logger.removeHandler(handler)
    assert f"{tmp_path}/config.json" in stream.getvalue()
    assert f"{tmp_path}/model.safetensors.index.json" in stream.getvalue()
    assert ".fastshard" not in stream.getvalue()


@pytest.mark.parametrize("enabled", [True, False])
def test_one_progress_bar_counts_bytes(
    tmp_path: Path, installed: None, capsys: pytest.CaptureFixture[str], enabled: bool
) -> None:
    logging = transformers.utils.logging
    (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
    try:
        llama().save_pretrained(tmp_path, max_shard_size="20KB")
    finally:
        logging.enable_progress_bar()
    shown = capsys.readouterr().err
    assert ("Saving checkpoint shards: 100%" in shown) == enabled
    assert "Writing model shards" not in shown


DEVICE_MAP = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "disk",
    "lm_head": "disk",
}


@pytest.mark.parametrize("size", ["50GB", "20KB"])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_models_with_modules_on_disk(tmp_path: Path, kind: str, size: str) -> None:
    whole = MODELS[kind]()
    whole.save_pretrained(tmp_path / "source", max_shard_size="30KB")

    def save(path: Path) -> None:
        model = type(whole).from_pretrained(
            tmp_path / "source", device_map=DEVICE_MAP, offload_folder=str(tmp_path / "offload")
        )
        assert model.lm_head.weight.device.type == "meta"
        model.save_pretrained(path, max_shard_size=size)

    plain, ours = both(tmp_path, save)
    assert ours == plain
    assert same_weights(type(whole).from_pretrained(tmp_path / "ours"), whole)


def test_modules_on_disk_in_another_precision(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "source")

    def save(path: Path) -> None:
        name = "dtype" if release("transformers") >= (4, 56) else "torch_dtype"
        options = {"device_map": DEVICE_MAP, name: torch.bfloat16}
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "source", **options)
        model.save_pretrained(path, max_shard_size="20KB")

    plain, ours = both(tmp_path, save)
    assert ours == plain


@pytest.mark.parametrize("size", ["50GB", "20KB", "30KB"])
def test_saving_into_the_folder_that_the_weights_are_mapped_from(
    tmp_path: Path, installed: None, size: str
) -> None:
    whole = llama()
    whole.save_pretrained(tmp_path, max_shard_size="30KB")
    model = type(whole).from_pretrained(tmp_path, device_map=DEVICE_MAP)
    assert model.lm_head.weight.device.type == "meta"
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert same_weights(type(whole).from_pretrained(tmp_path), whole)
    tokens = torch.arange(8).view(1, 8)  # and the model can still be used
    assert torch.equal(model(tokens).logits, whole(tokens).logits)
    model.save_pretrained(tmp_path / "again")
    assert same_weights(type(whole).from_pretrained(tmp_path / "again"), whole)


class Plain(torch.nn.Module):
    """With a parameter of its own, and a tie."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = torch.nn.Parameter(torch.rand(16))
        self.embed = torch.nn.Embedding(64, 16)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))
        self.head = torch.nn.Linear(16, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens) * self.scale
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("size", ["10GB", "3KB"])
@pytest.mark.parametrize("make", [Plain, llama, gpt2])
def test_accelerator_save_model(tmp_path: Path, make: Callable[[], Any], size: str, safe: bool) -> None:
    model = make()
    plain, ours = both(
        tmp_path, lambda path: accelerate.Accelerator().save_model(model, path, size, safe_serialization=safe)
    )
    assert ours == plain
    assert len(ours) > 1 or size == "10GB"


def test_accelerator_save_model_removes_what_is_obsolete(tmp_path: Path, installed: None) -> None:
    accelerator = accelerate.Accelerator()
    accelerator.save_model(Plain(), tmp_path, "3KB")
    (tmp_path / "other.safetensors").write_text("kept")
    accelerator.save_model(Plain(), tmp_path)
    assert names(tmp_path) == ["model.safetensors", "other.safetensors"]


@pytest.mark.parametrize("size", ["10GB", "3KB"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_accelerator_saves_offloaded_models_whole(tmp_path: Path, where: str, size: str) -> None:
    """accelerate itself loses parameters of the root module, and saves tied ones twice."""
    with fastshard.installed():
        accelerate.Accelerator().save_model(Plain(), tmp_path / "whole", size)
        model = Plain()
        if where == "cpu":
            accelerate.cpu_offload(model, torch.device("cpu"))
        else:
            places = {"scale": "cpu", "embed": "disk", "layers": "disk", "head": "disk"}
            accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path / "offload"))
            assert model.head.weight.device.type == "meta"
        accelerate.Accelerator().save_model(model, tmp_path / "offloaded", size)
    assert files_of(tmp_path / "offloaded") == files_of(tmp_path / "whole")


def train(output: Path, steps: int, resume: bool = False) -> Any:
    data = [{"input_ids": list(range(i, i + 8)), "labels": list(range(i, i + 8))} for i in range(16)]
    arguments = transformers.TrainingArguments(
        str(output),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = transformers.Trainer(llama(), arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_trainer_checkpoints_and_resumes(tmp_path: Path) -> None:
    plain, ours = both(tmp_path, lambda path: train(path, 4))
    assert ours.keys() == plain.keys()
    exact = ("model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")
    assert {n: d for n, d in ours.items() if n.endswith(exact)} == {
        n: d for n, d in plain.items() if n.endswith(exact)
    }
    assert sum(name.endswith("optimizer.pt") for name in ours) == 2
    finals = []
    for directory in (tmp_path / "plain", tmp_path / "ours"):
        with fastshard.installed():
            trainer = train(directory, 6, resume=True)
        assert trainer.state.global_step == 6
        finals.append(trainer.model.state_dict())
        assert (directory / "checkpoint-6" / "optimizer.pt").is_file()
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())


def test_a_checkpoint_that_fails_leaves_the_one_before(
    tmp_path: Path, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older checkpoints are removed when the new one stands, not before."""
    arguments = transformers.TrainingArguments(
        str(tmp_path), save_total_limit=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = transformers.Trainer(llama(), arguments)
    trainer.create_optimizer_and_scheduler(10)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer.optimizer.step()
    trainer.state.global_step = 1
    trainer._save_checkpoint(trainer.model, trial=None)
    before = files_of(tmp_path / "checkpoint-1")
    assert {"model.safetensors", "optimizer.pt"} < set(before)
    publish = archive._publish

    def failing(made: Any, path: str, *more: Any) -> None:
        if path.endswith("optimizer.pt"):  # all of it is written, and so is the model
            made.close()
            raise archive_error(errno.EIO, os.strerror(errno.EIO), path)
        publish(made, path, *more)

    trainer.state.global_step = 2
    with monkeypatch.context() as patch:
        patch.setattr(archive, "_publish", failing)
        with pytest.raises(RuntimeError, match="Input/output error"):
            trainer._save_checkpoint(trainer.model, trial=None)
    assert files_of(tmp_path / "checkpoint-1") == before
    assert "optimizer.pt" not in files_of(tmp_path / "checkpoint-2")
    assert not [path for path in tmp_path.rglob(".fastshard*")]
    trainer._save_checkpoint(trainer.model, trial=None)
    assert names(tmp_path) == ["checkpoint-2"]
    assert files_of(tmp_path / "checkpoint-2").keys() == before.keys()


def test_modules_that_are_no_models_of_transformers_are_saved_by_trainer(tmp_path: Path) -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner = torch.nn.Linear(4, 4)

    def save(path: Path) -> None:
        arguments = transformers.TrainingArguments(str(path), report_to=[], use_cpu=True)
        transformers.Trainer(Module(), arguments).save_model(str(path))

    plain, ours = both(tmp_path, save)
    assert ours["model.safetensors"] == plain["model.safetensors"]


KILLED = """
    import gc, os, signal, sys, threading
    gc.collect = lambda *_: 0  # transformers 4 collects for each shard that it loads
    import fastshard.auto
    import torch, transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, vocab_size=64)
    directory = sys.argv[1]
    models = []
    for value in (0.0, 1.0):
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        models.append(model)
    models[0].save_pretrained(directory, max_shard_size="20KB")
    transformers.utils.logging.disable_progress_bar()

    def contents():
        loaded = LlamaForCausalLM.from_pretrained(directory)
        values = {float(v) for p in loaded.parameters() for v in (p.min(), p.max())}
        assert len(values) == 1, values
        return values.pop()

    # Every call that changes the directory, of Python and of the engine, is one step further until the kill.
    for count in range(10000):
        pid = os.fork()
        if pid == 0:
            left = count
            def count_down(event, args):
                global left
                if event in ("os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.mkdir", "os.chmod",
                             "open") and (event != "open" or args[1] not in (None, "r", "rb")):
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(count_down)
            models[1].save_pretrained(directory, max_shard_size="20KB")
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        found = contents()
        print("killed" if os.WIFSIGNALED(status) else "ended", found, flush=True)
        if not os.WIFSIGNALED(status):
            break
        if found == 1.0:
            models[0].save_pretrained(directory, max_shard_size="20KB")
            assert contents() == 0.0
"""


def test_killed_at_any_point_from_pretrained_loads_the_old_or_the_new(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "model")],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    seen = done.stdout.split("\n")[:-1]
    assert seen[-1] == "ended 1.0"
    assert "killed 0.0" in seen and "killed 1.0" in seen
    assert len(seen) > 30
    assert not [name for name in names(tmp_path / "model") if name.startswith(".")]
