# SPDX-License-Identifier: Apache-2.0
"""fastshard in SGLang: what its plugin sets up, in every process of an engine.

SGLang's ``ShardedStateLoader`` (0.5.23, ``sglang/srt/model_loader/loader.py``) saves a model's state after
``process_weights_after_loading``. It also calls that step before it loads a state, so what it has saved is
what it expects, as long as the model still has the tensors that a new one has. One that has run may have more: the
first forward of an MLA model gives ``kv_b_proj`` a second name, which SGLang saves in place of the first, and then no
new model can load it. So :func:`loaded` notes the state when ``DefaultModelLoader`` and ``ShardedStateLoader`` have
loaded a model, and :func:`save_model`, which replaces the saving, saves what was noted, or refuses. It also saves
strided weights, on which SGLang 0.5.23 fails.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import torch

from ..api.sharded_save import save_sharded_state
from ..base.settings import flag, parse_size
from .patching import DISABLE_VARIABLE

_LOADER: Final = "sglang.srt.model_loader.loader"
TARGET: Final = f"{_LOADER}.ShardedStateLoader.save_model"
LOADED: Final = (f"{_LOADER}.DefaultModelLoader.load_model", f"{_LOADER}.ShardedStateLoader.load_model")
_SHOWN: Final = 5


class _Form(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype


_models: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, _Form]] = weakref.WeakKeyDictionary()
"""The tensors that each model had when it was loaded."""

logger = logging.getLogger(__name__)


def register() -> None:
    """The entry point (``sglang.srt.plugins``). It does nothing if ``FASTSHARD_DISABLE`` is set to yes.

    It never raises, so an engine starts with fastshard or without it.
    """
    if flag(DISABLE_VARIABLE):
        return
    try:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register(TARGET, save_model, HookType.REPLACE)
        for target in LOADED:
            HookRegistry.register(target, loaded, HookType.AFTER)
    except Exception as error:
        logger.warning("fastshard is not at work in this SGLang: %s: %s", type(error).__name__, error)


def loaded(model: torch.nn.Module, *_: Any, **__: Any) -> None:
    """Notes the state of a model that has just been loaded. It never raises, and changes nothing."""
    try:
        _models[model] = _forms(model.state_dict())
    except Exception as error:
        logger.warning(
            "fastshard: the state of a loaded model was not noted: %s: %s", type(error).__name__, error
        )


def _forms(state: Mapping[str, torch.Tensor]) -> dict[str, _Form]:
    return {name: _Form(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}


def _loadable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the state of a model under the names that a new model has.

    Raises ``ValueError`` if it is not what a new model has.
    """
    state: dict[str, torch.Tensor] = model.state_dict()
    expected = _models.get(model)
    if expected is None:
        logger.warning(
            "fastshard did not see how SGLang loaded this model, so nothing shows that its state can be loaded again"
        )
        return state
    found = _forms(state)
    kept = {name: state[name] for name in expected if name in state}
    memory = {_memory(tensor) for tensor in kept.values()}
    differing = [f"{name} is missing" for name in expected if name not in found]
    differing += [f"{name} has another shape or dtype" for name in kept if found[name] != expected[name]]
    differing += [
        f"{name} is not expected"
        for name, tensor in state.items()
        if name not in expected and tensor.numel() and _memory(tensor) not in memory
    ]
    if differing:
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise ValueError(f"the model has changed since it was loaded: {'; '.join(differing[:_SHOWN])}{more}")
    return kept


def _memory(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def save_model(
    model: torch.nn.Module, path: str, pattern: str | None = None, max_size: int | str | None = None
) -> None:
    """Replaces ``ShardedStateLoader.save_model``: saves this rank's part of a live engine's model.

    Each rank's files appear all at once, and those of an earlier save of the same rank are removed.
    ``max_size`` is in bytes, or a text as ``"5GB"``. (SGLang's own command line passes a text, and then fails
    when it compares it with a number.)

    Raises:
        ValueError: for pipeline parallelism, whose stages would overwrite each other's files, as SGLang's loader has
            no names for them; for a model whose tensors are not those that it had when it was loaded (second names
            of the same tensor are left out); for a pattern or a size that is not possible.
        OSError: a system call has failed.
    """
    from sglang import __version__ as version
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    if parallel.pp_size > 1:
        raise ValueError(
            f"SGLang's loader has no names for the {parallel.pp_size} stages of pipeline parallelism: "
            "they would overwrite each other's files"
        )
    save_sharded_state(
        _loadable(model),
        path,
        tp_rank=parallel.tp_rank,
        tp_size=parallel.tp_size,
        pattern=pattern,
        max_size=None if max_size is None else parse_size(max_size),
        writer=("sglang", version),
        post_processed=True,
    )
