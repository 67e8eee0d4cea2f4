# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a small language model with transformers' Trainer, whose checkpoints go through fastshard. The script says
so in one line; the rest is what it would be without fastshard.

Training goes on while a checkpoint is written. The lower layers are frozen: they are written once, and every further
checkpoint links to them. Each checkpoint has SHA256SUMS, and is read back and compared at the end. Started again with
the same folder, the script goes on from the newest checkpoint that is complete.

    python examples/finetune_trainer.py --dir /tmp/run --steps 40
"""

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import fastshard


def make_model(width: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=4, **sizes))
    # What needs no gradient gets files of its own, so these files are the same in every checkpoint.
    model.model.embed_tokens.requires_grad_(False)
    for layer in model.model.layers[:3]:
        layer.requires_grad_(False)
    return model


def make_data(count: int) -> list[dict[str, torch.Tensor]]:
    """Made-up texts: bytes that count up from a random one."""
    firsts = torch.randint(256, (count,)).tolist()
    texts = [(torch.arange(32) + first) % 256 for first in firsts]
    return [{"input_ids": text, "labels": text} for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True, help="the folder of the checkpoints")
    parser.add_argument("--steps", type=int, default=40, help="the number of steps in all (default: 40)")
    parser.add_argument(
        "--every", type=int, default=10, help="steps from one checkpoint to the next (default: 10)"
    )
    parser.add_argument("--width", type=int, default=64, help="the width of the model (default: 64)")
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)

    fastshard.install(asynchronous=True, incremental=True, manifest="sha256")

    set_seed(0)
    trainer = Trainer(
        model=make_model(args.width),
        args=TrainingArguments(
            output_dir=str(args.dir),
            max_steps=args.steps,
            save_steps=args.every,
            save_total_limit=3,
            logging_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        ),
        train_dataset=make_data(64),
    )
    # The newest one that is complete: a kill may have come while one was being written, or deleted.
    newest = fastshard.latest_checkpoint(args.dir)
    print(f"begins with {Path(newest).name if newest else 'the first step'}", flush=True)
    trainer.train(resume_from_checkpoint=newest)

    for checkpoint in fastshard.list_checkpoints(args.dir):
        report = fastshard.verify(checkpoint.path)
        linked = sum(file.stat().st_nlink > 1 for file in Path(checkpoint.path).glob("*.safetensors"))
        state = "sound" if report.ok else f"damaged: {report.problems[0]}"
        print(f"{checkpoint.name}: {state}, {report.files} files, {linked} linked", flush=True)
    made = fastshard.status()
    assert made.in_flight == ()  # the end of train() has waited for the last checkpoint
    print(f"not made by fastshard: {made.left or 'nothing'}", flush=True)


if __name__ == "__main__":
    main()
