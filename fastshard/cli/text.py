# SPDX-License-Identifier: Apache-2.0
"""How the commands print sizes, tables, and errors in one line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from safetensors import SafetensorError
from tqdm import tqdm

_MOST_SHOWN: Final = 2000
_MOST_OF_A_NAME: Final = 120


def size(nbytes: float) -> str:
    if nbytes < 1024:
        return f"{nbytes:.0f} B"
    text = tqdm.format_sizeof(nbytes, divisor=1024)
    return f"{text[:-1]} {text[-1].upper()}iB"


def amount(count: int, noun: str) -> str:
    """Returns a number with its noun, in the singular if it is one: ``1 file``, ``2 files``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def printable(name: str) -> str:
    """Returns a name in a form that can be printed. Names are data: control characters and megabytes of text
    must not reach the terminal."""
    shown = name if name.isprintable() else json.dumps(name)
    if len(shown) > _MOST_OF_A_NAME:
        half = _MOST_OF_A_NAME // 2
        shown = f"{shown[:half]}...{shown[-half:]} ({len(name)} characters)"
    return shown


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int]) -> str:
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


def fail(error: BaseException | str, name: str | None = None) -> int:
    """Prints in one line what went wrong, with the file's name before it unless the text has it. Returns the
    exit status."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        name = name if error.filename is None else os.fsdecode(error.filename)
        text = str(error.strerror)
    elif isinstance(error, MemoryError):
        text = "not enough memory"
    elif not isinstance(error, (str, OSError, ValueError, ImportError, SafetensorError)):
        text = f"{type(error).__name__}: {text}"
    if name and name not in text:
        text = f"{name}: {text}"
    line = " ".join(text.split()) or type(error).__name__
    if not line.isprintable():
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    print(f"fastshard: {line if len(line) <= _MOST_SHOWN else line[:_MOST_SHOWN] + '...'}", file=sys.stderr)
    return 1


def guarded(run: Callable[[], int | None], name: str | None = None) -> int:
    """Runs a command and prints an error as one line without a traceback. ``name`` stands before an error
    that names no file."""
    try:
        return run() or 0
    except BrokenPipeError:  # `fastshard inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        fail("interrupted")
        return 130
    except Exception as error:
        return fail(error, name)


def needs_torch(command: str) -> str | None:
    """Returns why a command cannot run, if torch cannot be imported."""
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        return f"{command} needs torch: {error}"
    return None
