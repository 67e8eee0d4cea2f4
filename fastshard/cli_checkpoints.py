# SPDX-License-Identifier: Apache-2.0
"""``fastshard shard``, ``fastshard merge``, ``fastshard reshard``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

COMMANDS: Final = ("shard", "merge", "reshard")


def add_parsers(commands: Commands) -> None:
    shard = commands.add_parser(
        "shard",
        help="cut a Hugging Face checkpoint into the parts that the ranks of tensor parallelism hold",
        description="Makes OUT/rank-0, OUT/rank-1, ...: each a checkpoint with one rank's part of every tensor.",
    )
    merge = commands.add_parser(
        "merge",
        help="put the parts together again: the files that were cut, to the byte",
        description="Makes the checkpoint again that `fastshard shard` was given.",
    )
    reshard = commands.add_parser(
        "reshard",
        help="distribute a checkpoint's tensors over files of another size",
        description="Makes the same checkpoint in files of another size. OUT may be SRC, with --force.",
    )
    for parser, what in (
        (shard, "a folder with safetensors files and config.json"),
        (merge, "a folder that `fastshard shard` made"),
        (reshard, "a folder with safetensors files"),
    ):
        parser.add_argument("src", metavar="SRC", help=what)
        parser.add_argument("-o", "--output", metavar="OUT", required=True, help="a new or empty folder")
    shard.add_argument("--tp", metavar="N", type=int, required=True, help="number of ranks")
    shard.add_argument(
        "--plan",
        metavar="FILE",
        help='JSON, names of tensors or modules to styles, as {"model.layers.*.mlp.up_proj": "colwise"}'
        " (default: the plan transformers has for the model)",
    )
    for parser, required, default in (
        (shard, False, "default: the source's files, each in parts"),
        (reshard, True, "a larger tensor has a file to itself"),
    ):
        parser.add_argument(
            "--max-shard-size", metavar="SIZE", required=required, help=f"of a file, as 5GB (10^9); {default}"
        )
    for parser in (shard, merge, reshard):
        parser.add_argument("--force", action="store_true", help="replace the checkpoint that is in OUT")
        parser.add_argument("--durable", action="store_true", help="return when all is on stable storage")


def run(given: argparse.Namespace) -> int:
    """Does what was asked; returns the exit status."""
    from . import reshard  # needs torch

    how: dict[str, Any] = {
        "force": given.force,
        "durable": given.durable,
        "progress": True if sys.stderr.isatty() else None,
    }
    try:
        if given.command == "shard":
            reshard.shard_checkpoint(
                given.src,
                given.output,
                given.tp,
                plan=given.plan,
                max_shard_size=given.max_shard_size,
                **how,
            )
        elif given.command == "merge":
            reshard.merge_checkpoint(given.src, given.output, **how)
        else:
            reshard.reshard_checkpoint(given.src, given.output, given.max_shard_size, **how)
    except (OSError, ValueError, ImportError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{os.fsdecode(error.filename)}: {error.strerror}"
        print(f"fastshard: {text}", file=sys.stderr)
        return 1
    return 0
