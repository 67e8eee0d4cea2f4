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
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import logging
import os
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from typing import Any, Final, NamedTuple

import torch

from ..api.sharded import save_sharded_state
from ..base.settings import flag, parse_size
from ..formats.naming import stale_parts
from ..publish.directory import replacing
from .patching import DISABLE_VARIABLE

REQUEST: Final = "fastshard_save"
"""Key in ``VllmConfig.additional_config``, which reaches every worker: the fields of :class:`Request`."""

_SAMPLES: Final = 64
"""Elements of a tensor that are looked at, evenly spread: whatever repacks a tensor moves most of them."""
_SHOWN: Final = 5

logger = logging.getLogger(__name__)


class Request(NamedTuple):
    """What ``fastshard vllm-save`` asks of the workers."""

    path: str
    pattern: str | None
    max_size: int | None
    durable: bool


class Outcome(NamedTuple):
    """What has become of it in one of them."""

    rank: str
    files: tuple[str, ...] = ()
    """Names in the directory, if it was saved."""
    error: str | None = None
    untied: bool = False
    """Whether the model's own config says that embeddings are tied which are not."""


@dataclass
class _Loaded:
    """What is known of a model that vLLM has loaded."""

    config: Any
    """``vllm.config.VllmConfig``"""
    expected: dict[str, _Form]
    """What a loader of sharded state finds, to be filled."""
    refusal: str | None = "what vLLM's process_weights_after_loading did to the weights was not seen"
    """Why its state may not be what a loader expects; ``None``: it is."""
    outcome: Outcome | None = None


class _Form(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    meta: bool

    def __str__(self) -> str:
        place = " without memory" if self.meta else ""
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}{place}"


_models: weakref.WeakKeyDictionary[torch.nn.Module, _Loaded] = weakref.WeakKeyDictionary()


def register() -> None:
    """The entry point (``vllm.general_plugins``). Never raises: an engine starts with fastshard or without it. Does
    nothing where ``FASTSHARD_DISABLE`` says so.

    vLLM's loaders are not imported for it: that takes seconds, and not all of an engine's processes load a model.
    """
    if flag(DISABLE_VARIABLE):
        return
    for name, hook in _HOOKS.items():
        if name in sys.modules:
            hook(sys.modules[name])
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def _never_raising(hook: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(hook)
    def logged(module: Any) -> None:
        with _logged("not at work in this vLLM"):
            hook(module)

    return logged


@_never_raising
def _watch_loading(base_loader: Any) -> None:
    _check_parameters(base_loader.initialize_model, "vllm_config")
    _check_parameters(base_loader.process_weights_after_loading, "model", "model_config")
    if not hasattr(base_loader.initialize_model, "_fastshard"):
        base_loader.initialize_model = _watching_initialize(base_loader.initialize_model)
        base_loader.process_weights_after_loading = _watching_process(
            base_loader.process_weights_after_loading
        )


@_never_raising
def _replace_saver(sharded_state_loader: Any) -> None:
    loader = sharded_state_loader.ShardedStateLoader
    _check_parameters(loader._filter_subtensors, "tensors")
    if loader.save_model is not save_model:
        _check_parameters(loader.save_model, "model", "path", "pattern", "max_size")
        loader.save_model = staticmethod(save_model)


_HOOKS: Final = {
    "vllm.model_executor.model_loader.base_loader": _watch_loading,
    "vllm.model_executor.model_loader.sharded_state_loader": _replace_saver,
}


class _Finder:
    """Finds what the other finders find, and has a hook called when the module's code has run."""

    def __init__(self) -> None:
        self._finding: set[str] = set()

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in _HOOKS or name in self._finding:
            return None
        self._finding.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._finding.discard(name)
        loader: Any = spec.loader if spec is not None else None
        if loader is not None and hasattr(loader, "exec_module"):
            execute = loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                execute(module)
                _HOOKS[name](module)

            loader.exec_module = exec_module
        return spec


_finder: Final[Any] = _Finder()


def _check_parameters(function: Callable[..., object], *names: str) -> None:
    found = tuple(inspect.signature(function).parameters)
    if found[: len(names)] != names:
        raise TypeError(
            f"{function.__module__}.{function.__qualname__} has the parameters {found}, not {names}"
        )


def _watching_initialize(initialize: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    @functools.wraps(initialize)
    def initialize_model(vllm_config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        model = initialize(vllm_config, *args, **kwargs)
        with _logged("the state of a new model was not noted"):
            _models[model] = _Loaded(vllm_config, _forms(_filtered(model)))
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
                loaded.refusal = _why_changed(before, _sampled(_filtered(model)))

    return process_weights_after_loading


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    """An engine does not stop because something could not be noted; saves from it will be refused."""
    try:
        yield
    except Exception as error:
        logger.warning("fastshard: %s: %s: %s", what, type(error).__name__, error)


def _before_processing(
    model: torch.nn.Module, model_config: Any, loaded: _Loaded
) -> dict[str, _Sampled] | None:
    """Looks at a model whose weights are loaded, and saves them if that is what the engine was started for. Returns what
    post-processing is to leave as it is; ``None`` where the state is not to be saved later."""
    request = _request(loaded.config)
    try:
        untied = _settle_ties(model, model_config, loaded)
        state = _filtered(model)
        refusal = _why_unloadable(loaded.expected, _forms(state))
        if refusal is None and untied and request is None:  # who asks will write another config
            refusal = (
                "config.json says that the embeddings are tied, and the weights say they are not, so a loader "
                "would expect others"
            )
        if request is None:
            loaded.refusal = refusal or loaded.refusal
            return _sampled(state) if refusal is None else None
        if refusal is not None:
            raise ValueError(refusal)
        files = _save(model, loaded, request)
        loaded.outcome = Outcome(_rank_name(), files, untied=untied)
    except Exception as error:
        if request is None:
            raise
        # Not raised: vLLM would report no more than that a worker has failed to start.
        loaded.outcome = Outcome(_rank_name(), error=_described(error))
    return None


def _request(config: Any) -> Request | None:
    asked = config.additional_config.get(REQUEST) if isinstance(config.additional_config, dict) else None
    return None if asked is None else Request(**asked)


def _settle_ties(model: torch.nn.Module, model_config: Any, loaded: _Loaded) -> bool:
    """Whether the model's embeddings are not tied although its config says so.

    vLLM builds such a model untied when its files have an ``lm_head``, and ties it in post-processing if that is
    the same as the embeddings after all. A loader of sharded state goes by the config alone.
    """
    if not getattr(model_config, "word_embeddings_untied_by_checkpoint", False):
        return False
    from vllm.model_executor.model_loader.weight_tying import maybe_retie_word_embeddings

    maybe_retie_word_embeddings(model, model_config)
    state = _filtered(model)
    tied = {
        name for name, tensor in model.state_dict().items() if name in loaded.expected and tensor.numel()
    } - state.keys()
    for name in tied:
        del loaded.expected[name]
    return not tied


class _Sampled(NamedTuple):
    form: _Form
    elements: torch.Tensor | None


def _sampled(state: Mapping[str, torch.Tensor]) -> dict[str, _Sampled]:
    return {
        name: _Sampled(form, None if form.meta else _sample(state[name]))
        for name, form in _forms(state).items()
    }


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Some elements' bits, on the tensor's own device."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    tensor = tensor.view(bits)
    if tensor.dim() == 0:
        return tensor.clone()
    count = min(_SAMPLES, tensor.numel())
    steps = torch.arange(count, device=tensor.device, dtype=torch.int64)
    indices = steps * (tensor.numel() - 1) // max(count - 1, 1)
    return tensor[torch.unravel_index(indices, tensor.shape)]


def _filtered(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What vLLM's loader fills, by its own rule."""
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

    filtered: dict[str, torch.Tensor] = ShardedStateLoader._filter_subtensors(model.state_dict())
    return filtered


def _forms(state: Mapping[str, torch.Tensor]) -> dict[str, _Form]:
    return {name: _Form(tuple(t.shape), t.dtype, t.is_meta) for name, t in state.items()}


def _why_unloadable(expected: Mapping[str, _Form], found: Mapping[str, _Form]) -> str | None:
    differences = _differences(expected, found)
    return (
        f"vLLM has changed the weights while it loaded them, so they are not what a loader of sharded state "
        f"expects: {_listed(differences)}"
        if differences
        else None
    )


def _why_changed(before: Mapping[str, _Sampled], after: Mapping[str, _Sampled]) -> str | None:
    differences = _differences(
        {name: sampled.form for name, sampled in before.items()},
        {name: sampled.form for name, sampled in after.items()},
    )
    for name, (form, elements) in before.items():
        if name in after and after[name].form == form and elements is not None:
            other = after[name].elements
            if other is None or not torch.equal(elements, other.to(elements.device)):
                differences.append(f"{name} has other values")
    return (
        f"vLLM has repacked the weights after loading them (process_weights_after_loading), and a loader of "
        f"sharded state expects them as they were before: {_listed(differences)}. "
        "`fastshard vllm-save` saves them at that moment"
        if differences
        else None
    )


def _differences(expected: Mapping[str, _Form], found: Mapping[str, _Form]) -> list[str]:
    differences = []
    for name, form in expected.items():
        if name not in found:
            differences.append(f"{name} is missing")
        elif found[name] != form:
            differences.append(f"{name} is {found[name]} instead of {form}")
        elif form.meta:
            differences.append(f"{name} is {form}")
    return differences + [f"{name} is not expected" for name in found if name not in expected]


def _listed(differences: Sequence[str]) -> str:
    more = len(differences) - _SHOWN
    return "; ".join(differences[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _save(model: torch.nn.Module, loaded: _Loaded, request: Request) -> tuple[str, ...]:
    """This rank's parts and their manifest; returns the names of the files."""
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


def _described(error: BaseException) -> str:
    return str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"


def outcome(worker: Any) -> Outcome | None:
    """What has become of the request in a worker; for ``Executor.collective_rpc``. ``None``: nothing, as the plugin is
    not at work or the weights did not come by vLLM's base loader."""
    loaded = _models.get(_unwrapped(worker.get_model()))
    return loaded.outcome if loaded is not None else None


def save_model(
    model: torch.nn.Module, path: str, pattern: str | None = None, max_size: int | None = None
) -> None:
    """In the place of ``ShardedStateLoader.save_model``: saves this rank's part of a live engine's model.

    All ranks of the engine call it, with the same arguments. The parts of all of them stand in ``path``, an existing
    directory that all of them see, at the same moment, or none does; parts of earlier saves there go.

    Raises:
        ValueError: the state is not what ``load_format="sharded_state"`` expects (the text says which tensors
            and why), or it cannot be shown that it is; the pattern or the size cannot be.
        RuntimeError: another rank has failed.
        OSError: a system call has.
    """
    model = _unwrapped(model)
    loaded = _models.get(model)
    ranks = _Ranks()
    with ranks.agreed():
        if loaded is None:
            raise ValueError(
                "fastshard did not see how vLLM loaded this model, so nothing shows that its state could be "
                "loaded again"
            )
        refusal = loaded.refusal or _why_changed_since(loaded.expected, _forms(_filtered(model)))
        if refusal is not None:
            raise ValueError(refusal)
    assert loaded is not None
    with contextlib.ExitStack() as stack:
        staging = ""
        with ranks.agreed():
            if ranks.first:
                staging = stack.enter_context(replacing(os.fspath(path), stale_parts(pattern)))
        staging = ranks.broadcast(staging)
        with ranks.agreed():
            _save(model, loaded, Request(staging, pattern, max_size, durable=False))
        with ranks.agreed():
            stack.close()


def _unwrapped(model: Any) -> torch.nn.Module:
    """What lies in vLLM's CUDA graph and micro-batching wrappers."""
    inner: torch.nn.Module = model.unwrap() if hasattr(model, "unwrap") else model
    return inner


def _why_changed_since(expected: Mapping[str, _Form], found: Mapping[str, _Form]) -> str | None:
    differences = _differences(expected, found)
    return f"the model has changed since it was loaded: {_listed(differences)}" if differences else None


class WorkerExtension:
    """For ``LLM(..., worker_extension_cls="fastshard.vllm.WorkerExtension")``; then
    ``llm.collective_rpc("fastshard_save", args=(path,))``."""

    def fastshard_save(
        self, path: str, pattern: str | None = None, max_size: int | str | None = None
    ) -> None:
        """:func:`save_model` for this worker's model. ``max_size``: bytes, or as ``"5GB"``."""
        save_model(self.get_model(), path, pattern, None if max_size is None else parse_size(max_size))  # type: ignore[attr-defined]


class _Ranks:
    """The processes of one engine, agreeing on how a save goes."""

    def __init__(self) -> None:
        from vllm.distributed import get_world_group

        self._world = get_world_group()
        self.first = self._world.rank_in_group == 0

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """A step that all ranks take. If it fails in one of them it has failed in all: nobody waits for the others."""
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        texts = self._gathered(None if failure is None else _described(failure))
        if failure is not None:
            raise failure
        failed = [rank for rank, text in enumerate(texts) if text is not None]
        if failed:
            raise RuntimeError(f"rank {failed[0]} could not save its part: {texts[failed[0]]}")

    def broadcast(self, value: str) -> str:
        """The first rank's."""
        return self._gathered(value)[0] or ""

    def _gathered(self, value: str | None) -> list[str | None]:
        values: list[str | None] = [value] * self._world.world_size
        if len(values) > 1:
            torch.distributed.all_gather_object(values, value, group=self._world.cpu_group)
        return values
