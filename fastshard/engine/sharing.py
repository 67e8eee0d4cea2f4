# SPDX-License-Identifier: Apache-2.0
"""Finds tensors that share memory. Saved as they are, their bytes would be in the file twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch

from .borrowed import find_shared_tensors, is_lazy, remove_duplicate_names


def overlapping(spans: Iterable[tuple[int, int]]) -> bool:
    """Returns whether any two of these ``(begin, end)`` address ranges overlap."""
    reached = 0
    for begin, end in sorted(spans):
        if begin < reached:
            return True
        reached = end
    return False


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Returns the addresses of the first element and of the end of the last one."""
    begin = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return begin, begin + (last + 1) * tensor.element_size()


def storage_of(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Returns address and size in bytes of a tensor's storage.

    Returns ``None`` for tensors that have no ordinary storage: sparse, opaque, not yet initialized, or on a
    device that hides it.
    """
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (RuntimeError, ValueError):  # NotImplementedError is a RuntimeError
        return None


_SEARCH_STEPS = 1000
"""Views that cannot be told apart in so many steps count as overlapping; slices of one tensor take a few
steps."""


def _disjoint(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two views of one storage have no byte in common.

    They have one when the distance of their first bytes is a sum of whole strides, each taken as often as
    the sizes allow: forwards along ``a``, backwards along ``b``, and any way inside an element. Searched
    from the widest stride down, with the reach of the narrower ones as the bound.
    """
    steps = {1: (1 - b.element_size(), a.element_size() - 1)}  # stride in bytes -> least and most often
    for tensor, sign in ((a, 1), (b, -1)):
        for size, stride in zip(tensor.shape, tensor.stride()):
            if size > 1 and stride > 0:
                stride *= tensor.element_size()
                low, high = steps.get(stride, (0, 0))
                steps[stride] = (low, high + size - 1) if sign > 0 else (low - size + 1, high)
    terms = [(stride, *steps[stride]) for stride in sorted(steps, reverse=True)]
    reach = [(0, 0)]  # of the terms from here on, together
    for stride, low, high in reversed(terms):
        reach.insert(0, (reach[0][0] + low * stride, reach[0][1] + high * stride))
    left = _SEARCH_STEPS

    def reached(distance: int, at: int) -> bool:
        nonlocal left
        left -= 1
        if at == len(terms):
            return distance == 0
        if left < 0:
            return True
        stride, low, high = terms[at]
        least, most = reach[at + 1]
        first = max(low, -((most - distance) // stride))
        last = min(high, (distance - least) // stride)
        return any(reached(distance - times * stride, at + 1) for times in range(first, last + 1))

    return not reached(b.data_ptr() - a.data_ptr(), 0)


def _clusters(tensors: Mapping[str, torch.Tensor], names: list[str]) -> Iterator[list[str]]:
    """Groups names whose address ranges touch each other, in the order of addresses."""
    reached = 0
    cluster: list[str] = []
    for begin, end, name in sorted((*_extent(tensors[name]), name) for name in names):
        if cluster and begin >= reached:
            yield cluster
            cluster = []
        cluster.append(name)
        reached = max(reached, end)
    yield cluster


def note_name(error: Exception, name: object) -> None:
    """Adds a note to an error that names the tensor (Python 3.11); its text stays that of torch or
    safetensors."""
    if str(name) not in str(error) and hasattr(error, "add_note"):
        error.add_note(f"while saving tensor `{name}`")


def by_storage(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Groups names by the storage that the tensors are views of.

    Tensors without a storage (empty, meta, sparse, uninitialized) are left out.
    """
    storages: dict[tuple[torch.device, int, int], list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or is_lazy(tensor):
            continue
        try:
            if tensor.device.type != "meta" and tensor.numel() != 0:
                storage = tensor.untyped_storage()
                storages[tensor.device, storage.data_ptr(), storage.nbytes()].append(name)
        except Exception as error:
            note_name(error, name)
            raise
    return list(storages.values())


def shared_names(tensors: Mapping[str, torch.Tensor], storages: Iterable[list[str]]) -> list[set[str]]:
    """Returns sets of two or more names that share memory. Disjoint slices of one storage do not."""
    shared: list[set[str]] = []
    for names in storages:
        for cluster in _clusters(tensors, names):
            groups: list[set[str]] = []
            for name in cluster:
                met = [g for g in groups if any(not _disjoint(tensors[name], tensors[other]) for other in g)]
                groups = [g for g in groups if g not in met] + [{name}.union(*met)]
            shared += [group for group in groups if len(group) > 1]
    return shared


def duplicates(tensors: dict[str, torch.Tensor]) -> dict[str, list[str]]:
    """Returns for each name that ``safetensors.torch.save_model`` keeps of tied tensors the names that it
    leaves out.

    Raises its ``RuntimeError`` if none of the tensors covers the memory that they share. A tensor that shares
    memory with no other is not tied.
    """
    try:
        return remove_duplicate_names(tensors)
    except RuntimeError:
        alone = {name for names in find_shared_tensors(tensors) if len(names) == 1 for name in names}
        return remove_duplicate_names({name: tensor for name, tensor in tensors.items() if name not in alone})
