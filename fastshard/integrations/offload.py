# SPDX-License-Identifier: Apache-2.0
"""Weights that accelerate has offloaded to memory or to files, found without loading them.

Such a parameter is on the meta device. A hook of its module, or of one around it, has a ``weights_map`` to
load it from. What lies in files is returned as a tensor over the file (:mod:`fastshard.engine.mapped`), so a
state dict of any size takes no memory. Formats and rules are those of accelerate.utils.offload,
accelerate.hooks and transformers.integrations.accelerate.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ..api.saving import save_file
from ..engine.mapped import MappedFile, lies_in_file, same_bytes
from ..formats.naming import WEIGHTS_SUFFIX


def offloaded_tensor(model: torch.nn.Module, name: str, scratch: str | None = None) -> torch.Tensor:
    """Returns the parameter or buffer of that name, which a hook of accelerate holds.

    Returns the tensor itself if it is held in memory, a CPU tensor mapped over its file if it was offloaded
    to disk, and otherwise whatever the mapping returns. If the index asks for another dtype than the file
    has, the tensor is copied: in memory, or in a file without a name in the directory ``scratch``. The
    innermost module that has a hook with a ``weights_map`` decides, also where hooks were chained. It
    replaces ``transformers.integrations.accelerate.load_offloaded_parameter``.

    Raises ``ValueError`` if no hook holds it, ``KeyError`` if the hook does not know it, and what
    :class:`fastshard.engine.mapped.MappedFile` raises, naming the file.
    """
    weights_map, key = _weights_map_of(model, name)
    return _resolve(weights_map, key, scratch)


def offloaded_state_dict(model: torch.nn.Module, scratch: str | None = None) -> dict[str, Any]:
    """Returns ``model.state_dict()`` with everything that is offloaded in its place.

    Names and their order are those of ``model.state_dict()``, and tied parameters are one tensor under
    several names. So a save of it has what a save of the model would have if it were not offloaded. Values
    have the dtypes of the model's parameters. What is not offloaded stays where it is. ``scratch`` is that of
    :func:`offloaded_tensor`. It replaces ``accelerate.utils.modeling.get_state_dict_offloaded_model``, which
    leaves out what belongs to the root module and loses ties.

    Two weights in files that are said to be tied (by hooks of ``dispatch_model``, by transformers) are taken
    for one only if their bytes agree. ``disk_offload`` of a plain module leaves no trace of its ties: both
    are saved.

    Raises ``RuntimeError``, naming them, if there are tensors on the meta device that nobody holds, as a
    model that lacks them must not look saved. Raises ``ValueError`` for a weight whose shape is not that of
    its parameter.
    """
    values: dict[str, Any] = {}
    lost: list[str] = []
    state = _state_dict(model)
    aliases = _same_objects(model)
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "meta":
            values[name] = tensor
            continue
        found = _first_held(model, [name, *aliases.get(name, ())], scratch)
        if found is None:
            lost.append(name)
        elif found.shape != tensor.shape:
            raise ValueError(
                f"`{name}` has shape {tuple(tensor.shape)}, but what was offloaded has {tuple(found.shape)}"
            )
        else:
            values[name] = _cast(found, tensor.dtype, scratch)
    if lost:
        raise RuntimeError(
            f"You can't save the model since some parameters are on the meta device: {', '.join(lost)}"
        )
    for names in itertools.chain(aliases.values(), _said_to_be_tied(model)):
        _tie(values, names)
    return values


def held_in_memory(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yields the offloaded weights that hooks of accelerate hold as tensors."""
    for held in _holders(model):
        tensors = getattr(held, "state_dict", held)
        if isinstance(tensors, dict):
            yield from tensors.values()


def held_elsewhere(model: torch.nn.Module) -> bool:
    """Returns whether hooks load weights from a mapping of an unknown kind, which may return the same memory
    again and again."""
    return any(
        type(held) is not dict and not type(held).__module__.startswith("accelerate.")
        for held in _holders(model)
    )


def is_offloaded(model: torch.nn.Module) -> bool:
    """Returns whether hooks of accelerate hold weights for the model."""
    return next(_holders(model), None) is not None


def follow_weights(model: torch.nn.Module, directory: str) -> None:
    """Tells the hooks of accelerate in which file of ``directory`` weights are that were saved over their own
    files.

    Only weights that are no longer in their files are concerned. Without it the model could not be used any
    more.
    """
    places: dict[str, str] = {}
    for held in _holders(model):
        index = getattr(held, "index", None)
        for key, entry in index.items() if isinstance(index, dict) else ():
            path, name = entry.get("safetensors_file"), entry.get("weight_name", key)
            if path is None or os.path.realpath(os.path.dirname(path)) != os.path.realpath(directory):
                continue
            with contextlib.suppress(FileNotFoundError):
                if name in MappedFile(path).names():
                    continue
            if not places:
                files = (os.path.join(directory, file) for file in sorted(os.listdir(directory)))
                weights = [MappedFile(file) for file in files if file.endswith(WEIGHTS_SUFFIX)]
                places = {name: file.path for file in weights for name in file.names()}
            entry["safetensors_file"] = places.get(name, path)


def _holders(model: torch.nn.Module) -> Iterator[Any]:
    """Yields the objects that hooks of accelerate load weights from, each once."""
    seen: set[int] = set()
    for module in model.modules():
        for hook in _hooks(getattr(module, "_hf_hook", None)):
            held = getattr(hook, "weights_map", None)
            held = getattr(held, "dataset", held)
            if held is not None and id(held) not in seen:
                seen.add(id(held))
                yield held


class _NotHeldError(ValueError):
    """No hook has the tensor."""


def _hooks(hook: Any) -> Iterator[Any]:
    """Returns a hook, or those chained in a ``SequentialHook``."""
    for part in getattr(hook, "hooks", None) or (hook,):
        if part is hook:
            yield hook
        else:
            yield from _hooks(part)


def _weights_map_of(model: torch.nn.Module, name: str) -> tuple[Mapping[str, torch.Tensor], str]:
    path = name.split(".")
    for depth in range(len(path) - 1, -1, -1):
        try:
            parent = model.get_submodule(".".join(path[:depth]))
        except AttributeError:  # a name that some module has made up
            continue
        for hook in _hooks(getattr(parent, "_hf_hook", None)):
            weights_map = getattr(hook, "weights_map", None)
            if weights_map is not None:
                return weights_map, ".".join(path[depth:])
    raise _NotHeldError(
        f"{name} is on the meta device because it was offloaded, but we could not find the corresponding hook for it"
    )


def _resolve(weights_map: Any, key: str, scratch: str | None) -> torch.Tensor:
    from accelerate.utils.offload import OffloadedWeightsLoader, PrefixedDataset

    # Subclasses may have rules of their own.
    while type(weights_map) is PrefixedDataset:
        weights_map, key = weights_map.dataset, weights_map.prefix + key
    if type(weights_map) is not OffloadedWeightsLoader:
        held: torch.Tensor = weights_map[key]
        return held
    if key in weights_map.state_dict:
        return _resolve(weights_map.state_dict, key, scratch)
    entry = weights_map.index[key]
    if entry.get("safetensors_file") is not None:
        tensor = MappedFile(entry["safetensors_file"]).tensor(entry.get("weight_name", key))
        return _cast(tensor, _dtype(entry["dtype"], key), scratch) if "dtype" in entry else tensor
    # The bytes as they are, whatever numpy had to take them for; a scalar was saved as one element.
    file = MappedFile(os.path.join(weights_map.save_folder, f"{key}.dat"))
    return file.view(_dtype(entry["dtype"], key), tuple(entry["shape"]))


def _dtype(name: str, key: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"the offload index gives `{key}` a dtype that torch does not have: {name!r}")
    return dtype


def _cast(tensor: torch.Tensor, dtype: torch.dtype, scratch: str | None) -> torch.Tensor:
    """Returns ``tensor.to(dtype)``. If the tensor lies in a file, so does the result, as the engine casts
    without taking memory."""
    if tensor.dtype == dtype or scratch is None or not tensor.is_floating_point() or not lies_in_file(tensor):
        return tensor.to(dtype)
    path = os.path.join(scratch, "cast")
    try:
        save_file({"": tensor}, path, dtype=dtype)
        return MappedFile(path).tensor("")
    except ValueError:  # no dtype that the engine casts to
        return tensor.to(dtype)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _first_held(model: torch.nn.Module, names: Iterable[str], scratch: str | None) -> torch.Tensor | None:
    """Returns what is held under the first of the names that is known; ``None`` if none is."""
    for name in names:
        with contextlib.suppress(_NotHeldError, KeyError):
            return offloaded_tensor(model, name, scratch)
    return None


def _state_dict(model: torch.nn.Module) -> dict[str, Any]:
    """Returns ``model.state_dict()``.

    Modules that make entries of their own from their weights (quantized ones) do so with the weights loaded,
    which takes memory for these. Entries that are missing without weights come last.
    """
    state: dict[str, Any] = dict(model.state_dict())
    for prefix, module in model.named_modules():
        if type(module)._save_to_state_dict is torch.nn.Module._save_to_state_dict:
            continue
        for hook in _hooks(getattr(module, "_hf_hook", None)):
            if getattr(hook, "offload", False):
                with _loaded(module, hook):
                    module._save_to_state_dict(state, f"{prefix}." if prefix else "", False)
    return state


@contextlib.contextmanager
def _loaded(module: torch.nn.Module, hook: Any) -> Iterator[None]:
    """Lets a hook of accelerate load the module's weights for the duration of the block."""
    device, hook.execution_device = hook.execution_device, "cpu"
    try:
        hook.pre_forward(module)
        yield
    finally:
        hook.post_forward(module, None)
        hook.execution_device = device


def _same_objects(model: torch.nn.Module) -> dict[str, list[str]]:
    """Returns all names of each parameter or buffer that has several, by each name."""
    named = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    groups: dict[int, list[str]] = {}
    for name, tensor in named:
        groups.setdefault(id(tensor), []).append(name)
    return {name: names for names in groups.values() if len(names) > 1 for name in names}


def _said_to_be_tied(model: torch.nn.Module) -> Iterator[list[str]]:
    """Yields names that may be tied, according to those who knew the model before it was offloaded."""
    by_source: dict[str, list[str]] = {}
    keys = getattr(model, "all_tied_weights_keys", None)  # transformers: target -> source
    if isinstance(keys, Mapping):
        for target, source in keys.items():
            by_source.setdefault(source, [source]).append(target)
    yield from by_source.values()
    by_map: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for hook in _hooks(getattr(module, "_hf_hook", None)):
            for name in getattr(hook, "tied_params_names", ()):
                by_map.setdefault(id(hook.tied_params_map), []).append(f"{prefix}.{name}" if prefix else name)
    yield from by_map.values()


def _tie(values: dict[str, Any], names: Iterable[str]) -> None:
    """Gives names whose tensors are equal, byte for byte, the same tensor."""
    kept: list[torch.Tensor] = []
    for name in names:
        tensor = values.get(name)
        if not isinstance(tensor, torch.Tensor):
            continue
        for other in kept:
            if _equal(tensor, other):
                values[name] = other
                break
        else:
            kept.append(tensor)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a is b:
        return True
    comparable = a.device.type == "cpu" and a.is_contiguous() and b.is_contiguous()
    return comparable and (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device) and same_bytes(a, b)
