# SPDX-License-Identifier: Apache-2.0
"""A save within a save, in the same thread, as a signal handler or a finalizer makes it: at one bytecode after another of
the outer one. Both end, and both files are right."""

from __future__ import annotations

from pathlib import Path

import forked
import pytest

SCRIPT = """
import gc, os, signal, sys, time
import torch
import safetensors.torch
from safetensors.torch import load_file
import fastshard

scenario, handler, folder, samples = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
TENSORS = {"a": torch.arange(3000.0), "b": torch.ones(64, 3).t()}
BYTES = safetensors.torch.save({name: tensor.contiguous() for name, tensor in TENSORS.items()})
LIMIT = 20

def right(name):
    path = f"{folder}/{name}"
    if name.endswith(".pt"):
        found = torch.load(path)
        assert found.keys() == TENSORS.keys() and all(torch.equal(found[n], TENSORS[n]) for n in found), name
    else:
        assert open(path, "rb").read() == BYTES, name

if scenario == "fetched":
    import ctypes
    from fastshard.engine.plan import FETCHED, FilePlan, TensorView

def fetched(path):
    engine = fastshard.Engine(fastshard.Options(threads=1, memory_budget=1 << 20))
    def fetch(file, item, first, nbytes, address):
        ctypes.memmove(address, BYTES[8 + first : 8 + first + nbytes], nbytes)
    plan = FilePlan(os.fsencode(path), BYTES[:8], [TensorView(0, len(BYTES) - 8, FETCHED)])
    global shared
    shared = engine
    engine.submit([plan], keep_alive=None, fetch=fetch, serve=False).result()

shared = None
outer = {
    "save_file": lambda: fastshard.save_file(TENSORS, f"{folder}/outer.safetensors", allow_strided=True),
    "torch_save": lambda: fastshard.torch_save(TENSORS, f"{folder}/outer.pt"),
    "save": lambda: open(f"{folder}/outer.safetensors", "wb").write(fastshard.save(TENSORS, allow_strided=True)),
    "fetched": lambda: fetched(f"{folder}/outer.safetensors"),
    "replaced": lambda: torch.save(TENSORS, f"{folder}/outer.pt"),
}
inner = {
    "save_files": lambda: fastshard.save_files({f"{folder}/inner.safetensors": TENSORS}, allow_strided=True),
    "torch_save": lambda: fastshard.torch_save(TENSORS, f"{folder}/inner.pt"),
    "same engine": lambda: fastshard.save_file(TENSORS, f"{folder}/inner.safetensors", allow_strided=True, engine=shared),
    "replaced": lambda: torch.save(TENSORS, f"{folder}/inner.pt"),
}
outer_file = "outer.pt" if scenario in ("torch_save", "replaced") else "outer.safetensors"
inner_file = "inner.pt" if handler in ("torch_save", "replaced") else "inner.safetensors"

def interrupted(at):
    steps = 0
    def trace(frame, event, argument):
        nonlocal steps
        if "fastshard" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            steps += 1
            if steps == at:
                inner[handler]()
                right(inner_file)
        return trace
    if handler == "replaced":
        gc.unfreeze()  # installing looks for referrers
        fastshard.install()
    sys.settrace(trace)
    try:
        outer[scenario]()
    finally:
        sys.settrace(None)
    right(outer_file)
    hidden = [name for name in os.listdir(folder) if name.startswith(".")]
    assert not hidden, hidden
    return steps

def child(at):
    for name in os.listdir(folder):
        os.unlink(f"{folder}/{name}")
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            said = str(interrupted(at))
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode()[:2000])
        os._exit(0)
    os.close(writer)
    end = time.monotonic() + LIMIT
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "does not end"
        time.sleep(0.002)
    return os.fdopen(reader).read()

total = child(0)
assert total.isdigit(), total
for number in range(samples):
    at = 1 + number * int(total) // samples
    said = child(at)
    if not said.isdigit():
        print(f"at {at} of {total}: {said}")
"""


@pytest.mark.parametrize(
    ("scenario", "handler"),
    [
        ("save_file", "torch_save"),
        ("torch_save", "save_files"),
        ("save", "save_files"),
        ("fetched", "same engine"),
        ("replaced", "replaced"),
    ],
)
def test_a_save_at_any_bytecode_of_the_first_save(tmp_path: Path, scenario: str, handler: str) -> None:
    found = forked.run(SCRIPT, scenario, handler, tmp_path, 25, timeout=400)
    assert found.returncode == 0, found.stderr
    assert found.stdout == ""


SIGNALS = """
import os, signal, sys, time
import torch, fastshard
folder = sys.argv[1]
tensors = {"a": torch.arange(20_000.0)}
handled = []

def handle(*_):
    fastshard.torch_save(tensors, f"{folder}/last.pt")
    fastshard.save_file(tensors, f"{folder}/last.safetensors")
    handled.append(None)

signal.signal(signal.SIGALRM, handle)
for i in range(25):
    signal.setitimer(signal.ITIMER_REAL, 0.0002 * (i + 1))
    while len(handled) <= i:
        fastshard.save_file(tensors, f"{folder}/weights.safetensors")
        fastshard.torch_save(tensors, f"{folder}/weights.pt")
from safetensors.torch import load_file
for name in ("last", "weights"):
    assert torch.equal(load_file(f"{folder}/{name}.safetensors")["a"], tensors["a"])
    assert torch.equal(torch.load(f"{folder}/{name}.pt")["a"], tensors["a"])
print(len(handled), sorted(os.listdir(folder)))
"""


def test_signals_that_save_while_saves_go_on(tmp_path: Path) -> None:
    found = forked.run(SIGNALS, tmp_path)
    assert found.stdout == "25 ['last.pt', 'last.safetensors', 'weights.pt', 'weights.safetensors']\n", (
        found.stderr
    )
