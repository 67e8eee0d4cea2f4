# SPDX-License-Identifier: Apache-2.0
"""``fastshard serve FOLDER``: compares rank shards with their digests, then becomes the server that loads them.

It is meant as the entry point of a container. The server takes the place of this process, so it gets the signals that a
container's runtime sends, and its exit status is the container's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Final

from ..formats.naming import PP_PATTERN, TP_PATTERN, is_manifest
from .text import amount, fail, guarded, printable
from .verify import show

if TYPE_CHECKING:
    from ..formats.manifest import RankManifest

_COMMANDS: Final[Mapping[str, tuple[str, ...]]] = {
    "vllm": ("vllm", "serve"),
    "sglang": (sys.executable, "-m", "sglang.launch_server", "--model-path"),
}
"""What starts a server; the folder follows."""
_SIZES: Final = {
    "tp_size": ("--tensor-parallel-size", "-tp", "--tp-size", "--tp"),
    "pp_size": ("--pipeline-parallel-size", "-pp", "--pp-size", "--pp"),
}
"""The engines' flags for the numbers of ranks."""

_USAGE: Final = """fastshard serve [--check CHECK] [--engine ENGINE] FOLDER [ARGUMENT ...]"""
_DESCRIPTION: Final = """Starts vLLM or SGLang on a folder of rank shards, as `fastshard vllm-save` makes them, with --load-format
sharded_state and the numbers of ranks that the folder is for. First every file is compared with what is known of it: with a
damaged or missing one, or with another number of ranks, the server is not started and the exit status is 1. ARGUMENTs go to the
server, which replaces this process."""


def run(arguments: Sequence[str]) -> int:
    """Replaces this process with the server, and returns only if that must not or cannot be started.

    Returns 1 if the folder is not what was saved, 2 for wrong arguments, and 126 or 127, as shells do, for a server
    that cannot be run or found.
    """
    given = _parser().parse_args(arguments)
    # As the first process of a container it would not end for a signal that nobody handles.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    return guarded(lambda: _serve(given), given.folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastshard serve", usage=_USAGE, description=_DESCRIPTION)
    parser.add_argument(
        "--check",
        choices=("crc32", "sha256", "quick"),
        default="crc32",
        help="what is compared: the CRC-32 of every tensor, or where it is known the SHA-256 of every file, which takes "
        "longer, or sizes and headers only (default: crc32)",
    )
    parser.add_argument(
        "--engine", choices=sorted(_COMMANDS), help="default: the one that the shards are from"
    )
    parser.add_argument("folder", metavar="FOLDER", help="what `fastshard vllm-save` has made")
    parser.add_argument("arguments", metavar="ARGUMENT", nargs=argparse.REMAINDER, help="of the server")
    return parser


def _serve(given: argparse.Namespace) -> int:
    from ..tools.verify import verify

    began = time.monotonic()
    quick = given.check == "quick"
    report = verify(given.folder, quick=quick, crc32=given.check == "crc32")
    show(report, time.monotonic() - began, quick=quick)
    if not report.ok:
        return fail(f"{given.folder} is not what was saved: the server is not started")
    if report.without_digests and not quick:
        return fail(
            f"no digests are known of {amount(len(report.without_digests), 'file')} in {given.folder}: `fastshard manifest "
            f"{given.folder}` notes them when the folder is made, and --check quick starts the server without"
        )
    ranks = _ranks(given.folder)
    command = _command(ranks, given.engine, given.folder, given.arguments)
    return _become(command)


def _ranks(folder: str) -> list[RankManifest]:
    """Returns the manifests of all ranks. Raises ``ValueError`` if one is missing, or they are not of one save."""
    from ..formats.manifest import read_rank_manifest

    found = [
        read_rank_manifest(os.path.join(folder, name))
        for name in sorted(os.listdir(folder))
        if is_manifest(name)
    ]
    if not found:
        raise ValueError("it holds no rank shards: `fastshard vllm-save` makes them from a model folder")
    sizes = {(of.ranks.tp_size, of.ranks.pp_size) for of in found}
    if len(sizes) > 1:
        raise ValueError(
            f"it holds the shards of several saves, for {_listed(sizes)} ranks (tensor x pipeline)"
        )
    ((tp_size, pp_size),) = sizes
    wanted = {(tp, pp) for tp in range(tp_size) for pp in range(pp_size)}
    missing = wanted - {(of.ranks.tp_rank, of.ranks.pp_rank) for of in found}
    if missing:
        raise ValueError(f"the shards of {len(missing)} of {len(wanted)} ranks are missing")
    return found


def _listed(sizes: set[tuple[int, int]]) -> str:
    return " and ".join(f"{tp} x {pp}" for tp, pp in sorted(sizes))


def _command(
    ranks: Sequence[RankManifest], engine: str | None, folder: str, arguments: Sequence[str]
) -> list[str]:
    """Returns the server's command. Raises ``ValueError`` for arguments that do not go with the shards."""
    of = ranks[0]
    name, version = of.writer or ("", "")
    engine = engine or (name if name in _COMMANDS else None)
    if engine is None:
        raise ValueError("its shards do not say which engine they are for: --engine")
    command = [*_COMMANDS[engine], folder, "--load-format", "sharded_state"]
    for size, flags in _SIZES.items():
        number = getattr(of.ranks, size)
        asked = _asked(arguments, flags)
        if asked is None and number > 1:
            command += [flags[0], str(number)]
        elif asked is not None and asked != str(number):
            raise ValueError(f"its shards are for {flags[0]} {number}, not {asked}")
    if of.pattern not in (TP_PATTERN, PP_PATTERN) and "--model-loader-extra-config" not in arguments:
        command += ["--model-loader-extra-config", json.dumps({"pattern": of.pattern})]
    if name == engine and version != (here := _version(engine)):
        print(f"fastshard: the shards are from {engine} {version}, and this is {here}", file=sys.stderr)
    return [*command, *arguments]


def _asked(arguments: Sequence[str], flags: Sequence[str]) -> str | None:
    """Returns the value of the last of these flags."""
    value = None
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        flag, equals, rest = argument.partition("=")
        if flag in flags:
            value = rest if equals else following
    return value


def _version(engine: str) -> str:
    """Returns the version that is installed. vLLM has several distributions, of which all have this module."""
    for distribution in metadata.packages_distributions().get(engine, ()):
        return metadata.version(distribution)
    return "another version"


def _become(command: Sequence[str]) -> int:
    """Runs the command in place of this process. Commands beside this Python come first."""
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)))
    found = shutil.which(command[0], path=path)
    if found is None:
        fail(f"{command[0]}: command not found")
        return 127
    print(f"fastshard: {' '.join(map(printable, command))}", file=sys.stderr)
    sys.stdout.flush()
    try:
        os.execv(found, [found, *command[1:]])
    except OSError as error:
        fail(error, found)
    return 126
