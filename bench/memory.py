# SPDX-License-Identifier: Apache-2.0
"""Extra memory of one save, in a fresh process: a process that has saved before hides what it kept.

The parent samples the child from outside: a thread inside would miss the moments in which the saver
holds the GIL, and would add to what it measures.

Two figures, because neither is enough alone. The high-water mark of the resident set is exact, but
counts mapped file pages (the shared libraries touched by the first call, a mapped output file), which
cost nothing that the page cache does not hold anyway. Anonymous plus shared memory is what a saver
really takes from the machine, but the kernel keeps no high-water mark of it, so it is sampled, and a
peak shorter than the interval may be missed.
"""

from __future__ import annotations

import gc
import json
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import machine
from .cases import CASES
from .job import CPU, Job, Rival, finish
from .machine import MEMORY_BACKED, memory_nbytes, mount_of
from .rivals import RIVALS
from .samples import Memory

INTERVAL_S = 0.005
SAVE_PY = Path(__file__).with_name("save.py")


def probe(spec: str) -> None:
    """The child: build the dict, say "ready", save when told to, say "done", leave when told to."""
    case, rival, nbytes, device, out = json.loads(spec)
    shards = CASES[case].build(nbytes, device)
    job = Job(shards, Path(out), durable=False, dtype=CASES[case].dtype)
    chosen = RIVALS[rival]
    run = chosen.prepare(job)
    with chosen.within():
        _probe(run, chosen, device, [chosen.budget(job)] if chosen.budget else [])


def _probe(run: Callable[[], Any], rival: Rival, device: str, budget: list[int]) -> None:
    if machine.device_kind(device) != CPU:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what building left over must not serve as the save's own
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    print("ready", flush=True)
    sys.stdin.readline()
    finish(run())
    print("done", _pinned(rival, device), *budget, flush=True)
    sys.stdin.readline()


def _pinned(rival: Rival, device: str) -> int:
    """Page-locked memory the save had at its peak, by the books of those who took it."""
    detail = rival.detail() if rival.detail else {}
    staged: int = detail.get("staging_nbytes", 0) if detail.get("staging") == "pinned" else 0
    if machine.device_kind(device) == CPU or not hasattr(torch.cuda, "host_memory_stats"):
        return staged
    return staged + int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0))


def _device_free(device: str) -> int:
    """Free memory of the GPU, all processes together; nothing for host tensors."""
    return 0 if machine.device_kind(device) == CPU else int(torch.cuda.mem_get_info(device)[0])


def held(pid: int, with_shared: bool) -> int:
    """Anonymous (and shared) memory of a process, bytes."""
    status = f"/proc/{pid}/status"
    anonymous = memory_nbytes("RssAnon", status)
    return anonymous + memory_nbytes("RssShmem", status) if with_shared else anonymous


def _watch(
    child: subprocess.Popen[str], out: Path, device: str
) -> tuple[int, int, int, int, int | None] | None:
    """Extra bytes of the save: held, high water, of the GPU, page-locked, and what it was allowed, where that was said;
    None when the child ended early."""
    assert child.stdin and child.stdout
    if child.stdout.readline() != "ready\n":
        return None
    # On a memory-backed filesystem shared pages are the output file itself, when it is mapped.
    with_shared = mount_of(out)[0] not in MEMORY_BACKED
    status = f"/proc/{child.pid}/status"
    held_before, resident_before = held(child.pid, with_shared), memory_nbytes("VmRSS", status)
    free_before = _device_free(device)
    peak, least_free = held_before, free_before
    child.stdin.write("go\n")
    child.stdin.flush()
    ended = False
    while not ended:
        ended = bool(select.select([child.stdout], [], [], INTERVAL_S)[0])
        peak = max(peak, held(child.pid, with_shared))
        least_free = min(least_free, _device_free(device))
    words = child.stdout.readline().split()
    if words[:1] != ["done"]:
        return None
    high_water = memory_nbytes("VmHWM", status) - resident_before
    pinned, budget = int(words[1]), int(words[2]) if len(words) > 2 else None
    return peak - held_before, high_water, free_before - least_free, pinned, budget


def measure(case: str, rival: str, nbytes: int, device: str, out: Path) -> Memory:
    """One save of the case by the rival in a process of its own, into the empty directory ``out``."""
    spec = json.dumps([case, rival, nbytes, device, str(out)])
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            [sys.executable, str(SAVE_PY), "--probe", spec],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as child:
            try:
                found = _watch(child, out, device)
            except BaseException:
                child.kill()
                raise
        if found is None:
            errors.seek(0)
            last = errors.read().strip().splitlines() or [f"exit status {child.returncode}"]
            return Memory(rival, error=last[-1])
    return Memory(rival, *found)
