# SPDX-License-Identifier: Apache-2.0
"""Asynchronous saves that are killed, refused, interrupted, or that nobody waits for: a name has its old file or a new
one, whole; no error is lost, and no memory beyond the budget is taken."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import signal
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import archives
import forked
import pytest
import torch
from helpers import PRELUDE, names, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastshard
from fastshard import Engine, Options, SaveError, SaveFuture
from fastshard.api import archive

MIB = 1 << 20
SNAPSHOTS = ("copy", "fork", "none")
SAVERS = ("save_file", "torch_save")
BY_SNAPSHOT = pytest.mark.parametrize("snapshot", SNAPSHOTS)
BY_SAVER = pytest.mark.parametrize("saver", SAVERS)

pytestmark = pytest.mark.usefixtures("no_hang")


def tensors(value: float, nbytes: int = MIB, count: int = 4) -> dict[str, torch.Tensor]:
    return {f"w{i}": torch.full((nbytes // 4 // count,), float(value)) for i in range(count)}


def value_of(path: Path) -> float:
    """The value of all elements of all tensors of the file, which must be one."""
    loaded = torch.load(path) if path.suffix == ".pt" else fastshard.load_file(path)
    found = {float(value) for tensor in loaded.values() for value in (tensor.min(), tensor.max())}
    assert len(found) == 1, f"a mixture of {sorted(found)}"
    return found.pop()


def hidden(folder: Path) -> list[str]:
    return [name for name in names(folder) if name.startswith(".")]


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    fastshard.wait_all()


# Kills ---------------------------------------------------------------------------------------------------

HELPERS = f"""
import contextlib, signal, threading, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import archives
folder = sys.argv[1]
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell has put in the background

def tensors(value, nbytes=1 << 20, count=4):
    return {{f"w{{i}}": torch.full((nbytes // 4 // count,), float(value)) for i in range(count)}}

def until(condition):
    while not condition():
        time.sleep(0.002)

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def save(value, name="m.pt", **how):
    how.setdefault("snapshot", snapshot)
    saver = torch_save_async if name.endswith(".pt") else save_file_async
    return saver(tensors(value), f"{{folder}}/{{name}}", **how)

snapshot = "copy"
"""

KILLED_AT = {
    "staging": """
        from fastshard.engine import tensors as described
        fetch, calls = described.fetch, []
        def dying(*arguments):
            calls.append(None)
            fetch(*arguments)
            if len(calls) == 2:
                die()
        described.fetch = dying
        told = {name: torch.ones(1 << 20).to(torch.float8_e5m2fnuz) for name in "ab"}  # Python casts these
        save_file_async(told, f"{folder}/m.pt", snapshot=snapshot, dtype="float16").result()
    """,
    "staged": """
        with archives.held():
            save(2)
            die()
    """,
    "written": """
        with archives.amended(die):
            save(2)
            time.sleep(60)
    """,
    "steps": """
        from fastshard.api import archive
        archive.counted = lambda *_: die
        save(2)
        time.sleep(60)
    """,
    "second in flight": """
        with archives.held(times=1):
            save(2)
            save(3)
            die()
    """,
}


@BY_SNAPSHOT
@pytest.mark.parametrize("at", KILLED_AT)
def test_a_kill_at_each_step(tmp_path: Path, at: str, snapshot: str) -> None:
    if at == "second in flight" and snapshot != "copy":
        pytest.skip("the second save of a path waits for the first")
    path = tmp_path / "m.pt"
    fastshard.torch_save(tensors(1), path)
    script = f"{HELPERS}\nsnapshot = {snapshot!r}\n"
    found = run(script + textwrap.dedent(KILLED_AT[at]), tmp_path)
    assert found.returncode == -signal.SIGKILL, found.stderr
    assert value_of(path) == (2 if at == "steps" else 1)
    assert names(tmp_path) == ["m.pt"]
    fastshard.torch_save_async(tensors(4), path, snapshot=snapshot).result()
    assert value_of(path) == 4 and names(tmp_path) == ["m.pt"]


FOR_EVER = """
size = 24 << 20
for value in range(1, 10_000):
    saver = torch_save_async if sys.argv[2].endswith(".pt") else save_file_async
    made = tensors(value, size)
    before = saver(made, f"{folder}/{sys.argv[2]}", snapshot=sys.argv[3])
    if sys.argv[3] == "none":
        before.result()
    else:
        for tensor in made.values():
            tensor.fill_(-1)
    print(value, flush=True)
"""


@BY_SAVER
@BY_SNAPSHOT
def test_a_kill_at_any_time(tmp_path: Path, saver: str, snapshot: str) -> None:
    path = tmp_path / ("m.pt" if saver == "torch_save" else "m.safetensors")
    dice = random.Random(f"{saver} {snapshot}")
    for _ in range(4):
        said = (tmp_path / "said").open("w+")
        child = forked.Started(
            PRELUDE + HELPERS + FOR_EVER, tmp_path, path.name, snapshot, stdout=said.fileno(), stderr=2
        )
        until(lambda output=said: os.fstat(output.fileno()).st_size > 0)
        time.sleep(dice.uniform(0, 0.25))
        child.send_signal(signal.SIGKILL)
        child.wait()
        said.seek(0)
        last = int(said.read().split()[-1])
        found = value_of(path) if path.exists() else 0
        assert last - Options().max_in_flight <= found <= last + 1
        assert hidden(tmp_path) == []
        said.close()
        path.unlink(missing_ok=True)


def test_a_file_that_an_earlier_save_has_just_put_there_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process may still hold it open, as it does files that have to be written over: a kill would leave a part."""
    path, note_made, why, go_on = (
        tmp_path / "m.pt",
        archive.note_made,
        archive.why_in_place,
        threading.Event(),
    )

    def noted_late(*args: Any) -> None:
        go_on.wait()
        note_made(*args)

    monkeypatch.setattr(archive, "note_made", noted_late)
    first = fastshard.torch_save_async(tensors(1, 4 * MIB), path)
    until(path.exists)
    made = path.stat()
    monkeypatch.setattr(archive, "why_in_place", lambda p: why(p) if first.done() else "held by this process")
    threading.Timer(0.2, go_on.set).start()
    fastshard.torch_save_async(tensors(2, 4 * MIB), path).result()
    assert value_of(path) == 2
    assert path.stat().st_ino != made.st_ino  # the new one was made while the old one was there


# A full disk ---------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_after_staging(small_disk: Path) -> None:
    """Where space cannot be reserved, the error comes when the snapshot is complete and the call has returned."""
    path = small_disk / "m.pt"
    with archives.held(times=1) as go_on:
        first = fastshard.torch_save_async(tensors(1, 4 * MIB), path)
        second = fastshard.torch_save_async(tensors(2, 4 * MIB), path)
        assert second.staged() and not first.done()
        with (small_disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(1 << 16))
        go_on.set()
        first.result()
        if isinstance(error := second.exception(), OSError):
            assert error.errno == errno.ENOSPC and error.filename == str(path)
    assert value_of(path) == (2 if error is None else 1)
    os.unlink(small_disk / "filler")
    fastshard.torch_save_async(tensors(3, 4 * MIB), path).result()
    assert value_of(path) == 3 and hidden(small_disk) == []


def test_a_disk_without_room_is_noticed_by_the_call(small_disk: Path) -> None:
    with pytest.raises(SaveError) as raised:
        fastshard.save_file_async(tensors(1, 32 * MIB), small_disk / "m")
    assert raised.value.errno == errno.ENOSPC and hidden(small_disk) == []
    fastshard.wait_all()


# Errors nobody waits for ---------------------------------------------------------------------------------


def lost(path: Path, snapshot: str = "copy") -> SaveFuture:
    """A save that has failed, of which nobody has been told."""
    with archives.failing():
        future = fastshard.torch_save_async(tensors(1), path, snapshot=snapshot)
        until(future.done)
    return future


@pytest.mark.parametrize("saver", ["torch_save", "torch_save_async", "save_file", "save_file_async"])
def test_an_error_is_raised_by_the_next_save_of_the_path(tmp_path: Path, saver: str) -> None:
    path = tmp_path / "m.pt"
    lost(path)
    fastshard.torch_save_async(tensors(1), tmp_path / "other.pt").result()
    save = getattr(fastshard, saver)
    with pytest.raises(OSError, match="the disk is gone"):
        save(tensors(2), path)
    assert not path.exists()
    save(tensors(2), path)  # once
    fastshard.wait_all()
    assert path.exists() and hidden(tmp_path) == []


def test_an_error_is_raised_by_wait_all(tmp_path: Path) -> None:
    lost(tmp_path / "a.pt")
    lost(tmp_path / "b.pt")
    fine = fastshard.torch_save_async(tensors(1), tmp_path / "c.pt")
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            fastshard.wait_all()
    fastshard.wait_all()
    assert fine.done() and names(tmp_path) == ["c.pt"]


def test_an_error_that_was_taken_is_not_raised_again(tmp_path: Path) -> None:
    future = lost(tmp_path / "m.pt")
    assert isinstance(future.exception(), OSError)
    fastshard.wait_all()
    fastshard.torch_save(tensors(1), tmp_path / "m.pt")


@pytest.mark.parametrize("fails", ["0", "1"])
@pytest.mark.parametrize("ends", ["pass", "sys.exit(3)", "1 / 0"])
def test_an_error_is_logged_at_the_end_of_the_process(tmp_path: Path, ends: str, fails: str) -> None:
    script = f"{HELPERS}\nwith archives.failing():\n    future = save(1)\n    until(future.done)\n{ends}"
    found = run(script, tmp_path, env={**os.environ, "FASTSHARD_FAIL_AT_EXIT": fails})
    assert "m.pt" in found.stderr and "the disk is gone" in found.stderr
    plain = {"pass": 0, "sys.exit(3)": 3, "1 / 0": 1}[ends]
    assert found.returncode == (1 if fails == "1" else plain)
    assert names(tmp_path) == []


# The end of the process ----------------------------------------------------------------------------------


@BY_SNAPSHOT
@pytest.mark.parametrize("ends", ["pass", "sys.exit(3)", "1 / 0", "thread", "daemon"])
def test_the_end_waits_for_saves_in_flight(tmp_path: Path, ends: str, snapshot: str) -> None:
    how = {
        "thread": "threading.Thread(target=saves).start()",
        "daemon": "thread = threading.Thread(target=saves, daemon=True); thread.start(); thread.join()",
    }
    script = f"""
def saves():
    with archives.amended(lambda: time.sleep(0.2)):
        for value in (1, 2):
            save(value)
        save(3, "m.safetensors")
{"" if ends in how else "saves()"}
{how.get(ends, ends)}
"""
    found = run(f"{HELPERS}\nsnapshot = {snapshot!r}\n{script}", tmp_path)
    assert found.returncode == {"sys.exit(3)": 3, "1 / 0": 1}.get(ends, 0), found.stderr
    assert "fastshard" not in found.stderr.replace("File", "")
    assert value_of(tmp_path / "m.pt") == 2 and value_of(tmp_path / "m.safetensors") == 3
    assert names(tmp_path) == ["m.pt", "m.safetensors"]


@BY_SNAPSHOT
@pytest.mark.parametrize("ends", ["os._exit(0)", "os.kill(os.getpid(), signal.SIGTERM)"])
def test_a_sudden_end_leaves_the_old_file(tmp_path: Path, ends: str, snapshot: str) -> None:
    fastshard.torch_save(tensors(1), tmp_path / "m.pt")
    script = f"{HELPERS}\nsnapshot = {snapshot!r}\nwith archives.held():\n    save(2)\n    {ends}"
    found = run(script, tmp_path)
    assert found.returncode == (0 if "exit" in ends else -signal.SIGTERM), found.stderr
    time.sleep(0.1)  # a forked child may be about to notice
    until(lambda: names(tmp_path) == ["m.pt"])
    assert value_of(tmp_path / "m.pt") == 1


# Other processes -----------------------------------------------------------------------------------------


@BY_SNAPSHOT
def test_a_fork_during_a_save(tmp_path: Path, snapshot: str) -> None:
    path = tmp_path / "m.pt"
    of_child = tensors(2), tensors(3)  # in the child, torch would wait for its threads
    with archives.held(times=1):
        future = fastshard.torch_save_async(tensors(1), path, snapshot=snapshot)
        pid = os.fork()
        if pid == 0:
            status = 1
            with contextlib.suppress(BaseException):
                fastshard.wait_all()  # nothing of this process
                fastshard.torch_save_async(of_child[0], tmp_path / "child.pt", snapshot=snapshot).result()
                fastshard.torch_save_async(of_child[1], path, snapshot=snapshot).result()
                status = 0
            os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert value_of(tmp_path / "child.pt") == 2 and value_of(path) == 3
        assert not future.done()
    future.result()
    assert value_of(path) == 1 and names(tmp_path) == ["child.pt", "m.pt"]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_multiprocessing_during_a_save(tmp_path: Path, method: str) -> None:
    """A worker that returns waits for its own saves, and leaves those of its parent alone."""
    path, worker = tmp_path / "m.pt", tmp_path / "worker.pt"
    with archives.held(times=1):
        future = fastshard.torch_save_async(tensors(1), path)
        context = multiprocessing.get_context(method)
        process = context.Process(target=_work, args=(str(worker),))
        process.start()
        process.join(300)
        assert process.exitcode == 0
        assert value_of(worker) == 5 and not future.done()
    future.result()
    assert value_of(path) == 1 and names(tmp_path) == ["m.pt", "worker.pt"]


def _work(path: str) -> None:
    torch.set_num_threads(1)
    with archives.amended(lambda: time.sleep(0.3)):
        fastshard.torch_save_async(tensors(5), path)


# Order, cancellation, interruption -----------------------------------------------------------------------


@BY_SNAPSHOT
def test_saves_of_one_path_appear_in_their_order(tmp_path: Path, snapshot: str) -> None:
    path, seen = tmp_path / "m.pt", []
    with Engine(Options(max_in_flight=8)) as engine, archives.amended(lambda: time.sleep(0.05)):
        for value in range(4):
            fastshard.torch_save_async(
                tensors(value), path, snapshot=snapshot, engine=engine
            ).add_done_callback(lambda _: seen.append(value_of(path)))
        until(lambda: len(seen) == 4)
    assert seen[-1] == 3 and seen == sorted(seen)


def test_saves_of_other_paths_do_not_wait(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with Engine(Options(max_in_flight=8)) as engine, archives.held(times=1) as go_on:
        first = fastshard.torch_save_async(tensors(1), path, engine=engine)
        second = fastshard.torch_save_async(tensors(2), path, engine=engine)
        fastshard.torch_save_async(tensors(3), tmp_path / "o.pt", engine=engine).result()
        assert second.staged() and not first.done() and not second.done() and not path.exists()
        go_on.set()
        second.result()
        assert first.done() and value_of(path) == 2


@BY_SNAPSHOT
def test_a_save_that_is_waited_for_comes_after_those_in_flight(tmp_path: Path, snapshot: str) -> None:
    path = tmp_path / "m.pt"
    with archives.held(times=1) as go_on:
        first = fastshard.torch_save_async(tensors(1), path, snapshot=snapshot)
        timer = threading.Timer(0.1, go_on.set)
        timer.start()
        fastshard.torch_save(tensors(2), path)
        assert first.done() and value_of(path) == 2
        timer.join()


@BY_SNAPSHOT
def test_cancel_leaves_the_old_file(tmp_path: Path, snapshot: str) -> None:
    path = tmp_path / "m.pt"
    fastshard.torch_save(tensors(1), path)
    with archives.held(times=1) as go_on:
        future = fastshard.torch_save_async(tensors(2), path, snapshot=snapshot)
        assert future.cancel()
        go_on.set()
        with pytest.raises(CancelledError):
            future.result()
    fastshard.wait_all()
    assert value_of(path) == 1 and names(tmp_path) == ["m.pt"]
    fastshard.torch_save_async(tensors(4), path, snapshot=snapshot).result()
    assert value_of(path) == 4


@pytest.mark.parametrize("cancelled", [0, 1])
def test_one_of_two_saves_of_a_path_is_cancelled(tmp_path: Path, cancelled: int) -> None:
    path = tmp_path / "m.pt"
    with archives.held(times=1) as go_on:
        futures = [fastshard.torch_save_async(tensors(value), path) for value in (1, 2)]
        assert futures[cancelled].cancel()
        go_on.set()
        futures[1 - cancelled].result()
        with pytest.raises(CancelledError):
            futures[cancelled].result()
    assert value_of(path) == 2 - cancelled and names(tmp_path) == ["m.pt"]


INTERRUPTED = """
main, told = threading.main_thread().ident, []
def is_in(function):
    frame = sys._current_frames()[main]
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame is not None
save(1).result()
with archives.held(times=1) as go_on:
    def interrupt():
        until(lambda: is_in("_pass"))
        signal.pthread_kill(main, signal.SIGINT)
        until(lambda: told or is_in("_stop"))
        time.sleep(0.1)  # the save is stopped, which waits for what is being amended
        go_on.set()
    future = save(2)
    threading.Thread(target=interrupt).start()
    try:
        {wait}
    except KeyboardInterrupt:
        told.append("interrupted")
        print(*told)
"""


@BY_SNAPSHOT
@pytest.mark.parametrize("wait", ["future.result()", "wait_all()"])
def test_ctrl_c_leaves_the_old_file(tmp_path: Path, wait: str, snapshot: str) -> None:
    script = f"{HELPERS}\nsnapshot = {snapshot!r}\n{INTERRUPTED.format(wait=wait)}"
    found = run(script, tmp_path)
    assert (found.returncode, found.stdout) == (0, "interrupted\n"), found.stderr
    assert value_of(tmp_path / "m.pt") == 1 and names(tmp_path) == ["m.pt"]


def test_ctrl_c_during_the_snapshot(tmp_path: Path) -> None:
    script = """
    from fastshard.engine import tensors as described
    save(1).result()
    def fetch(*_):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.01)
    described.fetch = fetch
    try:
        save_file_async({"w": torch.ones(1 << 20).to(torch.float8_e5m2fnuz)}, f"{folder}/m.pt", dtype="float16")
    except KeyboardInterrupt:
        print("interrupted")
    """
    found = run(HELPERS + textwrap.dedent(script), tmp_path)
    assert (found.returncode, found.stdout) == (0, "interrupted\n"), found.stderr
    assert value_of(tmp_path / "m.pt") == 1 and names(tmp_path) == ["m.pt"]


@BY_SNAPSHOT
def test_a_signal_handler_that_saves_during_a_save(tmp_path: Path, snapshot: str) -> None:
    script = f"""
snapshot = {snapshot!r}
handled = []
def handle(*_):
    number = len(handled)
    save(100 + number, "signal.pt")
    save_file(tensors(100 + number), f"{{folder}}/signal.safetensors")
    handled.append(None)
signal.signal(signal.SIGALRM, handle)
for number in range(20):
    signal.setitimer(signal.ITIMER_REAL, 0.0003 * (number + 1))
    future = save(number)
    future.result()
    while len(handled) <= number:
        time.sleep(0.001)
wait_all()
"""
    found = run(HELPERS + script, tmp_path, timeout=300)
    assert found.returncode == 0, found.stderr
    assert value_of(tmp_path / "m.pt") == 19
    assert value_of(tmp_path / "signal.pt") == value_of(tmp_path / "signal.safetensors") == 119
    assert hidden(tmp_path) == []


IN_THE_CALL = """
from fastshard.engine import background
from fastshard.api import archive
def handle(*_):
    save_file(tensors(7), f"{folder}/signal.safetensors")
    assert os.path.exists(f"{folder}/signal.safetensors")
    os.unlink(f"{folder}/signal.safetensors")
    save(8, "signal.pt").result()
    assert os.path.exists(f"{folder}/signal.pt")
    os.unlink(f"{folder}/signal.pt")
    print("handled")
signal.signal(signal.SIGUSR1, handle)

def once(holder, name, before):
    function = getattr(holder, name)
    def replaced(*arguments):
        setattr(holder, name, function)
        found = None if before else function(*arguments)
        signal.raise_signal(signal.SIGUSR1)
        return function(*arguments) if before else found
    setattr(holder, name, replaced)

once(archive, "plan", True)  # before the save is started
assert {f"{folder}/m.pt"} == save(1).background.paths
once(background.asynchronous, "take", False)  # and when its snapshot is complete
assert {f"{folder}/m.pt"} == save(2).background.paths
wait_all()
"""


def test_a_signal_handlers_save_is_not_the_calls(tmp_path: Path) -> None:
    """It is complete when it returns, and the call returns its own save."""
    found = run(HELPERS + IN_THE_CALL, tmp_path)
    assert (found.returncode, found.stdout) == (0, "handled\nhandled\n"), found.stderr
    assert value_of(tmp_path / "m.pt") == 2 and names(tmp_path) == ["m.pt"]


# Limits --------------------------------------------------------------------------------------------------


@BY_SNAPSHOT
def test_no_more_saves_than_allowed_are_in_flight(tmp_path: Path, snapshot: str) -> None:
    begun: list[int] = []
    with Engine(Options(max_in_flight=2)) as engine, archives.held() as go_on:

        def work() -> None:
            for number in range(4):
                path = tmp_path / f"{number}.pt"
                fastshard.torch_save_async(tensors(number), path, snapshot=snapshot, engine=engine)
                begun.append(len(engine.in_flight()))

        thread = threading.Thread(target=work)
        thread.start()
        until(lambda: len(begun) == 2)
        time.sleep(0.1)
        assert len(begun) == 2
        go_on.set()
        thread.join()
        fastshard.wait_all()
    assert max(begun) <= 2
    assert [value_of(tmp_path / f"{number}.pt") for number in range(4)] == [0, 1, 2, 3]


def test_snapshots_take_no_more_memory_than_the_budget(tmp_path: Path) -> None:
    engine, saves = Engine(Options(snapshot_budget=8 * MIB, max_in_flight=10)), []
    begun: list[SaveFuture] = []
    with engine, archives.held() as go_on:

        def work() -> None:
            for number in range(6):
                future = fastshard.torch_save_async(
                    tensors(number, 3 * MIB), tmp_path / f"{number}.pt", snapshot="copy", engine=engine
                )
                begun.append(future)

        thread = threading.Thread(target=work)
        thread.start()
        until(lambda: len(begun) == 2)
        time.sleep(0.1)
        assert len(begun) == 2 and engine.arena.nbytes <= 8 * MIB
        go_on.set()
        thread.join()
        saves = [future.result() for future in begun]
        assert engine.arena.peak <= 8 * MIB and engine.arena.nbytes <= 8 * MIB
    assert [stats.snapshot for stats in saves] == ["copy"] * 6
    assert [value_of(tmp_path / f"{number}.pt") for number in range(6)] == [0, 1, 2, 3, 4, 5]


def test_what_is_larger_than_the_budget_is_written_before_the_call_returns(tmp_path: Path) -> None:
    with Engine(Options(snapshot_budget=MIB)) as engine:
        changed = tensors(1, 4 * MIB)
        future = fastshard.save_file_async(changed, tmp_path / "m", snapshot="copy", engine=engine)
        for tensor in changed.values():
            tensor.fill_(2)
        stats = future.result()
        assert stats.snapshot == "written" and any("snapshot_budget" in text for text in stats.fallbacks)
        assert engine.arena.peak == 0
    assert value_of(tmp_path / "m") == 1


def test_memory_of_snapshots_is_kept_and_given_back(tmp_path: Path) -> None:
    left = []
    saved = tensors(1, 32 * MIB)
    for _ in range(4):
        engine = Engine(Options(snapshot_budget=64 * MIB))
        for _ in range(3):
            fastshard.save_file_async(saved, tmp_path / "m", snapshot="copy", engine=engine).result()
            until(lambda: all(block.idle for block in engine.arena._blocks))  # noqa: B023, a moment later
        assert engine.arena.peak == engine.arena.nbytes == 34 * MIB  # the same again and again, and a page
        engine.close()
        assert engine.arena.nbytes == 0
        left.append(mapped())
    assert left[-1] < left[0] + 16 * MIB


def mapped() -> int:
    """Bytes of anonymous memory of this process."""
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["RssAnon"].split()[0]) << 10


# Places and threads --------------------------------------------------------------------------------------


@BY_SAVER
@BY_SNAPSHOT
def test_every_filesystem(folder: Path, saver: str, snapshot: str) -> None:
    path = folder / ("m.pt" if saver == "torch_save" else "m.safetensors")
    for value in (1, 2):
        changed = tensors(value, 20 * MIB)
        future = getattr(fastshard, f"{saver}_async")(changed, path, snapshot=snapshot)
        if snapshot == "none":
            future.result()
        for tensor in changed.values():
            tensor.fill_(-1)
        future.result()
        assert value_of(path) == value and len(names(folder)) == 1


@BY_SNAPSHOT
def test_saves_from_many_threads(tmp_path: Path, snapshot: str) -> None:
    """Each changes its tensors at once, and two share each path."""
    wrong: list[object] = []

    def work(number: int) -> None:
        mine = tensors(number, MIB)
        try:
            for _ in range(6):
                future = fastshard.save_file_async(mine, tmp_path / f"{number % 4}", snapshot=snapshot)
                if snapshot == "none":
                    future.result()
                for tensor in mine.values():
                    tensor.add_(8)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,), daemon=number % 2 == 0) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fastshard.wait_all()
    assert wrong == []
    for number in range(4):
        assert value_of(tmp_path / str(number)) in (number + 40, number + 44)
    assert len(names(tmp_path)) == 4


# Any order of all of that --------------------------------------------------------------------------------

ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("save"),
            st.sampled_from(["a", "b"]),
            st.sampled_from(SNAPSHOTS[:2]),
            st.sampled_from(["", "", "fail", "cancel"]),
        ),
        st.tuples(st.just("change")),
        st.tuples(st.just("wait"), st.sampled_from(["a", "b"])),
        st.tuples(st.just("wait_all")),
        st.tuples(st.just("save now"), st.sampled_from(["a", "b"])),
    ),
    max_size=12,
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
@given(ACTIONS)
def test_any_sequence_of_saves(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, ...]]
) -> None:
    """Against a model: what each file may hold, and which errors nobody has been told yet."""
    folder = tmp_path_factory.mktemp("model")
    values = tensors(0)
    newest: dict[str, SaveFuture] = {}
    stands: dict[str, float | None] = {"a": None, "b": None}
    errors = {"a": 0, "b": 0}
    now = 0.0
    for action in actions:
        what, *rest = action
        if what == "change":
            now += 1
            for tensor in values.values():
                tensor.fill_(now)
        elif what == "wait_all":
            until(lambda: all(future.done() for future in newest.values()))
            for _ in range(sum(errors.values())):
                with pytest.raises(OSError, match="the disk is gone"):
                    fastshard.wait_all()
            fastshard.wait_all()
            errors = {"a": 0, "b": 0}
        elif what == "wait":
            if (future := newest.get(rest[0])) is not None:
                until(future.done)
                assert (
                    value_of(folder / f"{rest[0]}.pt") if stands[rest[0]] is not None else None
                ) == stands[rest[0]]
        else:
            name = rest[0]
            path = folder / f"{name}.pt"
            until(lambda: all(future.done() for future in newest.values()))
            for _ in range(errors[name]):
                with pytest.raises(OSError, match="the disk is gone"):
                    fastshard.torch_save(values, path)
            errors[name] = 0
            if what == "save now":
                fastshard.torch_save(values, path)
                stands[name] = now
                continue
            _, snapshot, fate = rest
            with archives.failing() if fate == "fail" else archives.held() as go_on:
                future = newest[name] = fastshard.torch_save_async(values, path, snapshot=snapshot)
                if fate == "cancel":
                    assert future.cancel()
                if fate == "fail":
                    errors[name] += 1
                    until(future.done)
                else:
                    assert isinstance(go_on, threading.Event)
                    go_on.set()
            if fate == "":
                stands[name] = now
    until(lambda: all(future.done() for future in newest.values()))
    for _ in range(sum(errors.values())):
        with pytest.raises(OSError, match="the disk is gone"):
            fastshard.wait_all()
    fastshard.wait_all()
    for name, value in stands.items():
        path = folder / f"{name}.pt"
        assert (value_of(path) if path.exists() else None) == value
    assert hidden(folder) == []
