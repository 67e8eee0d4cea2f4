# SPDX-License-Identifier: Apache-2.0
"""``fastshard checkpoints RUN``, ``fastshard du PATH...``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Final

from ..tools.run_folder import (
    CHECKPOINT_PREFIX,
    Pruned,
    RunCheckpoint,
    latest_checkpoint,
    list_checkpoints,
    prune_checkpoints,
)
from ..tools.usage import usage_of
from .text import fail, guarded, printable, size, table

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

COMMANDS: Final = ("checkpoints", "du")


def add_parsers(commands: Commands) -> None:
    checkpoints = commands.add_parser(
        "checkpoints",
        help="list the checkpoints of a run and whether they are complete, and delete those that need not be kept",
        description="Lists the checkpoints of a run, the oldest first. A complete one has its indices and all their shards, headers"
        " that fit the sizes, all that a manifest names, and what Trainer needs to go on. No tensors are read; `fastshard"
        " verify` reads them.",
        epilog="Exit status: 0 if all is well, 1 if --latest or --complete finds none or the run cannot be read or changed, 2 if"
        " the arguments are wrong.",
    )
    du = commands.add_parser(
        "du",
        help="show what the checkpoints of a run really occupy, and what deleting one would free",
        description="Files with several names (hard links) and blocks in several files (reflinks) count once. SIZE adds up"
        " the sizes of the files, USED all blocks that a checkpoint uses, and FREES those that nothing else uses.",
        epilog="Exit status: 0 if all is well, 1 if something cannot be read, 2 if the arguments are wrong.",
    )
    du.add_argument(
        "paths", metavar="PATH", nargs="+", help="the folder of a run, or any other folder or file"
    )
    du.add_argument("--json", action="store_true", help="print the result as JSON, in bytes")
    for parser in (checkpoints, du):
        parser.add_argument(
            "--prefix",
            default=CHECKPOINT_PREFIX,
            help=f"what the names of checkpoints have before the number (default: {CHECKPOINT_PREFIX})",
        )
    checkpoints.add_argument("run", metavar="RUN", help="the folder of a run")
    checkpoints.add_argument(
        "--complete", action="store_true", help="print only the paths of complete ones, one in each line"
    )
    checkpoints.add_argument(
        "--latest", action="store_true", help="print only the path of the newest complete one"
    )
    checkpoints.add_argument("--json", action="store_true", help="print the list as JSON")
    keep = checkpoints.add_argument_group(
        "retention (without --delete the command only says what it would delete)"
    )
    keep.add_argument("--keep-last", metavar="N", type=int, help="keep the N newest complete ones")
    keep.add_argument("--keep-every", metavar="M", type=int, help="keep those whose step is a multiple of M")
    keep.add_argument("--keep", metavar="NAME", action="append", default=[], help="keep this one, too")
    keep.add_argument(
        "--incomplete",
        action="store_true",
        help="also delete incomplete ones that are older than the newest complete one",
    )
    keep.add_argument(
        "--durable", action="store_true", help="delete nothing before the newest ones are on stable storage"
    )
    keep.add_argument("--delete", action="store_true", help="delete all that are not kept")


def run(given: argparse.Namespace) -> int:
    """Runs the command. Returns the exit status."""
    if given.command == "du":
        return guarded(lambda: _du(given))
    problem = _contradiction(given)
    if problem is not None:
        print(f"fastshard checkpoints: {problem}", file=sys.stderr)
        return 2
    return guarded(lambda: _checkpoints(given), given.run)


def _contradiction(given: argparse.Namespace) -> str | None:
    """Returns what is wrong with the arguments taken together."""
    prunes = given.keep_last is not None or given.keep_every is not None
    for name in ("delete", "incomplete", "durable", "keep"):
        if getattr(given, name) and not prunes:
            return f"--{name} goes with --keep-last or --keep-every"
    if prunes and (given.latest or given.complete):
        return "--latest and --complete list, --keep-last and --keep-every delete"
    if any(number is not None and number < 1 for number in (given.keep_last, given.keep_every)):
        return "--keep-last and --keep-every are numbers from 1 on"
    return None


def _checkpoints(given: argparse.Namespace) -> int:
    if given.keep_last is not None or given.keep_every is not None:
        return _prune(given)
    if given.latest:
        latest = latest_checkpoint(given.run, prefix=given.prefix)
        if given.json:
            print(json.dumps({"run": given.run, "latest": latest}))
        elif latest is not None:
            _print_path(latest)
        return 0 if latest is not None else fail("no checkpoint is complete", given.run)
    found = list_checkpoints(given.run, prefix=given.prefix)
    if given.complete:
        found = [checkpoint for checkpoint in found if checkpoint.complete]
    if given.json:
        print(json.dumps({"run": given.run, "checkpoints": [_as_dict(c) for c in found]}, indent=2))
    elif given.complete:
        for checkpoint in found:
            _print_path(checkpoint.path)
    elif found:
        print(table(("checkpoint", "state"), [_row(checkpoint) for checkpoint in found], right=()))
    else:
        print(f"{printable(given.run)}: no checkpoints {given.prefix}N")
    return 0 if found or not given.complete else fail("no checkpoint is complete", given.run)


def _print_path(path: str) -> None:
    """Prints a path as the bytes that it is, for scripts."""
    sys.stdout.buffer.write(os.fsencode(path) + b"\n")
    sys.stdout.buffer.flush()


def _row(checkpoint: RunCheckpoint) -> tuple[str, str]:
    if checkpoint.complete:
        return checkpoint.name, "complete"
    more = f" (and {len(checkpoint.problems) - 1} more)" if len(checkpoint.problems) > 1 else ""
    return checkpoint.name, f"not complete: {printable(checkpoint.problems[0])}{more}"


def _as_dict(checkpoint: RunCheckpoint) -> dict[str, object]:
    return {
        "name": checkpoint.name,
        "path": checkpoint.path,
        "step": checkpoint.step,
        "complete": checkpoint.complete,
        "problems": checkpoint.problems,
    }


def _prune(given: argparse.Namespace) -> int:
    done: Pruned = prune_checkpoints(
        given.run,
        keep_last=given.keep_last,
        keep_every=given.keep_every,
        keep=given.keep,
        incomplete=given.incomplete,
        durable=given.durable,
        dry_run=not given.delete,
        prefix=given.prefix,
    )
    if given.json:
        told = {"run": given.run, "dry_run": not given.delete, "kept": done.kept, "deleted": done.deleted}
        print(json.dumps(told, indent=2))
        return 0
    word = "deleted" if given.delete else "would be deleted"
    rows = [(os.path.basename(path), f"kept: {reason}") for path, reason in done.kept.items()]
    rows += [(os.path.basename(path), word) for path in done.deleted]
    if rows:
        print(table(("checkpoint", "what becomes of it"), rows, right=()))
    return 0


# du --------------------------------------------------------------------------------------------------------


def _du(given: argparse.Namespace) -> None:
    found = usage_of(given.paths, prefix=given.prefix)
    if given.json:
        print(json.dumps(found.as_dict(), indent=2))
        return
    rows = [
        (
            printable(one.path if len(given.paths) > 1 else one.name),
            str(one.files),
            *map(size, (one.nbytes, one.occupied, one.frees)),
        )
        for one in found.checkpoints
    ]
    rows.append(("together", "", size(found.nbytes), size(found.occupied), ""))
    print(table(("checkpoint", "files", "size", "used", "frees"), rows, right=(1, 2, 3, 4)))
