# SPDX-License-Identifier: Apache-2.0
"""vLLM's weight transfer with the backend ``fastshard_shm``, over stand-ins for vLLM's classes.

``tests/integration/serving.py`` and, where vLLM is installed, ``test_examples.py`` have the real engine.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_vllm
import pytest
import torch
from safetensors.torch import load_file

from fastshard.integrations import vllm

FACTORY = "vllm.distributed.weight_transfer.factory"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> fake_vllm.Vllm:
    return fake_vllm.plug_in(monkeypatch)


@pytest.fixture
def transfer(fake: fake_vllm.Vllm) -> Iterator[ModuleType]:
    """Our module over these stand-ins, from where the registry looks for it."""
    path, _ = fake[FACTORY].WeightTransferEngineFactory.registered["fastshard_shm"]
    yield importlib.import_module(path)
    del sys.modules[path]
    sys.modules.pop("fastshard.vllm_transfer", None)


class Served:
    """As a model of vLLM's: the weights come as from a checkpoint, and it takes its part of them."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.weights = {name: tensor.clone() for name, tensor in weights}


class Client:
    """The workers of a server, as its client sees them."""

    def __init__(self, transfer: ModuleType, workers: int) -> None:
        config = fake_vllm.config()
        self.calls: list[str] = []
        self.workers = [
            transfer.ShmWeightTransferEngine(None, config, torch.device("cpu"), Served())
            for _ in range(workers)
        ]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.calls.append("init")
        for worker in self.workers:
            worker.init_transfer_engine(worker.parse_init_info(init_info))

    def start_weight_update(self) -> None:
        self.calls.append("start")
        for worker in self.workers:
            worker.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.calls.append("update")
        for worker in self.workers:
            worker.update_weights(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append("finish")
        for worker in self.workers:
            worker.finish_weight_update()


class Source:
    """As a ``WeightSource``: every iteration yields the weights as they are then."""

    def __init__(self) -> None:
        self.rounds = 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.rounds += 1
        yield "b", torch.full((5, 3), float(self.rounds))
        yield "a", torch.arange(6.0).view(2, 3).T * self.rounds  # strided
        yield "p", torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16) * self.rounds)


def same(found: dict[str, torch.Tensor], source: Source) -> bool:
    number = source.rounds
    source.rounds -= 1
    wanted = dict(iter(source))
    assert source.rounds == number
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_all_workers_have_the_weights_of_each_round(
    transfer: ModuleType, fake: fake_vllm.Vllm, tmp_path: Path
) -> None:
    from fastshard.vllm_transfer import ShmTrainerInitInfo

    client, source, path = Client(transfer, 2), Source(), tmp_path / "weights.safetensors"
    engine = transfer.ShmTrainerWeightTransferEngine.trainer_init(
        ShmTrainerInitInfo(os.path.relpath(path), rank=0), client=client, source=source
    )
    assert client.calls == ["init"] and client.workers[0].path == str(path)
    for number in range(1, 5):  # each buffer is filled twice
        engine.send_weights()
        assert client.calls[1:] == ["start", "update", "finish"] * number
        assert fake.reloads == ["begin", "begin", "end", "end"] * number
        assert all(same(worker.model.weights, source) for worker in client.workers)
    engine.shutdown()
    engine.shutdown()
    assert same(load_file(path), source) and os.listdir(tmp_path) == [path.name]


def test_other_ranks_of_the_trainer_gather_and_write_nothing(transfer: ModuleType, tmp_path: Path) -> None:
    client, source = Client(transfer, 1), Source()
    given = transfer.ShmTrainerInitInfo(str(tmp_path / "weights.safetensors"), rank=1)
    engine = transfer.ShmTrainerWeightTransferEngine.trainer_init(given, client=client, source=source)
    engine.send_weights()
    engine.shutdown()
    assert source.rounds == 1 and client.calls == [] and os.listdir(tmp_path) == []


def test_a_server_that_sees_another_file_says_so(transfer: ModuleType, tmp_path: Path) -> None:
    client, path = Client(transfer, 1), tmp_path / "weights.safetensors"
    given = transfer.ShmTrainerInitInfo(str(path), rank=0)
    engine = transfer.ShmTrainerWeightTransferEngine.trainer_init(given, client=client, source=Source())
    (worker,) = client.workers
    worker.path = str(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="the trainer has written: here there is none. .* --ipc=host"):
        engine.send_weights()
    (tmp_path / "elsewhere").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="the trainer has written: here it is another file"):
        engine.send_weights()
    assert worker.model.weights == {}
    worker.path = str(path)
    engine.send_weights()
    assert worker.model.weights["b"][0, 0] == 3
    engine.shutdown()


def test_wrong_uses(transfer: ModuleType, tmp_path: Path) -> None:
    (worker,) = Client(transfer, 1).workers
    with pytest.raises(RuntimeError, match="init_weight_transfer_engine has to be called before"):
        worker.update_weights({"inode": 1, "nbytes": 1})
    given = transfer.ShmTrainerInitInfo(str(tmp_path / "weights"), rank=0)
    with pytest.raises(ValueError, match="needs a WeightSource"):
        transfer.ShmTrainerWeightTransferEngine.trainer_init(given, client=None)


def test_it_is_registered_once(fake: fake_vllm.Vllm) -> None:
    vllm.register()
    for kind, name in (("Engine", ""), ("Trainer", "Trainer")):
        found = getattr(fake[FACTORY], f"WeightTransfer{kind}Factory").registered
        module = "fastshard.integrations.vllm_transfer"
        assert found == {"fastshard_shm": (module, f"Shm{name}WeightTransferEngine")}


def test_another_vllm_gets_no_backend(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = fake_vllm.Vllm()
    made[FACTORY].WeightTransferEngine.__init__ = lambda self, config, parallel_config: None
    monkeypatch.setitem(sys.modules, FACTORY, made[FACTORY])
    vllm.register()
    assert "has the parameters ('self', 'config', 'parallel_config'), not ('self', 'config'" in caplog.text
    assert made[FACTORY].WeightTransferEngineFactory.registered == {}
