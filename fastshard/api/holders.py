# SPDX-License-Identifier: Apache-2.0
"""Finds out who else holds the tensors of a dict. If nobody does any more, saving them again repeats old
values.

The tensors of ``module.state_dict()`` share the memory of the module's. After ``parameter.data = ...``,
``load_state_dict(assign=True)`` or ``module.to(...)`` they keep memory that nobody writes to.
"""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from ..engine.borrowed import storage_number, storage_users

_SHOWN: Final = 3  # names in a warning


@dataclass
class _Watched:
    """A tensor of which somebody else held the object or its memory."""

    name: str
    tensor: torch.Tensor
    storage: torch.UntypedStorage
    """It is held, so that no other storage gets its number."""
    number: int
    own: int
    """The number of users of the storage when only tensors of the dict are left."""
    version: int


class Holders:
    """Watches those tensors of a dict of which somebody else held the object or its memory at the beginning.

    Memory that is not torch's own is left out, as others (numpy, another process) may write to it unseen.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._of_module = hasattr(tensors, "_metadata")  # as the dict of Module.state_dict() has
        self._watched: list[_Watched] = []
        if storage_users is None:
            return
        found = {name: tensor for name, tensor in tensors.items() if _has_countable_memory(tensor)}
        storages = [tensor.untyped_storage() for tensor in found.values()]
        numbers = [storage_number(storage) for storage in storages]
        distinct = {id(tensor): number for tensor, number in zip(found.values(), numbers)}
        users = Counter(distinct.values())
        held = held_elsewhere(list(found.values()), own=2)  # by this dict and that one
        for name, storage, number, elsewhere in zip(found, storages, numbers, held):
            own = users[number] + _unused()
            if elsewhere or storage_users(number) > own:
                tensor = found[name]
                self._watched.append(_Watched(name, tensor, storage, number, own, tensor._version))

    def abandoned(self, tensors: Mapping[str, torch.Tensor], reachable: bool) -> list[str]:
        """Returns the names of tensors that cannot have changed since the last call; each is returned once.

        ``reachable``: somebody else holds the dict, and may have written to the tensors through it. Then only
        those of a module's dict count whose version says that nobody has.
        """
        if not self._watched or storage_users is None:
            return []
        alone = [watched for watched in self._watched if storage_users(watched.number) <= watched.own]
        held = held_elsewhere([watched.tensor for watched in alone], own=2)  # by the dict and here
        found, done = [], set()
        for watched, elsewhere in zip(alone, held):
            if tensors.get(watched.name) is not watched.tensor:  # replaced in the dict
                done.add(watched.name)
            elif not elsewhere and (not reachable or self._is_unchanged(watched)):
                done.add(watched.name)
                found.append(watched.name)
        if done:
            self._watched = [watched for watched in self._watched if watched.name not in done]
        if self._of_module:
            for watched in self._watched:
                watched.version = watched.tensor._version
        return found

    def _is_unchanged(self, watched: _Watched) -> bool:
        return self._of_module and watched.tensor._version == watched.version


def held_elsewhere(values: list[Any], own: int) -> list[bool]:
    """Returns for each object whether there are references to it besides the list's and ``own`` others."""
    return [count > _unheld() + 1 + own for count in _references(values)]


def _references(values: list[Any]) -> list[int]:
    """Counts references. They are always counted in this way, as versions of Python count different ones in
    others."""
    return [sys.getrefcount(value) for value in values]


@functools.cache
def _unheld() -> int:
    """Returns the count for a value that nothing holds."""
    return _references([object()])[0] - 1


@functools.cache
def _unused() -> int:
    """Returns the count for a storage that nothing uses."""
    assert storage_users is not None
    tensor = torch.empty(1, device="cpu")
    storage = tensor.untyped_storage()
    return storage_users(storage_number(storage)) - 1


def _has_countable_memory(tensor: object) -> bool:
    if type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter:
        return False
    assert isinstance(tensor, torch.Tensor)
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_inference():
        return False
    storage = tensor.untyped_storage()
    return storage.resizable() and not (tensor.is_cpu and storage.is_shared())


def warn_stale(names: list[str]) -> None:
    """Warns in the log, and with a warning at the line that saves."""
    shown = ", ".join(f"`{name}`" for name in names[:_SHOWN])
    more = f" (and {len(names) - _SHOWN} others)" if len(names) > _SHOWN else ""
    text = (
        f"this prepared save repeats old values: nobody else holds {shown}{more} any more, which somebody did when the"
        " save was prepared. The tensors of a module's state_dict() do not follow it when its parameters are given"
        " other memory (.data =, load_state_dict(assign=True), .to()): prepare the module, fastshard.prepare(module,"
        " path)"
    )
    logging.getLogger("fastshard").warning(text)
    warnings.warn(text, stacklevel=5)
