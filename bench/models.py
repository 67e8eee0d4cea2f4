# SPDX-License-Identifier: Apache-2.0
"""What transformers makes of a case's tensors: a model, a trainer, a model on disk. None of them is copied."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("transformers", "accelerate")
HEADS = 8
TOKENS = 16
"""Of a training step."""


def llama_shapes(width: float = 1.0) -> dict[str, tuple[int, ...]]:
    """Names and shapes of TinyLlama-1.1B (embeddings not tied), in the model's order; each width divided by
    ``width``. Heads are fewer and wider: the hidden size is a multiple of their number and two."""
    head = 2 * max(1, round(128 / width))
    hidden, inner, vocab = HEADS * head, max(1, round(5632 / width)), max(1, round(32000 / width))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(22):
        layer = f"model.layers.{i}"
        for name, size in (("q", hidden), ("k", head), ("v", head), ("o", hidden)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (size, hidden)
        for name in ("gate", "up"):
            shapes[f"{layer}.mlp.{name}_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars, no warnings and no log, which would stand between the tables."""
    from transformers.utils import logging as bars

    disabled, shown = logging.root.manager.disable, bars.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    bars.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if shown:
            bars.enable_progress_bar()


def llama(tensors: dict[str, torch.Tensor]) -> Any:
    """The Llama that has these weights, by the names and shapes of :func:`llama_shapes`."""
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab, hidden = tensors["model.embed_tokens.weight"].shape
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=len(tensors["model.layers.0.mlp.up_proj.weight"]),
        num_hidden_layers=sum(name.endswith(".mlp.up_proj.weight") for name in tensors),
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    model.load_state_dict(tensors, assign=True)
    return model


def trainer(weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], out: Path) -> Any:
    """A Trainer after its first step: the weights' Llama, and AdamW with ``moments`` (``NAME.exp_avg`` and
    ``NAME.exp_avg_sq``). Its checkpoints go to ``out``."""
    from transformers import Trainer, TrainingArguments

    model = llama(weights)
    arguments = TrainingArguments(
        output_dir=str(out), report_to="none", disable_tqdm=True, use_cpu=model.device.type == "cpu"
    )
    made = Trainer(model, arguments)
    made.create_optimizer_and_scheduler(num_training_steps=2)
    assert made.optimizer is not None
    for name, parameter in model.named_parameters():
        kinds = ("exp_avg", "exp_avg_sq")
        made.optimizer.state[parameter] = {
            "step": torch.tensor(1.0),
            **{kind: moments[f"{name}.{kind}"] for kind in kinds},
        }
    made.state.global_step = 1
    return made


def freeze(model: Any, share: float) -> None:
    """Freezes so much of a model, from its first parameters on."""
    left = share * sum(parameter.nbytes for parameter in model.parameters())
    for parameter in model.parameters():
        left -= parameter.nbytes
        parameter.requires_grad_(left < 0)


def in_training(
    weights: dict[str, torch.Tensor], out: Path, steps: int, every: int | None, frozen: float = 0.0
) -> Any:
    """A Trainer before its first step: a copy of the weights' Llama, and a data set of random tokens. It saves to ``out``
    every so many steps, and keeps two checkpoints, or all of them if a share of the weights is ``frozen``.

    After the last step it does not save, as transformers would: what is saved there nobody could do anything
    beside, and a job has one of those.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class NotAtTheEnd(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save &= state.global_step < steps

    model = llama({name: tensor.clone() for name, tensor in weights.items()})
    freeze(model, frozen)
    arguments = TrainingArguments(
        output_dir=str(out),
        report_to="none",
        disable_tqdm=True,
        use_cpu=model.device.type == "cpu",
        max_steps=steps,
        per_device_train_batch_size=1,
        logging_strategy="no",
        save_strategy="no" if every is None else "steps",
        save_steps=every or steps,
        save_total_limit=None if frozen else 2,
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (steps, TOKENS), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in tokens]
    made = Trainer(model, arguments, train_dataset=data, callbacks=[NotAtTheEnd()])
    made.remove_callback(PrinterCallback)
    return made


def on_disk(tensors: dict[str, torch.Tensor], directory: Path) -> Any:
    """The weights' Llama as ``device_map`` leaves it when there is room nowhere else: all weights offloaded to
    disk, which for a safetensors checkpoint is the checkpoint. It is written to ``directory``, if it is not there."""
    from transformers import LlamaForCausalLM

    if not (directory / "model.safetensors").exists():
        llama(tensors).save_pretrained(directory)
    return LlamaForCausalLM.from_pretrained(
        directory, device_map={"": "disk"}, offload_folder=directory / "offload", dtype="auto"
    )
