# SPDX-License-Identifier: Apache-2.0
"""Finds the C headers of a Python: of an interpreter that the machine has, or else of Debian's package for it.

One set of headers serves both architectures: what ``pyconfig.h`` says of x86_64 and aarch64 Linux differs only in macros
that an extension module does not use.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
from pathlib import Path

SUITES = {"3.11": "bookworm", "3.13": "trixie", "3.14": "testing"}
"""The Debian release that has a Python."""
MIRROR = "http://deb.debian.org/debian"
ASK = "import sysconfig; print(sysconfig.get_path('include'))"


def find(version: str, folder: Path) -> Path:
    """The folder with ``Python.h`` of the Python `version` ("3.12"). What has to be downloaded goes into `folder`."""
    for python in interpreters(version):
        asked = subprocess.run([python, "-c", ASK], capture_output=True, text=True)
        if asked.returncode == 0 and is_of(include := Path(asked.stdout.strip()), version):
            return include
    include = folder / f"python{version}"
    if not is_of(include, version):
        if version not in SUITES or not shutil.which("apt-get"):
            raise SystemExit(
                f"no headers of Python {version}: install it, or name their folder by --headers {version}=FOLDER"
            )
        from_debian(version, folder, include)
    return include


def is_of(include: Path, version: str) -> bool:
    level = include / "patchlevel.h"
    if not (include / "Python.h").is_file() or not level.is_file():
        return False
    return (
        re.search(rf'^#define PY_VERSION\s+"{re.escape(version)}\.', level.read_text("utf-8"), re.MULTILINE)
        is not None
    )


def interpreters(version: str) -> list[str]:
    """Where one may be: on the PATH, or where pyenv and uv put theirs."""
    installed = ("~/.pyenv/versions/{}.*/bin/python", "~/.local/share/uv/python/cpython-{}.*/bin/python3")
    found = [
        path for place in installed for path in sorted(glob.glob(os.path.expanduser(place.format(version))))
    ]
    return [path for path in (shutil.which(f"python{version}"), *found) if path]


def from_debian(version: str, folder: Path, include: Path) -> None:
    """Unpacks Debian's package of the headers. Nothing of it is installed, and the machine's list of sources stays."""
    apt = folder / "apt"
    for part in ("lists/partial", "cache/archives/partial"):
        (apt / part).mkdir(parents=True, exist_ok=True)
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (apt / "sources.list").write_text(f"deb [signed-by={keyring}] {MIRROR} {SUITES[version]} main\n")
    (apt / "status").touch()
    options = [
        f"Dir::State={apt}",
        f"Dir::State::lists={apt}/lists",
        f"Dir::State::status={apt}/status",
        f"Dir::Cache={apt}/cache",
        f"Dir::Etc::SourceList={apt}/sources.list",
        "Dir::Etc::SourceParts=/dev/null",
        "APT::Sandbox::User=",
    ]
    command = ["apt-get", "-qq", *(part for option in options for part in ("-o", option))]
    subprocess.run([*command, "update"], check=True)
    subprocess.run([*command, "download", f"libpython{version}-dev:amd64"], check=True, cwd=apt)
    (package,) = apt.glob(f"libpython{version}-dev_*.deb")
    subprocess.run(["dpkg-deb", "-x", package, apt / "files"], check=True)
    package.unlink()
    shutil.copytree(apt / "files" / "usr" / "include" / f"python{version}", include, dirs_exist_ok=True)
    # What stands there leads to that of the compiler's architecture.
    shutil.copy(
        apt / "files" / "usr" / "include" / "x86_64-linux-gnu" / f"python{version}" / "pyconfig.h", include
    )
    shutil.rmtree(apt)
