# SPDX-License-Identifier: Apache-2.0
"""``fastshard inspect FILE``, ``convert FILE FILE``, ``env [PATH]``, ``run COMMAND``, ``bench``, ``vllm-save``, and those of
cli_checkpoints.py."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata, util

from tqdm import tqdm

from . import __version__, cli_checkpoints, cli_run
from .engine import IO_URING_VARIABLE, Options, io_uring_allowed, usable_cpus
from .layout import FileHeader, read_header


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 1 (the input is bad), 2 (the arguments are)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["bench"]:  # its own parser, and its own dependencies
        return _bench(arguments[1:])
    if arguments[:1] == ["run"]:  # with another command's arguments
        return cli_run.run(arguments[1:])
    if arguments[:1] == ["vllm-save"]:  # with vLLM's arguments
        return _vllm_save(arguments[1:])
    parser = argparse.ArgumentParser(prog="fastshard", description="Fast, safe safetensors files.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="header, tensors and sizes of a safetensors file")
    inspect.add_argument("file", help="a .safetensors file")
    inspect.add_argument("--json", action="store_true", help="as JSON")
    convert = commands.add_parser("convert", help="a checkpoint of torch.save to safetensors")
    convert.add_argument(
        "file", metavar="SRC", help="a .bin, .pt or .pth file: a dict of tensors; a folder of such"
    )
    convert.add_argument("destination", metavar="DST", help="the .safetensors file, or the folder")
    convert.add_argument("--key", help="the tensors are those of this entry (model, state_dict, ...)")
    convert.add_argument(
        "--dtype", help="cast floating-point tensors to this: fp32, fp16, bf16, fp8_e4m3fn, fp8_e5m2"
    )
    convert.add_argument(
        "--max-shard-size", metavar="SIZE", help="make DST a folder of shards of this size, as 5GB"
    )
    convert.add_argument("--force", action="store_true", help="replace DST if it exists")
    env = commands.add_parser("env", help="what this machine and the filesystem of a path offer a save, what is replaced")
    env.add_argument(
        "path", nargs="?", default=".", help="an existing directory, or a file in one (default: .)"
    )
    cli_checkpoints.add_parsers(commands)
    commands.add_parser("run", help="a command whose Pythons all start with fastshard (run torchrun train.py)")
    commands.add_parser(
        "bench", help="measure against safetensors, torch.save and DCP (--help for its options)"
    )
    commands.add_parser(
        "vllm-save", help="a model folder with the weights as the ranks of vLLM want them (needs vLLM)"
    )
    given = parser.parse_args(arguments)
    if given.command in cli_checkpoints.COMMANDS:
        return cli_checkpoints.run(given)
    try:
        if given.command == "inspect":
            _inspect(given.file, given.json)
        elif given.command == "convert":
            _convert(given)
        else:
            _env(given.path)
    except BrokenPipeError:  # `fastshard inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        name = given.path if given.command == "env" else given.file
        text: object = error
        if isinstance(error, OSError):
            name, text = error.filename or name, error.strerror
        print(f"fastshard: {name}: {text}", file=sys.stderr)
        return 1
    return 0


def _size(nbytes: float) -> str:
    if nbytes < 1024:
        return f"{nbytes:.0f} B"
    text = tqdm.format_sizeof(nbytes, divisor=1024)
    return f"{text[:-1]} {text[-1].upper()}iB"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int]) -> str:
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    numbers = set(right)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def _inspect(path: str, as_json: bool) -> None:
    with open(path, "rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        found = read_header(file, nbytes)
    if as_json:
        print(json.dumps(_as_dict(found, nbytes), indent=2, ensure_ascii=False))
        return
    rows = [
        (_printable(t.name), t.code, str(list(t.shape)), str(found.nbytes + t.begin), _size(t.end - t.begin))
        for t in found.tensors
    ]
    print(_table(("tensor", "dtype", "shape", "offset", "size"), rows, right=(3, 4)))
    by_code: dict[str, int] = {}
    for tensor in found.tensors:
        by_code[tensor.code] = by_code.get(tensor.code, 0) + tensor.end - tensor.begin
    dtypes = ", ".join(f"{code} {_size(total)}" for code, total in by_code.items())
    print(
        f"\n{len(found.tensors)} tensors, {_size(nbytes)} ({nbytes} bytes): header {_size(found.nbytes)}",
        end="",
    )
    print(f", {dtypes}" if dtypes else "")
    if found.metadata is None:
        print("no metadata")
    else:
        print(f"metadata: {json.dumps(found.metadata, ensure_ascii=False)}")


def _convert(given: argparse.Namespace) -> None:
    if util.find_spec("torch") is None:
        raise ValueError("convert needs torch")
    from .convert import DTYPES, convert, convert_folder

    if given.dtype not in (None, *DTYPES):
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {given.dtype}")
    dtype = DTYPES.get(given.dtype)
    options = {"key": given.key, "dtype": dtype, "force": given.force}
    if given.max_shard_size is None and os.path.isfile(given.file) and not given.file.endswith(".json"):
        done = convert(given.file, given.destination, **options)
    else:
        size = given.max_shard_size or "5GB"
        done = convert_folder(given.file, given.destination, max_shard_size=size, **options)
    print(f"{given.destination}: {done.tensors} tensors, {_size(done.nbytes)}")
    for name, kept in done.dropped.items():
        print(f"{_printable(name)} is {_printable(kept)}")


def _printable(name: str) -> str:
    """Names are data: control characters in one must not reach the terminal."""
    return name if name.isprintable() else json.dumps(name)


def _as_dict(found: FileHeader, nbytes: int) -> dict[str, object]:
    return {
        "nbytes": nbytes,
        "header_nbytes": found.nbytes,
        "metadata": found.metadata,
        "tensors": [tensor._asdict() for tensor in found.tensors],
    }


def _env(path: str) -> None:
    from . import _native

    directory = path if os.path.isdir(path) else os.path.dirname(path) or "."
    options = Options()
    kind, write_path, reason = _native.filesystem(directory, writers=options.writers)
    _, durable_path, durable_reason = _native.filesystem(directory, durable=True, writers=options.writers)
    rows = [
        ("fastshard", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.release()}"),
        *((name, _version(name)) for name in ("torch", "safetensors")),
        ("CPUs", f"{usable_cpus()} usable, {options.writers} writer threads"),
        ("staging memory", f"at most {_size(options.memory_budget)}"),
        (
            "CUDA kernels",
            "compiled in" if _native.kernels_compiled_in() else "not compiled in: copies by pitch",
        ),
        *_cuda(),
        ("", ""),
        ("filesystem", f"{kind} at {os.path.realpath(directory)}"),
        ("free space", _size(_free(directory))),
        ("a save here", f"{write_path}: {reason}"),
        ("a durable save here", f"{durable_path}: {durable_reason}"),
        *_native.probe(directory),
        ("asynchronous direct I/O (io_uring)", _io_uring()),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name.ljust(width)}  {value}".rstrip())
    print("\nwith `import fastshard.auto`", *cli_run.replacements(), sep="\n")


def _io_uring() -> str:
    from . import _native

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
    from . import _native

    try:
        library, version = _native.cuda_driver_version()
        devices = _native.cuda_devices()
    except RuntimeError as error:
        return [("CUDA driver", str(error))]
    rows = [("CUDA driver", f"{library}, CUDA {version // 1000}.{version % 1000 // 10}")]
    return rows + [(f"cuda:{i}", f"{name}, {_size(nbytes)}") for i, (name, nbytes) in enumerate(devices)]


def _free(directory: str) -> int:
    space = os.statvfs(directory)
    return space.f_bavail * space.f_frsize


def _bench(arguments: list[str]) -> int:
    if util.find_spec("torch") is None:
        print("fastshard: bench needs torch", file=sys.stderr)
        return 1
    from .bench.save import main as bench

    return int(bench(arguments))


def _vllm_save(arguments: list[str]) -> int:
    if util.find_spec("torch") is None:
        print("fastshard: vllm-save needs vLLM", file=sys.stderr)
        return 1
    from .vllm_save import main as vllm_save

    return vllm_save(arguments)
