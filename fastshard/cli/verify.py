# SPDX-License-Identifier: Apache-2.0
"""``fastshard verify PATH...``, ``fastshard manifest PATH...``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Final

from ..formats.naming import MANIFEST_NAME, SUMS_NAME
from .text import amount, fail, guarded, printable, size

if TYPE_CHECKING:
    from ..api.checked import Problem
    from ..tools.verify import Report

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

COMMANDS: Final = ("verify", "manifest")
_MOST_NAMED: Final = 40


def add_parsers(commands: Commands) -> None:
    verify = commands.add_parser(
        "verify",
        help="tell whether a checkpoint is still what was saved, and name damaged files and tensors",
        description="Compares the bytes of files with a manifest, SHA256SUMS and the checksums in archives, and headers,"
        " sizes, indices and configurations with each other. Exit status: 0 if all is well, 1 if something is damaged,"
        " missing or cannot be read, 2 if the arguments are wrong.",
    )
    verify.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        help="a file, an index, a folder, or a run: a folder with such folders in it",
    )
    verify.add_argument(
        "--json", action="store_true", help="print the report as JSON; a list if there are several paths"
    )
    verify.add_argument(
        "--quick", action="store_true", help="read no tensors, and compare only sizes, headers and indices"
    )
    verify.add_argument(
        "--crc32",
        action="store_true",
        help="compare CRC-32 and not SHA-256 where both are known, which is faster",
    )
    verify.add_argument(
        "--direct", action="store_true", help="read from the disk itself, past the page cache"
    )
    verify.add_argument(
        "--strict", action="store_true", help="also fail if no digest is known of a file of weights"
    )
    verify.add_argument(
        "--quiet", action="store_true", help="show no progress, and print nothing where all is well"
    )
    manifest = commands.add_parser(
        "manifest",
        help="write down what a checkpoint holds now, for verify",
        description=f"Writes {MANIFEST_NAME}, with the CRC-32 of every tensor, into a folder that was saved without one.",
    )
    manifest.add_argument("paths", metavar="PATH", nargs="+", help="a folder with one checkpoint")
    manifest.add_argument("--sha256", action="store_true", help=f"also write {SUMS_NAME}, for sha256sum -c")
    manifest.add_argument("--force", action="store_true", help="replace the files that are there")
    manifest.add_argument(
        "--format",
        choices=("in-toto", "oci"),
        help=f"write no manifest, and print what {SUMS_NAME} says as the statement that model_signing signs, or as the manifest"
        " of an OCI artifact as CNCF's ModelPack describes it; no weights are read",
    )
    manifest.add_argument(
        "--layout",
        metavar="FOLDER",
        help="with --format oci, make an OCI image layout of links in this new folder, from which it can be pushed",
    )
    manifest.add_argument(
        "--quiet", action="store_true", help="show no progress, and print nothing where all is well"
    )


def run(given: argparse.Namespace) -> int:
    """Runs the command. Returns the exit status."""
    if given.command == "verify":
        return guarded(lambda: _verify(given))
    return guarded(lambda: _manifest(given))


def _verify(given: argparse.Namespace) -> int:
    from ..tools.verify import verify

    status = 0
    reports: list[Report] = []
    for path in given.paths:
        began = time.monotonic()
        try:
            report = verify(
                path,
                quick=given.quick,
                crc32=given.crc32,
                direct=given.direct,
                progress=_shown(given) or None,
            )
        except (OSError, ValueError) as error:
            status = fail(error, path)
            continue
        reports.append(report)
        if not report.ok or (given.strict and report.without_digests):
            status = 1
        if not given.json:
            seconds = time.monotonic() - began
            show(report, seconds, quick=given.quick, strict=given.strict, quiet=given.quiet)
    if given.json and reports:
        told = [report.as_dict() for report in reports]
        print(json.dumps(told if len(given.paths) > 1 else told[0], indent=2))
    return status


def _shown(given: argparse.Namespace) -> bool:
    return sys.stderr.isatty() and not given.quiet


def show(
    report: Report, seconds: float, *, quick: bool = False, strict: bool = False, quiet: bool = False
) -> None:
    """Prints what was found, as ``fastshard verify`` does."""
    for problem in report.problems[:_MOST_NAMED]:
        print(_line(problem))
    if len(report.problems) > _MOST_NAMED:
        print(f"... and {len(report.problems) - _MOST_NAMED} more (--json names all)")
    unknown = report.without_digests
    if strict:
        for path in unknown[:_MOST_NAMED]:
            print(f"{printable(path)}: no digest of it is known")
    if quiet and report.ok and not (strict and unknown):
        return
    count = len(report.problems)
    verdict = "sound" if not count else amount(count, "problem")
    files = f"{amount(report.files, 'file')}, {size(report.nbytes)}"
    print(f"{printable(report.path)}: {verdict} ({files}, {seconds:.1f} s)", end="")
    if quick:
        print("; only sizes, headers and indices were looked at")
    elif unknown:
        print(
            f"; of {amount(len(unknown), 'file')} of weights no digest is known: only header and size were compared"
        )
    else:
        print()


def _line(problem: Problem) -> str:
    tensor = "" if problem.tensor is None else f" tensor {printable(problem.tensor)}:"
    text = problem.text if problem.text.isprintable() else json.dumps(problem.text)
    return f"{printable(problem.path)}:{tensor} {text}"


def _manifest(given: argparse.Namespace) -> int:
    if given.format is None and given.layout is not None:
        return fail("--layout is of --format oci")
    if given.format is not None and (given.sha256 or given.force or len(given.paths) > 1):
        return fail("--format is for one folder that has its digests, without --sha256 and --force")
    status = 0
    for path in given.paths:
        try:
            _describe(path, given)
        except (OSError, ValueError) as error:
            status = fail(error, path)
    return status


def _describe(path: str, given: argparse.Namespace) -> None:
    if given.format is not None:
        from ..tools.statements import statement_of

        print(statement_of(path, given.format, layout=given.layout), end="")
        return
    from ..tools.describe import write_manifest

    made = write_manifest(path, sha256=given.sha256, force=given.force, progress=_shown(given) or None)
    if not given.quiet:
        tensors = sum(len(entry.tensors or ()) for entry in made.files.values())
        nbytes = sum(entry.nbytes for entry in made.files.values())
        print(
            f"{printable(path)}: {amount(len(made.files), 'file')}, {amount(tensors, 'tensor')}, {size(nbytes)}"
        )
