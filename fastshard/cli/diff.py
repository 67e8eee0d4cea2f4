# SPDX-License-Identifier: Apache-2.0
"""``fastshard diff A B``."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Final

from ..tools.diff import Diff, Difference, diff_checkpoints
from .text import amount, fail, guarded, needs_torch, printable, size, table

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

COMMANDS: Final = ("diff",)
_TROUBLE: Final = 2


def add_parsers(commands: Commands) -> None:
    diff = commands.add_parser(
        "diff",
        help="tell which tensors of two checkpoints differ",
        description="Compares two checkpoints tensor by tensor, however they are cut into files, and the other files of"
        " two folders byte by byte. Tensors whose CRC-32 is in the manifests of both sides are not read, nor are"
        " those in the same file, or in files that have the same SHA-256 in SHA256SUMS.",
        epilog="Exit status: 0 if both are the same, 1 if something differs, 2 for trouble.",
    )
    for name in ("a", "b"):
        diff.add_argument(name, metavar=name.upper(), help="a safetensors file, an index, or a folder")
    diff.add_argument(
        "--max-abs",
        action="store_true",
        help="tell how many elements differ and by how much at most, also between dtypes; this needs torch and reads more",
    )
    diff.add_argument("--bytes", action="store_true", help="compare bytes also where the CRC-32 are the same")
    diff.add_argument("--weights", action="store_true", help="compare only tensors, no other files")
    diff.add_argument("--json", action="store_true", help="print the result as JSON")
    diff.add_argument(
        "--quiet", action="store_true", help="print nothing but errors; the exit status tells the result"
    )


def run(given: argparse.Namespace) -> int:
    """Runs the command. Returns the exit status, as diff has it."""
    found: list[Diff] = []
    status = guarded(lambda: _diff(given, found))
    if status:
        return _TROUBLE if status == 1 else status
    return 0 if found[0].same else 1


def _diff(given: argparse.Namespace, done: list[Diff]) -> int:
    if given.max_abs and (problem := needs_torch("diff --max-abs")):
        return fail(problem)
    found = diff_checkpoints(
        given.a,
        given.b,
        max_abs=given.max_abs,
        digests=not given.bytes,
        weights_only=given.weights,
        progress=True if sys.stderr.isatty() and not given.quiet else None,
    )
    done.append(found)
    if given.quiet:
        return 0
    if given.json:
        print(json.dumps(found.as_dict(), indent=2))
        return 0
    if found.differences:
        rows = [_row(difference) for difference in found.differences]
        print(table(("tensor", "A", "B", "size", "what differs"), rows, right=(3,)))
    for name, how in found.files.items():
        print(f"file {printable(name)}: {how if how.startswith('only') else f'differs ({how})'}")
    equal = sum(found.equal.values())
    by = ", ".join(
        f"{count} by {how}" if how != "same file" else f"{count} in the same file"
        for how, count in found.equal.items()
    )
    count = len(found.differences)
    text = f"{amount(count, 'tensor')} {'differs' if count == 1 else 'differ'}"
    text += f", {equal} {'is' if equal == 1 else 'are'} equal{f' ({by})' if by else ''}"
    print(f"{text}; {size(found.read_nbytes)} of each side read")
    return 0


def _row(difference: Difference) -> tuple[str, str, str, str, str]:
    text = difference.kind
    if difference.elements is not None:
        text += f": {difference.differing} of {difference.elements} elements, at most {difference.max_abs:g}"
        if difference.at is not None:
            text += f" at {difference.at}"
        if difference.nans:
            text += f", {difference.nans} are NaN on one side"
    return (
        printable(difference.name),
        printable(difference.a or "-"),
        printable(difference.b or "-"),
        size(difference.nbytes),
        text,
    )
