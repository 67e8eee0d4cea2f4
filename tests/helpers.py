# SPDX-License-Identifier: Apache-2.0
"""What several test files need: tensors whose every byte is known, folders and headers to compare."""

from __future__ import annotations

import gc
import io
import json
import math
import os
import re
import subprocess
import sys
import textwrap
import zlib
from importlib import metadata
from pathlib import Path
from typing import Any

import forked
import torch
from forked import PRELUDE
from safetensors.torch import _SIZE, load_file

from fastshard import _native
from fastshard.formats.safetensors import CODES

DTYPES = [getattr(torch, name) for name in CODES if getattr(torch, name, None) in _SIZE]
"""All that this torch and this safetensors have of what the format can hold."""
FLOAT4 = next((dtype for dtype in DTYPES if str(dtype) == "torch.float4_e2m1fn_x2"), None)


def filled(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """A contiguous tensor whose bytes differ from their neighbours' and from those of another seed."""
    raw = torch.arange(math.prod(shape) * dtype.itemsize) * 37 + 101 * seed
    raw = raw % (2 if dtype == torch.bool else 251)
    return raw.to(torch.uint8).view(dtype).view(shape)


def saved_by_torch(dtype: torch.dtype) -> bool:
    """Whether this torch has a way to save it."""
    try:
        torch.save(filled((2,), dtype), io.BytesIO())
    except KeyError:
        return False
    return True


def crc32(tensor: torch.Tensor) -> int:
    """Of the bytes a tensor has in a file."""
    return (
        zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()) if tensor.numel() else 0
    )


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file in there, temporary ones too, with its contents."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def parsed(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header, in the order of the file, and the tensors' bytes."""
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % 8 == 0
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def open_descriptors() -> list[str]:
    """This process's open descriptors, once nothing is left to be closed: neither garbage of earlier tests nor small old
    files, which the engine closes on a thread."""
    gc.collect()
    _native.wait_for_closing()
    return sorted(os.listdir("/proc/self/fd"))


def same(path: os.PathLike[str] | str, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether the file holds exactly these tensors."""
    loaded = load_file(path)
    return loaded.keys() == tensors.keys() and all(
        torch.equal(loaded[name], tensors[name]) for name in tensors
    )


def release(library: str) -> tuple[int, ...]:
    """Of the installed version, to compare with: ``(4, 57, 1)``."""
    return tuple(int(number) for number in re.findall(r"\d+", metadata.version(library))[:3])


def said_now(text: str) -> str:
    """An error of safetensors in the words of its version 0.8, which are ours: older ones name types of PyO3 and Rust."""
    text = re.sub(
        r"'(\w+)' object cannot be converted to 'Py(Dict|String)'",
        lambda match: (
            ("'None'" if match[1] == "NoneType" else f"'{match[1]}' object")
            + f" is not an instance of '{'dict' if match[2] == 'Dict' else 'str'}'"
        ),
        text,
    )
    text = re.sub(
        r'IoError\(Os \{ code: (\d+), .*, message: "(.*)" \}\)', r"I/O error: \2 (os error \1)", text
    )
    return re.sub(
        r"IoError\(Error \{ kind: InvalidInput, .*\}\)|I/O error: file name contained an unexpected NUL byte$",
        "I/O error: Invalid argument (os error 22)",
        text,
    )


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def run(script: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a Python script in a process of its own; its last line of output is what it found."""
    return forked.run(PRELUDE + textwrap.dedent(script), *arguments, **options)


def run_bare(script: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """As :func:`run`, in a process that starts with the script's first line: nothing is imported before. ``traced``: the
    command that runs it."""
    # Not from the checkout's top: its package would come before the installed one.
    options = {"capture_output": True, "text": True, "timeout": 120, "cwd": Path(__file__).parent, **options}
    command = [*options.pop("traced", ()), sys.executable]  # type: ignore[misc]
    return subprocess.run([*command, "-c", textwrap.dedent(script), *map(str, arguments)], **options)  # type: ignore[call-overload]


ENGINE = """
import os, sys
from fastshard.engine.engine import Engine
from fastshard.errors import SaveError
from fastshard.engine.plan import FETCHED, FilePlan, TensorView

def save(*paths, **options):
    plans = [FilePlan(os.fsencode(path), b"new contents", []) for path in paths]
    return Engine().submit(plans, keep_alive=None, **options).result()

def while_writing(path, act):
    plan = FilePlan(os.fsencode(path), b"new contents", [TensorView(0, 1 << 16, FETCHED)])
    Engine().submit([plan], keep_alive=None, fetch=lambda *_: act(), serve=False).result()
"""
"""``save`` gives files these contents; ``while_writing`` calls ``act`` when half of a file is written. Without torch,
which takes a second to import."""


def run_engine(script: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """As :func:`run`, with what ``ENGINE`` defines."""
    return run_bare(ENGINE + textwrap.dedent(script), *arguments, **options)


def preload(library: Path, refuse: str) -> dict[str, str]:
    return {**forked.preloading(library), "REFUSE": refuse}
