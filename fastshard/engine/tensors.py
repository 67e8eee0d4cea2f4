# SPDX-License-Identifier: Apache-2.0
"""Turns torch tensors into views that the engine can copy, with the checks and error texts of
safetensors.torch.

Plain tensors seldom come here, as :mod:`fastshard.engine.planning` describes them natively. Here is the rule for
all others, and every error. :func:`describe` is one short loop that only notices that something is unusual.
:func:`_refuse` then finds out what it is, in the order in which safetensors checks.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from ..formats.safetensors import CAST_NAMES, CODES, DTYPE_ORDER, METADATA_KEY, cast_name
from .borrowed import dtypes, find_shared_tensors, is_traceable_wrapper_subclass
from .plan import CASTS, FETCHED, HOST, TensorView
from .sharing import by_storage, note_name, overlapping, shared_names, storage_of

_MAX_DIMS = 8  # kMaxDims in csrc/plan.h

DTYPES: dict[torch.dtype, tuple[int, str, int]] = {
    dtype: (DTYPE_ORDER[code], code, dtype.itemsize)
    for name, code in CODES.items()
    # What the installed safetensors cannot read, it does not write.
    if (dtype := getattr(torch, name, None)) is not None and (dtypes is None or dtype in dtypes)
}
FLOAT4 = getattr(torch, "float4_e2m1fn_x2", None)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_TARGETS: dict[torch.dtype, str] = {getattr(torch, name): CODES[name] for name in CAST_NAMES}
_PIECE_NBYTES = 1 << 20  # cast at once by torch
PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


class Entry(NamedTuple):
    """A tensor's place in a file. Entries sort into file order."""

    rank: int
    name: str
    code: str
    shape: tuple[int, ...]
    """The shape in the header. It counts logical elements, so for packed float4 the last dimension is
    doubled."""
    view: TensorView
    tensor: torch.Tensor
    """The tensor that ``view`` points into."""


def describe(
    tensors: dict[str, torch.Tensor], *, allow_strided: bool, dtype: torch.dtype | None = None
) -> list[Entry]:
    """Returns the tensors in file order. Raises what ``safetensors.torch.save_file`` raises for them.

    With ``allow_strided`` non-contiguous tensors are described as they lie in memory; views that overlap are
    refused all the same. With ``dtype``, which :func:`check_dtype` must have returned, floating-point tensors
    are described as cast to it. If torch has no such cast, its error is raised with the tensor's name.
    """
    if not isinstance(tensors, dict):
        raise ValueError(f"Expected a dict of [str, torch.Tensor] but received {type(tensors)}")
    entries = []
    spans = []
    sound = True
    try:
        for name, tensor in tensors.items():
            if type(tensor) not in PLAIN and is_traceable_wrapper_subclass(tensor):
                sound = False
                break
            source = tensor.dtype
            rank, code, itemsize = DTYPES[source]
            if tensor.is_neg() or (code == "C64" and tensor.is_conj()):
                sound = False
                tensor = tensor.resolve_conj().resolve_neg()
            shape: tuple[int, ...] = tensor.shape
            nbytes = tensor.numel() * itemsize
            device = HOST if tensor.is_cpu else device_number(tensor.device)
            if tensor.is_contiguous() and device != FETCHED:
                data = tensor.data_ptr()
                if data == 0 and nbytes != 0:
                    sound = False
                view = TensorView(data, nbytes, device)
                spans.append((data, data + nbytes))
            else:
                sound = False
                tensor, view = view_of(tensor, device, nbytes)
            if source is FLOAT4:
                shape = _unpacked(shape)
            entries.append(Entry(rank, name, code, shape, view, tensor))
    except Exception as error:  # whatever a stranger object raises: the reason is found in order
        _refuse(tensors, allow_strided)
        note_name(error, name)
        raise
    if not sound or overlapping(spans):
        _refuse(tensors, allow_strided)
    check_names(tensors)
    if dtype is not None:
        entries = [_cast(entry, dtype) for entry in entries]
    entries.sort()
    return entries


def each_alone(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Returns whether each tensor is contiguous and alone in its storage, and takes all of it.

    They must be of torch's own classes, in host memory or on a GPU. Then shared memory need not be searched for
    (20,000 tensors: 42 ms instead of a second). ``False`` means only that a closer look is needed.
    """
    addresses = set()
    for tensor in tensors.values():
        if type(tensor) not in PLAIN or tensor.dtype not in DTYPES or not (tensor.is_cpu or tensor.is_cuda):
            return False
        storage = storage_of(tensor)
        if storage is None or storage[0] == 0 or storage[1] != tensor.nbytes or not tensor.is_contiguous():
            return False
        addresses.add(storage[0])
    return len(addresses) == len(tensors)


def stored_as(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Returns a tensor's dtype and shape as in a header. Raises ``KeyError`` for a dtype that the format lacks."""
    return DTYPES[dtype][1], _unpacked(shape) if dtype is FLOAT4 else shape


def _unpacked(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of packed float4, counted in single elements."""
    return (*shape[:-1], 2 * shape[-1]) if shape else ()


def check_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Returns the dtype that tensors are to be cast to, which may be given by name; ``None`` stays ``None``.

    Raises ``ValueError`` if tensors cannot be cast to it.
    """
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in _TARGETS):
        return dtype
    try:
        found: torch.dtype = getattr(torch, cast_name(str(dtype)))
    except ValueError as error:
        raise ValueError(f"cannot save as {dtype}: {error}") from None
    return found


def _is_cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> bool:
    """Returns whether ``module.to(dtype)`` changes such a tensor."""
    return dtype is not None and tensor.dtype is not dtype and tensor.is_floating_point()


def _cast(entry: Entry, dtype: torch.dtype) -> Entry:
    """Returns the entry with a floating-point tensor cast: by the engine if it can, else by torch."""
    tensor, view = entry.tensor, entry.view
    if not _is_cast(tensor, dtype):
        return entry
    nbytes = tensor.numel() * dtype.itemsize
    if entry.code in CASTS and view.device != FETCHED:
        cast = CASTS[entry.code], cast_number(dtype)
        view = TensorView(view.data, nbytes, view.device, view.itemsize, view.shape, view.strides, cast)
    else:
        try:
            torch.empty(1, dtype=tensor.dtype, device="cpu").to(dtype)
        except Exception as error:
            raise type(error)(f"cannot save `{entry.name}` as {dtype}: {error}") from None
        view = TensorView(0, nbytes, FETCHED)
    rank, code, _ = DTYPES[dtype]
    return Entry(rank, entry.name, code, entry.shape, view, tensor)


@functools.cache
def cast_number(dtype: torch.dtype) -> int:
    """Returns the number of the engine's cast. Up to torch 2.12, what is too large for float8_e4m3fn becomes NaN."""
    saturates = dtype is torch.float8_e4m3fn and not torch.tensor(1e4, device="cpu").to(dtype).float().isnan()
    return CASTS["F8_E4M3_SAT" if saturates else _TARGETS[dtype]]


def view_of(tensor: torch.Tensor, device: int, nbytes: int) -> tuple[torch.Tensor, TensorView]:
    """Returns the view of any tensor, also of one that is strided or that only torch can read, and the tensor that is
    viewed: this one or a copy."""
    if device == FETCHED:
        return tensor, TensorView(0, nbytes, device)
    if tensor.dim() > _MAX_DIMS:
        tensor = tensor.contiguous()
    if tensor.is_contiguous():
        return tensor, TensorView(tensor.data_ptr(), nbytes, device)
    return tensor, TensorView(
        tensor.data_ptr(), nbytes, device, tensor.element_size(), tuple(tensor.shape), tensor.stride()
    )


def device_number(device: torch.device) -> int:
    if device.type == "cpu":
        return HOST
    # ROCm builds of torch call their devices "cuda" too; the engine speaks to NVIDIA's driver only.
    if device.type == "cuda" and torch.version.hip is None and device.index is not None:
        return device.index
    return FETCHED


def _refuse(tensors: dict[str, Any], allow_strided: bool) -> None:
    """Raises for the first fault in safetensors' order of checks. Returns if there is none."""
    sparse = []
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"Key `{name}` is invalid, expected torch.Tensor but received {type(tensor)}")
        if tensor.layout != torch.strided:
            sparse.append(name)
    if sparse:
        raise ValueError(
            f"You are trying to save a sparse tensors: `{sparse}` which this library does not support."
            " You can make it a dense tensor before saving with `.to_dense()` but be aware this might"
            " make a much larger file than needed."
        )
    for name, tensor in tensors.items():
        if is_traceable_wrapper_subclass(tensor):
            raise RuntimeError(
                "Attempted to access the data pointer on an invalid python storage."
                f" `{name}` is a {type(tensor).__name__}: save what it wraps (`.to_local()`, `.full_tensor()`)."
            )
    if allow_strided:
        shared = shared_names(tensors, by_storage(tensors))
    else:  # by address ranges only, with torch's and Python's own errors for what it cannot flatten or measure
        for name, tensor in tensors.items():
            with _naming(name):
                find_shared_tensors({name: tensor})
        shared = [names for names in find_shared_tensors(tensors) if len(names) > 1]
    if shared:
        raise RuntimeError(
            f"""
            Some tensors share memory, this will lead to duplicate memory on disk and potential differences when loading them again: {shared}.
            A potential way to correctly save your model is to use `save_model`.
            More information at https://huggingface.co/docs/safetensors/torch_shared_tensors
            """  # noqa: E501
        )
    for name, tensor in tensors.items():
        if not allow_strided and not tensor.is_contiguous():
            raise ValueError(
                f"You are trying to save a non contiguous tensor: `{name}` which is not allowed. It either means you"
                " are trying to save tensors which are reference of each other in which case it's recommended to save"
                " only the full tensors, and reslice at load time, or simply call `.contiguous()` on your tensor to"
                " pack it before saving."
            )
        with _naming(name):
            if tensor.device.type == "meta":
                raise NotImplementedError("Cannot copy out of meta tensor; no data!")
            if tensor.dtype not in DTYPES:
                raise KeyError(tensor.dtype)
            _check_memory(name, tensor)


def _check_memory(name: str, tensor: torch.Tensor) -> None:
    """Raises for a tensor whose elements are not in its storage: freed (by FSDP, say), fake, or computed from
    others."""
    if device_number(tensor.device) == FETCHED or tensor.numel() == 0 or tensor.data_ptr() != 0:
        return
    tensor.untyped_storage().data_ptr()  # torch's own error, if it is no real one
    raise SafetensorError(
        "Error while serializing: invalid shape, data type, or offset for tensor"
        f" `{name}`: its {tensor.nbytes} bytes have no memory (a freed or fake storage)"
    )


@contextlib.contextmanager
def _naming(name: object) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        note_name(error, name)
        raise


def check_names(tensors: Mapping[Any, torch.Tensor]) -> None:
    """Raises ``TypeError`` for a name that is not a string, ``UnicodeEncodeError`` for a lone surrogate in one."""
    for name in tensors:
        if not isinstance(name, str):
            raise TypeError(f"argument 'tensor_dict': {what_it_is(name)} is not an instance of 'str'")
        name.encode()


def what_it_is(value: object) -> str:
    """Returns what safetensors calls an object in its errors."""
    return "'None'" if value is None else f"'{type(value).__name__}' object"


def check_format(entries: list[Entry]) -> None:
    """Raises ``ValueError`` or ``SafetensorError`` for what the format cannot hold."""
    for entry in entries:
        if entry.name == METADATA_KEY:
            raise ValueError(f"`{METADATA_KEY}` is not a tensor name: no reader could open the file")
        if entry.code == "F4" and not entry.shape:
            raise SafetensorError(
                "Error while serializing: The slice is slicing for subbytes dtypes, and the slice does not end up"
                " at a byte boundary, this is invalid."
            )


def current_streams(devices: Iterable[int]) -> dict[int, int]:
    """Returns the handle of the current stream of every CUDA device among these, behind whose work the copies run.

    Raises ``RuntimeError`` while such a stream is being captured into a graph.
    """
    streams = {}
    for ordinal in sorted({device for device in devices if device >= 0}):
        stream = torch.cuda.current_stream(ordinal)
        with torch.cuda.stream(stream):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"cannot save tensors of cuda:{ordinal} while a graph is being captured there"
                )
        streams[ordinal] = stream.cuda_stream
    return streams


def on_current_streams(
    devices: Iterable[torch.device],
) -> Callable[[torch.device], contextlib.AbstractContextManager[object]]:
    """Returns a context manager for a device, in which work of any thread runs on this thread's current
    stream.

    It is the stream that is current for the device in this thread now, so the work runs behind what that
    holds. Devices without streams need nothing.
    """
    streams: dict[torch.device, Any] = {}
    for device in set(devices):
        backend = getattr(torch, device.type, None)
        if backend is not None and hasattr(backend, "current_stream") and backend.is_available():
            streams[device] = backend.stream, backend.current_stream(device)

    def on_stream(device: torch.device) -> contextlib.AbstractContextManager[object]:
        found = streams.get(device)
        if found is None:
            return contextlib.nullcontext()
        enter, stream = found
        context: contextlib.AbstractContextManager[object] = enter(stream)
        return context

    return on_stream


def copy_from(tensor: torch.Tensor, packed: memoryview) -> None:
    """Copies the bytes that a tensor has in a file into the tensor, on whatever device and with whatever
    strides."""
    target = tensor.detach()
    if not (target.is_conj() or target.is_neg()):
        # As integers: not every backend copies every dtype.
        target = target.view(_INTEGERS[target.element_size()])
    target.copy_(torch.frombuffer(packed, dtype=torch.uint8).view(target.dtype).view(target.shape))


def fetch(
    tensor: torch.Tensor, first_byte: int, nbytes: int, address: int, dtype: torch.dtype | None = None
) -> None:
    """Copies packed bytes ``[first_byte, first_byte + nbytes)`` of a tensor on any device to host memory.

    This is the way for accelerators without a native device: torch copies, a staging buffer at a time. With
    ``dtype`` the bytes are those of the tensor when saved as that dtype.
    """
    memory = (ctypes.c_char * nbytes).from_address(address)
    # As integers: not every backend copies every dtype (float4, say).
    source = tensor.detach().view(_INTEGERS[tensor.element_size()])
    if not _is_cast(tensor, dtype):
        out = torch.frombuffer(memory, dtype=source.dtype)
        itemsize = source.element_size()
        _copy_range(source, first_byte // itemsize, nbytes // itemsize, out)
        return
    assert dtype is not None
    out = torch.frombuffer(memory, dtype=dtype)
    first = first_byte // dtype.itemsize
    # Cast here, not on the device, which may know neither dtype and need memory for it.
    step = _PIECE_NBYTES // source.element_size()
    for begin in range(0, len(out), step):
        piece = out[begin : begin + step]
        as_they_are = torch.empty(len(piece), dtype=source.dtype, device="cpu")
        _copy_range(source, first + begin, len(piece), as_they_are)
        piece.copy_(as_they_are.view(tensor.dtype))


def _copy_range(source: torch.Tensor, first: int, count: int, out: torch.Tensor) -> None:
    """Does ``out.copy_(source.flatten()[first : first + count])`` without flattening a strided tensor."""
    if count == 0:
        return
    if source.is_contiguous():
        out.copy_(source.view(-1)[first : first + count])
        return
    row = source[0].numel()
    index, inside = divmod(first, row)
    head = min(count, (row - inside) % row)
    if head:
        _copy_range(source[index], inside, head, out[:head])
        index += 1
    rows = (count - head) // row
    if rows:
        whole = out[head : head + rows * row].view(rows, *source.shape[1:])
        whole.copy_(source[index : index + rows])
    done = head + rows * row
    _copy_range(source[index + rows] if count > done else source[:0], 0, count - done, out[done:])
