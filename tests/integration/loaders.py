# SPDX-License-Identifier: Apache-2.0
"""Checks sharded state against the loader classes of vLLM and SGLang: ``python tests/integration/loaders.py``.

Downloads their wheels (375 MB, kept in ``--work``) and what vLLM needs to be imported (150 MB) into a virtual
environment there that borrows torch from the Python it is started with, takes only the Python files out of the wheels,
and runs ``check_loaders.py``. No GPU, no compiled part of theirs. Arguments after ``--`` go to pytest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

VLLM, SGLANG = "vllm==0.33.0", "sglang==0.5.23"
SGLANG_LOADER = "sglang/srt/model_loader/loader.py"
NEEDED_BY_VLLM = """
pyzmq urllib3 cbor2 aiohttp multidict attrs yarl propcache aiosignal frozenlist aiohappyeyeballs requests
charset-normalizer certifi cloudpickle msgspec cachetools oss-harmony openai sniffio pillow pybase64 uvloop py-cpuinfo
prometheus_client xgrammar apache-tvm-ffi fastapi starlette opentelemetry-api partial-json-parser llguidance einops
pydantic pydantic-core annotated-types typing-inspection psutil distro jiter
""".split()


def wheel(work: Path, requirement: str) -> Path:
    """Downloaded once."""
    name, version = requirement.split("==")
    if not list(work.glob(f"{name}-{version}-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work, requirement]
        subprocess.run(command, check=True)
    return next(work.glob(f"{name}-{version}-*.whl"))


def environment(work: Path) -> Path:
    """The Python of an environment that finds all that this one does, and what vLLM imports."""
    home = work / "venv"
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
        packages = next(home.glob("lib/*/site-packages"))
        borrowed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (packages / "borrowed.pth").write_text(
            "".join(f"import site; site.addsitedir({p!r})\n" for p in borrowed)
        )
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *NEEDED_BY_VLLM], check=True)
    return python


def unpack(work: Path) -> Path:
    """The Python files of both."""
    sources = work / "sources"
    with zipfile.ZipFile(wheel(work, VLLM)) as archive:
        names = [
            n for n in archive.namelist() if n.startswith("vllm") and (n.endswith(".py") or "dist-info" in n)
        ]
        archive.extractall(sources, names)
    with zipfile.ZipFile(wheel(work, SGLANG)) as archive:
        archive.extract(SGLANG_LOADER, sources)
    return sources


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "fastshard-loaders",
        help="kept from run to run",
    )
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    sources, python = unpack(work), environment(work)
    here = Path(__file__).resolve().parent
    command = [
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        here / "check_loaders.py",
        *given.pytest,
    ]
    found = {"FASTSHARD_VLLM": str(sources), "FASTSHARD_SGLANG_LOADER": str(sources / SGLANG_LOADER)}
    return subprocess.run(command, env={**os.environ, **found}, cwd=here.parent).returncode


if __name__ == "__main__":
    sys.exit(main())
