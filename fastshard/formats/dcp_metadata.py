# SPDX-License-Identifier: Apache-2.0
"""What ``torch.distributed.checkpoint`` (DCP) says of a checkpoint: which boxes of which tensors lie where.

There are two layouts. With ``FileSystemWriter`` it is pickled in ``.metadata``, beside ``.distcp`` files. With
``HuggingFaceStorageWriter`` each safetensors file has in its metadata, under ``DCP_SHARDING_INFO``, where its tensors
lie in the whole ones. Neither is trusted: the pickle is read by :mod:`fastshard.formats.inert_pickle`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from .hf_index import is_plain, open_file
from .inert_pickle import Inert, read_pickle
from .json_text import read_json_object
from .naming import DCP_METADATA, DISTCP_SUFFIX, INDEX_SUFFIX, WEIGHTS_SUFFIX, is_dcp_metadata
from .safetensors import read_header
from .torch_items import DTYPE_NAMES

SHARDING_KEY: Final = "DCP_SHARDING_INFO"

_MAX_NBYTES: Final = 1 << 30
_CHECKPOINT: Final = "torch.distributed.checkpoint"
_TENSOR: Final = f"{_CHECKPOINT}.metadata.TensorStorageMetadata"
_OBJECT: Final = f"{_CHECKPOINT}.metadata.BytesStorageMetadata"
_INDEX: Final = f"{_CHECKPOINT}.metadata.MetadataIndex"
_PLACE: Final = f"{_CHECKPOINT}.filesystem._StorageInfo"
_METADATA: Final = f"{_CHECKPOINT}.metadata.Metadata"
_KNOWN: Final = {
    *DTYPE_NAMES,
    _TENSOR,
    _OBJECT,
    _INDEX,
    _PLACE,
    _METADATA,
    f"{_CHECKPOINT}.metadata.TensorProperties",
    f"{_CHECKPOINT}.metadata.ChunkStorageMetadata",
    f"{_CHECKPOINT}.metadata.StorageMeta",
    f"{_CHECKPOINT}.metadata._MEM_FORMAT_ENCODING",
    "torch.Size",
    "torch.serialization._get_layout",
    "collections.OrderedDict",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
}

Numbers = tuple[int, ...]


class Chunk(NamedTuple):
    """A box of a tensor, which lies in a file."""

    offsets: Numbers
    sizes: Numbers
    path: str
    begin: int
    """Offset in the file."""
    nbytes: int
    """Of all that is stored there for the box."""


class DcpTensor(NamedTuple):
    dtype: str
    """As torch calls it."""
    shape: Numbers
    chunks: list[Chunk]


class DcpMetadata(NamedTuple):
    """What a checkpoint of ``FileSystemWriter`` has."""

    tensors: dict[str, DcpTensor]
    objects: list[str]
    """The names of what is no tensor."""
    paths: dict[str, tuple[str | int, ...]]
    """Of each name that was made of the keys of nested dicts, these keys, in the order of the dicts."""


def is_dcp_folder(folder: str) -> bool:
    """Returns whether the folder holds a checkpoint in one of DCP's layouts. Raises ``OSError``."""
    names = os.listdir(folder)
    if any(map(is_dcp_metadata, names)):
        return True
    weights = sorted(n for n in names if n.endswith(WEIGHTS_SUFFIX) and not n.startswith("."))
    if not weights or any(name.endswith(INDEX_SUFFIX) for name in names):
        return False
    path = os.path.join(folder, weights[0])
    with open_file(path) as file:
        try:
            header = read_header(file, os.fstat(file.fileno()).st_size)
        except ValueError:
            return False
    return SHARDING_KEY in (header.metadata or {})


def is_part(name: str) -> bool:
    """Returns whether a file of this name is one that ``FileSystemWriter`` writes."""
    return name.endswith(DISTCP_SUFFIX) or is_dcp_metadata(name)


def read_metadata(folder: str) -> DcpMetadata | None:
    """Reads ``.metadata`` of a folder, or what ranks have written that saved on their own; ``None`` if there is neither.

    Raises ``OSError``, and ``ValueError`` naming the file.
    """
    names = os.listdir(folder)
    found = [DCP_METADATA] if DCP_METADATA in names else []
    found = found or sorted(filter(is_dcp_metadata, names), key=lambda n: (len(n), n))
    if not found:
        return None
    whole = DcpMetadata({}, [], {})
    for name in found:
        path = os.path.join(folder, name)
        with open_file(path) as file:
            data = file.read(_MAX_NBYTES + 1)
        try:
            if len(data) > _MAX_NBYTES:
                raise ValueError("it is too large")
            _add(whole, _metadata(read_pickle(data, _KNOWN), folder))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        except (AttributeError, TypeError, KeyError, IndexError):
            raise ValueError(f"{path}: not the metadata of {_CHECKPOINT}") from None
    return whole


def sharding_info(metadata: Mapping[str, str]) -> dict[str, Numbers] | None:
    """Returns at which offsets the tensors of a safetensors file lie in the whole ones, in the order of the text; ``None``
    if its metadata do not tell.

    Raises ``ValueError``.
    """
    text = metadata.get(SHARDING_KEY)
    if text is None:
        return None
    found: dict[str, Numbers] = {}
    for name, told in read_json_object(text).items():
        offsets = told.get("saved_offsets") if isinstance(told, dict) else None
        if not isinstance(offsets, list) or any(type(n) is not int or n < 0 for n in offsets):
            raise ValueError(f"{SHARDING_KEY} does not say where tensor {name!r} lies")
        found[name] = tuple(offsets)
    return found


def _add(whole: DcpMetadata, more: DcpMetadata) -> None:
    for name, tensor in more.tensors.items():
        other = whole.tensors.setdefault(name, tensor)
        if other is not tensor:
            if (other.dtype, other.shape) != (tensor.dtype, tensor.shape):
                raise ValueError(
                    f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, elsewhere it is not"
                )
            other.chunks.extend(tensor.chunks)
    whole.objects.extend(name for name in more.objects if name not in whole.objects)
    whole.paths.update(more.paths)


def _metadata(found: Any, folder: str) -> DcpMetadata:
    if found.name != _METADATA:
        raise ValueError(f"not the metadata of {_CHECKPOINT}")
    places: dict[tuple[str, Numbers | None], Inert] = {}
    for index, place in (found.field("storage_data") or {}).items():
        offset = index.state.get("offset")
        places[_text(index.field("fqn")), None if offset is None else _numbers(offset)] = place
    whole = DcpMetadata({}, [], {})
    for name, told in found.field("state_dict_metadata").items():
        if told.name == _OBJECT:
            whole.objects.append(_text(name))
        elif told.name == _TENSOR:
            try:
                whole.tensors[_text(name)] = _tensor(name, told, places, folder)
            except ValueError as error:
                raise ValueError(f"tensor {name!r}: {error}") from None
        else:
            raise ValueError(f"{name!r} is described as a {told.name}")
    whole.paths.update(_paths(found.state.get("planner_data")))
    return whole


def _tensor(
    name: str, told: Inert, places: Mapping[tuple[str, Numbers | None], Inert], folder: str
) -> DcpTensor:
    properties = told.field("properties").state
    dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
    shape = _numbers(told.field("size"))
    chunks = []
    for chunk in told.field("chunks"):
        offsets, sizes = _numbers(chunk.field("offsets")), _numbers(chunk.field("sizes"))
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise ValueError(f"a part of {list(sizes)} at {list(offsets)} is not of shape {list(shape)}")
        if 0 in sizes:
            continue
        place = places.get((name, offsets)) or places.get((name, None))
        if place is None:
            raise ValueError(f"it is not said where the part at {list(offsets)} lies")
        chunks.append(_chunk(offsets, sizes, place, folder))
    return DcpTensor(DTYPE_NAMES[dtype.name], shape, chunks)


def _chunk(offsets: Numbers, sizes: Numbers, place: Inert, folder: str) -> Chunk:
    if place.name != _PLACE:
        raise ValueError(f"its place is a {place.name}")
    filename, begin, nbytes = place.field("relative_path"), place.field("offset"), place.field("length")
    if not is_plain(filename):
        raise ValueError(f"it cannot lie in {filename!r}")
    if place.state.get("transform_descriptors"):
        raise ValueError(
            f"it is stored as {place.state['transform_descriptors']!r:.80}, which only torch reads"
        )
    if any(type(number) is not int or number < 0 for number in (begin, nbytes)):
        raise ValueError("its place is not given as numbers")
    return Chunk(offsets, sizes, os.path.join(folder, filename), begin, nbytes)


def _paths(told: Any) -> dict[str, tuple[str | int, ...]]:
    """Returns the keys of each name, as far as the planner has noted them as torch's own does."""
    if not isinstance(told, dict):
        return {}
    return {
        name: keys
        for name, keys in told.items()
        if isinstance(name, str) and isinstance(keys, tuple) and keys and _all_keys(keys)
    }


def _all_keys(keys: Iterable[object]) -> bool:
    return all(isinstance(key, (str, int)) for key in keys)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a {type(value).__name__} where a name is expected")
    return value


def _numbers(value: Any) -> Numbers:
    """Returns the numbers of a ``torch.Size``."""
    numbers = value.arguments[0] if isinstance(value, Inert) and value.name == "torch.Size" else value
    if not isinstance(numbers, (tuple, list)) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("a size is not given as numbers")
    return tuple(numbers)
