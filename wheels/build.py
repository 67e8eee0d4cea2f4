#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Builds the source distribution, and of it the wheels for all Pythons and both architectures: ``make wheels``.

It needs a Debian (or any Linux with these Pythons' headers), PyPI, and the dependency group ``wheels``: no compiler, no
container and no CUDA toolkit. Zig's C++ compiler, from PyPI, links against glibc 2.28 for either architecture, with its
own C++ runtime inside. What does not depend on Python is compiled once for each architecture.

    python wheels/build.py [--python 3.12 ...] [--architecture x86_64 ...] [--out dist]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheels"

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
ARCHITECTURES = ("x86_64", "aarch64")
GLIBC = "2.28"
LARGEST = 2 << 20
"""Bytes of a wheel."""


@dataclass(frozen=True)
class Wheel:
    """One that is to be built."""

    python: str
    architecture: str

    @property
    def abi(self) -> str:
        return "cp" + self.python.replace(".", "")

    @property
    def tag(self) -> str:
        return f"{self.abi}-{self.abi}-{self.platform}"

    @property
    def platform(self) -> str:
        return f"manylinux_{GLIBC.replace('.', '_')}_{self.architecture}"

    @property
    def suffix(self) -> str:
        """What Python wants a native module's name to end with."""
        return f".cpython-{self.abi.removeprefix('cp')}-{self.architecture}-linux-gnu.so"


def planned(pythons: Iterable[str] = PYTHONS, architectures: Iterable[str] = ARCHITECTURES) -> list[Wheel]:
    """By architectures: what their wheels share is compiled once."""
    pythons = list(pythons)
    return [Wheel(python, architecture) for architecture in architectures for python in pythons]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", action="append", help=f"a version; default: {', '.join(PYTHONS)}")
    parser.add_argument("--architecture", action="append", choices=ARCHITECTURES, help="default: both")
    parser.add_argument(
        "--headers", action="append", default=[], metavar="VERSION=FOLDER", help="its C headers"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default: dist")
    parser.add_argument("--jobs", default=str(os.cpu_count()), help="compilations at a time")
    options = parser.parse_args()
    given = {
        version: Path(folder) for version, _, folder in (text.partition("=") for text in options.headers)
    }
    wheels = planned(options.python or PYTHONS, options.architecture or ARCHITECTURES)

    # Of this folder, and of the dependency group.
    import headers
    import kernels

    include = {
        p: given.get(p) or headers.find(p, WORK / "headers") for p in dict.fromkeys(w.python for w in wheels)
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for old in (*options.out.glob("fastshard-*"), options.out / "SHA256SUMS"):
        old.unlink(missing_ok=True)
    source = source_distribution(options.out)
    fatbin = kernels.make(WORK / "kernels")
    base: Path | None = None
    for wheel in wheels:
        module = native(wheel, source, fatbin, include[wheel.python], options.jobs)
        base = base or base_wheel(source, module)
        finish(wheel, base, module, options.out)
    made = sorted(options.out.iterdir())
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in made]
    (options.out / "SHA256SUMS").write_text("".join(sums))
    print("\n".join(table(options.out)))


def source_distribution(out: Path) -> Path:
    """Makes it, and unpacks it: wheels are built of what it holds. Returns that folder."""
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, ROOT)
    (archive,) = out.glob("*.tar.gz")
    target = WORK / "source"
    shutil.rmtree(target, ignore_errors=True)
    with tarfile.open(archive) as files:
        # With the times that the files have here: only what has changed is compiled again.
        files.extractall(target, filter="data")
    unpacked = target / archive.name.removesuffix(".tar.gz")
    return unpacked.rename(target / "fastshard")


def native(wheel: Wheel, source: Path, fatbin: Path, include: Path, jobs: str) -> Path:
    """The native module of one wheel, stripped."""
    build = WORK / wheel.architecture
    build.mkdir(parents=True, exist_ok=True)
    compiler = build / "c++"
    if not compiler.exists():
        target = f"{wheel.architecture}-linux-gnu.{GLIBC}"
        compiler.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ziglang c++ -target {target} "$@"\n')
        compiler.chmod(0o755)
    output = build / wheel.abi
    settings = {
        "Python_EXECUTABLE": sys.executable,
        "CMAKE_CXX_COMPILER": compiler,
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_COMPILE_WARNING_AS_ERROR": "OFF",
        "CMAKE_CXX_FLAGS": f"-ffile-prefix-map={source}=.",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output,
        "CUDA_INCLUDE": cuda_headers(),
        "FASTSHARD_KERNELS": "ON",
        "FASTSHARD_FATBIN": fatbin,
        "FASTSHARD_PYTHON_INCLUDE": include,
        # What pybind11 would ask the Python that runs.
        "PYTHON_MODULE_EXTENSION": wheel.suffix,
        "PYTHON_MODULE_DEBUG_POSTFIX": "",
        # It would try whether the compiler can optimise while it links, which we do not use and Zig takes minutes for.
        **dict.fromkeys(("HAS_FLTO_THIN", "HAS_FLTO_AUTO", "HAS_FLTO"), "ON"),
    }
    configure = (
        "cmake",
        "-S",
        source,
        "-B",
        build,
        "-G",
        "Ninja",
        *(f"-D{key}={settings[key]}" for key in settings),
    )
    # Only a cache that is found again spares it the compilation of its C++ runtime.
    zig = {"ZIG_GLOBAL_CACHE_DIR": str(WORK / "zig"), "ZIG_LOCAL_CACHE_DIR": str(WORK / "zig")}
    run(*configure, **zig)
    run("cmake", "--build", build, "--target", "_native", "--parallel", jobs, **zig)
    return output / f"_native{wheel.suffix}"


def cuda_headers() -> Path:
    """Those of the pinned package, whether or not the machine has a toolkit."""
    files = importlib.metadata.files("nvidia-cuda-runtime") or []
    (header,) = [file for file in files if file.name == "cuda.h"]
    return Path(str(header.locate())).parent


def base_wheel(source: Path, module: Path) -> Path:
    """A wheel of this Python, of which the others differ in their module and tags."""
    out = WORK / "base"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(source / "build", ignore_errors=True)
    command = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source)
    run(*command, FASTSHARD_NATIVE_MODULE=str(module))
    (made,) = out.glob("*.whl")
    return made


def finish(wheel: Wheel, base: Path, module: Path, out: Path) -> Path:
    """Packs one wheel, with what says what is inside, and has auditwheel judge it."""
    import sbom  # of this folder

    folder = WORK / "unpacked"
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(base) as archive:
        archive.extractall(folder)
    for other in (folder / "fastshard").glob("_native*.so"):
        other.unlink()
    shutil.copy2(module, folder / "fastshard" / module.name)
    (info,) = folder.glob("*.dist-info")
    about = info / "WHEEL"
    tagged = re.sub(r"^Tag: .*$", f"Tag: {wheel.tag}", about.read_text("utf-8"), flags=re.MULTILINE)
    about.write_text(tagged, "utf-8")
    names = "".join(f"License-File: {name}\n" for name in sbom.licenses(info / "licenses"))
    metadata = info / "METADATA"
    ours = "License-File: LICENSE\n"
    metadata.write_text(metadata.read_text("utf-8").replace(ours, ours + names, 1), "utf-8")
    version = info.name.removesuffix(".dist-info").rpartition("-")[2]
    (info / "sboms").mkdir()
    (info / "sboms" / "fastshard.cdx.json").write_text(sbom.document(version, wheel.architecture))
    run(sys.executable, "-m", "wheel", "pack", folder, "--dest-dir", out)
    made = out / f"fastshard-{version}-{wheel.tag}.whl"
    check(wheel, made, module)
    return made


def check(wheel: Wheel, made: Path, module: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", made], check=True, capture_output=True, text=True
    ).stdout
    verdict = re.search(r'following platform tag: "(\w+)"', " ".join(said.split()))
    if not verdict or verdict[1] != wheel.platform:
        raise SystemExit(f"{made.name}: auditwheel says {said}")
    content = module.read_bytes()
    for place in (ROOT, WORK, Path.home()):
        if str(place).encode() + b"/" in content:
            raise SystemExit(f"{module.name} names a folder of this machine: {place}")
    if made.stat().st_size > LARGEST:
        raise SystemExit(f"{made.name} has {made.stat().st_size} bytes, more than {LARGEST}")


def table(out: Path) -> list[str]:
    """Rows of Markdown."""
    rows = ["| file | module | file's size |", "|---|---|---|"]
    for path in sorted(out.glob("fastshard-*")):
        inside = "-"
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as archive:
                inside = next(f"{i.file_size:,}" for i in archive.infolist() if i.filename.endswith(".so"))
        rows.append(f"| {path.name} | {inside} | {path.stat().st_size:,} |")
    return rows


def run(*command: object, **variables: str) -> None:
    subprocess.run([str(part) for part in command], check=True, env={**os.environ, **variables})


if __name__ == "__main__":
    main()
