# SPDX-License-Identifier: Apache-2.0
"""Builds the simulated CUDA driver (tests/simulated_driver)."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "simulated_driver"
CSRC = SOURCES.parents[1] / "csrc"

WARNINGS_ARE_ERRORS = "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON"
"""Among ``CMAKE_ARGS`` it holds here, too; else a newer compiler's new warning fails no test."""


def cuda_include() -> Path | None:
    """The folder of cuda.h: a toolkit's, or that of the package nvidia-cuda-runtime."""
    candidates = [
        Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)
    ]
    candidates.append(Path("/usr/local/cuda/include"))
    for entry in sys.path:
        packages = Path(entry) / "nvidia"
        candidates += [
            *sorted(packages.glob("cu1*/include"), reverse=True),
            packages / "cuda_runtime" / "include",
        ]
    return next((folder for folder in candidates if (folder / "cuda.h").is_file()), None)


def build(directory: str | os.PathLike[str]) -> Path:
    """Compiles the driver into `directory` unless it is up to date there, and returns its path."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever runs tests beside this process waits for one build
        return _built(directory / "libsimcuda.so")


def _built(library: Path) -> Path:
    ours = [
        CSRC / name
        for name in (
            "plan/places.cc",
            "plan/plan.cc",
            "device/processor.cc",
            "device/cast.cc",
            "device/pack.cc",
            "device/kernels/table.cc",
        )
    ]
    sources = sorted(SOURCES.glob("*.cc"))
    inputs = [*sources, *ours, *SOURCES.glob("*.h"), *CSRC.rglob("*.h"), *CSRC.glob("device/kernels/*")]
    if library.exists() and library.stat().st_mtime >= max(path.stat().st_mtime for path in inputs):
        return library
    include = cuda_include()
    if include is None:
        raise FileNotFoundError("cuda.h not found: set CUDA_HOME, or pip install nvidia-cuda-runtime")
    compiler = os.environ.get("CXX") or shutil.which("g++") or "g++"
    flags = ["-std=c++20", "-fPIC", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread"]
    flags += [f"-I{CSRC}", *os.environ.get("CXXFLAGS", "").split()]
    flags += ["-Wno-unknown-pragmas", "-Wno-subobject-linkage"]  # nvcc's pragmas; files that are included
    if WARNINGS_ARE_ERRORS in os.environ.get("CMAKE_ARGS", "").split():
        flags.append("-Werror")
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:

        def compiled(name: str, files: list[Path]) -> str:
            """All in one unit: most of a compiler's time goes into the standard library's headers."""
            unit, target = os.path.join(scratch, f"{name}.cc"), os.path.join(scratch, f"{name}.o")
            Path(unit).write_text("".join(f'#include "{file}"\n' for file in files))
            _run([compiler, *flags, "-isystem", str(include), "-c", unit, "-o", target])
            return target

        units = [("driver", sources), ("ours", ours)]
        with ThreadPoolExecutor(max_workers=len(units)) as pool:
            objects = list(pool.map(lambda unit: compiled(*unit), units))
        # -Bsymbolic: its own cuInit, also where torch has loaded a real driver. nodelete: it has threads.
        linked = os.path.join(scratch, library.name)
        link = [*flags, "-shared", "-Wl,-Bsymbolic,-z,nodelete,-z,defs"]
        _run([compiler, *link, *objects, "-o", linked])
        os.replace(linked, library)
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
