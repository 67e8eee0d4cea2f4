# SPDX-License-Identifier: Apache-2.0
"""The tests that need a real GPU, by themselves and under compute-sanitizer. Of the standard library only."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

MARKER = "real_gpu"
"""Of pytest: what needs a real GPU (pyproject.toml; set by the fixtures in tests/conftest.py)."""
MENTIONS = re.compile(r"\breal_cuda\b|\bdevice: torch\.device\b|\breal_gpu\b")
"""In a file that has such tests: files that have nothing to do with a GPU are not even collected."""
KERNELS = "test_real_gpu.py"
"""Small saves by every way out of a GPU: the kernels', and copies straight into files."""
SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck")
FOUND_STATUS = "86"
"""Exit status when the sanitizer has found something."""


def _pytest(*arguments: str) -> list[str]:
    options = ["-q", "-rfE", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return [sys.executable, "-m", "pytest", *options, *arguments]


def command(root: Path, tiny: bool = False) -> list[str]:
    """Pytest on all that needs a real GPU; of a tiny run, on one file and on host tensors, too."""
    tests = root / "tests"
    if tiny:
        return _pytest("-k", "not simulated", str(tests / KERNELS))
    files = [str(path) for path in sorted(tests.glob("test_*.py")) if MENTIONS.search(path.read_text())]
    return _pytest("-m", MARKER, *files)


def summary(output: str) -> str:
    """The last line, and the names of what failed."""
    lines = output.strip().splitlines() or [""]
    failed = [line.split(" ")[1].split("::")[-1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return lines[-1].strip("= ") + (f": {', '.join(failed)}" if failed else "")


def find_sanitizer() -> str | None:
    """On the path, or in a toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(os.path.join(home, "bin") for home in homes if home)]
    return shutil.which(SANITIZER, path=os.pathsep.join(folders))


def sanitizer_command(root: Path, sanitizer: str, tool: str) -> list[str]:
    tests = _pytest("-m", MARKER, str(root / "tests" / KERNELS))
    return [sanitizer, "--tool", tool, "--error-exitcode", FOUND_STATUS, *tests]


def refused(output: str) -> str | None:
    """Why the sanitizer did not watch at all: some virtual machines do not let it."""
    return "Device not supported" if "Device not supported" in output else None


def verdict(output: str) -> str:
    """What the sanitizer sums up at its end, and pytest before it."""
    lines = [line.strip("= ") for line in output.splitlines()]
    told = [line for line in lines if "SUMMARY" in line]
    passed = [line for line in lines if re.search(r"\b(passed|failed|skipped|error)\b.* in [\d.]+", line)]
    return ", ".join([*passed[-1:], *told[-1:]]) or "no summary"
