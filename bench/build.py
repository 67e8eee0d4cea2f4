# SPDX-License-Identifier: Apache-2.0
"""A package that can be imported, made of a bare checkout without a network and with whatever tools lie about.

The checkout is not touched: sources are copied to a directory for ``PYTHONPATH``, and CMake puts the native
module beside them. Where that cannot work, a module that was built before serves, if this Python can load it.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import time
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from . import budget

TRY = "from fastshard import _native as n; print('kernels', 'compiled in' if n.kernels_compiled_in() else 'absent')"
TRY_SECONDS = 60.0
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@dataclass
class Built:
    """What to run with."""

    how: str
    """For people: where the native module is from, and whether it has kernels."""
    path: Path | None
    """For ``PYTHONPATH``; None: an installed fastshard does without."""


def environment(path: Path | None) -> dict[str, str]:
    """Of the commands to come: the package first, and the tools that lie beside this Python."""
    variables = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
    if path is not None:
        before = os.environ.get("PYTHONPATH")
        variables["PYTHONPATH"] = os.pathsep.join([str(path), *([before] if before else [])])
    return variables


def missing_tools() -> list[str]:
    """What a build needs and this machine does not have; CMake itself looks for nvcc and cuda.h."""
    where = environment(None)["PATH"]
    compilers = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    missing = [] if any(shutil.which(c, path=where) for c in compilers if c) else ["a C++ compiler"]
    missing += [] if shutil.which("cmake", path=where) else ["cmake"]
    makers = ("ninja", "make")
    missing += [] if any(shutil.which(m, path=where) for m in makers) else [" or ".join(makers)]
    return missing + ([] if util.find_spec("pybind11") else ["pybind11"])


def make(root: Path, site: Path, seconds: float, log: Path, fresh: bool = True) -> Built | None:
    """The package in ``site``, or None with the reasons in ``log``. ``fresh=False``: nothing is compiled."""
    end = time.monotonic() + seconds
    skip = shutil.ignore_patterns("*.so", "__pycache__", "results", "out")
    here = shutil.ignore_patterns(
        "*.so", "__pycache__", "bench"
    )  # a link to the folder beside it, in some checkouts
    shutil.copytree(root / "fastshard", site / "fastshard", ignore=here)
    shutil.copytree(root / "bench", site / "fastshard" / "bench", ignore=skip)
    missing = missing_tools() if fresh else ["nothing: told not to build"]
    if missing:
        _note(log, f"not built; missing: {', '.join(missing)}")
    elif _compile(root, site, end, log):
        found = _try(site, log)
        if found:
            return Built(f"built here, {found}", site)
    before = root / "fastshard" / f"_native{SUFFIX}"
    if before.is_file():
        shutil.copy2(before, site / "fastshard")
        found = _try(site, log)
        if found:
            return Built(f"built before, perhaps of other sources; {found}", site)
    found = _try(None, log)
    return Built(f"the installed one, perhaps of other sources; {found}", None) if found else None


def _compile(root: Path, site: Path, end: float, log: Path) -> bool:
    build = site / "build"
    where = environment(None)
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=where["PATH"]) else []
    configure = ["cmake", "-S", str(root), "-B", str(build), *generator, "-DCMAKE_BUILD_TYPE=Release"]
    configure += [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={site / 'fastshard'}",
    ]
    build_it = ["cmake", "--build", str(build), "--target", "_native", "--parallel", str(os.cpu_count())]
    return all(
        budget.run(command, end - time.monotonic(), log, where).ok for command in (configure, build_it)
    )


def _try(path: Path | None, log: Path) -> str | None:
    """What the module says of itself, if it can be loaded."""
    done = budget.run([sys.executable, "-c", TRY], TRY_SECONDS, log, environment(path), log.parent)
    return done.output.strip().splitlines()[-1] if done.ok else None


def _note(log: Path, text: str) -> None:
    with log.open("a") as out:
        out.write(text + "\n")
