# SPDX-License-Identifier: Apache-2.0
"""Finds the tensors of a state dict, and makes a state dict of the same structure with others in their places."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch

from ..engine.borrowed import is_traceable_wrapper_subclass
from ..engine.plan import FETCHED, HOST, TensorView, WriteItem
from ..engine.tensors import PLAIN, device_number, view_of
from .stock import sharded_tensor_of

_ALIGNMENT: Final = 64
_LEAVES: Final = (str, bytes, int, float, complex, type, torch.dtype, torch.device, types.ModuleType)
_CALLED: Final = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)


class Gathered:
    """The tensors of a state dict, each at its place in one piece of memory.

    Tensors that lie in containers, in objects with attributes, and in other tensors (``DTensor``, ``ShardedTensor``)
    are found. Only what is viewed has a place, packed; tensors that are views of the same elements share it. What the
    engine cannot read (sparse and quantized tensors, for instance) is copied by torch.
    """

    def __init__(self, state_dict: Any) -> None:
        self._state_dict = state_dict
        self._seen: set[int] = set()
        self._plain: list[tuple[torch.Tensor, int]] = []
        """Tensors and their places."""
        self._shared: dict[tuple[Any, ...], int] = {}
        self._copied: list[torch.Tensor] = []
        self._wrapped: list[tuple[Any, Any]] = []
        """Tensors that consist of others, which come before them, and the result of those that stand for one."""
        self.items: list[WriteItem] = []
        """What the engine is to copy, in the order of places."""
        self.sources: list[torch.Tensor] = []
        """The tensors that the items view."""
        self.nbytes = 0
        self._look_at(state_dict)

    @property
    def devices(self) -> set[int]:
        return {item.source.device for item in self.items}

    def _look_at(self, value: Any) -> None:
        ahead = [value]
        while ahead:
            value = ahead.pop()
            if isinstance(value, _LEAVES) or id(value) in self._seen:
                continue
            self._seen.add(id(value))
            if isinstance(value, torch.Tensor):
                self._look_at_tensor(value)
            elif isinstance(value, Mapping):
                ahead += reversed(list(value.values()))
            elif isinstance(value, (list, tuple)):
                ahead += reversed(value)
            elif not isinstance(value, _CALLED) and not hasattr(value, "__deepcopy__"):
                ahead += getattr(value, "__dict__", {}).values()

    def _look_at_tensor(self, tensor: Any) -> None:
        if type(tensor) not in PLAIN:
            if callable(getattr(tensor, "wait", None)):  # a collective under way
                result = tensor.wait()
                self._look_at(result)
                self._wrapped.append((tensor, result))
                return
            if callable(getattr(tensor, "local_shards", None)):
                self._look_into(tensor, [shard.tensor for shard in tensor.local_shards()])
                return
            if is_traceable_wrapper_subclass(tensor):
                self._look_into(tensor, _parts(tensor).values())
                return
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
            self._copied.append(tensor)
            return
        self._place(tensor)

    def _look_into(self, tensor: Any, parts: Iterable[Any]) -> None:
        for part in parts:
            if isinstance(part, torch.Tensor):
                self._look_at(part)
        self._wrapped.append((tensor, None))

    def _place(self, tensor: torch.Tensor) -> None:
        source = tensor
        if tensor.is_neg() or (tensor.is_complex() and tensor.is_conj()):
            source = tensor.resolve_conj().resolve_neg()
        itemsize = source.element_size()
        nbytes = source.numel() * itemsize
        device = HOST if source.is_cpu else device_number(source.device)
        if device == FETCHED and itemsize > 8:
            self._copied.append(tensor)
            return
        if nbytes == 0:
            self._plain.append((tensor, 0))
            return
        if source.is_contiguous() and device != FETCHED:
            view = TensorView(source.data_ptr(), nbytes, device)
        else:
            source, view = view_of(source, device, nbytes)
        if view.data == 0 and device != FETCHED:
            raise RuntimeError(f"{nbytes} bytes of a tensor have no memory (a freed or fake storage)")
        key = (view, tensor.dtype, tensor.shape, id(source) if device == FETCHED else 0)
        offset = self._shared.setdefault(key, self.nbytes)
        self._plain.append((tensor, offset))
        if offset == self.nbytes:
            self.items.append(WriteItem(view, offset))
            self.sources.append(source)
            self.nbytes += -(-nbytes // _ALIGNMENT) * _ALIGNMENT

    def staged(self, make: Callable[[int, torch.Tensor], torch.Tensor]) -> Any:
        """Returns the state dict with other tensors: ``make(place, tensor)`` in place of each, and what is no tensor
        deep-copied."""
        made: dict[int, Any] = {}
        by_place: dict[int, torch.Tensor] = {}
        for tensor, place in self._plain:
            if tensor.numel() == 0:
                new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            elif place in by_place:
                new = by_place[place].detach()
            else:
                new = by_place[place] = make(place, tensor)
            made[id(tensor)] = new if type(tensor) in PLAIN else _of_class(new, tensor)
        for tensor in self._copied:
            made[id(tensor)] = _copy_of(tensor)
        for tensor, result in self._wrapped:
            made[id(tensor)] = made[id(result)] if result is not None else _around(tensor, made)
        with torch.no_grad():
            for tensor in [*(tensor for tensor, _ in self._plain), *self._copied]:
                if tensor.__dict__:
                    made[id(tensor)].__dict__.update(copy.deepcopy(tensor.__dict__, made))
            return copy.deepcopy(self._state_dict, made)


def _of_class(new: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return new if isinstance(like, torch.nn.Parameter) else new.as_subclass(type(like))


def _copy_of(tensor: torch.Tensor) -> torch.Tensor:
    detached = tensor.detach()
    return detached if tensor.is_meta else detached.to("cpu", copy=True)


def _parts(tensor: Any) -> dict[str, Any]:
    """Returns what a wrapper consists of, by its names for it: tensors, and the mesh of a ``DTensor``."""
    names, _ = tensor.__tensor_flatten__()
    return {name: getattr(tensor, name) for name in names}


def _around(tensor: Any, made: dict[int, Any]) -> Any:
    """Returns what ``tensor`` is, around those that were made in place of its parts."""
    if callable(getattr(tensor, "local_shards", None)):
        return sharded_tensor_of(tensor, [made[id(shard.tensor)] for shard in tensor.local_shards()])
    _, context = tensor.__tensor_flatten__()
    parts = {name: made.get(id(part), part) for name, part in _parts(tensor).items()}
    whole = type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())
    return whole.requires_grad_(False)
