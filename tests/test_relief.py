# SPDX-License-Identifier: Apache-2.0
"""Writers of asynchronous saves step aside for the job, and others take over when somebody waits for the save.

The process shares one processor with another one that never rests, so a writer that has stepped aside gets next to
nothing of it. A save that is not taken over would take minutes: then the process is killed, and the test fails.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
import torch
from helpers import same

from fastshard.engine import relief

BEGIN = """
import atexit, os, signal, sys, time
atexit.register(lambda: print(fastshard.status().taken_over))  # after the hook of fastshard
import fastshard, torch
from fastshard import Engine, Options, wait_all
from fastshard.engine import relief, serving

signal.alarm(120)
torch.set_num_threads(1)

def state(number):
    return {str(n): torch.full((2048, 1024), n + 100.0 * number) for n in range(4)}

def save(path, number=1, **options):
    return fastshard.save_file_async(state(number), path, **options)

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
warm = fastshard.save_file_async({"a": torch.ones(1)}, "warm")  # what is imported for that
while not warm.done():
    time.sleep(0.001)
fastshard.status()
relief.PATIENCE_SECONDS = 1000.0
parent = os.getpid()
if os.fork() == 0:
    signal.alarm(0)
    while os.getppid() == parent:
        pass
    os._exit(0)
if os.geteuid() == 0 and sys.argv[1] != "0":
    os.setuid(int(sys.argv[1]))
"""
# What is done with a save of state(1) as "a", and why it is taken over.
WAITS = {
    "result": ("assert save('a').result().taken_over == why", "WAITED_FOR"),
    "result of what was promised not to change": (
        "save('b', snapshot='none'); stats = save('a', snapshot='none').result()\nassert (stats.taken_over, stats.priority) == (why, 'idle'), stats",
        "WAITED_FOR",
    ),
    "exception": ("assert save('a', checksums=True, durable=True).exception(100) is None", "WAITED_FOR"),
    "wait for what goes past the page cache": ("assert save('a', keep_cached=False).wait()", "WAITED_FOR"),
    "wait for what goes through the page cache": (
        "engine = Engine(Options(write_path='buffered'))\nfuture = save('a', engine=engine)\n"
        "assert future.wait() and future.stats.write_path == 'buffered'",
        "WAITED_FOR",
    ),
    "wait for what is taken out of the page cache": (
        "engine = Engine(Options(write_path='buffered'))\nfuture = save('a', engine=engine, keep_cached=False)\n"
        "assert future.wait() and future.stats.write_path == 'buffered'",
        "WAITED_FOR",
    ),
    "wait_all": ("save('a'); wait_all()", "WAITED_FOR"),
    "many files": (
        "future = fastshard.save_torch_state_dict_async(state(1), '.', max_shard_size='9MB')\n"
        "assert future.result().files == 4; fastshard.save_file(state(1), 'a')",
        "WAITED_FOR",
    ),
    "save of the path": ("save('a', 2); fastshard.save_file(state(1), 'a')", "WAITED_FOR"),
    "save of the path by a signal handler": (
        "signal.signal(signal.SIGUSR1, lambda *_: fastshard.save_file(state(1), 'a'))\n"
        "save('a', 2); signal.raise_signal(signal.SIGUSR1)",
        "WAITED_FOR",
    ),
    "max_in_flight": (
        "engine = Engine(Options(max_in_flight=1))\nfirst = save('a', engine=engine)\n"
        "second = save('b', engine=engine); assert first.done(); second.cancel(); second.wait()",
        "WAITED_FOR",
    ),
    "snapshot_budget": (
        "engine = Engine(Options(snapshot_budget=34 << 20))\nfirst = save('a', engine=engine)\n"
        "second = save('b', engine=engine); assert first.done(); second.cancel(); second.wait()",
        "WAITED_FOR",
    ),
    "engine's end": ("with Engine() as engine: save('a', engine=engine)", "WAITED_FOR"),
    "interpreter's end": ("save('a')", "WAITED_FOR"),
    "next asynchronous save of the path": (
        "first = save('a', 2); second = save('a'); assert first.relief.why == why; second.wait()",
        "FOLLOWED",
    ),
    "nobody, but it takes too long": (
        "relief.PATIENCE_SECONDS, relief.PATIENCE_NBYTES, serving._POLL_SECONDS = 0.0, 1 << 60, 0.001\n"
        "future = save('a')\n"
        "while not future.done(): time.sleep(0.01)\nassert future.stats.taken_over == why",
        "OVERDUE",
    ),
}
NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that every user can write to, however pytest's own are protected."""
    made = Path(tempfile.mkdtemp())
    made.chmod(0o777)
    yield made
    shutil.rmtree(made)


@pytest.mark.parametrize(
    ("how", "user"), [*((how, NOBODY) for how in WAITS), ("result", 0), ("interpreter's end", 0)]
)
def test_a_save_that_is_waited_for_is_taken_over(folder: Path, how: str, user: int) -> None:
    """Whoever waits, and whether or not the user may give a thread its priority back."""
    waits, why = WAITS[how]
    told = forked.run(f"{BEGIN}why = relief.{why}\n{waits}\n", user, cwd=folder)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count(getattr(relief, why)) == 1, told.stdout
    assert same(folder / "a", {str(n): torch.full((2048, 1024), n + 100.0) for n in range(4)})
