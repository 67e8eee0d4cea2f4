# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of Lightning: its files, its bookkeeping, and what a save in flight has to do with them."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import archives
import pytest
import torch
from archives import large
from helpers import names, run_bare

lightning = pytest.importorskip("lightning", reason="Lightning is not installed")

from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO  # noqa: E402
from lightning.pytorch import LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402

from fastshard.lightning import FastshardCheckpointIO  # noqa: E402

pytestmark = [pytest.mark.usefixtures("no_hang"), pytest.mark.filterwarnings("ignore")]

WIDTH = 200
"""The parameters are large enough to go through the engine."""
BOTH = pytest.mark.parametrize("asynchronous", [False, True])


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH))

    def training_step(self, batch: torch.Tensor, number: int) -> torch.Tensor:
        loss = self.model(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def batches() -> torch.utils.data.DataLoader[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.utils.data.DataLoader(torch.randn(8, WIDTH, generator=generator), batch_size=2)  # type: ignore[arg-type]


def trainer(folder: Path, plugin: object, *callbacks: object, epochs: int = 3, **options: Any) -> Trainer:
    plugins = [plugin] if plugin else []
    return Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        plugins=plugins,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        devices=1,
        **options,
    )


def fitted(folder: Path, plugin: object, **kept: Any) -> ModelCheckpoint:
    """What Lightning knows about its checkpoints after three epochs."""
    checkpoints = ModelCheckpoint(dirpath=folder / "checkpoints", **kept)
    trainer(folder, plugin, checkpoints).fit(Model(), batches())
    return checkpoints


def weights(path: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = torch.load(path, weights_only=False)["state_dict"]
    return loaded


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Archives are completed when this is set."""
    with archives.held() as event:
        yield event


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


# What Lightning finds ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kept",
    [
        {},
        {"save_top_k": 2, "monitor": "loss", "save_last": True},
        {"save_top_k": 2, "monitor": "loss", "save_last": "link"},
        {"save_top_k": -1, "filename": "same", "monitor": "loss"},
        {"save_top_k": 1, "every_n_train_steps": 1, "save_last": True, "save_weights_only": True},
    ],
    ids=["default", "last", "link", "version", "steps"],
)
@BOTH
def test_a_run_leaves_what_lightnings_own_plugin_leaves(
    tmp_path: Path, asynchronous: bool, kept: dict[str, Any]
) -> None:
    theirs = fitted(tmp_path / "theirs", None, **kept)
    ours = fitted(tmp_path / "ours", FastshardCheckpointIO(asynchronous), **kept)
    folder = tmp_path / "ours" / "checkpoints"
    assert names(folder) == names(tmp_path / "theirs" / "checkpoints")
    for name in names(folder):
        assert os.path.islink(folder / name) == os.path.islink(tmp_path / "theirs" / "checkpoints" / name)
        assert same(weights(folder / name), weights(tmp_path / "theirs" / "checkpoints" / name))
    for known in ("best_model_path", "last_model_path", "kth_best_model_path"):
        assert Path(getattr(ours, known)).name == Path(getattr(theirs, known)).name


@BOTH
def test_a_run_goes_on_from_a_checkpoint(tmp_path: Path, asynchronous: bool) -> None:
    found = []
    for plugin in (None, FastshardCheckpointIO(asynchronous)):
        folder = tmp_path / str(len(found))
        half = trainer(folder, plugin, epochs=1)
        half.fit(Model(), batches())
        saved = half.checkpoint_callback.best_model_path  # type: ignore[union-attr]
        model = Model()
        trainer(folder, plugin, epochs=3).fit(model, batches(), ckpt_path=saved)
        found.append(model.state_dict())
    assert same(*found)


@BOTH
def test_a_checkpoint_is_torchs_file(tmp_path: Path, asynchronous: bool) -> None:
    plugin = FastshardCheckpointIO(asynchronous)
    plugin.save_checkpoint(large(), tmp_path / "new" / "m.ckpt")
    plugin.teardown()
    torch.save(large(), tmp_path / "m.ckpt")
    assert (tmp_path / "new" / "m.ckpt").read_bytes() == (tmp_path / "m.ckpt").read_bytes()
    assert names(tmp_path / "new") == ["m.ckpt"]


@BOTH
def test_fabric(tmp_path: Path, asynchronous: bool) -> None:
    fabric = lightning.Fabric(
        accelerator="cpu", devices=1, plugins=[FastshardCheckpointIO(asynchronous, durable=True)]
    )
    fabric.launch()
    model = fabric.setup(torch.nn.Linear(WIDTH, 2 * WIDTH))
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    fabric.save(tmp_path / "m.ckpt", {"model": model})
    with torch.no_grad():
        model.weight.zero_()
    fabric.load(tmp_path / "m.ckpt", {"model": model})
    assert same(dict(model.state_dict()), saved)


@BOTH
def test_other_filesystems_are_lightnings(tmp_path: Path, asynchronous: bool) -> None:
    plugin = FastshardCheckpointIO(asynchronous)
    path = f"memory://{tmp_path.name}-{asynchronous}/m.ckpt"
    plugin.save_checkpoint(large(), path)
    assert same(plugin.load_checkpoint(path)["state_dict"], large()["state_dict"])
    plugin.remove_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        plugin.load_checkpoint(path)


@BOTH
def test_a_path_may_be_a_url_of_this_machine(tmp_path: Path, asynchronous: bool) -> None:
    plugin = FastshardCheckpointIO(asynchronous)
    plugin.save_checkpoint(large(), f"file://{tmp_path}/m.ckpt")
    assert same(plugin.load_checkpoint(f"file://{tmp_path}/m.ckpt")["state_dict"], large()["state_dict"])
    assert names(tmp_path) == ["m.ckpt"]


@BOTH
def test_a_link_is_replaced(tmp_path: Path, asynchronous: bool) -> None:
    """``last.ckpt`` of a run with ``save_last="link"`` leads to the best checkpoint, which must not be written over."""
    plugin = FastshardCheckpointIO(asynchronous)
    plugin.save_checkpoint(large(1), tmp_path / "best.ckpt")
    os.symlink("best.ckpt", tmp_path / "last.ckpt")
    plugin.save_checkpoint(large(2), tmp_path / "last.ckpt")
    plugin.teardown()
    assert names(tmp_path) == ["best.ckpt", "last.ckpt"] and not (tmp_path / "last.ckpt").is_symlink()
    assert same(weights(tmp_path / "best.ckpt"), large(1)["state_dict"])
    assert same(weights(tmp_path / "last.ckpt"), large(2)["state_dict"])


def test_storage_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError) as theirs:
        TorchCheckpointIO().save_checkpoint(large(), tmp_path / "m", storage_options={})
    with pytest.raises(TypeError) as ours:
        FastshardCheckpointIO().save_checkpoint(large(), tmp_path / "m", storage_options={})
    assert str(ours.value) == str(theirs.value).replace("TorchCheckpointIO", "FastshardCheckpointIO")


# Saves in flight -----------------------------------------------------------------------------------------


def test_values_are_captured_when_the_call_returns(tmp_path: Path, gate: threading.Event) -> None:
    plugin, checkpoint = FastshardCheckpointIO(True), large(1)
    plugin.save_checkpoint(checkpoint, tmp_path / "m.ckpt")
    assert plugin.in_flight(tmp_path / "m.ckpt") and names(tmp_path) == []
    checkpoint["state_dict"]["w"].fill_(2)
    gate.set()
    assert same(plugin.load_checkpoint(tmp_path / "m.ckpt")["state_dict"], large(1)["state_dict"])
    assert not plugin.in_flight(tmp_path / "m.ckpt")
    plugin.teardown()


def test_the_checkpoint_before_stays_until_the_new_one_stands(tmp_path: Path, gate: threading.Event) -> None:
    plugin = FastshardCheckpointIO(True)
    (tmp_path / "0.ckpt").write_bytes(b"old")
    plugin.save_checkpoint(large(), tmp_path / "1.ckpt")
    plugin.remove_checkpoint(tmp_path / "0.ckpt")
    plugin.save_checkpoint(large(), tmp_path / "2.ckpt")
    plugin.remove_checkpoint(tmp_path / "1.ckpt")
    time.sleep(0.05)
    assert names(tmp_path) == ["0.ckpt"]
    gate.set()
    until(lambda: names(tmp_path) == ["2.ckpt"])  # without another call
    plugin.teardown()


def test_a_removal_gives_way_to_a_save_of_that_path(tmp_path: Path, gate: threading.Event) -> None:
    plugin = FastshardCheckpointIO(True)
    (tmp_path / "0.ckpt").write_bytes(b"old")
    plugin.save_checkpoint(large(1), tmp_path / "1.ckpt")
    plugin.remove_checkpoint(tmp_path / "0.ckpt")
    plugin.save_checkpoint(large(2), tmp_path / "0.ckpt")
    gate.set()
    plugin.teardown()
    assert same(weights(tmp_path / "0.ckpt"), large(2)["state_dict"])


@pytest.mark.parametrize("where", ["save", "teardown", "load"])
def test_an_error_is_raised_and_the_checkpoint_before_is_kept(
    tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = FastshardCheckpointIO(True)
    plugin.save_checkpoint(large(0), tmp_path / "0.ckpt")
    plugin.teardown()
    with archives.failing():
        plugin.save_checkpoint(large(1), tmp_path / "1.ckpt")
    plugin.remove_checkpoint(tmp_path / "0.ckpt")
    until(lambda: not plugin.in_flight(tmp_path / "1.ckpt"))
    with pytest.raises(OSError, match="the disk is gone"):
        if where == "save":
            plugin.save_checkpoint(large(2), tmp_path / "2.ckpt")
        elif where == "load":
            plugin.load_checkpoint(tmp_path / "1.ckpt")
        else:
            plugin.teardown()
    plugin.teardown()  # once
    assert names(tmp_path) == ["0.ckpt"] and "0.ckpt is kept" in caplog.text
    plugin.save_checkpoint(large(2), tmp_path / "2.ckpt")
    plugin.teardown()
    assert same(weights(tmp_path / "2.ckpt"), large(2)["state_dict"])


def test_a_failed_save_ends_the_run(tmp_path: Path) -> None:
    with archives.failing(), pytest.raises(OSError, match="the disk is gone"):
        fitted(tmp_path, FastshardCheckpointIO(True))


def test_a_copy_has_no_saves(tmp_path: Path, gate: threading.Event) -> None:
    plugin = FastshardCheckpointIO(True, durable=True)
    plugin.save_checkpoint(large(), tmp_path / "m.ckpt")
    copy = pickle.loads(pickle.dumps(plugin))
    assert copy.asynchronous and copy._how == plugin._how and not copy.in_flight(tmp_path / "m.ckpt")
    copy.teardown()
    pid = os.fork()
    if pid == 0:
        plugin.teardown()
        os._exit(0 if not plugin.in_flight(tmp_path / "m.ckpt") else 1)
    assert os.waitpid(pid, 0)[1] == 0
    gate.set()
    plugin.teardown()
    assert same(weights(tmp_path / "m.ckpt"), large()["state_dict"])


# The libraries -------------------------------------------------------------------------------------------


def test_it_is_a_plugin_of_the_lightning_that_is_used() -> None:
    assert issubclass(FastshardCheckpointIO, CheckpointIO)
    pytest.importorskip("pytorch_lightning", reason="Lightning's package of the old name is not installed")
    script = """
    import warnings
    warnings.simplefilter("ignore")
    import pytorch_lightning
    from fastshard.lightning import FastshardCheckpointIO
    trainer = pytorch_lightning.Trainer(plugins=[FastshardCheckpointIO(True)], accelerator="cpu", devices=1, logger=False)
    assert isinstance(trainer.strategy.checkpoint_io, FastshardCheckpointIO)
    assert "lightning" not in __import__("sys").modules
    """
    found = run_bare(script)
    assert found.returncode == 0, found.stderr


def test_without_lightning() -> None:
    script = """
    import sys
    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("lightning", "lightning_fabric", "pytorch_lightning"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Missing())
    from fastshard.lightning import FastshardCheckpointIO
    try:
        FastshardCheckpointIO()
    except ModuleNotFoundError as error:
        print(error)
    """
    found = run_bare(script)
    assert found.stdout == "Lightning is not installed: pip install lightning\n", found.stderr
