# SPDX-License-Identifier: Apache-2.0
"""Lays out the tensors of one file: natively where that is possible, and else in Python.

Both ways give the same file. The native one reads plain tensors through the table of C functions that torch
has from 2.10 on, and takes a fraction of a microsecond for each. It decides nothing: whatever is unusual, and
every error, is left to :func:`fastshard.engine.tensors.describe`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Protocol, overload

import torch

from ..base.activity import count_planned
from ..base.loading import load
from ..base.settings import flag
from ..formats.safetensors import MAX_HEADER_NBYTES, METADATA_KEY, HeaderTooLarge, header, metadata_entry
from .borrowed import dlpack_exchange_api
from .plan import CASTS, HOST, TensorView
from .tensors import DTYPES, FLOAT4, PLAIN, Entry, cast_number, check_format, describe

if TYPE_CHECKING:
    from .. import _native

VARIABLE: Final = "FASTSHARD_NATIVE_PLANNING"
"""Set to no, everything is laid out in Python."""


class Layout(Protocol):
    """The tensors of one file, in its order. It keeps them alive."""

    @property
    def entries(self) -> Sequence[Entry]: ...
    @property
    def names(self) -> Sequence[str]: ...
    @property
    def items(self) -> list[TensorView] | _native.Layout:
        """What a plan of the file has as its items. That alone keeps no tensor alive."""

    @property
    def devices(self) -> set[int]: ...
    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of each tensor in the file."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together in the file."""

    def header(self, metadata: Mapping[str, str] | None) -> bytes:
        """Returns the header of the file. Raises for what the format cannot hold."""

    def copied(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
        """Returns the names of those of ``tensors`` of which the layout has a copy instead."""


def lay_out(
    tensors: dict[str, torch.Tensor], *, allow_strided: bool, dtype: torch.dtype | None = None
) -> Layout:
    """Lays out the tensors. Arguments and errors are those of :func:`fastshard.engine.tensors.describe`."""
    layout, reason = _natively(tensors, allow_strided, dtype)
    if layout is None:
        layout = _InPython(describe(tensors, allow_strided=allow_strided, dtype=dtype))
    count_planned(reason)
    return layout


def lay_out_each(tensors: dict[str, torch.Tensor], *, dtype: torch.dtype | None = None) -> Layout:
    """Lays out tensors that may be strided and may share memory: the file has the bytes of each.

    Raises as :func:`fastshard.engine.tensors.describe` does for a tensor by itself.
    """
    layout, reason = _natively(tensors, True, dtype)
    if layout is None:
        each = (describe({name: tensor}, allow_strided=True, dtype=dtype) for name, tensor in tensors.items())
        layout = _InPython(sorted(entry for entries in each for entry in entries))
    count_planned(reason)
    return layout


def _natively(
    tensors: dict[str, torch.Tensor], allow_strided: bool, dtype: torch.dtype | None
) -> tuple[Layout | None, str]:
    """Returns a native layout, or why there is none."""
    planner, reason = _planner(dtype)
    if planner is None:
        return None, reason
    found = planner.lay_out(tensors, allow_strided)
    return (None, found) if isinstance(found, str) else (_Native(*found), "")


def places(tensors: Mapping[str, torch.Tensor]) -> bytes | None:
    """Returns in which order the tensors lie where, and with which dtypes and layouts, as bytes to be compared.

    ``None``: they have to be looked at in Python.
    """
    planner, _ = _planner(None)
    return None if planner is None else planner.places(tensors)


class _InPython:
    """A layout that was made in Python."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.names = [entry.name for entry in entries]
        self.items = [entry.view for entry in entries]
        self.devices = {view.device for view in self.items}

    @property
    def sizes(self) -> list[int]:
        return [view.nbytes for view in self.items]

    @property
    def nbytes(self) -> int:
        return sum(self.sizes)

    def header(self, metadata: Mapping[str, str] | None) -> bytes:
        check_format(self.entries)
        return header([(e.name, e.code, e.shape, e.view.nbytes) for e in self.entries], metadata)

    def copied(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
        return (entry.name for entry in self.entries if entry.tensor is not tensors[entry.name])


class _Native:
    """A layout that was made natively."""

    def __init__(self, items: _native.Layout, tensors: list[torch.Tensor]) -> None:
        self.items = items
        self.entries = _Entries(items, tensors)
        self.devices = items.devices()

    @property
    def names(self) -> list[str]:
        return self.items.names()

    @property
    def sizes(self) -> list[int]:
        return [TensorView(*view).nbytes for view in self.items.views()]

    @property
    def nbytes(self) -> int:
        return self.items.nbytes

    def header(self, metadata: Mapping[str, str] | None) -> bytes:
        entry = "" if metadata is None else metadata_entry(metadata)
        made = self.items.header(entry.encode(), MAX_HEADER_NBYTES)
        if made is None:
            raise HeaderTooLarge(f"readers accept {MAX_HEADER_NBYTES} bytes")
        return made

    def copied(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
        return iter(())  # what has to be copied is unusual


class _Entries(Sequence[Entry]):
    """The entries of a native layout, each made when it is asked for."""

    def __init__(self, layout: _native.Layout, tensors: list[torch.Tensor]) -> None:
        self._layout = layout
        self._tensors = tensors

    def __len__(self) -> int:
        return len(self._tensors)

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> list[Entry]: ...
    def __getitem__(self, index: int | slice) -> Entry | list[Entry]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are only {len(self)} tensors")
        place, rank, name, code, shape, view = self._layout.entry(index % len(self))
        return Entry(rank, name, code, shape, TensorView(*view), self._tensors[place])


_planners: Final[dict[torch.dtype | None, _native.Planner]] = {}
"""By the dtype that tensors are cast to."""
_known: Final[dict[str, tuple[_native.Exchange, dict[torch.dtype, int]]]] = {}
"""The table of torch's functions, and what it calls each dtype, under one key."""
_refused: Final[dict[str, str]] = {}
"""Why the table is not used, under one key."""


def why_not_native() -> str:
    """Returns why nothing is laid out natively in this process; empty if plain tensors are."""
    return _planner(None)[1]


def _planner(dtype: torch.dtype | None) -> tuple[_native.Planner | None, str]:
    """Returns what lays out tensors that are cast to ``dtype``, or why there is none."""
    if not flag(VARIABLE, True):
        return None, f"{VARIABLE} says no"
    planner = _planners.get(dtype)
    if planner is not None:
        return planner, ""
    if not _known:
        reason = _refused.get("") or _ask()
        if reason:
            return None, reason
    exchange, numbers = _known[""]
    kinds = [(number, *kind) for source, number in numbers.items() if (kind := _kind(source, dtype))]
    made: _native.Planner = load("fastshard._native").Planner(exchange, kinds, METADATA_KEY)
    return _planners.setdefault(dtype, made), ""


def _kind(source: torch.dtype, target: torch.dtype | None) -> tuple[int, int, int, str, int, int, int] | None:
    """Returns what becomes of tensors of a dtype, as the fields of ``Kind`` in csrc/plan/layout.h; ``None`` if only
    Python can cast them."""
    rank, code, itemsize = DTYPES[source]
    if target is None or target is source or not source.is_floating_point:
        return itemsize, itemsize, rank, code, 2 if source is FLOAT4 else 1, 0, 0
    if code not in CASTS:
        return None
    rank, to, _ = DTYPES[target]
    return itemsize, target.itemsize, rank, to, 1, CASTS[code], cast_number(target)


def _ask() -> str:
    """Asks torch for its table, and compares what that says of one tensor of each dtype with what torch says
    otherwise. Returns why it is not used; empty if it is."""
    api = dlpack_exchange_api()
    if api is None:
        return _refused.setdefault(
            "", f"torch {torch.__version__} has no table of DLPack functions (2.10 has)"
        )
    native = load("fastshard._native")
    is_neg, is_conj = torch.Tensor.is_neg, torch.Tensor.is_conj
    try:
        exchange = native.Exchange(api, tuple(PLAIN), is_neg, is_conj)
    except ValueError as error:
        return _refused.setdefault("", str(error))
    numbers: dict[torch.dtype, int] = {}
    for dtype in DTYPES:
        try:
            sample = torch.empty((4, 3), dtype=dtype, device="cpu").t()[:, 1:]
        except Exception:  # the dtype is left to Python
            continue
        if type(sample) is not torch.Tensor:
            return "a mode of torch's is active"  # this time
        told = exchange.describe(sample)
        if isinstance(told, str):
            continue
        numbers[dtype], *rest = told
        if rest != [sample.data_ptr(), HOST, tuple(sample.shape), sample.stride()]:
            return _refused.setdefault("", f"torch's table of DLPack functions describes {dtype} wrongly")
        if not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool):
            exchange.ask_for_dtype(numbers[dtype], dtype)  # int1 has the number of int8, for instance
    if len(set(numbers.values())) < len(numbers):
        return _refused.setdefault("", "torch's table of DLPack functions does not tell all dtypes apart")
    conjugate = torch.empty(1, dtype=torch.complex64, device="cpu").conj()
    if not all(isinstance(exchange.describe(lazy), str) for lazy in (conjugate, conjugate.imag)):
        return _refused.setdefault("", "torch does not tell of conjugate and negative bits")
    _known.setdefault("", (exchange, numbers))
    return ""
