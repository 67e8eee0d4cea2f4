# SPDX-License-Identifier: Apache-2.0
"""Saves a tiny model with each of the libraries that stand beside fastshard, under ``fastshard.install()``, and shows which
of its calls go through the engine: ``make neighbours``. Nothing is downloaded.

    python tests/neighbours.py [NAME ...]

Each library is tried in a process of its own, without fastshard and with it. The two folders must have the same files, and those of
weights the same bytes. Libraries that are not installed are named. The exit status is 1 if a call did not go as expected.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".tar", ".ckpt")
SECONDS = 400


def llama() -> Any:
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=64,
        )
    )


def tokenizer(folder: Path) -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", "a", "b", "c", "d"))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def diffusers(folder: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    unet.save_pretrained(folder / "unet", max_shard_size="100KB")
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder / "pipeline")


def peft(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "merged")


def sentence_transformers(folder: Path) -> None:
    import transformers
    from sentence_transformers import SentenceTransformer, models

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32
    )
    transformers.BertModel(config).save_pretrained(folder / "bert")
    tokenizer(folder).save_pretrained(folder / "bert")
    words = models.Transformer(str(folder / "bert"))
    dense = models.Dense(16, 8)
    SentenceTransformer(modules=[words, models.Pooling(16), dense]).save_pretrained(str(folder / "sentences"))


def timm(folder: Path) -> None:
    import timm as library
    from timm.models import save_for_hf
    from timm.utils import CheckpointSaver

    torch.manual_seed(0)
    model = library.create_model("resnet10t", num_classes=4)
    save_for_hf(model, folder / "hub", safe_serialization="both")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    (folder / "run").mkdir()
    saver = CheckpointSaver(
        model, optimizer, checkpoint_dir=str(folder / "run"), recovery_dir=str(folder / "run")
    )
    saver.save_checkpoint(0, metric=1.0)


def _trl(folder: Path, dpo: bool) -> None:
    import datasets
    import trl

    common: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    more: dict[str, Any] = {}
    if dpo:
        more["ref_model"] = llama()
        rows = {"prompt": ["a b"] * 4, "chosen": ["c"] * 4, "rejected": ["d"] * 4}
        arguments, kind = trl.DPOConfig(**common), trl.DPOTrainer
    else:
        rows, arguments, kind = {"text": ["a b c d"] * 4}, trl.SFTConfig(**common), trl.SFTTrainer
    trainer = kind(
        model=llama(),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer(folder),
        **more,
    )
    trainer.train()
    trainer.save_model(str(folder / "final"))


def trl_sft(folder: Path) -> None:
    _trl(folder, dpo=False)


def trl_dpo(folder: Path) -> None:
    _trl(folder, dpo=True)


def lightning(folder: Path) -> None:
    import lightning as library

    class Line(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(8, 8)

        def training_step(self, batch: Any, number: int) -> Any:
            return self.layer(batch[0]).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

    ours = sys.modules.get("fastshard")
    if (
        ours is not None
    ):  # torch.save into memory, which Lightning does by itself, cannot go through the engine
        from fastshard.lightning import FastshardCheckpointIO
    trainer = library.Trainer(
        plugins=[FastshardCheckpointIO()] if ours is not None else [],
        max_steps=1,
        accelerator="cpu",
        default_root_dir=folder / "root",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Line(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 8))))
    trainer.save_checkpoint(folder / "last.ckpt")


LIBRARIES: dict[str, tuple[str, Callable[[Path], None], tuple[str, ...]]] = {
    "diffusers": (
        "diffusers",
        diffusers,
        ("ModelMixin.save_pretrained", "DiffusionPipeline.save_pretrained"),
    ),
    "peft": ("peft", peft, ("save_file", "PreTrainedModel.save_pretrained")),
    "sentence-transformers": (
        "sentence-transformers",
        sentence_transformers,
        ("save_model", "PreTrainedModel.save_pretrained"),
    ),
    "timm": ("timm", timm, ("save_file", "torch.save")),
    "trl-sft": ("trl", trl_sft, ("PreTrainedModel.save_pretrained", "torch.save")),
    "trl-dpo": ("trl", trl_dpo, ("PreTrainedModel.save_pretrained", "torch.save")),
    "lightning": ("lightning", lightning, ("torch.save",)),
}
"""By name: the distribution, what is called, and under which of fastshard's names its saves are counted."""


def child(name: str, folder: Path, installed: bool) -> None:
    """What each process does: it saves, and tells what was counted."""
    said: dict[str, Any] = {}
    if installed:
        import fastshard

        fastshard.install()
    LIBRARIES[name][1](folder)
    if installed:
        status = fastshard.status()
        said["saved"] = {call: [total.saves, total.files] for call, total in status.saved.items()}
        said["left"] = status.left
    (folder.parent / f"{folder.name}.json").write_text(json.dumps(said))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tried(name: str, folder: Path) -> tuple[str, str]:
    """Returns what is wrong with a library, if anything, and what was counted."""
    for kind in ("plain", "ours"):
        (folder / kind).mkdir()
        command = [sys.executable, __file__, "--child", str(folder / kind), name]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
        if ended.returncode != 0:
            return f"failed: {ended.stderr.strip().splitlines()[-1]}", ""
    plain, ours = files_of(folder / "plain"), files_of(folder / "ours")
    said = json.loads((folder / "ours.json").read_text())
    counted = ", ".join(
        f"{call}: {saves} saves, {files} files" for call, (saves, files) in said["saved"].items()
    )
    counted += "".join(f"; left: {call}: {reasons}" for call, reasons in said["left"].items())
    differing = sorted(
        path for path in ours if path.endswith(".safetensors") and ours[path] != plain.get(path)
    )
    missing = [call for call in LIBRARIES[name][2] if call not in said["saved"]]
    if plain.keys() != ours.keys():
        return f"other files: {sorted(plain.keys() ^ ours.keys())}", counted
    if differing:
        return f"other bytes: {differing}", counted
    if missing:
        return f"not through the engine: {missing}", counted
    weights = sum(path.endswith(WEIGHTS) for path in ours)
    return "", f"{counted} ({weights} files of weights)"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(LIBRARIES))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(asked.names[0], asked.child, asked.child.name == "ours")
        return 0
    bad = 0
    for name in asked.names:
        try:
            version = importlib.metadata.version(LIBRARIES[name][0])
        except importlib.metadata.PackageNotFoundError:
            print(f"{name}: not installed", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            wrong, counted = tried(name, Path(folder))
        bad += bool(wrong)
        print(f"{name} {version}: {wrong or 'as expected'}: {counted}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
