# SPDX-License-Identifier: Apache-2.0
"""Small saves: what they ask of the kernel, and that their benchmark runs both ways, compares and reports. Never how fast
anything is."""

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PRELUDE, run_bare

import fastshard
from fastshard.bench import save, small_saves
from fastshard.bench.small_saves import Measured
from fastshard.publish import directory

pytestmark = [pytest.mark.filterwarnings("ignore")]


def test_every_function_is_measured_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.save
    code = save.main(
        ["small-saves", "--dir", str(tmp_path), "--rounds", "2", "--json", str(tmp_path / "x.json")]
    )
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["rounds"] == 2 and torch.save is before
    names = [row["name"] for row in found["saves"]]
    assert names == ["torch.save", "save_file", "save_torch_state_dict", "save_pretrained"]
    assert all(name in shown for name in names) and "medians of 2, in ms" in shown
    assert code == int(not all(row["holds"] for row in found["saves"]))
    assert all(row["original"] > 0 < row["ours"] for row in found["saves"])
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_the_mark() -> None:
    assert Measured("a", 1e-3, 1.199e-3).holds and not Measured("a", 1e-3, 1.201e-3).holds
    text = small_saves.table([Measured("a", 1e-3, 2e-3), Measured("b", 1e-3, 1e-3)], 300)
    assert "1.000       2.000       1.200  too slow" in text and text.endswith("holds")


def test_the_engine_saves_in_every_second_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[bool] = []
    monkeypatch.setattr(small_saves, "BLOCK", 2)
    small_saves.measure("x", lambda folder: installed.append(fastshard.status().installed), tmp_path, 3)
    # One more before each block, which is not measured.
    assert installed == [False] * 3 + [True] * 3 + [False] * 2 + [True] * 2


def test_other_files_are_told(tmp_path: Path) -> None:
    def other(folder: Path) -> None:
        (folder / "a").write_text(folder.name)

    with pytest.raises(RuntimeError, match="x: the files are not the same"):
        small_saves.measure("x", other, tmp_path, 1)


_CALLS = (
    "open close stat lstat fstat listdir scandir mkdir rmdir rename link unlink symlink readlink utime chmod"
).split()


@contextlib.contextmanager
def _counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Calls that go to the kernel, and threads that are started to close files."""
    counts: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return count

    with monkeypatch.context() as patch:
        for name in _CALLS:
            patch.setattr(os, name, counted(name, getattr(os, name)))
        patch.setattr(directory, "close_later", counted("close_later", directory.close_later))
        yield counts


def _traced(save: str, place: Path, log: Path) -> tuple[list[str], int]:
    """System calls of the thread that saves, in its third save to a place; and descriptors that are open."""
    calls, saving, descriptors = _traced_threads(save, place, log)
    return [call for thread, call in calls if thread == saving], descriptors


def _traced_threads(save: str, place: Path, log: Path) -> tuple[list[tuple[str, str]], str, int]:
    """System calls of all threads, in the order in which they ended; which thread saves; and open descriptors."""
    if shutil.which("strace") is None:
        pytest.skip("no strace here")
    script = f"""
import huggingface_hub
tensors = {{"a": torch.ones(4)}}
place = sys.argv[1]
with installed():
    for number in range(3):
        os.path.exists(f"/before/{{number}}")
        {save}
    os.path.exists("/before/end")
    print(len(os.listdir("/proc/self/fd")))
"""
    done = run_bare(PRELUDE + script, place, traced=["strace", "-f", "-o", log])
    assert done.returncode == 0, done.stderr
    calls: list[tuple[str, str]] = []
    begun: dict[str, str] = {}
    for thread, call in (line.split(None, 1) for line in log.read_text().splitlines()):
        if call.endswith("<unfinished ...>"):
            begun[thread] = call.removesuffix("<unfinished ...>")
        elif call.startswith("<..."):
            calls.append((thread, begun.pop(thread) + call.partition("resumed>")[2]))
        elif call.partition("(")[0].isidentifier():
            calls.append((thread, call))
    begin, end = (
        next(i for i, (_, call) in enumerate(calls) if mark in call) for mark in ("/before/2", "/before/end")
    )
    return calls[begin + 1 : end], calls[begin][0], int(done.stdout)


def _kinds(calls: list[str]) -> Counter[str]:
    return Counter(call.partition("(")[0] for call in calls)


def _holds_the_old_file(calls: list[str], folder: Path) -> bool:
    """Over the rename, which would wait for the disk to free it; in memory there is nothing to wait for."""
    rename = next(index for index, call in enumerate(calls) if call.startswith("rename"))
    held = any("O_PATH" in call for call in calls[:rename])
    return held or not os.major(folder.stat().st_dev)


def test_torch_save_takes_few_system_calls(tmp_path: Path) -> None:
    """Of a file that is replaced. Descriptors of this process are looked at one by one."""
    folder = tmp_path / "folder"
    folder.mkdir()
    calls, descriptors = _traced("torch.save(tensors, place)", folder / "m.pt", tmp_path / "log")
    kinds = _kinds(calls)
    assert kinds["rename"] == 1 and kinds["linkat"] == kinds["memfd_create"] == 0
    assert kinds.total() - kinds["futex"] - descriptors <= 44, kinds
    assert _holds_the_old_file(calls, folder)


@pytest.mark.parametrize("files", (1, 3))
def test_large_old_files_are_freed_by_another_thread(tmp_path: Path, files: int) -> None:
    """Each is held when it loses its last name, and the thread that saves closes none of them."""
    folder = tmp_path / "folder"
    folder.mkdir()
    save = f"""
large = {{"a": torch.ones(1 << 20)}}
fastshard.save_files({{f"{{place}}/{{i}}.safetensors": large for i in range({files})}})
"""
    calls, saving, _ = _traced_threads(save.strip().replace("\n", "; "), folder, tmp_path / "log")
    loses = "rename(" if files == 1 else "unlink("
    lost = [index for index, (_, call) in enumerate(calls) if call.startswith(loses) and "fastshard" in call]
    held = [(index, call.rpartition("= ")[2]) for index, (_, call) in enumerate(calls) if "O_PATH" in call]
    assert len(lost) == files
    if not os.major(folder.stat().st_dev):
        assert not held  # memory is not held back
        return
    assert len(held) == files and all(opened < gone for (opened, _), gone in zip(held, lost))
    closes = {f"close({fd})" for _, fd in held}
    closing = {thread for thread, call in calls[held[0][0] :] if call.partition(" ")[0] in closes}
    assert not closing & {saving, *(calls[index][0] for index in lost)}


def _save_checkpoint(folder: Path, config: str, weights: str) -> None:
    with directory.replacing(str(folder)) as stage:
        Path(stage, "config.json").write_text(config)
        Path(stage, "generation_config.json").write_text("{}")
        Path(stage, "model.safetensors").write_text(weights)


def test_one_small_file_takes_few_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("fastshard.api.hub")
    tensors = {"a": torch.ones(4)}
    hub.save_torch_state_dict(tensors, tmp_path)
    with _counted(monkeypatch) as counts:
        hub.save_torch_state_dict(tensors, tmp_path)
    # One look for what is there, and one in each folder above for what killed saves have left.
    assert counts.pop("lstat") <= 1 + len(tmp_path.parents)
    assert counts == {"listdir": 1}


def test_hubs_save_takes_few_system_calls(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    folder = tmp_path / "folder"
    folder.mkdir()
    calls, _ = _traced("huggingface_hub.save_torch_state_dict(tensors, place)", folder, tmp_path / "log")
    kinds = _kinds(calls)
    # A folder more costs a look for what killed saves have left there.
    assert kinds.total() - kinds["futex"] - len(folder.parents) <= 36, kinds
    assert kinds["rename"] + kinds["renameat"] + kinds["renameat2"] == 1
    assert _holds_the_old_file(calls, folder)


def test_a_checkpoint_whose_configuration_stays_takes_few_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save_checkpoint(tmp_path, "{}", "old")
    before = (tmp_path / "config.json").stat()
    os.utime(tmp_path / "config.json", (1, 1))
    with _counted(monkeypatch) as counts:
        _save_checkpoint(tmp_path, "{}", "new")
    assert (tmp_path / "model.safetensors").read_text() == "new"
    after = (tmp_path / "config.json").stat()
    assert after.st_ino == before.st_ino and after.st_mtime >= before.st_mtime
    assert len(list(tmp_path.iterdir())) == 3
    assert counts.keys().isdisjoint({"symlink", "link", "close_later"})
    assert counts["rename"] == 2  # its turn, and the file
    assert counts.total() - counts["lstat"] <= 60, counts


@pytest.mark.parametrize("linked", (False, True))
def test_what_differs_is_replaced(tmp_path: Path, linked: bool) -> None:
    (tmp_path / "folder").mkdir()
    _save_checkpoint(tmp_path / "folder", "{}", "old")
    if linked:  # then it may be changed from elsewhere
        os.link(tmp_path / "folder" / "config.json", tmp_path / "other")
    before = (tmp_path / "folder" / "config.json").stat().st_ino
    _save_checkpoint(tmp_path / "folder", "{}" if linked else "[]", "new")
    after = tmp_path / "folder" / "config.json"
    assert after.stat().st_ino != before and after.read_text() == ("{}" if linked else "[]")
    assert (tmp_path / "folder" / "model.safetensors").read_text() == "new"
    assert len(list((tmp_path / "folder").iterdir())) == 3


def test_many_small_files_are_let_go_by_the_thread_that_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save_checkpoint(tmp_path, "{}", "old")
    with _counted(monkeypatch) as counts:
        _save_checkpoint(tmp_path, "[]", "new")
    assert counts["symlink"] and not counts["close_later"]
    large = "x" * (2 << 20)
    _save_checkpoint(tmp_path, "[1]", large)
    with _counted(monkeypatch) as counts:
        _save_checkpoint(tmp_path, "[2]", large)
    assert counts["close_later"] == 1
    for going in directory._freeing:
        going.closing.wait()
