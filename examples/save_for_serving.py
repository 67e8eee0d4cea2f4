# SPDX-License-Identifier: Apache-2.0
"""Makes a checkpoint ready for serving on several ranks, and shows that the ranks get what was saved.

A server that cuts a whole checkpoint at each start reads all of it in every rank. Here it is cut once, into a folder for
each rank, by byte ranges and in constant memory. Then each rank, in a process of its own, loads only its part and saves
it as vLLM's and SGLang's `sharded_state`, from which they start without cutting anything. At the end the parts are put
together again and compared with the checkpoint, byte for byte.

    python examples/save_for_serving.py --dir /tmp/serving --ranks 2
"""

import argparse
import filecmp
from pathlib import Path

import torch
import torch.multiprocessing as mp

import fastshard

# Which dimension of a tensor is cut: the rows of `up` (colwise, as torch names it after its output), the columns of
# `down`. What is not named is the same on all ranks. For models that transformers knows, no plan is needed.
PLAN = """{"layers.*.up": "colwise", "layers.*.down": "rowwise"}"""


def make_checkpoint(folder: Path, width: int) -> None:
    """A model of a few layers, in several files, as it comes from a training."""
    generator = torch.Generator().manual_seed(0)
    weights = {"norm.weight": torch.ones(width)}
    for layer in range(4):
        for name, shape in (("up", (4 * width, width)), ("down", (width, 4 * width))):
            weights[f"layers.{layer}.{name}.weight"] = torch.randn(shape, generator=generator)
    folder.mkdir()
    fastshard.save_torch_state_dict(weights, folder, max_shard_size="300KB", manifest=True)
    (folder / "config.json").write_text('{"model_type": "made up"}')


def serve_rank(rank: int, ranks: int, parts: Path, served: Path) -> None:
    """What one rank does."""
    part = {}
    for file in sorted((parts / f"rank-{rank}").glob("*.safetensors")):
        part.update(fastshard.load_file(file))
    # All ranks save into one folder, each its own files; nobody waits for another.
    fastshard.save_sharded_state(part, served, tp_rank=rank, tp_size=ranks)
    # What a server does when it starts: the tensors are filled, and names, shapes and dtypes compared first.
    fresh = {name: torch.empty_like(tensor) for name, tensor in part.items()}
    fastshard.load_sharded_state(fresh, served, tp_rank=rank, tp_size=ranks)
    assert all(torch.equal(fresh[name], tensor) for name, tensor in part.items())
    print(f"rank {rank}: {len(part)} tensors, {sum(t.nbytes for t in part.values()):,} bytes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True, help="a new or empty folder to work in")
    parser.add_argument("--ranks", type=int, default=2, help="the number of ranks (default: 2)")
    parser.add_argument("--width", type=int, default=128, help="the width of the model (default: 128)")
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    whole, parts, served, again = (args.dir / name for name in ("whole", "parts", "served", "again"))

    make_checkpoint(whole, args.width)
    plan = args.dir / "plan.json"
    plan.write_text(PLAN)
    fastshard.shard_checkpoint(whole, parts, tp=args.ranks, plan=plan)

    served.mkdir()
    mp.spawn(serve_rank, (args.ranks, parts, served), nprocs=args.ranks)

    fastshard.merge_checkpoint(parts, again)
    names = [file.name for file in whole.iterdir() if file.suffix in (".safetensors", ".json")]
    names.remove("fastshard.manifest.json")
    _, different, missing = filecmp.cmpfiles(whole, again, names, shallow=False)
    assert not different and not missing, (different, missing)
    assert fastshard.verify(whole).ok
    print(f"put together again: {len(names)} files, all the same", flush=True)


if __name__ == "__main__":
    main()
