# SPDX-License-Identifier: Apache-2.0
"""fastshard in vLLM: what its general plugin sets up, in every process of an engine.

vLLM's ``ShardedStateLoader`` saves a model's state after ``process_weights_after_loading`` and loads it before. What
that step repacks (linear layers on CPUs, quantized and mixture-of-experts models on GPUs) therefore cannot be loaded
back. So :func:`register` watches two functions that vLLM's ``BaseModelLoader.load_model`` calls (vLLM 0.32 and 0.33,
``vllm/model_executor/model_loader/base_loader.py``):

- ``initialize_model``: the state of the new model is what ``load_format="sharded_state"`` fills: its names, shapes
  and dtypes are noted;
- ``process_weights_after_loading``: before it the state is compared with that note and, when ``fastshard
  vllm-save`` has asked for it, saved; after it, with what it was before.

``ShardedStateLoader.save_model`` is replaced by :func:`save_model`, which saves the state of a live engine if these
comparisons have shown that it can be loaded, and refuses otherwise. :class:`WorkerExtension` does the same by name.
vLLM's registries of weight transfer get a backend of ours (:func:`vllm_probe.register_transfer`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch

from ..api.sharded_save import save_sharded_state
from ..base.settings import flag, parse_size
from ..distributed.group import Group, described
from ..formats.naming import stale_parts
from ..publish.directory import replacing
from . import import_hook
from .patching import DISABLE_VARIABLE
from .vllm_probe import check_parameters, register_transfer
from .vllm_states import (
    Form,
    Sampled,
    filter_of,
    filtered,
    forms,
    sampled,
    why_changed,
    why_changed_since,
    why_unloadable,
)

REQUEST: Final = "fastshard_save"
"""The key in ``VllmConfig.additional_config``, which reaches every worker. The value has the fields of
:class:`Request`."""

logger = logging.getLogger(__name__)


class Request(NamedTuple):
    """What ``fastshard vllm-save`` asks of the workers."""

    path: str
    pattern: str | None
    max_size: int | None
    durable: bool
    manifest: bool
    """Whether checksums are noted, for ``fastshard verify``."""


class Outcome(NamedTuple):
    """The result of the request in one worker."""

    rank: str
    files: tuple[str, ...] = ()
    """Names of the files in the directory, if it was saved."""
    error: str | None = None
    untied: bool = False
    """Whether embeddings are not tied although the model's config says that they are."""


@dataclass
class _Loaded:
    """What is known of a model that vLLM has loaded."""

    config: Any
    """``vllm.config.VllmConfig``"""
    expected: dict[str, Form]
    """The tensors that a loader of sharded state would fill."""
    refusal: str | None = "what vLLM's process_weights_after_loading did to the weights was not seen"
    """Why the state may not be what a loader expects; ``None`` if it is."""
    outcome: Outcome | None = None


_models: weakref.WeakKeyDictionary[torch.nn.Module, _Loaded] = weakref.WeakKeyDictionary()


def register() -> None:
    """The entry point (``vllm.general_plugins``). It does nothing if ``FASTSHARD_DISABLE`` is set to yes.

    It never raises, so an engine starts with fastshard or without it. vLLM's loaders are not imported for it:
    that takes seconds, and not all of an engine's processes load a model.
    """
    if flag(DISABLE_VARIABLE):
        return
    for name in _HOOKS:
        _imported(name)
    import_hook.begin(_finder)


def _imported(name: str) -> None:
    """Hooks a module, if it is there."""
    module = sys.modules.get(name)
    if module is not None:
        _HOOKS[name](module)


def _never_raising(hook: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(hook)
    def logged(module: Any) -> None:
        with _logged("not at work in this vLLM"):
            hook(module)

    return logged


@_never_raising
def _watch_loading(base_loader: Any) -> None:
    check_parameters(base_loader.initialize_model, "vllm_config")
    check_parameters(base_loader.process_weights_after_loading, "model", "model_config")
    if not hasattr(base_loader.initialize_model, "_fastshard"):
        base_loader.initialize_model = _watching_initialize(base_loader.initialize_model)
        base_loader.process_weights_after_loading = _watching_process(
            base_loader.process_weights_after_loading
        )


@_never_raising
def _replace_saver(sharded_state_loader: Any) -> None:
    loader = sharded_state_loader.ShardedStateLoader
    check_parameters(filter_of(loader), "tensors")
    if loader.save_model is not save_model:
        check_parameters(loader.save_model, "model", "path", "pattern", "max_size")
        loader.save_model = staticmethod(save_model)


_HOOKS: Final = {
    "vllm.distributed.weight_transfer.factory": _never_raising(register_transfer),
    "vllm.model_executor.model_loader.base_loader": _watch_loading,
    "vllm.model_executor.model_loader.sharded_state_loader": _replace_saver,
}


_finder: Final = import_hook.Hook(_HOOKS.__contains__, _imported)


def _watching_initialize(initialize: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    @functools.wraps(initialize)
    def initialize_model(vllm_config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        model = initialize(vllm_config, *args, **kwargs)
        with _logged("the state of a new model was not noted"):
            _models[model] = _Loaded(vllm_config, forms(filtered(model)))
        return model

    initialize_model.__dict__["_fastshard"] = True
    return initialize_model


def _watching_process(process: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(process)
    def process_weights_after_loading(
        model: torch.nn.Module, model_config: Any, *args: Any, **kwargs: Any
    ) -> None:
        before = None
        loaded = _models.get(model)
        if loaded is not None:
            with _logged("the state of a loaded model was not noted"):
                before = _before_processing(model, model_config, loaded)
        process(model, model_config, *args, **kwargs)
        if loaded is not None and before is not None:
            with _logged("the state of a processed model was not compared"):
                loaded.refusal = why_changed(before, sampled(filtered(model)))

    return process_weights_after_loading


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    """Logs what fails in the block: an engine must not stop for it. Saves from this engine are refused then."""
    try:
        yield
    except Exception as error:
        logger.warning("fastshard: %s: %s: %s", what, type(error).__name__, error)


def _before_processing(
    model: torch.nn.Module, model_config: Any, loaded: _Loaded
) -> dict[str, Sampled] | None:
    """Examines a model whose weights are loaded, and saves them if the engine was started for that.

    Returns what post-processing must not change; ``None`` if the state is not to be saved later.
    """
    request = _request(loaded.config)
    try:
        untied = _settle_ties(model, model_config, loaded)
        state = filtered(model)
        refusal = why_unloadable(loaded.expected, forms(state))
        if refusal is None and untied and request is None:  # who asks will write another config
            refusal = (
                "config.json says that the embeddings are tied, and the weights say they are not, so a loader "
                "would expect others"
            )
        if request is None:
            loaded.refusal = refusal or loaded.refusal
            return sampled(state) if refusal is None else None
        if refusal is not None:
            raise ValueError(refusal)
        files = _save(model, loaded, request)
        loaded.outcome = Outcome(_rank_name(), files, untied=untied)
    except Exception as error:
        if request is None:
            raise
        # Not raised: vLLM would report no more than that a worker has failed to start.
        loaded.outcome = Outcome(_rank_name(), error=described(error))
    return None


def _request(config: Any) -> Request | None:
    asked = config.additional_config.get(REQUEST) if isinstance(config.additional_config, dict) else None
    return None if asked is None else Request(**asked)


def _settle_ties(model: torch.nn.Module, model_config: Any, loaded: _Loaded) -> bool:
    """Returns whether the model's embeddings are not tied although its config says so.

    vLLM builds such a model untied if its files have an ``lm_head``, and ties it in post-processing if that
    equals the embeddings after all. A loader of sharded state goes by the config alone.
    """
    if not getattr(model_config, "word_embeddings_untied_by_checkpoint", False):
        return False
    from vllm.model_executor.model_loader.weight_tying import maybe_retie_word_embeddings

    maybe_retie_word_embeddings(model, model_config)
    state = filtered(model)
    tied = {
        name for name, tensor in model.state_dict().items() if name in loaded.expected and tensor.numel()
    } - state.keys()
    for name in tied:
        del loaded.expected[name]
    return not tied


def _save(model: torch.nn.Module, loaded: _Loaded, request: Request) -> tuple[str, ...]:
    """Saves this rank's parts and their manifest. Returns the names of the files."""
    from vllm import __version__ as version
    from vllm.distributed import get_pp_group, get_tp_group

    config = loaded.config
    parallel = config.parallel_config
    tp, pp = get_tp_group(), get_pp_group()
    ep = None
    if parallel.enable_expert_parallel:
        from vllm.distributed import get_ep_group

        ep = get_ep_group()
    if parallel.world_size != tp.world_size * pp.world_size or parallel.data_parallel_size > 1:
        raise ValueError(
            "the names of sharded state tell ranks of tensor and pipeline parallelism apart, no others: "
            "ranks of data or context parallelism would overwrite each other's files"
        )
    # Not to be made: the command that made it may have been killed, and the next one has cleaned up after it.
    os.stat(request.path)
    manifest = save_sharded_state(
        model,
        request.path,
        tp_rank=tp.rank_in_group,
        tp_size=tp.world_size,
        pp_rank=pp.rank_in_group,
        pp_size=pp.world_size,
        ep_rank=ep.rank_in_group if ep else 0,
        ep_size=ep.world_size if ep else 1,
        pattern=request.pattern,
        max_size=request.max_size,
        writer=("vllm", version),
        quantization=config.model_config.quantization,
        post_processed=False,
        durable=request.durable,
        manifest=request.manifest,
    )
    if manifest.tensors.keys() != loaded.expected.keys():  # of tensors with memory in common others were kept
        differing = ", ".join(sorted(manifest.tensors.keys() ^ loaded.expected.keys()))
        raise ValueError(f"vLLM's loader would not find the tensors that were saved: {differing}")
    return tuple(manifest.files)


def _rank_name() -> str:
    from vllm.distributed import get_pp_group, get_tp_group

    tp, pp = get_tp_group(), get_pp_group()
    stage = f"stage {pp.rank_in_group}, " if pp.world_size > 1 else ""
    return f"{stage}rank {tp.rank_in_group} of {tp.world_size}"


def outcome(worker: Any) -> Outcome | None:
    """Returns the result of the request in a worker; for ``Executor.collective_rpc``.

    Returns ``None`` if there is none, as the plugin is not active or the weights were not loaded by vLLM's
    base loader.
    """
    loaded = _models.get(_unwrapped(worker.get_model()))
    return loaded.outcome if loaded is not None else None


def save_model(
    model: torch.nn.Module, path: str, pattern: str | None = None, max_size: int | None = None
) -> None:
    """Replaces ``ShardedStateLoader.save_model``: saves this rank's part of a live engine's model.

    All ranks of the engine call it, with the same arguments. The parts of all of them appear in ``path``, an
    existing directory that all of them see, at the same moment, or none does. Parts of earlier saves there
    are removed.

    Raises:
        ValueError: the state is not what ``load_format="sharded_state"`` expects (the text says which tensors
            and why), or it cannot be shown that it is; or pattern or size are not possible.
        RuntimeError: another rank has failed.
        OSError: a system call has failed.
    """
    model = _unwrapped(model)
    loaded = _models.get(model)
    world = _world()
    with world.agreed():
        if loaded is None:
            raise ValueError(
                "fastshard did not see how vLLM loaded this model, so nothing shows that its state could be "
                "loaded again"
            )
        refusal = loaded.refusal or why_changed_since(loaded.expected, forms(filtered(model)))
        if refusal is not None:
            raise ValueError(refusal)
    assert loaded is not None
    with contextlib.ExitStack() as stack:
        staging = ""
        with world.agreed():
            if world.first:
                staging = stack.enter_context(replacing(os.fspath(path), stale_parts(pattern)))
        staging = world.broadcast(staging)
        with world.agreed():
            _save(model, loaded, Request(staging, pattern, max_size, durable=False, manifest=False))
        with world.agreed():
            stack.close()


def _unwrapped(model: Any) -> torch.nn.Module:
    """Returns the model within vLLM's CUDA graph and micro-batching wrappers."""
    inner: torch.nn.Module = model.unwrap() if hasattr(model, "unwrap") else model
    return inner


class WorkerExtension:
    """Adds a save to vLLM's workers: ``LLM(..., worker_extension_cls="fastshard.vllm.WorkerExtension")``.

    Then ``llm.collective_rpc("fastshard_save", args=(path,))`` saves the engine's model.
    """

    def fastshard_save(
        self, path: str, pattern: str | None = None, max_size: int | str | None = None
    ) -> None:
        """Calls :func:`save_model` for this worker's model. ``max_size`` is in bytes, or a text as
        ``"5GB"``."""
        save_model(self.get_model(), path, pattern, None if max_size is None else parse_size(max_size))  # type: ignore[attr-defined]


def _world() -> Group:
    """Returns all processes of this engine."""
    from vllm.distributed import get_world_group

    return Group(get_world_group().cpu_group)
