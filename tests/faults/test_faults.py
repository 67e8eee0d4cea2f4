# SPDX-License-Identifier: Apache-2.0
"""A sample of the failing calls, kills and power cuts; ``make faults`` does all of them.

The harness runs in a process of its own: it forks, and what it forks must know nothing of other tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import calls
import pytest
from conftest import by_one_worker, without_mounts

HERE = Path(__file__).parent
SAMPLE = 12
"""Cases of each saver, evenly spread over all of its calls; the same ones each time."""
SAVERS = """
save_file_async-copy:exists save_file_async-fork:new torch_save_async-fork:exists torch_save_async-copy:new
save_files_async-copy:some save_torch_state_dict_async-copy:more_shards save_sharded_state_async-none:more_parts
save_file_async-twice:exists Accelerator.save_state_async:exists save_file:exists save_file-durable:exists save_file-uncached-buffered:new save_files:some prepare:exists
prepare-tmpfs:new torch_save:exists torch_save-old_format-durable:exists save_torch_state_dict:more_shards
save_torch_state_dict-bin:new save_sharded_state:more_parts save_sharded_state-durable:new
save_pretrained:more_shards Accelerator.save_model:new convert:exists shard:over_ranks merge:new
reshard:in_place save_file-manifest:exists save_torch_state_dict-manifest:one_file_over_shards
""".split()
DURABLE = """
save_file-durable:exists save_files-durable:some torch_save-durable:exists save_sharded_state-durable:more_parts
""".split()
CUTS = 6


class Ran(NamedTuple):
    status: int
    said: str
    results: dict[str, list[dict[str, Any]]]
    """By saver."""


def _run(out: Path, savers: list[str], *arguments: str) -> Ran:
    choice = [word for saver in savers for word in ("--saver", saver)]
    command = [sys.executable, str(HERE), *choice, *arguments, "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=540, cwd=HERE, env=dict(os.environ)
    )
    results: dict[str, list[dict[str, Any]]] = {}
    for line in out.read_text().splitlines() if out.exists() else ():
        found = json.loads(line)
        results.setdefault(found["saver"], []).append(found)
    return Ran(done.returncode, done.stdout + done.stderr, results)


def _check(ran: Ran, saver: str, count: int) -> None:
    if "no power cuts:" in ran.said:
        without_mounts(ran.said.strip().splitlines()[0])
    if ran.status == 77 or f"{saver}: skipped" in ran.said:
        pytest.skip(ran.said.strip().splitlines()[0])
    found = ran.results.get(saver, [])
    assert len(found) == count, ran.said
    wrong = [
        f"{result['command']}\n    {wrong['kind']}: {wrong['text']}"
        for result in found
        for wrong in result["wrong"]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    arguments = ("--only", "calls", "--sample", str(SAMPLE))
    return by_one_worker(tmp_path_factory, "calls", lambda folder: _run(folder / "out", SAVERS, *arguments))


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    arguments = ("--only", "power", "--cuts", str(CUTS))
    return by_one_worker(tmp_path_factory, "cuts", lambda folder: _run(folder / "out", DURABLE, *arguments))


@pytest.mark.parametrize("saver", SAVERS)
def test_a_call_that_fails_and_a_kill(failing: Ran, saver: str) -> None:
    _check(failing, saver, SAMPLE)


@pytest.mark.parametrize("saver", DURABLE)
def test_a_power_cut(cuts: Ran, saver: str) -> None:
    _check(cuts, saver, CUTS)


# --- The harness itself: what it is to notice is noticed. ---------------------------------------------------


@pytest.fixture
def watched() -> None:
    if refusal := calls.refusal():
        pytest.skip(refusal)


def _at(name: str, nth: int, error: int) -> Callable[[calls.Call], int | None]:
    return lambda call: error if (call.name, call.nth) == (name, nth) else None


def test_a_call_fails_in_the_child_alone(watched: None, tmp_path: Path) -> None:
    def work() -> None:
        os.mkdir(tmp_path / "first")
        os.mkdir(tmp_path / "second")

    def after(value: object, error: BaseException | None) -> tuple[type, int | None]:
        return type(error), getattr(error, "errno", None)

    name = "mkdir" if calls.MACHINE == "x86_64" else "mkdirat"
    report = calls.run(work, act=_at(name, 2, 28), after=after)
    assert (report.outcome, report.value) == ("raised", (OSError, 28))
    assert report.hit is not None and report.hit.path == str(tmp_path / "second")
    assert os.listdir(tmp_path) == ["first"]


def test_a_kill_comes_before_the_call(watched: None, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("kept")
    report = calls.run(
        lambda: os.rename(tmp_path / "old", tmp_path / "new"),
        act=lambda call: calls.KILL if call.name.startswith("rename") else None,
    )
    assert report.outcome == "killed"
    assert os.listdir(tmp_path) == ["old"]


def test_a_close_that_fails_closes_all_the_same(watched: None, tmp_path: Path) -> None:
    opened: list[int] = []

    def work() -> None:
        opened.append(os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY))
        os.close(opened[0])

    def after(value: object, error: BaseException | None) -> tuple[str, str]:
        return type(error).__name__, os.readlink(f"/proc/self/fd/{opened[0]}")

    report = calls.run(
        work, act=_at("close", 1, 5), after=after, seen=lambda name, path: path.startswith(str(tmp_path))
    )
    assert report.value == ("OSError", os.devnull)


def test_whoever_waits_for_ever_hangs(watched: None) -> None:
    ends = os.pipe()
    report = calls.run(lambda: os.read(ends[0], 1), seen=lambda name, path: False)
    assert report.outcome == "hung"
    for end in ends:
        os.close(end)


def test_whoever_crashes_is_told_from_whoever_raises(watched: None) -> None:
    report = calls.run(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert report.outcome == "died"


def test_what_is_left_of_a_save_is_told_for_other_savers_too(watched: None) -> None:
    """The two that take no time: half of the room, and half of a file."""
    if os.getuid():
        without_mounts("filesystems of a known size need root")
    command = [
        sys.executable,
        str(HERE / "rivals.py"),
        "--saver",
        "fastshard.save_files",
        "--disturbance",
        "half",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=HERE)
    if done.returncode == 77:
        without_mounts(done.stdout.strip())
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    assert [row[1:] for row in rows[2:]] == [
        [disk, "fastshard.save_files", "1", "1", ""] for _ in range(2) for disk in ("ext4", "tmpfs")
    ], done.stdout


def test_a_mixture_and_a_lie_are_wrong() -> None:
    import rivals

    assert not rivals.Found("raised", "old", False, 0).wrong
    assert not rivals.Found("raised", "new", True, 0).wrong
    assert not rivals.Found("killed", "old", False, 0).wrong
    for found in (
        ("returned", "old", False, 0),
        ("raised", "new", False, 0),
        ("raised", "old", True, 0),
        ("killed", "files of two saves, mixed", False, 0),
        ("killed", "new", False, 1),
        ("died", "old", False, 0),
        ("hung", "old", False, 0),
    ):
        assert rivals.Found(*found).wrong, found
