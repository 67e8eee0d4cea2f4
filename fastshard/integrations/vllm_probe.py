# SPDX-License-Identifier: Apache-2.0
"""Whether the installed vLLM has what fastshard uses, as it uses it. Nothing of vLLM is imported for it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any, Final

TRANSFER: Final = "fastshard_shm"
"""The name of our backend in vLLM's registries of weight transfer."""


def check_parameters(function: Callable[..., object], *names: str) -> None:
    """Raises ``TypeError`` unless a function's first parameters have these names."""
    found = tuple(inspect.signature(function).parameters)
    if found[: len(names)] != names:
        raise TypeError(
            f"{function.__module__}.{function.__qualname__} has the parameters {found}, not {names}"
        )


def register_transfer(factory: Any) -> None:
    """Registers the weight transfer of :mod:`fastshard.integrations.vllm_transfer`, which is imported when it is used."""
    engine, trainer = factory.WeightTransferEngine, factory.TrainerWeightTransferEngine
    check_parameters(engine.__init__, "self", "config", "vllm_config", "device", "model")
    check_parameters(engine.receive_weights, "self", "update_info")
    check_parameters(engine.finish_weight_update, "self")
    check_parameters(trainer.send_weights, "self")
    for registry, name in (
        (factory.WeightTransferEngineFactory, "ShmWeightTransferEngine"),
        (factory.WeightTransferTrainerFactory, "ShmTrainerWeightTransferEngine"),
    ):
        check_parameters(registry.register_engine, "name", "module_path_or_cls", "class_name")
        with contextlib.suppress(ValueError):  # it is registered already
            registry.register_engine(TRANSFER, f"{__package__}.vllm_transfer", name)
