# SPDX-License-Identifier: Apache-2.0
"""Trains a small language model under FSDP2 and saves it every few steps without stopping for the disk. All ranks may
be killed at any moment (``kill -9``, too): started again with the same arguments, they go on from the newest
checkpoint, and end with the same weights, bit for bit, as a run that was never interrupted. The last save is an
ordinary Hugging Face folder, which ``from_pretrained`` loads in one process.

    torchrun --nproc-per-node 2 examples/fsdp2_checkpoint.py --dir /tmp/run
"""

import argparse
import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import fastshard
from fastshard.dcp import FastshardReader, FastshardStager, FastshardWriter

KEPT = 2


def make_model(device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)  # the same weights on all ranks
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, **sizes)).to(device)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, step: int) -> None:
    # The data depend on step and rank only, so they are the same after a restart.
    generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
    tokens = torch.randint(256, (4, 32), generator=generator).to(model.device)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def state_of(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def checkpoints(directory: Path) -> list[Path]:
    """The complete ones, from the oldest to the newest: the files of a checkpoint appear all at once."""
    return sorted(folder for folder in directory.glob("step-*") if any(folder.glob("*.safetensors")))


def end_save(directory: Path, saving: "Future[Any] | None") -> None:
    """Waits until the checkpoint stands, raises what went wrong, and removes checkpoints that are no longer needed."""
    if saving is not None:
        saving.result()
        if dist.get_rank() == 0:
            for old in checkpoints(directory)[:-KEPT]:
                shutil.rmtree(old)


def resume(directory: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> int:
    """Loads the newest checkpoint, if there is one, and returns the number of steps that were done."""
    found = checkpoints(directory)
    if not found:
        return 0
    state = state_of(model, optimizer)
    dcp.load(state, storage_reader=FastshardReader(found[-1]))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(found[-1].name.removeprefix("step-"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True, help="the folder of the checkpoints")
    parser.add_argument("--steps", type=int, default=40, help="the number of steps in all (default: 40)")
    parser.add_argument(
        "--every", type=int, default=5, help="steps from one checkpoint to the next (default: 5)"
    )
    args = parser.parse_args()

    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device != "cpu" else "cpu:gloo")
    # Saves talk in a thread while the training talks in this one, so they need a group of their own.
    group = dist.new_group(backend="gloo")
    model = make_model(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    done = resume(args.dir, model, optimizer)
    dist.barrier()  # all have found the same one
    if dist.get_rank() == 0:
        print(f"begins after step {done}", flush=True)

    saving, stager = None, FastshardStager()
    for step in range(done + 1, args.steps + 1):
        train_step(model, optimizer, step)
        if dist.get_rank() == 0:
            print(f"step {step}", flush=True)
        if step % args.every == 0:
            # If the disk is slower than five steps, the job waits here. An error of the former save is raised here.
            end_save(args.dir, saving)
            writer = FastshardWriter(args.dir / f"step-{step:08}")
            # Returns when the values are captured in memory that is kept from save to save.
            saving = dcp.async_save(
                state_of(model, optimizer), storage_writer=writer, async_stager=stager, process_group=group
            )
    end_save(args.dir, saving)
    stager.close()

    # Each rank writes its slices straight into the final files: nothing is gathered.
    fastshard.save_distributed(model.state_dict(), args.dir / "final", metadata={"format": "pt"})
    if dist.get_rank() == 0:
        model.config.save_pretrained(args.dir / "final")
        print(f"saved {args.dir / 'final'}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
