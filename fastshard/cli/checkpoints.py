# SPDX-License-Identifier: Apache-2.0
"""``fastshard shard``, ``fastshard merge``, ``fastshard reshard``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from ..formats.naming import WEIGHTS_SUFFIX, is_rank_folder
from .text import amount, fail, guarded, needs_torch, printable, size

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
        help="put the parts of ranks together again, into the files that were cut, to the byte",
        description="Makes the checkpoint again that `fastshard shard` was given, byte for byte.",
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
    shard.add_argument("--tp", metavar="N", type=int, required=True, help="the number of ranks")
    shard.add_argument(
        "--plan",
        metavar="FILE",
        help='a JSON file that gives names of tensors or modules a style, such as {"model.layers.*.mlp.up_proj": "colwise"}'
        " (default: the plan that transformers has for the model)",
    )
    for parser, required, default in (
        (shard, False, "default: the source's files, each in parts"),
        (reshard, True, "a larger tensor has a file to itself"),
    ):
        parser.add_argument(
            "--max-shard-size",
            metavar="SIZE",
            required=required,
            help=f"the size of a file, such as 5GB (5 * 10^9 bytes); {default}",
        )
    for parser in (shard, merge, reshard):
        parser.add_argument("--force", action="store_true", help="replace the checkpoint that is in OUT")
        parser.add_argument(
            "--durable", action="store_true", help="return when everything is on stable storage"
        )
        parser.add_argument(
            "--quiet", action="store_true", help="show no progress, and print nothing where all is well"
        )


def run(given: argparse.Namespace) -> int:
    """Runs the command. Returns the exit status."""
    return guarded(lambda: _run(given))


def _run(given: argparse.Namespace) -> int:
    if problem := needs_torch(given.command):
        return fail(problem)
    from ..tools import reshard

    shown = sys.stderr.isatty() and not given.quiet
    if not shown and not given.quiet:
        print(f"fastshard: {given.command} of {_described(given.src)} ...", file=sys.stderr)
    began = time.monotonic()
    how: dict[str, Any] = {
        "force": given.force,
        "durable": given.durable,
        "progress": True if shown else None,
    }
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
    if not given.quiet:
        took = f"{time.monotonic() - began:.1f} s"
        try:
            print(f"{_described(given.output)} in {took}")
        except OSError as error:  # it stands all the same
            print(f"{printable(given.output)}: in place after {took}, not looked at again ({error.strerror})")
    return 0


def _described(folder: str) -> str:
    """Returns the name of a checkpoint and the bytes of its safetensors files, including those in ranks'
    folders."""
    files, nbytes = 0, 0
    for place in (folder, *_ranks_in(folder)):
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.endswith(WEIGHTS_SUFFIX) and entry.is_file():
                    files, nbytes = files + 1, nbytes + entry.stat().st_size
    return f"{printable(folder)}: {amount(files, 'file')}, {size(nbytes)}"


def _ranks_in(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.path for entry in entries if is_rank_folder(entry.name) and entry.is_dir()]
