# SPDX-License-Identifier: Apache-2.0
"""``fastshard env [PATH]``, ``run COMMAND``, ``bench``, ``vllm-save``, ``serve``, and the commands of files.py,
checkpoints.py, verify.py, run_folders.py and diff.py."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata

from .. import __version__
from ..engine.engine import IO_URING_VARIABLE, Options, io_uring_allowed, usable_cpus
from ..formats.hf_index import is_folder
from . import checkpoints as cli_checkpoints
from . import diff as cli_diff
from . import files as cli_files
from . import run as cli_run
from . import run_folders as cli_run_folders
from . import serve as cli_serve
from . import verify as cli_verify
from .text import fail, guarded, needs_torch, size


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit status: 0, 1 if the input is bad, 2 if the arguments are."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["bench"]:  # its own parser, and its own dependencies
        return _bench(arguments[1:])
    if arguments[:1] == ["run"]:  # with another command's arguments
        return cli_run.run(arguments[1:])
    if arguments[:1] == ["serve"]:  # with a server's arguments
        return cli_serve.run(arguments[1:])
    if arguments[:1] == ["vllm-save"]:  # with vLLM's arguments
        return _vllm_save(arguments[1:])
    given = make_parser().parse_args(arguments)
    if given.command in cli_files.COMMANDS:
        return cli_files.run(given)
    if given.command in cli_checkpoints.COMMANDS:
        return cli_checkpoints.run(given)
    if given.command in cli_run_folders.COMMANDS:
        return cli_run_folders.run(given)
    if given.command in cli_diff.COMMANDS:
        return cli_diff.run(given)
    if given.command in cli_verify.COMMANDS:
        return cli_verify.run(given)
    return guarded(lambda: _env(given.path), given.path)


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="fastshard", description="Saves, checks, compares and converts PyTorch weights."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    cli_files.add_parsers(commands)
    cli_verify.add_parsers(commands)
    env = commands.add_parser(
        "env",
        help="show what this machine and the filesystem of a path offer a save, and which functions are replaced",
    )
    env.add_argument(
        "path",
        nargs="?",
        default=".",
        help="an existing directory, or a file in one (default: the current directory)",
    )
    cli_checkpoints.add_parsers(commands)
    cli_run_folders.add_parsers(commands)
    cli_diff.add_parsers(commands)
    commands.add_parser(
        "run",
        help="run a command, every Python of which starts with fastshard: fastshard run torchrun train.py",
    )
    commands.add_parser(
        "bench", help="measure fastshard beside safetensors, torch.save and torch.distributed.checkpoint"
    )
    commands.add_parser(
        "vllm-save", help="make a model folder with the weights as the ranks of vLLM load them (needs vLLM)"
    )
    commands.add_parser(
        "serve", help="start vLLM or SGLang on such a folder, if it is what was saved (for containers)"
    )
    return parser


def _env(path: str) -> None:
    from .. import _native

    directory = path if is_folder(path) else os.path.dirname(path) or "."
    options = Options()
    kind, write_path, reason = _native.filesystem(directory)
    _, durable_path, durable_reason = _native.filesystem(directory, durable=True)
    _, later_path, later_reason = _native.filesystem(directory, past_cache=True)
    rows = [
        ("fastshard", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.release()}"),
        *((name, _version(name)) for name in ("torch", "safetensors")),
        ("tensors are laid out", _layout()),
        ("CPUs", f"{usable_cpus()} usable, {options.writers} writer threads"),
        ("casts and checksums use", ", ".join(_native.processor_features()) or "plain instructions"),
        ("staging memory", f"at most {size(options.memory_budget)}"),
        (
            "CUDA kernels",
            "compiled in" if _native.kernels_compiled_in() else "not compiled in: copies by pitch",
        ),
        *_cuda(),
        ("", ""),
        ("filesystem", f"{kind} at {os.path.realpath(directory)}"),
        ("free space", size(_free(directory))),
        ("a save here", f"{write_path}: {reason}"),
        ("a durable save here", f"{durable_path}: {durable_reason}"),
        ("an asynchronous save here", f"{later_path}: {later_reason}"),
        *_native.probe(directory),
        ("asynchronous direct I/O (io_uring)", _io_uring()),
        ("", ""),
        *cli_run.replacements(),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name.ljust(width)}  {value}".rstrip())


def _layout() -> str:
    try:
        from ..engine.planning import why_not_native
    except ImportError as error:
        return str(error)
    why = why_not_native()
    return f"in Python: {why}" if why else "natively"


def _io_uring() -> str:
    from .. import _native

    if not io_uring_allowed():
        return f"no: {IO_URING_VARIABLE}=0; threads instead"
    refusal = _native.io_uring_refusal()
    return f"no: {os.strerror(refusal)}; threads instead" if refusal else "yes"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cuda() -> list[tuple[str, str]]:
    from .. import _native

    try:
        library, version = _native.cuda_driver_version()
        devices = _native.cuda_devices()
    except RuntimeError as error:
        return [("CUDA driver", str(error))]
    rows = [("CUDA driver", f"{library}, CUDA {version // 1000}.{version % 1000 // 10}")]
    return rows + [(f"cuda:{i}", f"{name}, {size(nbytes)}") for i, (name, nbytes) in enumerate(devices)]


def _free(directory: str) -> int:
    space = os.statvfs(directory)
    return space.f_bavail * space.f_frsize


def _bench(arguments: list[str]) -> int:
    if problem := needs_torch("bench"):
        return fail(problem)
    from ..bench.save import main as bench

    return int(bench(arguments))


def _vllm_save(arguments: list[str]) -> int:
    if problem := needs_torch("vllm-save"):
        return fail(problem)
    from ..integrations.vllm_save import main as vllm_save

    return vllm_save(arguments)
