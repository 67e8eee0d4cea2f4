# SPDX-License-Identifier: Apache-2.0
"""Files with one archive of ``torch.save`` behind the other, as ``.distcp`` files of ``torch.distributed.checkpoint``.

Archives of tensors of the same dtype, shape and strides differ in the tensors' bytes and in what depends on their
CRC-32. So torch writes one archive of each kind, with a hole, which serves as the template of all others.
"""

from __future__ import annotations

import ctypes
import io
import pickle
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch

from ..api.archive_skeleton import NotByEngine, Pickling, Skeleton, make_skeleton
from ..base.originals import original_of
from ..engine.engine import Amend, Fetch
from ..engine.plan import FETCHED, HOST, TensorView
from ..engine.planning import lay_out_each
from ..engine.tensors import DTYPES, PLAIN, on_current_streams
from ..engine.tensors import fetch as fetch_tensor
from ..formats.torch_archive import Archive, UnknownLayout

_LARGE: Final = 1 << 20
"""Archives of larger tensors are made without memory for the tensor."""
_PROTOCOL: Final = torch.serialization.DEFAULT_PROTOCOL


class _Kind(NamedTuple):
    """What archives of tensors have to have in common to differ in the tensors' bytes only."""

    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int
    nbytes: int
    """Of the storage."""


class _Template(NamedTuple):
    before: bytes
    after: bytes
    archive: Archive
    name: str
    """Of the record with the tensor's bytes."""
    memory: object


class _Placed(NamedTuple):
    """A tensor between the two parts of its template."""

    template: _Template
    base: int
    """Where its archive begins in the file."""
    item: int
    """The number of the tensor's view in the plan."""


class Archives:
    """The contents of one file. Objects are added one after the other."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.items: list[TensorView] = []
        self._tensors: dict[int, torch.Tensor] = {}
        """By the number of the view."""
        self._placed: list[_Placed] = []
        self._kept: list[object] = []

    def add_bytes(self, data: Any) -> tuple[int, int]:
        """Adds bytes as they are. Returns their offset and number."""
        begin = self.nbytes
        self._add(data)
        return begin, self.nbytes - begin

    def add_tensor(self, tensor: torch.Tensor, templates: dict[_Kind, _Template | None]) -> tuple[int, int]:
        """Adds the archive that torch makes of a tensor when that is in host memory and alone in its storage.
        Returns its offset and size in bytes."""
        begin = self.nbytes
        stored = _stored(tensor)
        template = None
        if stored is not None:
            kind, source = stored
            if kind not in templates:
                templates[kind] = _make_template(kind)
            template = templates[kind]
        if template is None:
            return self.add_bytes(_by_torch(tensor))
        self._add(template.before)
        self._placed.append(_Placed(template, begin, len(self.items)))
        self._tensors[len(self.items)] = source
        self.items.append(TensorView(0, kind.nbytes, HOST))  # until `close`
        self.nbytes += kind.nbytes
        self._add(template.after)
        return begin, self.nbytes - begin

    def close(self) -> None:
        """Looks at the tensors: where they lie, and how."""
        layout = lay_out_each({str(item): tensor for item, tensor in self._tensors.items()})
        for entry in layout.entries:
            item = int(entry.name)
            assert entry.view.nbytes == self.items[item].nbytes
            self.items[item] = entry.view
            self._tensors[item] = entry.tensor
        self._kept.append(layout)

    @property
    def has_crcs(self) -> bool:
        return any(placed.template.archive.has_crcs for placed in self._placed)

    def fetched(self) -> list[torch.device]:
        """Returns the devices of tensors whose bytes only Python can bring."""
        return [tensor.device for item, tensor in self._tensors.items() if self.items[item].device == FETCHED]

    def fetch(self, item: int, first_byte: int, nbytes: int, address: int) -> None:
        fetch_tensor(self._tensors[item], first_byte, nbytes, address)

    def device_of(self, item: int) -> torch.device:
        return self._tensors[item].device

    def amendments(self, checksums: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Returns what is to be changed when the CRC-32 of each view is known, as (offset, bytes)."""
        for template, base, item in self._placed:
            if template.archive.has_crcs:
                for offset, data in template.archive.amendments({template.name: checksums[item]}):
                    yield base + offset, data

    def _add(self, data: Any) -> None:
        if not isinstance(data, bytes):
            self._kept.append(data)
            array = (ctypes.c_char * len(data)).from_buffer(data)
            address = ctypes.addressof(array)
            self._kept.append(array)
        else:
            self._kept.append(data)
            address = ctypes.cast(data, ctypes.c_void_p).value or 0  # type: ignore[arg-type]
        self.items.append(TensorView(address, len(data), HOST))
        self.nbytes += len(data)


def fetcher(files: Sequence[Archives]) -> Fetch | None:
    """Returns what brings the bytes that only Python can bring; ``None`` if there are none."""
    devices = [device for file in files for device in file.fetched()]
    if not devices:
        return None
    on_streams = on_current_streams(devices)

    def fetch(file: int, item: int, first_byte: int, nbytes: int, address: int) -> None:
        with on_streams(files[file].device_of(item)):
            files[file].fetch(item, first_byte, nbytes, address)

    return fetch


def amender(files: Sequence[Archives]) -> Amend | None:
    """Returns what is to be done when the CRCs are known; ``None`` if torch is set to write none."""
    if not any(file.has_crcs for file in files):
        return None

    def amend(checksums: Sequence[Sequence[int]]) -> list[tuple[int, int, bytes]]:
        return [
            (number, offset, data)
            for number, file in enumerate(files)
            for offset, data in file.amendments(checksums[number])
        ]

    return amend


def _stored(tensor: torch.Tensor) -> tuple[_Kind, torch.Tensor] | None:
    """Returns what a tensor is saved as, and a tensor whose elements in order are the bytes of its storage then;
    ``None`` if that is left to torch.

    The stock writer saves a tensor as it is if it takes all of its storage, and else a clone of it.
    """
    if (
        type(tensor) not in PLAIN
        or tensor.layout is not torch.strided
        or tensor.is_quantized
        or tensor.is_neg()
        or tensor.is_conj()
        or tensor.device.type == "meta"
    ):
        return None
    nbytes = tensor.nbytes
    if tensor.is_cpu and tensor.untyped_storage().nbytes() == nbytes:
        kind = _Kind(tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()), nbytes)
        if nbytes and not tensor.untyped_storage().data_ptr():
            return None
        return kind, torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    strides = torch.empty_like(tensor, device="meta").stride()
    order = sorted(range(tensor.dim()), key=lambda dimension: -strides[dimension])
    source = tensor.permute(order)
    if source.is_contiguous():
        source = source.view(-1).view(torch.uint8) if nbytes else source.new_empty(0, dtype=torch.uint8)
    elif tensor.dtype not in DTYPES:
        return None
    return _Kind(tensor.dtype, tensor.shape, strides, 0, nbytes), source


def _make_template(kind: _Kind) -> _Template | None:
    """Lets torch write the archive of such a tensor. Returns ``None`` if its layout is not known."""
    count = kind.nbytes // kind.dtype.itemsize
    sample = torch.empty(count, dtype=kind.dtype, device="cpu").as_strided(
        kind.shape, kind.strides, kind.offset
    )
    memory: Any
    if kind.nbytes > _LARGE:
        try:
            made = make_skeleton(Pickling(sample, pickle, _PROTOCOL, True, False), "archive")
        except NotByEngine:
            return None
        assert isinstance(made, Skeleton)
        memory = made.mapping
    else:
        memory = _by_torch(sample)
    try:
        archive = Archive(memory)
    except UnknownLayout:
        return None
    found = [record for record in archive.records if record.name.startswith("data/")]
    if len(found) != 1 or found[0].nbytes != kind.nbytes:
        return None
    end = found[0].begin + kind.nbytes
    return _Template(bytes(memory[: found[0].begin]), bytes(memory[end:]), archive, found[0].name, memory)


def _by_torch(tensor: torch.Tensor) -> memoryview:
    """Returns the archive that torch makes of a tensor, as the stock writer prepares it."""
    tensor = tensor.cpu()
    if tensor.layout is torch.strided and tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone()
    data = io.BytesIO()
    original_of("torch.serialization", "save")(tensor, data)
    return data.getbuffer()
