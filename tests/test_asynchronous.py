# SPDX-License-Identifier: Apache-2.0
"""Asynchronous saves: what is in the file, when the tensors may be changed, and how much memory it takes."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import names, same
from torch import Tensor

import fastshard
from fastshard import Engine, Options, SaveError, SaveFuture, asynchronous, wait_all
from fastshard.engine import background, pipeline, snapshots
from fastshard.engine.arena import Arena

MIB = 1 << 20
STATE = Callable[[], dict[str, Tensor]]


def state(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(300, 400, generator=generator)
    return {
        "whole": torch.randn(1000, 300, generator=generator),
        "half": torch.randn(1001, generator=generator).to(torch.bfloat16),
        "bytes": torch.randint(0, 255, (77,), generator=generator).to(torch.uint8),
        "none": torch.empty(0, 5),
        "scalar": torch.tensor(3.5),
        "wide": wide,
    }


def spoil(tensors: dict[str, Tensor]) -> None:
    """What training does to tensors."""
    for tensor in tensors.values():
        tensor.fill_(9)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert background.in_flight() == []
    lost = [future for future in background._lost if not future.seen]
    background._lost.clear()
    assert lost == []


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(Options(threads=2)) as engine:
        yield engine


class Hold:
    """Keeps saves in flight: it is a step of each, before its end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = threading.Semaphore(0), threading.Event()
        counted = pipeline.counted

        def held(call: str, place: object) -> Callable[[Any], None]:
            step = counted(call, place)

            def wait(figures: Any) -> None:
                self.reached.release()
                assert self.open.wait(300)
                step(figures)

            return wait

        monkeypatch.setattr("fastshard.engine.pipeline.counted", held)


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hold]:
    held = Hold(monkeypatch)
    yield held
    held.open.set()
    wait_all()


# The same files, whatever happens to the tensors -------------------------------------------------------------


def module() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 7))


def nested(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {"model": tensors, "step": 3, "more": [tensors["whole"][:10], "text"]}


SAVERS: dict[str, Callable[[str, Path, dict[str, Tensor], dict[str, Any]], SaveFuture | None]] = {
    "save_file": lambda form, path, tensors, more: getattr(fastshard, f"save_file{form}")(
        tensors, path / "a.safetensors", {"format": "pt"}, **more
    ),
    "cast": lambda form, path, tensors, more: getattr(fastshard, f"save_file{form}")(
        tensors, path / "a.safetensors", dtype="bf16", **more
    ),
    "strided": lambda form, path, tensors, more: getattr(fastshard, f"save_file{form}")(
        {"t": tensors["wide"].t(), "part": tensors["whole"][:, 10:20]},
        path / "a.safetensors",
        allow_strided=True,
        **more,
    ),
    "checksums": lambda form, path, tensors, more: getattr(fastshard, f"save_file{form}")(
        tensors, path / "a.safetensors", checksums=True, **more
    ),
    "durable": lambda form, path, tensors, more: getattr(fastshard, f"save_file{form}")(
        tensors, path / "a.safetensors", durable=True, keep_cached=False, **more
    ),
    "save_files": lambda form, path, tensors, more: getattr(fastshard, f"save_files{form}")(
        {path / "a": {"whole": tensors["whole"]}, path / "b": {"wide": tensors["wide"]}, path / "c": {}},
        **more,
    ),
    "save_torch_state_dict": lambda form, path, tensors, more: getattr(
        fastshard, f"save_torch_state_dict{form}"
    )(tensors, path, max_shard_size="500KB", **more),
    "save_sharded_state": lambda form, path, tensors, more: getattr(fastshard, f"save_sharded_state{form}")(
        tensors, path / "ranks", max_size=600_000, **more
    ),
    "torch_save": lambda form, path, tensors, more: getattr(fastshard, f"torch_save{form}")(
        nested(tensors), path / "a.pt", **more
    ),
}


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    }


@pytest.mark.parametrize("snapshot", ["copy", "fork"])
@pytest.mark.parametrize("saver", SAVERS)
def test_files_hold_what_the_tensors_were(
    saver: str, snapshot: str, tmp_path_factory: pytest.TempPathFactory, folder: Path, engine: Engine
) -> None:
    save, expected = SAVERS[saver], tmp_path_factory.mktemp("expected")
    save("", expected, state(), {"engine": engine})
    for _ in range(2):  # into new memory, and into memory that was used before
        tensors = state()
        future = save("_async", folder, tensors, {"engine": engine, "snapshot": snapshot})
        assert future is not None and future.staged()
        spoil(tensors)
        figures = future.result(300)
        assert files(folder) == files(expected)
        assert figures.snapshot == snapshot
        assert not any("snapshot" in text for text in figures.fallbacks)
    assert engine.arena.peak == engine.arena.nbytes  # of one save: the second has used it again
    assert (engine.arena.peak > 64 << 10) == (snapshot == "copy")  # a forked process has the tensors


def test_what_a_child_would_share_is_copied_before_the_fork(tmp_path: Path, engine: Engine) -> None:
    tensors = state()
    tensors["wide"] = torch.empty_like(tensors["wide"]).share_memory_().copy_(tensors["wide"])
    tensors["half"].share_memory_()
    future = fastshard.save_files_async(
        {
            tmp_path / "a": tensors,
            tmp_path / "b": {"b": tensors["wide"].t()},
            tmp_path / "c": {"c": tensors["whole"]},
        },
        allow_strided=True,
        snapshot="fork",
        engine=engine,
    )
    spoil(tensors)
    assert future.result().snapshot == "fork" and 0 < engine.arena.peak < MIB
    assert same(tmp_path / "a", state()) and same(tmp_path / "b", {"b": state()["wide"].t().contiguous()})
    assert same(tmp_path / "c", {"c": state()["whole"]})


def test_where_nothing_can_be_forked_it_is_copied(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastshard import _native

    start = engine.start

    def refuse(files: Any, asked: Any, *more: Any) -> SaveFuture:
        if asked.forked:
            raise _native.NotForked("no process")
        return start(files, asked, *more)

    monkeypatch.setattr(engine, "start", refuse)
    tensors = state()
    future = fastshard.save_file_async(tensors, tmp_path / "a", snapshot="fork", engine=engine)
    spoil(tensors)
    figures = future.result()
    assert figures.snapshot == "copy"
    assert figures.fallbacks == ("no snapshot by a forked process: no process",)
    assert same(tmp_path / "a", state())


def test_save_model(tmp_path: Path) -> None:
    model = module()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    future = fastshard.save_model_async(model, tmp_path / "a")
    spoil(model.state_dict())
    future.result()
    assert same(tmp_path / "a", expected)


def test_a_block_makes_every_saver_asynchronous(tmp_path: Path, hold: Hold) -> None:
    tensors = state()
    with asynchronous() as saves:
        fastshard.save_file(tensors, tmp_path / "a")
        fastshard.save_file({"scalar": tensors["scalar"]}, tmp_path / "b")
        spoil(tensors)
        assert len(saves.futures) == 2 and not saves.done()
    hold.open.set()
    saves.wait(300)
    assert (
        saves.done() and same(tmp_path / "a", state()) and same(tmp_path / "b", {"scalar": state()["scalar"]})
    )


def test_other_threads_and_later_calls_wait(tmp_path: Path) -> None:
    def elsewhere() -> None:
        fastshard.save_file(state(), tmp_path / "elsewhere")
        seen.append(len(background.in_flight()))

    seen: list[int] = []
    with asynchronous() as saves:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    fastshard.save_file(state(), tmp_path / "later")
    assert seen == [0] and saves.futures == [] and fastshard.stats() is not None
    assert fastshard.stats().snapshot == "none"  # type: ignore[union-attr]


def test_bytes_are_returned_at_once(tmp_path: Path) -> None:
    with asynchronous() as saves:
        data = fastshard.save(state())
    fastshard.save_file(state(), tmp_path / "a")
    assert saves.futures == [] and data == (tmp_path / "a").read_bytes()


def test_prepared(tmp_path: Path) -> None:
    tensors = state()
    with fastshard.prepare(tensors, tmp_path / "a") as prepared:
        for n in range(4):
            tensors["whole"].fill_(n)
            future = prepared.save_async()
            tensors["whole"].fill_(-1)
            if n == 3:
                assert future.result().snapshot == "written"
        assert prepared.saves == 4
    assert same(tmp_path / "a", {**state(), "whole": torch.full((1000, 300), 3.0)})


def test_what_is_left_to_torch_has_ended(tmp_path: Path) -> None:
    import io

    buffer = io.BytesIO()
    future = fastshard.torch_save_async(state(), buffer)
    assert future.done() and future.staged() and future.result().files == 0 and buffer.getvalue()
    small = fastshard.torch_save_async({"a": torch.ones(3)}, tmp_path / "small.pt")
    assert small.done() and small.result().files == 1
    assert torch.equal(torch.load(tmp_path / "small.pt")["a"], torch.ones(3))


# When the tensors may be changed --------------------------------------------------------------------------


def test_without_a_snapshot_the_tensors_are_read_later(tmp_path: Path, engine: Engine) -> None:
    future = fastshard.save_file_async(state(), tmp_path / "a", snapshot="none", engine=engine)
    assert future.staged() and future.result().snapshot == "none" and engine.arena.nbytes == 0
    assert same(tmp_path / "a", state())


@pytest.mark.parametrize("saver", SAVERS)
def test_over_the_budget_it_is_written_before_the_call_returns(saver: str, folder: Path) -> None:
    with Engine(Options(snapshot_budget="64KiB")) as engine:
        tensors = state()
        future = SAVERS[saver]("_async", folder, tensors, {"engine": engine})
        assert future is not None and future.staged()
        spoil(tensors)
        figures = future.result(300)
        assert (
            figures.snapshot == "written" and "more than the snapshot_budget of 65536" in figures.fallbacks[0]
        )
        assert engine.arena.peak == 0
    found = files(folder)
    SAVERS[saver]("", folder, state(), {})
    assert found == files(folder)


def test_staging_can_be_waited_for(tmp_path: Path) -> None:
    tensors = state()
    future = fastshard.save_file_async(tensors, tmp_path / "a", wait_staged=False)
    assert future.wait_staged(30) and future.staged()
    spoil(tensors)
    assert future.result().staged_seconds > 0
    assert same(tmp_path / "a", state())


class Slow(torch.Tensor):
    """Reports a device whose bytes only Python brings."""


def test_a_change_before_the_snapshot_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = state()
    (tmp_path / "a").write_bytes(b"old")
    check = snapshots._check

    def changed_meanwhile(wanted: Any) -> None:
        tensors["wide"].add_(1)
        check(wanted)

    fastshard.save_file_async(tensors, tmp_path / "a", check_unchanged=True).result()
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr("fastshard.engine.snapshots._check", changed_meanwhile)
    with pytest.raises(RuntimeError, match="tensor 'wide' was changed before the snapshot"):
        fastshard.save_file_async(tensors, tmp_path / "a", check_unchanged=True)
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["none", "written"])
def test_a_change_before_the_end_is_found(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = state()
    checked = snapshots._checked

    def changed(unchanged: Callable[[], None], amend: Any) -> Any:
        def change() -> None:
            tensors["half"].mul_(2)
            unchanged()

        return checked(change, amend)

    monkeypatch.setattr("fastshard.engine.snapshots._checked", changed)
    budget = Options(snapshot_budget=0 if kind == "written" else None)
    with Engine(budget) as engine, pytest.raises(RuntimeError, match="tensor 'half' was changed"):
        fastshard.save_file_async(
            tensors,
            tmp_path / "a",
            check_unchanged=True,
            snapshot="none" if kind == "none" else "copy",
            engine=engine,
        ).result()
    assert names(tmp_path) == []


def test_what_cannot_be_checked_is_refused(tmp_path: Path) -> None:
    with torch.inference_mode():
        tensors = {"a": torch.ones(3)}
    with pytest.raises(ValueError, match="does not count the changes of inference tensor 'a'"):
        fastshard.save_file_async(tensors, tmp_path / "a", check_unchanged=True)
    with pytest.raises(ValueError, match="storages"):
        fastshard.torch_save_async(state(), tmp_path / "a", check_unchanged=True)
    assert names(tmp_path) == []


@pytest.mark.parametrize("snapshot", ["", "Copy", None])
def test_snapshots_have_names(snapshot: Any) -> None:
    with pytest.raises(ValueError, match="snapshot must be one of auto, copy, fork, none, not"):
        asynchronous(snapshot=snapshot)


# Errors ----------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused_by_the_call(tmp_path: Path) -> None:
    with pytest.raises(SaveError):
        fastshard.save_file_async(state(), tmp_path / "no" / "folder")
    with pytest.raises(ValueError):
        fastshard.save_file_async({"a": 3}, tmp_path / "a")  # type: ignore[dict-item]
    with pytest.raises(RuntimeError, match="Parent directory"):
        fastshard.torch_save_async(state(), tmp_path / "no" / "folder")


def fails_late(monkeypatch: pytest.MonkeyPatch, path: Path) -> SaveFuture:
    """Starts a save that fails when nobody waits."""
    with monkeypatch.context() as patch:
        patch.setattr("fastshard.engine.pipeline.counted", lambda call, place: _fail)
        future = fastshard.save_file_async(state(), path)
    while not future.done():
        pass
    return future


def _fail(_: object) -> None:
    raise OSError(5, "late")


def test_an_error_is_raised_by_the_result_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    future = fails_late(monkeypatch, tmp_path / "a")
    with pytest.raises(OSError, match="late"):
        future.result()
    fastshard.save_file(state(), tmp_path / "a")
    wait_all()


def test_an_error_is_raised_by_the_next_save_of_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for save in (fastshard.save_file, fastshard.save_file_async):
        fails_late(monkeypatch, tmp_path / "a")
        fastshard.save_file(state(), tmp_path / "b")
        with pytest.raises(OSError, match="late"):
            save(state(), tmp_path / "a")
        save(state(), tmp_path / "a")
        wait_all()


def test_an_error_is_raised_by_a_save_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_late(monkeypatch, tmp_path / "a")
    with pytest.raises(OSError, match="late"):
        fastshard.save_torch_state_dict(state(), tmp_path)


def test_errors_are_raised_by_wait_all_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_late(monkeypatch, tmp_path / "a")
    fails_late(monkeypatch, tmp_path / "b")
    for _ in range(2):
        with pytest.raises(OSError, match="late"):
            wait_all()
    wait_all()


def test_what_nobody_has_seen_is_logged_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fails_late(monkeypatch, tmp_path / "a")
    with caplog.at_level(logging.ERROR, "fastshard"):
        assert not background.report_lost()
    assert str(tmp_path / "a") in caplog.text and "late" in caplog.text
    monkeypatch.setenv("FASTSHARD_FAIL_AT_EXIT", "1")
    assert not background.report_lost()
    fails_late(monkeypatch, tmp_path / "a")
    assert background.report_lost()


def test_a_cancelled_save_is_no_surprise(tmp_path: Path, hold: Hold) -> None:
    (tmp_path / "a").write_bytes(b"old")
    first = fastshard.save_file_async(state(), tmp_path / "a")
    second = fastshard.save_file_async(state(1), tmp_path / "a")  # held, until the first has ended
    assert hold.reached.acquire(timeout=300)
    assert second.cancel()
    hold.open.set()
    first.result()
    assert (
        second.wait(300) and second.cancelled() and same(tmp_path / "a", state()) and names(tmp_path) == ["a"]
    )


# Order, back-pressure, memory -----------------------------------------------------------------------------


def test_saves_of_one_path_are_ordered(tmp_path: Path, hold: Hold) -> None:
    with Engine(Options(max_in_flight=4)) as engine:
        futures = []
        for n in range(3):
            futures.append(fastshard.save_file_async(state(n), tmp_path / "a", engine=engine))
            if n == 0:
                assert hold.reached.acquire(timeout=300)
        assert all(future.staged() and not future.done() for future in futures)
        assert same(tmp_path / "a", state(0))  # the others are held
        hold.open.set()
        wait_all(30)
        assert same(tmp_path / "a", state(2))


@pytest.mark.parametrize("kind", ["none", "written"])
def test_without_a_snapshot_an_earlier_save_is_waited_for(tmp_path: Path, hold: Hold, kind: str) -> None:
    first = fastshard.save_file_async(state(0), tmp_path / "a")
    assert hold.reached.acquire(timeout=300)
    threading.Timer(0.2, hold.open.set).start()
    budget = Options(snapshot_budget=0)
    snapshot = "none" if kind == "none" else "copy"
    second = fastshard.save_file_async(state(1), tmp_path / "a", snapshot=snapshot, engine=budget)
    assert first.done()
    second.result()
    assert same(tmp_path / "a", state(1))


def test_a_save_waits_for_an_asynchronous_one_of_its_path(tmp_path: Path, hold: Hold) -> None:
    future = fastshard.torch_save_async(nested(state()), tmp_path / "a.pt")
    more = fastshard.save_file_async(state(), tmp_path / "a")
    assert hold.reached.acquire(timeout=300)
    threading.Timer(0.2, hold.open.set).start()
    fastshard.save_file(state(1), tmp_path / "a")
    assert more.done() and same(tmp_path / "a", state(1))
    future.result()


def test_no_more_are_in_flight_than_allowed(tmp_path: Path, hold: Hold) -> None:
    with Engine(Options(max_in_flight=2)) as engine:
        first = fastshard.save_file_async(state(0), tmp_path / "0", engine=engine)
        second = fastshard.save_file_async(state(1), tmp_path / "1", engine=engine)
        for _ in range(2):
            assert hold.reached.acquire(timeout=300)
        threading.Timer(0.2, hold.open.set).start()
        third = fastshard.save_file_async(state(2), tmp_path / "2", engine=engine)
        assert first.done() and third.staged()
        second.result()
        third.result()


def test_snapshots_wait_for_memory(tmp_path: Path, hold: Hold) -> None:
    with Engine(Options(max_in_flight=8, snapshot_budget="4MiB")) as engine:
        big = {"a": torch.ones(3 * MIB, dtype=torch.uint8)}
        first = fastshard.save_file_async(big, tmp_path / "0", engine=engine)
        assert hold.reached.acquire(timeout=300)
        threading.Timer(0.2, hold.open.set).start()
        second = fastshard.save_file_async(big, tmp_path / "1", engine=engine)
        assert first.done()
        assert second.result().snapshot == "copy"
        assert engine.arena.peak == engine.arena.nbytes == 4 * MIB


def test_snapshots_wait_for_what_a_fork_has_copied_first(tmp_path: Path, hold: Hold) -> None:
    """As shared memory, which a forked process would see change."""
    with Engine(Options(max_in_flight=8, snapshot_budget="4MiB")) as engine:
        big = {"a": torch.ones(3 * MIB, dtype=torch.uint8).share_memory_()}
        first = fastshard.save_file_async(big, tmp_path / "0", snapshot="fork", engine=engine)
        assert hold.reached.acquire(timeout=300) and engine.arena.nbytes == 4 * MIB
        threading.Timer(0.2, hold.open.set).start()
        second = fastshard.save_file_async(big, tmp_path / "1", engine=engine)
        assert first.done() and second.result().snapshot == "copy"
        assert first.result().snapshot == "fork" and engine.arena.peak == 4 * MIB


def test_the_arena_is_released_when_the_engine_rests(tmp_path: Path) -> None:
    engine = Engine()
    fastshard.save_file_async(state(), tmp_path / "a", engine=engine).result()
    assert engine.arena.nbytes > 0
    engine.close()
    assert engine.arena.nbytes == 0


@pytest.mark.parametrize("wrong", [{"max_in_flight": 0}, {"max_in_flight": 1.5}, {"snapshot_budget": "much"}])
def test_limits_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
        Options(**wrong)


def test_a_block_of_the_right_size_is_used_again() -> None:
    arena = Arena(100 * MIB)
    large, small = arena.take(80 * MIB, never), arena.take(3 * MIB, never)
    assert not isinstance(large, str) and not isinstance(small, str)
    large.give_back()
    small.give_back()
    assert arena.take(2 * MIB, never) is small and arena.take(70 * MIB, never) is large
    assert arena.nbytes == 84 * MIB
    small.give_back()
    large.give_back()
    assert not isinstance(arena.take(100 * MIB, never), str)  # for which the others went
    assert arena.nbytes == arena.peak == 100 * MIB
    assert arena.take(1, never) == "all of the snapshot_budget is in use"
    assert "more than the snapshot_budget" in str(arena.take(101 * MIB, never))


def never() -> bool:
    return False


def test_memory_that_is_not_free_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fastshard.engine.limits.free_memory", lambda: 2 * MIB)
    with Engine(Options(snapshot_budget="64MiB")) as engine:
        future = fastshard.save_file_async({"a": torch.zeros(MIB)}, tmp_path / "a", engine=engine)
        assert future.result().fallbacks == (f"no snapshot: {4 * MIB + 4096} bytes of memory are not free",)


def test_threads_never_exceed_the_budget() -> None:
    arena = Arena(16 * MIB)
    seen: list[int] = []

    def use() -> None:
        for n in range(200):
            block = arena.take((1 + n % 6) * MIB, lambda: True)
            assert not isinstance(block, str)
            seen.append(sum(one.nbytes for one in arena._blocks[:] if one.address))
            block.give_back()

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 800 and max(seen) <= 16 * MIB


def test_it_is_counted_under_its_own_name(tmp_path: Path) -> None:
    before = {call: saved.saves for call, saved in fastshard.status().saved.items()}
    fastshard.save_model_async(module(), tmp_path / "a").result()
    fastshard.save_torch_state_dict_async(
        state(), tmp_path / "b" if (tmp_path / "b").mkdir() is None else ""
    ).result()
    after = fastshard.status().saved
    for call in ("save_model", "save_torch_state_dict"):
        assert after[call].saves == before.get(call, 0) + 1
    assert after.get("save_file") is None or after["save_file"].saves == before.get("save_file", 0)


def test_a_forked_child_knows_none_of_them(tmp_path: Path, hold: Hold) -> None:
    future = fastshard.save_file_async(state(), tmp_path / "a")
    assert hold.reached.acquire(timeout=300)
    child = os.fork()
    if child == 0:
        try:
            wait_all()
            hold.open.set()
            fastshard.save_file(state(1), tmp_path / "b")
            os._exit(0 if background.in_flight() == [] else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    hold.open.set()
    future.result()
    assert same(tmp_path / "a", state()) and same(tmp_path / "b", state(1))


def writers() -> dict[str, int]:
    """The engines' writers in this process, by number, and their policies."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            if (task / "comm").read_text() == "fastshard-write\n":
                found[task.name] = os.sched_getscheduler(int(task.name))
    return found


@pytest.mark.parametrize("snapshot", ["copy", "none", None])
def test_writers_of_what_nobody_waits_for_step_aside(tmp_path: Path, snapshot: str | None) -> None:
    """So that the steps after the call are disturbed less. Snapshots are made, and saves are ended, by others: what
    these threads start would be as they are."""
    others = writers()
    with Engine(Options(threads=1)) as engine:
        tensors = {"a": torch.ones(1 << 20)}
        if snapshot is None:
            fastshard.save_file(tensors, tmp_path / "f", engine=engine)
        else:
            future = fastshard.save_file_async(tensors, tmp_path / "f", snapshot=snapshot, engine=engine)
            assert wait_until(future.done)
            assert (future.stats.priority, future.stats.taken_over) == ("idle", "")
        found = sorted(policy for number, policy in writers().items() if number not in others)
    normal, idle = os.SCHED_OTHER, os.SCHED_IDLE
    assert found == {"copy": [normal, normal, idle], "none": [normal, idle], None: [normal]}[snapshot]


def wait_until(reached: Callable[[], bool]) -> bool:
    """Whether that came to be, without anybody who waits for a save."""
    end = time.monotonic() + 60
    while not reached() and time.monotonic() < end:
        time.sleep(0.005)
    return reached()
