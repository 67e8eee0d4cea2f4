# SPDX-License-Identifier: Apache-2.0
"""The machine a figure came from: without it the figure says nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from .samples import GIB

# Filesystems whose fallocate is cheap. Elsewhere glibc emulates it by writing every block (NFS, FUSE),
# and on tmpfs it clears the pages that the save is about to fill.
PREALLOCATE = frozenset({"ext4", "xfs", "btrfs", "f2fs"})
MEMORY_BACKED = frozenset({"tmpfs", "hugetlbfs", "ramfs"})


def cpu_count() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def _proc_field(path: str, name: str) -> str | None:
    """The first ``name : value`` line of a file under /proc."""
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def memory_nbytes(name: str, path: str = "/proc/meminfo") -> int:
    """A field given in kB: MemTotal, MemAvailable; or of a process: VmRSS, RssAnon."""
    value = _proc_field(path, name)
    return int(value.split()[0]) * 1024 if value else 0


def mount_of(path: Path) -> tuple[str, str]:
    """Filesystem type and mount point that ``path`` lies on."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    found = ("unknown", "?")
    longest = -1
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split()
        point = fields[4].encode().decode("unicode_escape")  # spaces are written \040
        inside = path.resolve().is_relative_to(point)
        # btrfs gives subvolumes device numbers that mountinfo does not show: then the path decides.
        rank = (len(point) if inside else 0) + (1 << 16 if fields[2] == wanted else 0)
        if (inside or fields[2] == wanted) and rank > longest:
            longest = rank
            found = (right.split()[0], point)
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout this file lies in, with ``+`` when files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def _huge_pages() -> str | None:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    text = path.read_text() if path.exists() else ""
    return text[text.find("[") + 1 : text.find("]")] or None


def describe(directory: Path, device: str) -> dict[str, Any]:
    """Everything a reader needs to place the figures; sizes in bytes."""
    filesystem, mount = mount_of(directory)
    disk = os.statvfs(directory)
    found: dict[str, Any] = {
        "cpu": _proc_field("/proc/cpuinfo", "model name") or platform.machine(),
        "cpus": cpu_count(),
        "memory_nbytes": memory_nbytes("MemTotal"),
        "kernel": platform.release(),
        "huge_pages": _huge_pages(),
        "filesystem": filesystem,
        "mount": mount,
        "free_nbytes": disk.f_bavail * disk.f_frsize,
        "python": platform.python_version(),
        "commit": _commit(),
        "device": device,
    }
    for package in ("torch", "safetensors", "fastshard"):
        found[package] = _version(package)
    if device.startswith("cuda"):
        import torch

        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def headline(found: dict[str, Any]) -> str:
    """Three lines for the top of the report."""
    gpu = f", {found['gpu']}" if "gpu" in found else ""
    return (
        f"{found['cpu']}, {found['cpus']} CPUs, {found['memory_nbytes'] / GIB:.1f} GiB, "
        f"kernel {found['kernel']}{gpu}\n"
        f"{found['filesystem']} on {found['mount']}, {found['free_nbytes'] / GIB:.0f} GiB free; "
        f"huge pages: {found['huge_pages']}\n"
        f"fastshard {found['fastshard']} ({found['commit'] or 'no commit'}), "
        f"safetensors {found['safetensors']}, torch {found['torch']}, Python {found['python']}"
    )
