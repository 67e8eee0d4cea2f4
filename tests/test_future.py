# SPDX-License-Identifier: Apache-2.0
"""The handle of a save: it ends whether or not anybody waits, its steps run in order, and no error is lost."""

from __future__ import annotations

import _thread
import contextlib
import gc
import logging
import os
import signal
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SLOT
from helpers import names, run_engine, same
from test_fetch import HEADER, Library, fetched, noise, on_host

import fastshard
from fastshard import Engine, SaveError
from fastshard.engine import pipeline, tensors
from fastshard.engine.future import SaveFuture
from fastshard.engine.pipeline import How
from fastshard.engine.plan import FilePlan

NewEngine = Callable[..., Engine]

pytestmark = pytest.mark.usefixtures("no_hang")

DATA = noise(3 * SLOT)


def start(engine: Engine, path: Path, **options: Any) -> SaveFuture:
    """A save whose bytes only Python can bring."""
    plan = FilePlan(os.fsencode(path), HEADER, [fetched(DATA)])
    options.setdefault("fetch", Library([DATA]))
    return engine.submit([plan], keep_alive=None, **options)


def until(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.001)


class Gate:
    """A fetch function or step that waits until it is let go."""

    def __init__(self, then: Callable[..., object] = lambda *_: None) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self._then = then

    def __call__(self, *arguments: Any) -> None:
        self.reached.set()
        self.open.wait()
        self._then(*arguments)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate(Library([DATA]))
    yield gate
    gate.open.set()


# It ends -------------------------------------------------------------------------------------------------


def test_nobody_waits(new_engine: NewEngine, path: Path) -> None:
    done: list[str] = []

    def amend(_: object) -> list[tuple[int, int, bytes]]:
        done.append("amended")
        return [(0, 0, b"A")]

    def step(_: object) -> None:
        assert path.exists()
        done.append("step")

    future = start(
        new_engine(),
        path,
        amend=amend,
        steps=[step, lambda _: done.append("last")],
        undo=lambda: done.append("undo"),
    )
    until(future.done)
    assert done == ["amended", "step", "last", "undo"]
    assert path.read_bytes() == b"A" + HEADER[1:] + DATA
    assert future.result().nbytes == len(HEADER) + len(DATA)
    assert not future.running() and not future.cancelled() and future.exception() is None


def test_nobody_holds_it(new_engine: NewEngine, path: Path) -> None:
    ended = threading.Event()
    start(new_engine(), path, steps=[lambda _: ended.set()])
    assert ended.wait(300) and path.read_bytes() == HEADER + DATA


@pytest.mark.parametrize("serve", [False, True])
def test_every_waiting_thread_gets_the_result(new_engine: NewEngine, path: Path, serve: bool) -> None:
    future = start(new_engine(), path, serve=serve, steps=[lambda _: time.sleep(0.05)])
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(future.result())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [future.stats] * 4


def test_at_exit(path: Path) -> None:
    done = run_engine(
        """
        import time
        plan = FilePlan(os.fsencode(sys.argv[1]), b"contents", [TensorView(0, 1 << 16, FETCHED)])
        engine = Engine()
        engine.submit([plan], keep_alive=None, fetch=lambda *_: time.sleep(0.2), steps=[lambda _: print("step")])
        """,
        path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "step\n", "")
    assert path.stat().st_size == 8 + (1 << 16)


def test_a_fork_meanwhile(new_engine: NewEngine, path: Path, gate: Gate) -> None:
    future = start(new_engine(), path, fetch=gate)
    gate.reached.wait()
    pid = os.fork()
    if pid == 0:
        try:
            future.wait()
        except RuntimeError as error:
            os._exit(0 if "parent process" in str(error) else 2)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    gate.open.set()
    future.result()
    assert path.read_bytes() == HEADER + DATA


def test_without_a_thread_whoever_waits_serves_it(
    new_engine: NewEngine, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    engine = new_engine()
    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", refused)
        future = start(engine, path)
    assert "no thread is to be had" in caplog.text
    future.result()
    assert path.read_bytes() == HEADER + DATA


# As concurrent.futures -----------------------------------------------------------------------------------


def test_a_time_limit(new_engine: NewEngine, path: Path, gate: Gate) -> None:
    future = start(new_engine(), path, fetch=gate)
    for wait in (future.result, future.exception):
        with pytest.raises(TimeoutError, match=r"0\.01 seconds"):
            wait(timeout=0.01)
    assert not future.wait(0) and future.running() and not future.cancelled()
    gate.open.set()
    assert future.result(timeout=300).files == 1


def test_progress(new_engine: NewEngine, path: Path, gate: Gate) -> None:
    future = start(new_engine(), path, fetch=gate)
    written, nbytes = future.progress()
    assert written < nbytes == len(HEADER) + len(DATA)
    gate.open.set()
    future.result()
    assert future.progress() == (nbytes, nbytes)


@pytest.mark.parametrize("plain", [False, True])
def test_callbacks(
    new_engine: NewEngine, path: Path, gate: Gate, plain: bool, caplog: pytest.LogCaptureFixture
) -> None:
    called: list[object] = []

    def failing(_: object) -> None:
        raise ZeroDivisionError

    if plain:
        plan = FilePlan(os.fsencode(path), HEADER, [on_host(DATA)])
        future = new_engine().submit([plan], keep_alive=DATA)
    else:
        future = start(new_engine(), path, fetch=gate)
    future.add_done_callback(failing)
    future.add_done_callback(called.append)
    gate.open.set()
    until(lambda: called)
    assert future.done() and called == [future]
    future.add_done_callback(called.append)
    assert called == [future, future]
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("serve", [False, True])
def test_cancelled(new_engine: NewEngine, path: Path, gate: Gate, serve: bool) -> None:
    path.write_bytes(b"old")
    undone: list[None] = []
    future = start(new_engine(), path, fetch=gate, serve=serve, undo=lambda: undone.append(None))
    if serve:
        gate.reached.wait()
    assert future.cancel()
    gate.open.set()
    with pytest.raises(CancelledError):
        future.exception()
    assert future.cancelled() and future.done() and not future.cancel() and undone == [None]
    assert path.read_bytes() == b"old" and names(path.parent) == [path.name]


def test_cancelled_before_a_step(new_engine: NewEngine, path: Path, no_hang: None) -> None:
    """The bytes are there, but what makes them visible has not begun."""
    future = start(
        new_engine(), path, serve=False, fetch=Library([DATA]), steps=[lambda _: pytest.fail("a step")]
    )
    while not future._native.wait(0):
        future._bring()
    assert future.cancel()
    with pytest.raises(CancelledError):
        future.result()


def test_too_late_to_cancel(new_engine: NewEngine, path: Path) -> None:
    step = Gate()
    future = start(new_engine(), path, steps=[step])
    step.reached.wait()
    assert not future.cancel()
    step.open.set()
    future.result()
    assert not future.cancel() and not future.cancelled()


# Errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("serve", [False, True])
@pytest.mark.parametrize("where", ["fetch", "amend", "step", "undo"])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_an_error_reaches_everybody_who_waits(
    new_engine: NewEngine, path: Path, serve: bool, where: str, error: type[BaseException]
) -> None:
    def fail(*_: object) -> Any:
        raise error("from " + where)

    seen: list[str] = []
    options: dict[str, Any] = {"fetch": Library([DATA]), "undo": lambda: seen.append("undo")}
    options |= {"steps": [fail, lambda _: seen.append("a later step")]} if where == "step" else {where: fail}
    future = start(new_engine(), path, serve=serve, **options)
    for _ in range(2):
        with pytest.raises(error, match="from " + where):
            future.result()
    assert isinstance(future.exception(), error)
    assert seen == ([] if where == "undo" else ["undo"])
    assert path.exists() == (where in ("step", "undo"))
    assert names(path.parent) == [path.name] * path.exists()


def test_an_error_of_the_engine_undoes(new_engine: NewEngine, path: Path) -> None:
    undone: list[None] = []
    path.parent.joinpath("folder").mkdir()
    future = start(new_engine(), path.parent / "folder" / "m", serve=False, undo=lambda: undone.append(None))
    path.parent.joinpath("folder").rename(path.parent / "moved")
    with pytest.raises(SaveError):
        future.result()
    assert undone == [None]


@pytest.mark.parametrize("serve", [False, True])
@pytest.mark.parametrize("where", ["fetch", "steps"])
def test_a_failed_save_holds_nothing(new_engine: NewEngine, path: Path, serve: bool, where: str) -> None:
    """Its error is kept, but by no cycle that only a garbage collection would end."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    class Data:
        pass

    data = Data()
    engine = new_engine()
    plan = FilePlan(os.fsencode(path), HEADER, [fetched(DATA)])
    options: dict[str, Any] = (
        {"fetch": fail} if where == "fetch" else {"fetch": Library([DATA]), "steps": [fail]}
    )
    gc.collect()
    gc.disable()
    try:
        future = engine.submit([plan], keep_alive=data, serve=serve, **options)
        watch, watched_data = weakref.ref(future), weakref.ref(data)
        failed = False
        try:  # pytest.raises would keep the traceback, and all that is in its frames
            future.result()
        except ZeroDivisionError:
            failed = True
        assert failed
        del future, data
        until(lambda: watch() is None) if serve else None
        assert watch() is None and watched_data() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("serve", [False, True])
def test_ctrl_c_in_the_waiting_thread(new_engine: NewEngine, path: Path, gate: Gate, serve: bool) -> None:
    path.write_bytes(b"old")
    undone: list[None] = []

    def interrupt() -> None:
        gate.reached.wait()
        time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.05)
        gate.open.set()

    future = start(new_engine(), path, fetch=gate, serve=serve, undo=lambda: undone.append(None))
    thread = threading.Thread(target=interrupt)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where tests run in the background
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            future.result()
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert future.done() and undone == [None]
    assert path.read_bytes() == b"old" and names(path.parent) == [path.name]


@pytest.mark.parametrize("serve", [False, True])
def test_an_error_is_explained_before_anybody_sees_it(new_engine: NewEngine, path: Path, serve: bool) -> None:
    def explain(error: BaseException) -> None:
        error.args = ("explained",)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a hidden name")

    seen: list[object] = []
    future = start(new_engine(), path, serve=serve, fetch=fail, explain=explain)
    future.wait()
    future.add_done_callback(lambda future: seen.append(str(future.exception())))
    with pytest.raises(ZeroDivisionError, match="explained"):
        future.result()
    assert seen == ["explained"]


# What is counted, and where Python's bytes come from ------------------------------------------------------


def test_figures_are_those_of_the_thread_that_started_it(path: Path) -> None:
    state = {"a": torch.arange(100.0)}
    fastshard.save_file({"other": torch.ones(1)}, path)
    before = fastshard.status().saved["save_file"].saves

    def elsewhere() -> None:
        fastshard.save_file({"another": torch.ones(3)}, path.parent / "another")

    plan = pipeline.plan_file(state, path, None, How(checksums=True))
    future = pipeline.start({path: plan}, How(checksums=True), time.perf_counter())
    future.serve()
    until(future.done)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert fastshard.stats() == future.result() and same(path, state)
    assert list(future.stats.checksums[str(path)]) == ["a"]
    assert fastshard.status().saved["save_file"].saves == before + 2


def test_pieces_are_brought_on_the_starters_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a backend has it that is not CUDA: what is current is each thread's own."""
    current = threading.local()
    used: list[object] = []

    @contextlib.contextmanager
    def stream(wanted: object) -> Iterator[None]:
        used.append(wanted)
        yield

    backend = types.SimpleNamespace(
        is_available=lambda: True,
        current_stream=lambda device: getattr(current, "stream", "default"),
        stream=stream,
    )
    monkeypatch.setattr(torch, "xpu", backend)
    xpu, cpu = torch.device("xpu", 0), torch.device("cpu")
    current.stream = "the starter's"
    on_streams = tensors.on_current_streams([xpu, cpu])

    def elsewhere() -> None:
        with on_streams(xpu), on_streams(cpu):
            pass

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert used == ["the starter's"]


def test_the_log_is_quiet(new_engine: NewEngine, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        start(new_engine(), path).result()
    assert caplog.records == []
