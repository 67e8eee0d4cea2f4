# SPDX-License-Identifier: Apache-2.0
"""Not vLLM: modules with the names that fastshard's plugin takes hold of, called in the order in which vLLM's base
loader calls them (0.32). What runs on them shows how our side behaves; that vLLM is like this, and that its engine serves what
was saved, is for ``tests/integration/serving.py`` to show."""

from __future__ import annotations

import abc
import argparse
import dataclasses
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastshard.integrations import vllm

NAMES = """
vllm vllm.distributed vllm.distributed.weight_transfer vllm.distributed.weight_transfer.base
vllm.distributed.weight_transfer.factory vllm.engine vllm.engine.arg_utils vllm.model_executor vllm.model_executor.model_loader
vllm.model_executor.model_loader.base_loader vllm.model_executor.model_loader.sharded_state_loader
vllm.model_executor.model_loader.reload vllm.model_executor.model_loader.weight_tying vllm.usage vllm.usage.usage_lib vllm.utils vllm.utils.argparse_utils
vllm.v1 vllm.v1.executor
""".split()


class Model(torch.nn.Module):
    """A linear layer of a rank, and a head that may be tied to the embeddings."""

    def __init__(self, rank: int = 0, tied: bool = True) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(6, 4)
        self.linear = torch.nn.Linear(4, 8)
        self.lm_head = torch.nn.Linear(4, 6, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.requires_grad_(False)
        for number, parameter in enumerate(self.parameters()):
            parameter.copy_(
                torch.arange(parameter.numel()).view(parameter.shape) + 100 * number + 1000 * rank
            )


class Group:
    """As vLLM's ``GroupCoordinator``."""

    def __init__(self, rank: int = 0, size: int = 1, cpu_group: Any = None) -> None:
        self.rank_in_group, self.world_size, self.cpu_group = rank, size, cpu_group


def config(additional: object = None, **parallel: object) -> Any:
    """As ``VllmConfig``."""
    return types.SimpleNamespace(
        additional_config={} if additional is None else additional,
        model_config=types.SimpleNamespace(quantization=None, word_embeddings_untied_by_checkpoint=False),
        parallel_config=types.SimpleNamespace(
            **{"world_size": 1, "data_parallel_size": 1, "enable_expert_parallel": False, **parallel}
        ),
    )


def filtered(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of tensors with the same memory the smallest name; no empty ones. vLLM's rule for these models."""
    smallest: dict[int, str] = {}
    for name in sorted(tensors, reverse=True):
        smallest[tensors[name].data_ptr()] = name
    return {name: t for name, t in tensors.items() if t.numel() and smallest[t.data_ptr()] == name}


def plug_in(monkeypatch: pytest.MonkeyPatch) -> Vllm:
    """Returns stand-ins for vLLM's modules, which can be imported during the test, with the plugin at work."""
    made = Vllm()
    for name, module in made.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    vllm.register()
    return made


class Vllm:
    """The modules, and what they do."""

    def __init__(self, world: Group | None = None) -> None:
        self.modules = {name: types.ModuleType(name) for name in NAMES}
        for name, module in self.modules.items():
            parent, _, attribute = name.rpartition(".")
            module.__path__ = []  # a package
            if parent:
                setattr(self.modules[parent], attribute, module)
        world = world or Group()
        self.load: Callable[[torch.nn.Module], None] = lambda model: None
        """What a loader does with the weights."""
        self.process: Callable[[torch.nn.Module], None] = lambda model: None
        """What post-processing does with them."""
        self.make: Callable[[], torch.nn.Module] = lambda: Model(world.rank_in_group)

        def initialize_model(vllm_config: Any, *, prefix: str = "") -> torch.nn.Module:
            return self.make()

        def process_weights_after_loading(
            model: torch.nn.Module, model_config: Any, target_device: Any
        ) -> None:
            self.process(model)

        class ShardedStateLoader:
            _filter_subtensors = staticmethod(filtered)

            @staticmethod
            def save_model(
                model: Any, path: str, pattern: str | None = None, max_size: int | None = None
            ) -> None:
                raise AssertionError("fastshard saves")

        self["vllm"].__version__ = "0.0"
        distributed = self["vllm.distributed"]
        distributed.get_tp_group = distributed.get_world_group = lambda: world
        distributed.get_pp_group = lambda: Group()
        self.base = self["vllm.model_executor.model_loader.base_loader"]
        self.base.initialize_model = initialize_model
        self.base.process_weights_after_loading = process_weights_after_loading
        self.loader = ShardedStateLoader
        self["vllm.model_executor.model_loader.sharded_state_loader"].ShardedStateLoader = ShardedStateLoader
        self["vllm.model_executor.model_loader.weight_tying"].maybe_retie_word_embeddings = retie
        self.reloads: list[str] = []
        """What an engine of weight transfer has called for the model's layers."""
        reload = self["vllm.model_executor.model_loader.reload"]
        reload.initialize_layerwise_reload = lambda model: self.reloads.append("begin")
        reload.finalize_layerwise_reload = lambda model, model_config: self.reloads.append("end")
        for module in ("base", "factory"):
            self[f"vllm.distributed.weight_transfer.{module}"].__dict__.update(weight_transfer())
        self["vllm.usage.usage_lib"].UsageContext = types.SimpleNamespace(LLM_CLASS="LLM_CLASS")
        self["vllm.v1.executor"].Executor = types.SimpleNamespace(get_class=lambda config: self.executor)
        self["vllm.utils.argparse_utils"].FlexibleArgumentParser = argparse.ArgumentParser
        self["vllm.engine.arg_utils"].EngineArgs = EngineArgs

    def __getitem__(self, name: str) -> Any:
        return self.modules[name]

    def install(self) -> None:
        """For a process that does nothing else."""
        sys.modules.update(self.modules)

    def load_model(self, vllm_config: Any) -> torch.nn.Module:
        """As ``BaseModelLoader.load_model``."""
        model: torch.nn.Module = self.base.initialize_model(vllm_config=vllm_config, prefix="")
        self.load(model)
        self.base.process_weights_after_loading(model, vllm_config.model_config, torch.device("cpu"))
        return model.eval()

    def executor(self, vllm_config: Any) -> Any:
        """As ``UniProcExecutor``."""
        model = self.load_model(vllm_config)
        worker = types.SimpleNamespace(get_model=lambda: model)
        return types.SimpleNamespace(collective_rpc=lambda method: [method(worker)], shutdown=lambda: None)


def retie(model: Any, model_config: Any) -> None:
    if torch.equal(model.lm_head.weight, model.embed.weight):
        model.lm_head.weight = model.embed.weight


def weight_transfer() -> dict[str, Any]:
    """The classes of ``vllm.distributed.weight_transfer``, as far as a backend meets them."""

    class WeightTransferEngine(abc.ABC):
        def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
            self.model, self.model_config = model, vllm_config.model_config

        def parse_init_info(self, init_dict: dict[str, Any]) -> Any:
            return self.init_info_cls(**init_dict)  # type: ignore[attr-defined]

        def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
            return self.update_info_cls(**update_dict)  # type: ignore[attr-defined]

        @abc.abstractmethod
        def init_transfer_engine(self, init_info: Any) -> None: ...

        @abc.abstractmethod
        def start_weight_update(self) -> None: ...

        @abc.abstractmethod
        def receive_weights(self, update_info: Any) -> None: ...

        @abc.abstractmethod
        def finish_weight_update(self) -> None: ...

        @abc.abstractmethod
        def shutdown(self) -> None: ...

    class TrainerWeightTransferEngine(abc.ABC):
        def __init__(self, *, client: Any, source: Any = None, is_sender: bool = True) -> None:
            self.client, self.source, self.is_sender = client, source, is_sender

        @classmethod
        @abc.abstractmethod
        def trainer_init(cls, init_info: Any, *, client: Any, source: Any = None) -> Any: ...

        @abc.abstractmethod
        def send_weights(self) -> None: ...

    @dataclasses.dataclass
    class TrainerInitInfo:
        rank: int = dataclasses.field(kw_only=True)

        @property
        def is_sender(self) -> bool:
            return self.rank == 0

    def registry() -> Any:
        class Factory:
            registered: dict[str, tuple[object, object]] = {}

            @classmethod
            def register_engine(
                cls, name: str, module_path_or_cls: object, class_name: str | None = None
            ) -> None:
                if name in cls.registered:
                    raise ValueError(f"Weight transfer engine '{name}' is already registered.")
                cls.registered[name] = module_path_or_cls, class_name

        return Factory

    return {
        "WeightTransferEngine": WeightTransferEngine,
        "WeightTransferInitInfo": type("WeightTransferInitInfo", (), {}),
        "WeightTransferUpdateInfo": type("WeightTransferUpdateInfo", (), {}),
        "TrainerWeightTransferEngine": TrainerWeightTransferEngine,
        "TrainerInitInfo": TrainerInitInfo,
        "WeightTransferEngineFactory": registry(),
        "WeightTransferTrainerFactory": registry(),
    }


class EngineArgs:
    enable_lora = False
    speculative_config = None
    data_parallel_size = 1
    untied_by_checkpoint = False

    def __init__(self, model: str = "", **more: object) -> None:
        self.model = model
        self.__dict__.update(more)

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.add_argument("--model")
        parser.add_argument("--enable-lora", action="store_true")
        return parser

    @classmethod
    def from_cli_args(cls, given: argparse.Namespace) -> EngineArgs:
        return cls(given.model, enable_lora=given.enable_lora)

    def create_engine_config(self, usage_context: object) -> Any:
        made = config()
        made.model_config.word_embeddings_untied_by_checkpoint = self.untied_by_checkpoint
        return made
