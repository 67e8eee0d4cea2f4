# SPDX-License-Identifier: Apache-2.0
"""``PreTrainedModel.save_pretrained``: transformers' own code writes into a hidden directory, so its results
are its own.

:func:`fastshard.install` replaces transformers' functions with these. Each gets the original as its first
argument.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Final

import torch

from ..api.hub import split_apart
from ..base.activity import count_left
from ..engine.borrowed import is_traceable_wrapper_subclass
from ..engine.pipeline import How
from ..engine.sharing import storage_of
from ..engine.unchanged import frozen_storages, is_in
from ..publish.incremental import current_base
from ..publish.manifests import complete, noted
from ..publish.staged import current, staged
from . import patching
from .calls import arguments_of
from .offload import follow_weights, held_elsewhere, held_in_memory, is_offloaded, offloaded_tensor
from .overrides import bound, is_of_a_library, on_the_spot, overridden, wrapped
from .transformers_distributed import under_way

_CALL: Final = "PreTrainedModel.save_pretrained"
_LOGGERS: Final = (
    "transformers.modeling_utils",
    "transformers.configuration_utils",
    "transformers.generation.configuration_utils",
)


def save_pretrained(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Saves configuration, shards and index as one save: the shards in parallel, and the directory all at
    once.

    What is pushed to the hub is written as transformers does it, file by file. So are saves in which a user's own code
    takes part. For distributed checkpoints see :mod:`fastshard.integrations.transformers_distributed`.
    """
    began = time.time_ns()
    arguments = arguments_by_name(original)(model, *args, **kwargs)
    directory = arguments["save_directory"]
    reason = _why_left(original, model, arguments)
    if reason is None and arguments.get("distributed_checkpoint"):
        with on_the_spot(_CALL, "several processes save together"), under_way(arguments):
            result = original(model, *args, **kwargs)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            complete_folder(directory, began, within=False)
        return result
    if reason is not None:
        count_left(_CALL, reason)
        with on_the_spot(_CALL, reason):
            result = original(model, *args, **kwargs)
        if is_main(arguments):
            complete_folder(directory, began, within=False)
        return result
    if os.path.isfile(directory):
        return original(model, *args, **kwargs)
    directory = os.fspath(directory)
    reason = why_on_the_spot(model)
    with contextlib.nullcontext() if reason is None else on_the_spot(_CALL, reason):
        return _save(original, model, directory, arguments, args, kwargs)


def _save(
    original: Callable[..., Any],
    model: Any,
    directory: str,
    arguments: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    from transformers.utils import logging

    how = How(progress=logging.is_progress_bar_enabled(), manifest=patching.manifest(), base=current_base())
    stale = None if is_main(arguments) else nothing
    with staged(directory, stale, how, call=_CALL, create=True, loggers=_LOGGERS) as stage:
        state_dict = arguments.get("state_dict")
        if stage.base is not None:
            stage.base.frozen = frozen_storages(model.parameters())
        stage.at_once = _changes_between_shards(model, state_dict)
        given_apart = _storages(state_dict.values()) if state_dict and not stage.at_once else set()
        stage.lasting = functools.partial(lasting, model, given_apart)
        if "save_directory" in kwargs:
            kwargs["save_directory"] = stage.path
        else:  # always the first
            args = (stage.path, *args[1:])
        result = original(model, *args, **kwargs)
    if hasattr(model, "hf_device_map"):
        follow_weights(model, directory)
    # The original waits for the writing rank before there is anything: once more.
    barrier = getattr(model, "barrier_after_gathered_checkpoint_save", None)
    if barrier is not None:
        barrier(getattr(model.config, "distributed_config", None))
    return result


def is_main(arguments: Mapping[str, Any]) -> bool:
    """Returns whether this is the process that removes what is obsolete. In transformers 4 others write their files and
    remove none; its old spelling of the argument, too."""
    main: bool = arguments.get("is_main_process", True) and arguments.get("kwargs", {}).get(
        "save_config", True
    )
    return main


def complete_folder(
    directory: object, began: int, within: bool = True, only: Collection[str] | None = None
) -> None:
    """Brings what a library has written by itself, from ``began`` on, into the manifest of its folder, if there is to be
    one. Without ``within`` folders in it are not looked into. ``only``: the full paths of the files to bring in."""
    if patching.manifest() and isinstance(directory, (str, os.PathLike)) and os.path.isdir(directory):
        complete(os.fspath(directory), patching.manifest(), since=began, within=within, only=only)


@contextlib.contextmanager
def completing(directory: str, main: bool) -> Iterator[None]:
    """A block in which each process writes its files of a checkpoint. Afterwards they are in the manifest of the folder, if
    there is to be one.

    The ``main`` process brings in all that it finds. It does not wait for the others, which may write later or not at
    all, so each of them brings in what it has written itself.
    """
    began = time.time_ns()
    with noted() as written:
        yield
    complete_folder(directory, began, only=None if main else {*written})


@functools.cache
def arguments_by_name(function: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Returns a function that returns the arguments of a call by name."""
    return arguments_of(inspect.signature(function))


def _why_left(original: Callable[..., Any], model: Any, arguments: Mapping[str, Any]) -> str | None:
    """Returns why a call is left to transformers; ``None`` if it is not."""
    if arguments.get("push_to_hub"):
        return "push_to_hub=True"
    if not arguments.get("safe_serialization", True):
        function = arguments.get("save_function")
        if wrapped(function) and not is_of_a_library(function):
            return "a save_function of the caller's"
    elif wrapped(bound("transformers.modeling_utils", "safe_save_file")):
        return "somebody else's save_file is in place"
    own = next(filter(None, overridden_in_model(model)), None)
    return f"{own} is not transformers' own" if own else None


def why_on_the_spot(model: Any) -> str | None:
    """Returns why a save has to be complete when its call returns; ``None`` if it may be asynchronous."""
    if hasattr(model, "hf_device_map") and is_offloaded(model):
        return "weights are offloaded"  # and may be read from the files that are being replaced
    own = overridden(model, "save_pretrained")
    if own is not None:
        return f"{own} may look at what was saved"
    return several_processes()


def several_processes() -> str | None:
    """Returns that several processes save, if they do."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return "several processes save together"
    return None


def overridden_in_model(model: Any) -> Iterator[str | None]:
    """Returns methods that a user has overridden and that the original calls with its directory, or after it
    has saved a file."""
    yield overridden(model, "num_parameters", "barrier_after_gathered_checkpoint_save")
    for config in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        yield overridden(config, "save_pretrained", "to_json_file")
    if getattr(model, "_hf_peft_config_loaded", False):
        for config in model.peft_config.values():
            yield overridden(config, "save_pretrained")


def _changes_between_shards(model: Any, state_dict: object) -> bool:
    """Returns whether a user's code provides the tensors one shard after the other, so that the same memory
    may serve for several."""
    return (
        type(state_dict) not in (type(None), dict, OrderedDict)
        or overridden(model, "state_dict") is not None
        or (hasattr(model, "hf_device_map") and held_elsewhere(model))
    )


def nothing(name: str) -> bool:
    """Says of every file that it stays."""
    return False


def load_offloaded_parameter(original: Callable[..., Any], model: Any, param_name: str) -> torch.Tensor:
    """While a model is being saved, maps its offloaded weights from their files. Transformers reads them into
    memory."""
    stage = current()
    return original(model, param_name) if stage is None else offloaded_tensor(model, param_name, stage.hidden)


def split_into_shards(
    original: Callable[..., Any], state_dict: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """While a model is being saved after an earlier checkpoint, gives frozen parameters shards of their own."""
    base = None if (stage := current()) is None else stage.base
    if base is None or not base.frozen:
        return original(state_dict, *args, **kwargs)
    pattern = arguments_by_name(original)(state_dict, *args, **kwargs)["filename_pattern"]
    apart = {n for n, t in state_dict.items() if isinstance(t, torch.Tensor) and is_in(base.frozen, t)}
    return split_apart(lambda part: original(part, *args, **kwargs), state_dict, apart, pattern)


def progress_bar(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """While a model is being saved, hides transformers' own bar, which would count shards that are not
    written yet."""
    if current() is None:
        return original(*args, **kwargs)
    from transformers.utils import logging

    return logging.EmptyTqdm(*args[1:], **kwargs)


def lasting(model: Any, besides: Iterable[int] = ()) -> set[int]:
    """Returns the storages that outlive the save: the model's own, and those that hooks of accelerate hold
    for it."""
    held = held_in_memory(model) if hasattr(model, "hf_device_map") else ()
    return {*besides} | _storages(model.parameters(), model.buffers(), held)


def _storages(*groups: Iterable[object]) -> set[int]:
    """Returns the addresses of the memory of these tensors."""
    return {
        found[0]
        for group in groups
        for value in group
        if isinstance(value, torch.Tensor)
        and not is_traceable_wrapper_subclass(value)
        and (found := storage_of(value))
    }
