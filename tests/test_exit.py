# SPDX-License-Identifier: Apache-2.0
"""The last save, made while the interpreter ends: it is there, and the process ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import forked
import pytest

HOOKS = {
    "atexit": "import atexit; atexit.register(last)",
    "threads end": "import threading; threading._register_atexit(last)",
    "finalize": "import weakref\nclass A: pass\na = A(); weakref.finalize(a, last)",
    "__del__": "class A:\n    def __del__(self, last=last): last()\na = A()",
    "logging": (
        "import logging\nclass H(logging.Handler):\n    def close(self):\n        super().close(); last()\n"
        "logging.getLogger().addHandler(H())"
    ),
    "thread": (
        "import threading, time\n"
        "def work():\n    threading.main_thread().join(); last()\n"
        "threading.Thread(target=work).start()"
    ),
    "excepthook": "sys.excepthook = lambda *_: last()\nends = lambda: 1 / 0",
}
SCRIPT = """
import gc, sys
gc.unfreeze()  # all goes at the end
import torch, fastshard
from safetensors.torch import load_file
folder, first = sys.argv[1], sys.argv[2]
tensors = {{"a": torch.arange(10_000.0), "b": torch.ones(30, 20).t()}}
if sys.argv[3] == "installed":
    fastshard.install()
import safetensors.torch
engine = fastshard.Engine() if first == "own engine" else None
ends = lambda: None

def made():  # what it uses is still there when the globals of this module are gone
    save_file, torch_save, there, how = fastshard.save_file, fastshard.torch_save, engine, sys.argv[3]
    theirs, folder, saved = (safetensors.torch.save_file, torch.save), sys.argv[1], tensors
    say, archives = print, sys.argv[4] != "__del__"  # nothing can be imported then, and pickling imports

    def last():
        if how == "installed":
            if archives:
                theirs[1](saved, f"{{folder}}/last.pt")
            theirs[0]({{"a": saved["a"]}}, f"{{folder}}/last.safetensors")
        else:
            if archives:
                torch_save(saved, f"{{folder}}/last.pt", engine=there)
            save_file(saved, f"{{folder}}/last.safetensors", allow_strided=True, engine=there)
        say("saved", flush=True)

    return last

last = made()
{hook}
if first != "none":
    fastshard.save_file({{"a": tensors["a"]}}, f"{{folder}}/first", engine=engine)
    fastshard.torch_save({{"a": tensors["a"]}}, f"{{folder}}/first.pt", engine=engine)
ends()
"""


@pytest.mark.parametrize("installed", ["by name", "installed"])
@pytest.mark.parametrize("first", ["none", "saved", "own engine"])
@pytest.mark.parametrize("hook", HOOKS)
def test_the_last_save(tmp_path: Path, hook: str, first: str, installed: str) -> None:
    if first == "own engine" and installed == "installed":
        pytest.skip("what is replaced has no engine of its own")
    if hook == "__del__" and (first == "none" or installed == "installed"):
        pytest.skip("when objects of modules go, nothing can be imported any more, by the original neither")
    script = SCRIPT.format(hook=HOOKS[hook])
    found = forked.run(script, tmp_path, first, installed, hook, timeout=300)
    assert found.returncode == (1 if hook == "excepthook" else 0), found.stderr
    assert found.stdout == "saved\n", found.stderr
    import torch
    from safetensors.torch import load_file

    if hook != "__del__":
        assert torch.equal(torch.load(tmp_path / "last.pt")["a"], torch.arange(10_000.0))
    assert torch.equal(load_file(tmp_path / "last.safetensors")["a"], torch.arange(10_000.0))
    hidden = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert hidden == []


DAEMON = """
import ctypes, os, sys, threading
from fastshard import Engine
from fastshard.engine.plan import HOST, FilePlan, TensorView
memory = ctypes.create_string_buffer(b"x" * 1_200_000, 1_200_000)
plan = FilePlan(os.fsencode(sys.argv[1]), b"head", [TensorView(ctypes.addressof(memory), len(memory), HOST)])
engine = Engine()
begun = threading.Event()
def work():
    while True:
        engine.submit([plan], keep_alive=memory).result()
        begun.set()
threading.Thread(target=work, daemon=True).start()
begun.wait()
assert "torch" not in sys.modules  # whose own calls end the process so now and then
"""


def test_a_daemon_thread_that_saves_for_ever_does_not_keep_the_process(tmp_path: Path) -> None:
    for _ in range(20):
        found = subprocess.run(
            [sys.executable, "-c", DAEMON, tmp_path / "weights"], capture_output=True, text=True, timeout=300
        )
        assert (found.returncode, found.stderr) == (0, "")
        assert (tmp_path / "weights").stat().st_size == 1_200_004


def test_an_engine_that_was_closed_stays_closed_at_exit(tmp_path: Path) -> None:
    script = """
import atexit, sys
import torch, fastshard
engine = fastshard.Engine()
def last():
    try:
        fastshard.save_file({"a": torch.ones(3)}, sys.argv[1], engine=engine)
    except RuntimeError as error:
        print(error)
atexit.register(last)
fastshard.save({"a": torch.ones(3)})
engine.close()
"""
    found = forked.run(script, tmp_path / "file", timeout=300)
    assert found.stdout == "the engine is closed\n", found.stderr
    assert not (tmp_path / "file").exists()
