# SPDX-License-Identifier: Apache-2.0
"""How far the values of two stretches of elements are apart."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Apart(NamedTuple):
    """How far elements are apart."""

    differing: int = 0
    """How many are not equal. Two NaNs are equal, and so are zeros of both signs."""
    nans: int = 0
    """How many of those are NaN on one side only."""
    max_abs: float = 0.0
    """The largest absolute difference of all others."""
    at: int = -1
    """The number of the element where it was found."""

    def plus(self, other: Apart) -> Apart:
        """Returns what is true of both stretches together."""
        largest = max(self, other, key=lambda apart: (apart.max_abs, -apart.at))
        return Apart(self.differing + other.differing, self.nans + other.nans, largest.max_abs, largest.at)


def known(code: str) -> bool:
    """Returns whether torch knows the values of elements of this dtype."""
    from ..engine.mapped import DTYPES

    return code in DTYPES


def apart(one: memoryview, code: str, other: memoryview, other_code: str, first: int) -> Apart:
    """Compares two stretches of as many elements. ``first`` is the number of their first element."""
    import torch

    a, b = _values(one, code), _values(other, other_code)
    same = (a == b) | (a.isnan() & b.isnan())
    distance = (a - b).abs()
    if code == other_code and code in ("I64", "U64"):  # a double has 53 bits
        exact = _integers(one) - _integers(other)
        same = exact == 0
        distance = torch.where(distance < 2**62, exact.abs().to(torch.float64), distance)
    differing = int((~same).sum())
    if not differing:
        return Apart()
    distance[same] = 0
    nans = distance.isnan()
    distance[nans] = 0
    at = int(torch.argmax(distance))
    return Apart(differing, int(nans.sum()), float(distance[at]), first + at)


def _integers(memory: memoryview) -> torch.Tensor:
    import torch

    return torch.frombuffer(memory, dtype=torch.int64)


def _values(memory: memoryview, code: str) -> torch.Tensor:
    import torch

    from ..engine.mapped import DTYPES

    if code == "F4":
        pairs = torch.frombuffer(memory, dtype=torch.uint8).long()
        return _float4()[torch.stack((pairs & 15, pairs >> 4), dim=1).view(-1)]
    found = torch.frombuffer(memory, dtype=DTYPES[code])
    if found.is_complex():
        return found.to(torch.complex128)
    return (found.float() if code.startswith("F8") else found).to(torch.float64)


@functools.cache
def _float4() -> torch.Tensor:
    import torch

    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    return torch.tensor([*values, *(math.copysign(value, -1) for value in values)], dtype=torch.float64)
