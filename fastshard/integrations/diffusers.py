# SPDX-License-Identifier: Apache-2.0
"""``ModelMixin.save_pretrained`` and ``DiffusionPipeline.save_pretrained``: diffusers' own code writes into a hidden
directory, so its results are its own.

:func:`fastshard.install` replaces diffusers' functions with these. Each gets the original as its first
argument. A pipeline's components are saved by their own libraries into the pipeline's hidden directory, which
appears when all of them are in it.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from ..base.activity import count_left
from ..base.originals import is_ours
from ..engine import background
from ..engine.pipeline import How
from ..formats.naming import are_of_the_same_weights
from ..publish.checkpoint import checkpoint, wait_for_earlier
from ..publish.staged import staged
from . import patching
from .overrides import bound, on_the_spot, overridden, wrapped
from .transformers import (
    arguments_by_name,
    complete_folder,
    is_main,
    lasting,
    nothing,
    overridden_in_model,
    several_processes,
)

_MODEL: Final = "ModelMixin.save_pretrained"
_PIPELINE: Final = "DiffusionPipeline.save_pretrained"
_MODELS: Final = (
    ("diffusers.models.modeling_utils", "ModelMixin"),
    ("transformers.modeling_utils", "PreTrainedModel"),
)
_LOGGERS: Final = ("diffusers.models.modeling_utils", "diffusers.configuration_utils")
_LOGGERS_OF_PIPELINES: Final = (
    *_LOGGERS,
    "diffusers.pipelines.pipeline_utils",
    "transformers.modeling_utils",
    "transformers.configuration_utils",
    "transformers.generation.configuration_utils",
    "transformers.tokenization_utils_base",
    "transformers.processing_utils",
    "transformers.image_processing_base",
    "transformers.feature_extraction_utils",
)
_SAVES: Final = (
    "save_pretrained",
    "_save_pretrained",
    "save_config",
    "to_json_file",
    "save_vocabulary",
)
"""Methods of components that get the folder, or the name of a file in it."""


def save_model(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Saves configuration, shards and index as one save: the shards in parallel, and the directory all at once.

    In the same moment other files of the same weights go: what diffusers removes, and the index that it leaves.
    Those of other variants stay, other than there. What is pushed to the hub is written as diffusers does it, file
    by file, and so are saves in which a user's own code takes part.
    """
    began = time.time_ns()
    arguments = arguments_by_name(original)(model, *args, **kwargs)
    directory = arguments["save_directory"]
    if os.path.isfile(directory):
        return original(model, *args, **kwargs)
    reason = _why_left(arguments) or _not_its_own(model, "save_config", "to_json_file")
    if reason is not None:
        result = _left(_MODEL, reason, original, model, *args, **kwargs)
        if is_main(arguments):
            complete_folder(directory, began, within=False)
        return result
    if background.current() is not None and (reason := _why_on_the_spot(model)) is not None:
        with on_the_spot(_MODEL, reason):
            return _save_model(original, model, arguments, args, kwargs)
    return _save_model(original, model, arguments, args, kwargs)


def _save_model(
    original: Callable[..., Any],
    model: Any,
    arguments: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    names: set[str] = set()
    stale = functools.partial(are_of_the_same_weights, names, in_any_container=True)
    with staged(
        os.fspath(arguments["save_directory"]),
        stale if is_main(arguments) else nothing,
        How(manifest=patching.manifest()),
        call=_MODEL,
        create=True,
        loggers=_LOGGERS,
    ) as stage:
        stage.at_once = overridden(model, "state_dict") is not None
        stage.lasting = functools.partial(lasting, model)
        result = _into(stage.path, original, model, args, kwargs)
        names |= stage.weights()
    return result


def save_pipeline(original: Callable[..., Any], pipeline: Any, *args: Any, **kwargs: Any) -> Any:
    """Saves all components of a pipeline as one save, which appears when all of them are in it.

    In the same moment files of the same weights that earlier saves have left in the components' folders go.
    """
    began = time.time_ns()
    arguments = arguments_by_name(original)(pipeline, *args, **kwargs)
    directory = arguments["save_directory"]
    if os.path.isfile(directory):
        return original(pipeline, *args, **kwargs)
    reason = _why_left(arguments) or next(_reasons(pipeline), None)
    if reason is not None:
        result = _left(_PIPELINE, reason, original, pipeline, *args, **kwargs)
        complete_folder(directory, began)
        return result
    if background.current() is not None and (reason := _why_on_the_spot(pipeline)) is not None:
        with on_the_spot(_PIPELINE, reason):
            return _save_pipeline(original, pipeline, os.fspath(directory), args, kwargs)
    return _save_pipeline(original, pipeline, os.fspath(directory), args, kwargs)


def _save_pipeline(
    original: Callable[..., Any],
    pipeline: Any,
    directory: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    waited = background.current() is None
    if not waited:
        wait_for_earlier()
    with checkpoint(
        directory,
        call=_PIPELINE,
        loggers=_LOGGERS_OF_PIPELINES,
        manifest=patching.manifest(),
        waited=waited,
    ) as made:
        return _into(made.path, original, pipeline, args, kwargs)


def _into(
    path: str, original: Callable[..., Any], saved: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Calls the original with another directory, which is always the first argument or given by name."""
    if "save_directory" in kwargs:
        return original(saved, *args, **{**kwargs, "save_directory": path})
    return original(saved, path, *args[1:], **kwargs)


def _left(call: str, reason: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    count_left(call, reason)
    with on_the_spot(call, reason):
        return original(*args, **kwargs)


def _why_left(arguments: Mapping[str, Any]) -> str | None:
    """Returns why a call with these arguments is left to diffusers; ``None`` if it is not."""
    for name in ("push_to_hub", "use_flashpack"):
        if arguments.get(name):
            return f"{name}=True"
    if wrapped(bound("safetensors.torch", "save_file"), bound("torch", "save")):
        return "somebody else's save_file or torch.save is in place"
    return None


def _not_its_own(saved: Any, *names: str) -> str | None:
    own = overridden(saved, *names)
    return f"{own} is not diffusers' own" if own else None


def _reasons(pipeline: Any) -> Iterator[str]:
    """Yields why a pipeline is left to diffusers."""
    for module, name in _MODELS:
        kind = bound(module, name)
        if isinstance(kind, type) and not is_ours(vars(kind).get("save_pretrained")):
            yield f"{name}.save_pretrained is not replaced"  # and would not tell what is stale
    own = [overridden(pipeline, "save_config", "to_json_file")]
    for component in _components(pipeline):
        own += [overridden(component, *_SAVES), *overridden_in_model(component)]
    yield from (f"{name} is not its library's own" for name in own if name)


def _components(pipeline: Any) -> Iterator[Any]:
    """Yields what a pipeline has of that which its configuration names, and what is behind torch.compile."""
    for name in pipeline.config:
        component = getattr(pipeline, name, None)
        if component is not None:
            inner = getattr(component, "__dict__", {}).get("_modules", {})
            yield inner.get("_orig_mod") or component


def _why_on_the_spot(saved: Any) -> str | None:
    """Returns why a save has to be complete when its call returns; ``None`` if it may be asynchronous."""
    own = overridden(saved, "save_pretrained")
    return f"{own} may look at what was saved" if own else several_processes()
