# SPDX-License-Identifier: Apache-2.0
"""``install(asynchronous=True)``: checkpoints of ``Accelerator.save_state`` appear complete or not at all."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import archives
import pytest
import torch
from helpers import names, run_bare

import fastshard
from fastshard.base import activity

pytest.importorskip("accelerate", reason="accelerate is not installed")
from accelerate import Accelerator  # noqa: E402
from accelerate.utils import ProjectConfiguration  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("no_hang", "quiet")]

CALL = "Accelerator.save_state"


@pytest.fixture
def quiet() -> Iterator[None]:
    activity._forget()
    yield
    fastshard.uninstall()
    fastshard.wait_all()


@pytest.fixture
def asynchronous() -> Iterator[None]:
    with fastshard.installed(asynchronous=True):
        yield


class Counter:
    """An object that is registered for checkpoints."""

    count = 3

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def accelerator(folder: Path, **naming: Any) -> Any:
    """One that has trained for a step."""
    torch.manual_seed(0)
    made = Accelerator(cpu=True, project_config=ProjectConfiguration(project_dir=str(folder), **naming))
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.Adam(model.parameters())
    made.prepare(model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    made.register_for_checkpointing(Counter())
    step(made)
    return made


def step(made: Any) -> None:
    made.backward(made._models[0](torch.ones(2, 300)).square().mean())
    made._optimizers[0].step()


def weights(made: Any) -> torch.Tensor:
    found: torch.Tensor = made._models[0].weight.detach().clone()
    return found


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checkpoints(folder: Path) -> list[str]:
    return names(folder / "checkpoints")


def on_the_spot() -> str:
    return " ".join(fastshard.status().on_the_spot.get(CALL, {}))


@pytest.mark.parametrize("safe", [True, False])
def test_the_files_are_accelerates(tmp_path: Path, safe: bool) -> None:
    made = accelerator(tmp_path)
    made.save_state(tmp_path / "plain", safe_serialization=safe)
    with fastshard.installed(asynchronous=True):
        returned = made.save_state(str(tmp_path / "ours"), safe_serialization=safe)
        made.end_training()
        assert returned == tmp_path / "ours"
        assert tree(tmp_path / "ours") == tree(tmp_path / "plain")
    assert names(tmp_path) == ["ours", "plain"] and fastshard.status().saved[CALL].saves == 1


def test_values_are_captured_and_the_folder_appears_as_a_whole(tmp_path: Path, asynchronous: None) -> None:
    made = accelerator(tmp_path)
    with archives.held() as go_on:
        made.save_state(str(tmp_path / "c"))
        saved = weights(made)
        step(made)
        assert not (tmp_path / "c").exists() and not torch.equal(weights(made), saved)
        go_on.set()
        fastshard.wait_all()
    made.load_state(str(tmp_path / "c"))
    assert torch.equal(weights(made), saved) and names(tmp_path) == ["c"]


def test_older_checkpoints_go_when_the_new_one_stands(tmp_path: Path, asynchronous: None) -> None:
    made = accelerator(tmp_path, automatic_checkpoint_naming=True, total_limit=2)
    for _ in range(2):
        made.save_state()
    with archives.held() as go_on:
        made.save_state()
        seen = [name for name in checkpoints(tmp_path) if not name.startswith(".")]
        assert seen == ["checkpoint_0", "checkpoint_1"]
        go_on.set()
        fastshard.wait_all()
    assert checkpoints(tmp_path) == ["checkpoint_1", "checkpoint_2"]
    saved = weights(made)
    step(made)
    made.load_state()  # the newest
    assert torch.equal(weights(made), saved) and made.project_configuration.automatic_checkpoint_naming


def test_loading_waits(tmp_path: Path, asynchronous: None) -> None:
    made = accelerator(tmp_path, automatic_checkpoint_naming=True)
    made.save_state()
    with archives.held() as go_on:
        step(made)
        made.save_state()
        saved = weights(made)
        step(made)
        timer = threading.Timer(0.2, go_on.set)
        timer.start()
        made.load_state()
        timer.join()
    assert torch.equal(weights(made), saved) and checkpoints(tmp_path) == ["checkpoint_0", "checkpoint_1"]


@pytest.mark.parametrize("where", ["save_state", "load_state", "end_training"])
def test_an_error_is_raised_and_older_checkpoints_stay(
    tmp_path: Path, asynchronous: None, where: str
) -> None:
    made = accelerator(tmp_path, automatic_checkpoint_naming=True, total_limit=1)
    made.save_state()
    fastshard.wait_all()
    with archives.failing():
        made.save_state()
    with pytest.raises(OSError, match="the disk is gone"):
        getattr(made, where)()
    assert checkpoints(tmp_path) == ["checkpoint_0"]
    made.save_state()  # under the next number
    made.end_training()
    assert checkpoints(tmp_path) == ["checkpoint_2"]


def test_a_name_that_is_taken(tmp_path: Path, asynchronous: None) -> None:
    made = accelerator(tmp_path, automatic_checkpoint_naming=True)
    made.save_state()
    made.project_configuration.iteration = 0
    with pytest.raises(ValueError, match="already exists"):
        made.save_state()
    assert checkpoints(tmp_path) == ["checkpoint_0"]


def test_a_folder_that_is_there_is_changed_at_once(tmp_path: Path, asynchronous: None) -> None:
    made = accelerator(tmp_path)
    made.save_state(str(tmp_path / "c"))
    fastshard.wait_all()
    before = tree(tmp_path / "c")
    (tmp_path / "c" / "mine").write_bytes(b"stays")
    step(made)
    with archives.held() as go_on:
        made.save_state(str(tmp_path / "c"))
        assert tree(tmp_path / "c") == {**before, "mine": b"stays"}
        go_on.set()
        fastshard.wait_all()
    after = tree(tmp_path / "c")
    assert after.keys() == {*before, "mine"} and after["model.safetensors"] != before["model.safetensors"]


def test_a_hook_of_the_users_finds_files(tmp_path: Path, asynchronous: None) -> None:
    made, seen = accelerator(tmp_path), []
    made.register_save_state_pre_hook(lambda models, weights, folder: seen.append(folder))
    made.save_state(str(tmp_path / "c"))
    assert seen == [str(tmp_path / "c")] and (tmp_path / "c" / "model.safetensors").exists()
    assert "register_save_state_pre_hook" in on_the_spot()


def test_without_the_switch_nothing_changes(tmp_path: Path) -> None:
    with fastshard.installed():
        made = accelerator(tmp_path)
        made.save_state(str(tmp_path / "c"))
        assert "model.safetensors" in names(tmp_path / "c")
    assert CALL not in fastshard.status().saved


KILLED = """
import os, signal, sys
sys.path.insert(0, os.getcwd())
import torch
import fastshard
fastshard.install(asynchronous=True)
from pathlib import Path
import archives, test_async_accelerate as tests
made = tests.accelerator(Path(sys.argv[1]), automatic_checkpoint_naming=True, total_limit=1)
made.save_state()
fastshard.wait_all()
with archives.held():
    tests.step(made)
    made.save_state()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    found = run_bare(KILLED, tmp_path)
    assert found.returncode == -signal.SIGKILL, found.stderr
    left = checkpoints(tmp_path)
    assert [name for name in left if not name.startswith(".")] == ["checkpoint_0"]
    assert any(re.search("[0-9]", name) for name in left if name.startswith("."))  # accelerate would take it
    with fastshard.installed(asynchronous=True):
        made = accelerator(tmp_path, automatic_checkpoint_naming=True)
        saved = weights(made)
        step(made)
        made.load_state()
        assert torch.equal(weights(made), saved) and checkpoints(tmp_path) == ["checkpoint_0"]
        made.end_training()
    assert os.listdir(tmp_path) == ["checkpoints"]
