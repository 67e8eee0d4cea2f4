# SPDX-License-Identifier: Apache-2.0
"""Filesystems of one's own to work on: with root, mounts that only this process sees and that end with it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Final

_NEW_NAMESPACE: Final = 0x00020000
_PRIVATE: Final = (1 << 18) | (1 << 14)
_libc = ctypes.CDLL(None, use_errno=True)


def mkfs() -> str | None:
    return shutil.which("mkfs.ext4") or next(
        (path for path in ("/sbin/mkfs.ext4", "/usr/sbin/mkfs.ext4") if os.path.exists(path)), None
    )


def own_mounts() -> bool:
    """Gives this process mounts of its own, and an empty ``/dev/shm``; whether it may."""
    if os.getuid() or _libc.unshare(_NEW_NAMESPACE):
        return False
    if _libc.mount(b"none", b"/", None, ctypes.c_ulong(_PRIVATE), None):
        return False
    return not run("mount", "-t", "tmpfs", "-o", "mode=1777", "faults", "/dev/shm")


def run(*command: str) -> int:
    return subprocess.run(command, capture_output=True).returncode


def mount_ext4(image: str, place: str, options: str = "") -> bool:
    """Makes an ext4 in a file and mounts it; whether that is possible here."""
    make = mkfs()
    if make is None or run(make, "-q", "-F", "-m", "0", image):
        return False
    os.makedirs(place, exist_ok=True)
    return not run("mount", "-o", ",".join(filter(None, ("loop", options))), image, place)


@contextlib.contextmanager
def places(given: str | None = None) -> Iterator[tuple[str, str]]:
    """A folder on a disk's filesystem and one in memory. With root the disk is an image in memory, so that
    nobody waits for the real one."""
    private = own_mounts()
    if private:
        os.environ["FAULTS_PRIVATE_SHM"] = "1"
    with (
        tempfile.TemporaryDirectory(prefix="faults-", dir="/dev/shm") as memory,
        tempfile.TemporaryDirectory(prefix="faults-", dir=given) as disk,
    ):
        mounted = False
        if private and given is None:
            image = os.path.join(memory, "image")
            with open(image, "wb") as file:
                file.truncate(1 << 30)
            mounted = mount_ext4(image, disk)
        try:
            yield disk, memory
        finally:
            if mounted:
                run("umount", "-l", disk)
