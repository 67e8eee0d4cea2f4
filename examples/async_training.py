# SPDX-License-Identifier: Apache-2.0
"""Trains a small model and saves it every ten steps without stopping for the disk. It may be killed at any moment
(``kill -9``, too): started again with the same arguments, it goes on from the newest checkpoint, and ends with the
same weights, bit for bit, as a run that was never interrupted.

    python examples/async_training.py --dir /tmp/run --steps 200
"""

import argparse
from pathlib import Path

import torch

import fastshard

KEPT = 2


def make_model(width: int) -> torch.nn.Module:
    # Dropout draws from the random number generator, so its state has to be part of a checkpoint.
    return torch.nn.Sequential(
        torch.nn.Linear(64, width),
        torch.nn.GELU(),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(width, width),
        torch.nn.GELU(),
        torch.nn.Linear(width, 1),
    )


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
    inputs = torch.randn(32, 64)
    loss = torch.nn.functional.mse_loss(model(inputs), inputs.sin().sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def begin_save(
    directory: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> fastshard.SaveFuture:
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    # The call returns as soon as the values are captured, so the next step may change them. The file appears under
    # its name later, and only when it is complete. Whatever checkpoint can be seen can therefore be loaded.
    return fastshard.torch_save_async(state, directory / f"step-{step:08}.pt")


def end_save(directory: Path, saving: fastshard.SaveFuture | None) -> None:
    """Waits until the checkpoint stands, raises what went wrong, and removes checkpoints that are no longer needed."""
    if saving is not None:
        saving.result()
        for old in checkpoints(directory)[:-KEPT]:
            old.unlink()


def checkpoints(directory: Path) -> list[Path]:
    """From the oldest to the newest: the names sort by their steps."""
    return sorted(directory.glob("step-*.pt"))


def resume(directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Loads the newest checkpoint, if there is one, and returns the number of steps that were done."""
    found = checkpoints(directory)
    if not found:
        return 0
    state = torch.load(found[-1], weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    # Last, as nothing may draw a random number between this line and the next step.
    torch.set_rng_state(state["rng"])
    return int(state["step"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True, help="the folder of the checkpoints")
    parser.add_argument("--steps", type=int, default=200, help="the number of steps in all (default: 200)")
    parser.add_argument(
        "--every", type=int, default=10, help="steps from one checkpoint to the next (default: 10)"
    )
    parser.add_argument("--width", type=int, default=512, help="the width of the model (default: 512)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and dropout (default: 0)")
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    model = make_model(args.width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    done = resume(args.dir, model, optimizer)
    print(f"begins after step {done}", flush=True)

    saving = None
    for step in range(done + 1, args.steps + 1):
        loss = train_step(model, optimizer)
        print(f"step {step}: loss {loss:.6f}", flush=True)
        if step % args.every == 0:
            # If the disk is slower than ten steps, the job waits here, and not in the middle of a step. An error of
            # the former save is raised here, too, at most ten steps after it happened.
            end_save(args.dir, saving)
            saving = begin_save(args.dir, step, model, optimizer)
    end_save(args.dir, saving)
    fastshard.save_file(model.state_dict(), args.dir / "model.safetensors")
    print(f"saved {args.dir / 'model.safetensors'}", flush=True)


if __name__ == "__main__":
    main()
