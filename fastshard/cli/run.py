# SPDX-License-Identifier: Apache-2.0
"""``fastshard run COMMAND ...`` runs a command in which every Python starts with fastshard.

:func:`replacements` is what ``fastshard env`` says of the installed libraries.
"""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import sys
from importlib import util
from typing import Final

from ..base.settings import AUTO_VARIABLE, flag
from ..integrations import patching

STARTUP_FILE: Final = "fastshard_auto.pth"
"""The file beside the package whose line Python runs when it starts."""

_USAGE: Final = f"""usage: fastshard run COMMAND [ARGUMENT ...]

Runs a command with {AUTO_VARIABLE}=1, so that every Python it starts, workers included, does `import fastshard.auto` before
anything else: `fastshard run torchrun train.py`, `fastshard run accelerate launch train.py`, `fastshard run train.py`.
Commands are looked for beside this Python first. {patching.DISABLE_VARIABLE}=1 wins."""


def run(arguments: list[str]) -> int:
    """Replaces this process with the command, and returns only if that fails.

    Returns 2 for wrong arguments, 1 if Python would not start with fastshard, and 126 or 127, as shells do,
    for a command that cannot be run or found.
    """
    if arguments[:1] in (["-h"], ["--help"]):
        print(_USAGE)
        return 0
    if arguments[:1] == ["--"]:
        arguments = arguments[1:]
    if not arguments:
        print(_USAGE, file=sys.stderr)
        return 2
    if not flag(patching.DISABLE_VARIABLE) and startup_file() is None:
        print(
            f"fastshard: {STARTUP_FILE} is not installed beside fastshard, so no Python would start with it: install "
            "fastshard with pip, or write `import fastshard.auto` into the script",
            file=sys.stderr,
        )
        return 1
    command = arguments[0]
    if command.startswith("-") or (command.endswith(".py") and not os.access(command, os.X_OK)):
        arguments = [sys.executable, *arguments]  # a script, `-m package`, `-c code`
    beside = os.path.dirname(sys.executable)
    path = os.pathsep.join((beside, os.environ.get("PATH", os.defpath)))
    found = shutil.which(arguments[0], path=path)
    if found is None:
        print(f"fastshard: {arguments[0]}: command not found", file=sys.stderr)
        return 127
    sys.stdout.flush()
    try:
        # By its whole path, from which Python finds its environment.
        os.execve(found, [found, *arguments[1:]], {**os.environ, AUTO_VARIABLE: "1"})
    except OSError as error:
        print(f"fastshard: {found}: {error.strerror}", file=sys.stderr)
        return 127 if error.errno == errno.ENOENT else 126


def startup_file() -> str | None:
    """Returns the path of :data:`STARTUP_FILE`, if Python finds it when it starts."""
    for folder in sys.path:
        path = os.path.join(folder, STARTUP_FILE)
        if os.path.isfile(path):
            return path
    return None


def replacements() -> list[tuple[str, str]]:
    """Returns what ``import fastshard.auto`` replaces in the libraries that are installed here; imports
    them."""
    from ..integrations import report

    for module in dict.fromkeys(entry.module for entry in patching.TABLE):
        if util.find_spec(module.partition(".")[0]) is not None:
            try:
                importlib.import_module(module)
            except Exception as error:
                if not isinstance(error, ModuleNotFoundError):  # which `status` will tell
                    print(f"fastshard: {module}: {type(error).__name__}: {error}", file=sys.stderr)
    with patching.installed():
        found = report.status().replacements
    rows = []
    for r in sorted(found, key=lambda r: not r.replaced):
        why = f" ({r.why_not})" if r.why_not else ""
        text = f"{f'{r.library} {r.version}'.rstrip()}: {', '.join(r.functions)}{why}"
        rows.append(("replaced by fastshard.auto" if r.replaced else "not replaced", text))
    where = startup_file()
    effect = f"{where} is read by every Python here" if where else f"no effect: there is no {STARTUP_FILE}"
    rows.append((f"{AUTO_VARIABLE}, fastshard run", effect))
    set_here = (name for name in (AUTO_VARIABLE, patching.DISABLE_VARIABLE) if name in os.environ)
    return rows + [(f"{name} is set", os.environ[name]) for name in set_here]
