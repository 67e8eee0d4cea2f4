# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a model are stored, and which share the memory of a stored one, by the rule of vLLM and
SGLang."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..engine.borrowed import is_traceable_wrapper_subclass

State = torch.nn.Module | Mapping[str, torch.Tensor]


def state_of(model_or_state_dict: State) -> dict[str, torch.Tensor]:
    """Returns the tensors that are to be saved or filled, in a new dict. Raises ``ValueError`` for anything
    else."""
    if isinstance(model_or_state_dict, torch.nn.Module):
        return dict(model_or_state_dict.state_dict())
    if not isinstance(model_or_state_dict, Mapping):
        raise ValueError(f"Expected a module or a dict of tensors but received {type(model_or_state_dict)}")
    return dict(model_or_state_dict)


def without_subtensors(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors that vLLM saves, in its order. For every other one that is not empty: the one that covers it.

    The order is by storage, and storages are in the order of their first names. A contiguous tensor is left out when a contiguous one has all of its
    memory and more, or the same and a smaller name. Strided ones stay, as in SGLang.
    """
    groups: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"Key `{name}` is invalid, expected torch.Tensor but received {type(tensor)}")
        if tensor.numel():
            key = (tensor.device, tensor.untyped_storage().data_ptr()) if has_memory(tensor) else name
            groups.setdefault(key, []).append(name)
    kept, covered = {}, {}
    for group in groups.values():
        if len(group) > 1:
            reached, holder = 0, ""
            for _, minus_end, name in sorted(
                _span(name, tensors[name]) for name in group if is_flat(tensors[name])
            ):
                if -minus_end > reached:
                    reached, holder = -minus_end, name
                else:
                    covered[name] = holder
        for name in group:
            if name not in covered:
                kept[name] = tensors[name]
    return kept, covered


def has_memory(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor has memory of its own, at an address."""
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return False
    return not is_traceable_wrapper_subclass(tensor)


def is_flat(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor's bytes in a file are those in memory, one after the other."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _span(name: str, tensor: torch.Tensor) -> tuple[int, int, str]:
    """Returns a key that sorts tensors so that one that covers others comes before them."""
    begin = tensor.data_ptr()
    return begin, -(begin + nbytes_of(tensor)), name


def nbytes_of(tensor: torch.Tensor) -> int:
    """Returns the number of bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
