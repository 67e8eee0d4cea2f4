# SPDX-License-Identifier: Apache-2.0
"""A process that is refused a thread, a mapping or memory at one moment after another (refusing_resources.cc)."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path

import forked
import pytest

from fastshard import _native

TESTS = Path(__file__).resolve().parent

PRELUDE = """
import ctypes, errno, os, signal, sys, time
import torch
import fastshard
from fastshard import _native
library = ctypes.CDLL(None)
library.counted.restype = ctypes.c_long

def child(work, kind, call, limit=20.0):
    '''What became of work() in a forked child whose `call`-th request of that kind is refused.'''
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        library.refuse(kind, ctypes.c_long(call))
        try:
            said = work()
            said = f"returned {said}" if said is not None else "returned"
        except BaseException as error:
            library.refuse(kind, ctypes.c_long(0))
            said = f"{type(error).__name__}: {error}"
        if call == 0:
            said = str(library.counted(kind))
        os.write(writer, said.encode()[:4000])
        os._exit(0)
    os.close(writer)
    end = time.monotonic() + limit
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(reader)
            return "does not end"
        time.sleep(0.001)
    with os.fdopen(reader) as answers:
        return answers.read() or "died"

def descriptors():
    _native.wait_for_closing()
    return len(os.listdir("/proc/self/fd"))
"""


@functools.cache
def _library() -> Path:
    folder = tempfile.mkdtemp(prefix="fastshard-refusals-")
    library = Path(folder) / "refusing_resources.so"
    source = TESTS / "refusing_resources.cc"
    subprocess.run(
        ["c++", "-std=c++20", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True
    )
    return library


def run(script: str, *arguments: object, timeout: float = 300) -> str:
    """What a script says in which ``library`` refuses and ``child(work, kind, call)`` tries it."""
    if "memory" in arguments and b"libstdc++.so" not in Path(_native.__file__).read_bytes():
        pytest.skip(
            "this module, as those of wheels, has a C++ runtime inside, whose memory cannot be refused"
        )
    found = forked.run(PRELUDE + script, *arguments, env=forked.preloading(_library()), timeout=timeout)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout
