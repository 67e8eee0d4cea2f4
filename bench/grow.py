# SPDX-License-Identifier: Apache-2.0
"""Memory that is there only once it is used. ``python bench/grow.py GIB`` touches so much, step by step.

The memory of some virtual machines starts small and grows as it is used, and what its host has taken back
costs ten times a copy at first touch. A bench that looks at ``MemAvailable`` would shrink its cases, and one
that does not would time the host. Of the standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MIB, GIB = 1 << 20, 1 << 30
STEP_NBYTES = 2 * GIB
SPARED_NBYTES = 512 * MIB
"""Left to everything else at each step."""
PATIENCE_SECONDS = 10.0
"""Without any growth: then this is all there is."""
PAGES = re.compile(r"^Node (\d+), zone +(\w+)|^ +(present|managed) +(\d+)|^ +pages free +(\d+)", re.M)


def meminfo(name: str) -> int:
    """A field of /proc/meminfo in bytes."""
    found = re.search(rf"^{name}: +(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    return int(found[1]) * 1024 if found else 0


def zones(text: str) -> list[str]:
    """The zones of /proc/zoneinfo that have any memory, one a line."""
    found: list[tuple[str, dict[str, int]]] = []
    for node, zone, name, pages, free in PAGES.findall(text):
        if zone:
            found.append((f"node {node} {zone}", {}))
        elif found:
            found[-1][1][name or "free"] = int(pages or free) * mmap.PAGESIZE
    return [
        f"{zone}: " + ", ".join(f"{what} {nbytes / GIB:.2f} GiB" for what, nbytes in sorted(sizes.items()))
        for zone, sizes in found
        if sizes.get("present")
    ]


def state(shm: Path) -> list[str]:
    """What is there now: memory, its zones, and the room on tmpfs."""
    try:
        room = shutil.disk_usage(shm)
        there = f"{shm}: {room.total / GIB:.2f} GiB, {room.free / GIB:.2f} free"
    except OSError as error:
        there = f"{shm}: {error.strerror}"
    try:
        known = zones(Path("/proc/zoneinfo").read_text())
    except OSError as error:
        known = [f"no zones: {error.strerror}"]
    total, available = meminfo("MemTotal") / GIB, meminfo("MemAvailable") / GIB
    return [f"memory {total:.2f} GiB, {available:.2f} available", *known, there]


@contextlib.contextmanager
def touched(nbytes: int) -> Iterator[None]:
    """So much memory, every page of it written by all CPUs, until the block ends."""
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as ballast:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel built without them
                ballast.madvise(mmap.MADV_HUGEPAGE)  # the same pages, in a tenth of the faults
        cpus = len(os.sched_getaffinity(0))
        begin = ctypes.addressof(ctypes.c_char.from_buffer(ballast))
        step = max(64 * MIB, -(-nbytes // cpus))
        with ThreadPoolExecutor(cpus) as pool:  # ctypes lets the GIL go
            parts = [(begin + at, 1, min(step, nbytes - at)) for at in range(0, nbytes, step)]
            list(pool.map(lambda part: ctypes.memset(*part), parts))
        yield


def touch_and_free(nbytes: int) -> None:
    """Make the kernel's free memory real, so that no run pays for the host's page faults."""
    if nbytes > 0:
        with touched(nbytes):
            pass


def grow(
    nbytes: int,
    step: int = STEP_NBYTES,
    available: Callable[[], int] = lambda: meminfo("MemAvailable"),
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Touches memory until ``nbytes`` are held at once, or no more comes; returns how much that was."""
    held, waited, nbytes = 0, 0.0, -(-nbytes // MIB) * MIB
    with contextlib.ExitStack() as stack:
        while held < nbytes and waited < PATIENCE_SECONDS:
            take = min(step, nbytes - held, available() - SPARED_NBYTES) // MIB * MIB
            if take <= 0:
                sleep(0.5)
                waited += 0.5
                continue
            stack.enter_context(touched(take))
            held, waited = held + take, 0.0
            total = meminfo("MemTotal") / GIB
            print(
                f"holding {held / GIB:.2f} GiB of {total:.2f}, {available() / GIB:.2f} available", flush=True
            )
    return held


def main(argv: list[str]) -> int:
    wanted, shm = int(float(argv[0]) * GIB), Path(*argv[1:] or ["/dev/shm"])
    with contextlib.suppress(OSError):  # should memory run out, this process is the one to go
        Path("/proc/self/oom_score_adj").write_text("1000")
    print("\n".join(state(shm)), flush=True)
    held = grow(wanted)
    print("\n".join(state(shm)))
    print(f"{held / GIB:.2f} of {wanted / GIB:.2f} GiB touched at once; {state(shm)[0]}; {state(shm)[-1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
