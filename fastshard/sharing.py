# SPDX-License-Identifier: Apache-2.0
"""Which tensors share memory: saved as they are, their bytes would stand in the file twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch


def overlapping(spans: Iterable[tuple[int, int]]) -> bool:
    """Whether any two of these ``(begin, end)`` address ranges overlap."""
    reached = 0
    for begin, end in sorted(spans):
        if begin < reached:
            return True
        reached = end
    return False


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses from the first to behind the last element."""
    begin = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return begin, begin + (last + 1) * tensor.element_size()


def _disjoint(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two views of one storage have no element in common, as far as that is plain to see.

    Slices of one base tensor (the column halves of a matrix, say) have equal strides; then the distance of
    their first elements is a distance in indices, and boxes of indices are compared. Anything else counts as
    overlapping when the address ranges do.
    """
    (a_begin, a_end), (b_begin, b_end) = _extent(a), _extent(b)
    if a_end <= b_begin or b_end <= a_begin:
        return True
    if a.dtype != b.dtype or a.stride() != b.stride():
        return False
    if a_begin > b_begin:
        a, b, a_begin, b_begin = b, a, b_begin, a_begin
    distance, remainder = divmod(b_begin - a_begin, a.element_size())
    if remainder:
        return False
    dims = sorted(range(a.dim()), key=a.stride().__getitem__, reverse=True)
    for position, dim in enumerate(dims):
        stride = a.stride(dim)
        if stride == 0:
            return False
        # Indices are only unambiguous when a dimension does not reach into the next one of the wider one.
        if position and max(a.size(dim), b.size(dim)) * stride > a.stride(dims[position - 1]):
            return False
        index, distance = divmod(distance, stride)
        if index >= a.size(dim):
            return True
    return False


def _clusters(tensors: Mapping[str, torch.Tensor], names: list[str]) -> Iterator[list[str]]:
    """Names whose address ranges touch each other, by address."""
    reached = 0
    cluster: list[str] = []
    for begin, end, name in sorted((*_extent(tensors[name]), name) for name in names):
        if cluster and begin >= reached:
            yield cluster
            cluster = []
        cluster.append(name)
        reached = max(reached, end)
    yield cluster


def by_storage(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Names grouped by the storage they are views of; empty and meta tensors are left out."""
    storages: dict[tuple[torch.device, int, int], list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.device.type != "meta" and tensor.numel() != 0:
            storage = tensor.untyped_storage()
            storages[tensor.device, storage.data_ptr(), storage.nbytes()].append(name)
    return list(storages.values())


def shared_names(tensors: Mapping[str, torch.Tensor], storages: Iterable[list[str]]) -> list[set[str]]:
    """Sets of two or more names that have memory in common. Disjoint slices of one storage are not shared."""
    shared: list[set[str]] = []
    for names in storages:
        for cluster in _clusters(tensors, names):
            groups: list[set[str]] = []
            for name in cluster:
                met = [g for g in groups if any(not _disjoint(tensors[name], tensors[other]) for other in g)]
                groups = [g for g in groups if g not in met] + [{name}.union(*met)]
            shared += [group for group in groups if len(group) > 1]
    return shared
