# SPDX-License-Identifier: Apache-2.0
"""A Debian in a folder, for a Python that the machine does not have: made by debootstrap, entered by chroot.

It needs root on a Debian or an Ubuntu. What is mounted into it is mounted in a namespace of each command's own, so that
nothing stays mounted, however the command ends, and the folder can be taken away like any other.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

SUITES = {"3.14": "testing"}
"""Which of Debian's releases brings a Python."""
PACKAGES = ("e2fsprogs", "g++", "mount")

ENTER = """
set -e
root=$0 shared=$1
shift
mkdir -p "$root$shared"
mount --bind "$shared" "$root$shared"
for folder in /dev /proc /sys; do mount --rbind "$folder" "$root$folder"; done
PATH=$PATH:/usr/sbin:/sbin
exec chroot "$root" env --chdir="$PWD" "$@"
"""

Call = Callable[[list[object]], bool]
"""Runs a command, and says whether it ended well."""


def make(root: Path, version: str, call: Call) -> bool:
    """Whether there is now a Debian in the folder `root` that runs this Python."""
    if version not in SUITES or os.geteuid() != 0 or not shutil.which("apt-get"):
        return False
    if not call(["debootstrap", "--version"]):
        tools = ["debootstrap", "debian-archive-keyring"]
        call(["apt-get", "-qq", "update"])
        if not call(["apt-get", "-qq", "install", "-y", "--no-install-recommends", *tools]):
            return False
    shutil.rmtree(root, ignore_errors=True)
    packages = ",".join((*PACKAGES, f"python{version}-dev", f"python{version}-venv"))
    # debootstrap mounts, too.
    command = ["unshare", "--mount", "debootstrap", "--variant=minbase", f"--include={packages}"]
    if not call([*command, SUITES[version], root]):
        return False
    for path in map(Path, network_settings()):
        bring(path, root / path.relative_to("/"))
    return call([*entrance(root, root.parent), f"python{version}", "--version"])


def entrance(root: Path, shared: Path) -> list[object]:
    """What stands before a command that is to run in `root`, where the folder `shared` has the path that it has here."""
    return ["unshare", "--mount", "sh", "-c", ENTER, root, shared]


def network_settings() -> list[str]:
    """The files and folders that say how this machine reaches PyPI."""
    named = ("PIP_CERT", "PIP_CONFIG_FILE", "REQUESTS_CA_BUNDLE", "SSL_CERT_DIR", "SSL_CERT_FILE")
    usual = ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs", "/etc/pip.conf", "/etc/xdg/pip")
    own = ("~/.config/pip", "~/.pip")
    paths = [*usual, *map(os.path.expanduser, own), *filter(None, map(os.environ.get, named))]
    return [path for path in dict.fromkeys(paths) if os.path.isabs(path) and os.path.exists(path)]


def bring(source: Path, target: Path) -> None:
    # What stands there is taken away first: it may be, or hold, links that lead out of the Debian.
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, ignore_dangling_symlinks=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    shutil.copyfile(source, target)
