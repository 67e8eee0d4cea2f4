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


COMMIT_VARIABLE = "FASTSHARD_COMMIT"
"""The commit of a copy that has no history beside it."""


def device_kind(device: str) -> str:
    """``cpu`` or ``cuda``, whatever the number behind it."""
    return device.partition(":")[0]


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
    """Commit of the checkout this file lies in, with ``+`` when files differ from it; else what the
    environment says."""
    told = os.environ.get(COMMIT_VARIABLE) or None
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return told
    if head.returncode:
        return told
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def _huge_pages() -> str | None:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    text = path.read_text() if path.exists() else ""
    return text[text.find("[") + 1 : text.find("]")] or None


def free_nbytes(directory: Path) -> int:
    space = os.statvfs(directory)
    return space.f_bavail * space.f_frsize


def _gpu(device: str) -> dict[str, Any]:
    """The GPU as torch and the driver's own tool know it."""
    import torch

    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(device),
        "gpu_memory_nbytes": torch.cuda.get_device_properties(device).total_memory,
        "cuda": torch.version.cuda,
    }
    fields = "driver_version,pcie.link.gen.max,pcie.link.width.max"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        told = []
    found |= dict(zip(("driver", "pcie_gen", "pcie_width"), told[0].split(", "))) if told else {}
    return found


def describe(directory: Path, device: str, shm: Path | None = None) -> dict[str, Any]:
    """Everything a reader needs to place the figures; sizes in bytes."""
    filesystem, mount = mount_of(directory)
    found: dict[str, Any] = {
        "cpu": _proc_field("/proc/cpuinfo", "model name") or platform.machine(),
        "cpus": cpu_count(),
        "memory_nbytes": memory_nbytes("MemTotal"),
        "kernel": platform.release(),
        "huge_pages": _huge_pages(),
        "filesystem": filesystem,
        "mount": mount,
        "free_nbytes": free_nbytes(directory),
        "python": platform.python_version(),
        "commit": _commit(),
        "device": device,
    }
    for package in ("torch", "safetensors", "fastshard"):
        found[package] = _version(package)
    if found["fastshard"] is None:  # a checkout on the path, not an installation
        import fastshard

        found["fastshard"] = fastshard.__version__
    if shm is not None:
        found["shm"] = {
            "directory": str(shm),
            "filesystem": mount_of(shm)[0],
            "free_nbytes": free_nbytes(shm),
        }
    if device_kind(device) == "cuda":
        found |= _gpu(device)
    return found


def headline(found: dict[str, Any]) -> str:
    """Three lines for the top of the report."""
    gpu = f", {found['gpu']}, driver {found.get('driver', '?')}" if "gpu" in found else ""
    return (
        f"{found['cpu']}, {found['cpus']} CPUs, {found['memory_nbytes'] / GIB:.1f} GiB, "
        f"kernel {found['kernel']}{gpu}\n"
        f"{found['filesystem']} on {found['mount']}, {found['free_nbytes'] / GIB:.0f} GiB free; "
        f"huge pages: {found['huge_pages']}\n"
        f"fastshard {found['fastshard']} ({found['commit'] or 'no commit'}), "
        f"safetensors {found['safetensors']}, torch {found['torch']}, Python {found['python']}"
    )
