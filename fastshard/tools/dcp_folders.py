# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of ``torch.distributed.checkpoint`` (DCP) become ordinary Hugging Face files.

Whatever the size of the model, its tensors pass through the engine's staging buffers only. Of the ``.distcp`` files
nothing is unpickled.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import torch

from ..api.hub import index_text, split_by_size
from ..engine.engine import Engine, Options
from ..engine.mapped import DTYPES
from ..engine.pipeline import How
from ..engine.plan import TensorView
from ..engine.tensors import check_dtype
from ..formats.dcp_metadata import is_part
from ..formats.hf_index import exists, is_folder, other_files, same_file, write_text
from ..formats.naming import HUB_PATTERN, WEIGHTS_SUFFIX, index_of, names_of
from ..formats.safetensors import DTYPE_ORDER, header
from ..publish.directory import replacing
from ..publish.manifests import add, check_wanted, forget, recorder
from .dcp_source import Tensor, choose, read_folder
from .outputs import Fetched, Output, copy, write
from .stored_boxes import Mapped, items

PathLike = str | os.PathLike[str]


class Assembled(NamedTuple):
    """The result of a conversion."""

    tensors: int
    nbytes: int
    """Bytes of the files that were written."""
    left_out: dict[str, int]
    """The entries that were not taken (an optimizer's state, say), with how many tensors each has."""
    objects: list[str]
    """Names of what is no tensor and was left out."""


def convert_dcp(
    source: PathLike,
    destination: PathLike,
    *,
    key: str | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    verify: bool = False,
    force: bool = False,
    durable: bool = False,
    keep_cached: bool = True,
    progress: bool | None = None,
    manifest: bool | Literal["sha256"] = False,
    engine: Engine | Options | None = None,
) -> Assembled:
    """Writes the model of a checkpoint of ``torch.distributed.checkpoint`` as ordinary Hugging Face files.

    The files are to the byte those of :func:`fastshard.save_torch_state_dict`, or of :func:`fastshard.save_file` with
    ``{"format": "pt"}``, for the whole tensors. This takes the engine's staging buffers of memory, and nothing of the
    checkpoint is executed.

    Args:
        source: a folder with ``.metadata`` and ``.distcp`` files (``FileSystemWriter``, as accelerate, Lightning and
            torchtitan have it), or with safetensors files of ranks (``HuggingFaceStorageWriter``, as transformers has
            it with ``distributed_checkpoint=True``).
        destination: a folder, or a file whose name ends in ``.safetensors``. Other files of ``source``
            (configuration, tokenizer, ...) are copied into a folder.
        key: take the tensors of this entry (``"app.model"`` for one within another). ``None``: of nested dicts the
            only one, or that of a model, which is called ``model``, ``state_dict`` or ``module``; the state of an
            optimizer is not taken unless it is named.
        dtype: as for :func:`fastshard.save_file`.
        max_shard_size: as for :func:`fastshard.save_torch_state_dict`.
        verify: compare the CRC-32 of each tensor first, where ``torch.save`` has noted one.
        force: replace the weights in ``destination``.
        durable, keep_cached, progress, manifest, engine: as for :func:`fastshard.save_file`. For a manifest the files
            are read back.

    Raises:
        ValueError: the checkpoint is incomplete or damaged (the text names file and tensor), or it is not clear which
            tensors are meant.
        OSError, SaveError: a file could not be read or written, or ``destination`` is there.
    """
    folder, target = os.fspath(source), os.fspath(destination)
    cast = check_dtype(dtype)
    how = How(durable=durable, keep_cached=keep_cached, progress=progress, manifest=manifest, engine=engine)
    in_one_file = target.endswith(WEIGHTS_SUFFIX) and not is_folder(target)
    if not force:
        _refuse_present(target, in_one_file)
    found = read_folder(folder, verify=verify)
    chosen, left_out = choose(found, key, folder)
    if in_one_file:
        return _write_file(chosen, target, cast, how, left_out, found.objects)
    return _write_folder(chosen, folder, target, cast, max_shard_size, how, left_out, found.objects)


def consolidate(source: str, destination: str, files: Mapping[str, str]) -> dict[str, Tensor]:
    """Writes tensors of a folder of safetensors files of ranks as whole ones. ``files`` has the name of the file of each.

    Raises as :func:`convert_dcp`.
    """
    found = read_folder(source, plain=True)
    by_file: dict[str, list[Tensor]] = {}
    for name, filename in files.items():
        if name not in found.tensors:
            raise ValueError(f"{source}: tensor {name!r} is not in any file")
        by_file.setdefault(filename, []).append(found.tensors[name])
    mapped = Mapped()
    outputs = (_output(filename, tensors, None, mapped) for filename, tensors in by_file.items())
    write(outputs, destination, How(), "Consolidating")
    return {name: found.tensors[name] for name in files}


def _refuse_present(target: str, in_one_file: bool) -> None:
    present = [target] if in_one_file and exists(target) else []
    if is_folder(target):
        names = sorted(os.listdir(target))
        is_ours = names_of(HUB_PATTERN).fullmatch
        present = [os.path.join(target, name) for name in names if is_ours(name)]
    if present:
        raise FileExistsError(errno.EEXIST, "it exists already; --force replaces it", present[0])


def _nbytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    return math.prod(tensor.shape) * tensor.target(dtype).dtype.itemsize


def _output(path: str, tensors: list[Tensor], dtype: torch.dtype | None, files: Mapped) -> Output:
    entries: list[tuple[str, str, tuple[int, ...], int]] = []
    found: list[TensorView | Fetched] = []
    codes = {known: code for code, known in DTYPES.items()}
    written = [(codes[tensor.target(dtype).dtype], tensor) for tensor in tensors]
    for code, tensor in sorted(written, key=lambda one: (DTYPE_ORDER[one[0]], one[1].name)):
        shape = (*tensor.shape[:-1], 2 * tensor.shape[-1]) if code == "F4" else tensor.shape
        entries.append((tensor.name, code, shape, _nbytes(tensor, dtype)))
        found.extend(items(tensor.shape, tensor.boxes, tensor.target(dtype), files))
    kept = files.of(box for tensor in tensors for box in tensor.boxes)
    return Output(path, header(entries, {"format": "pt"}), found, kept)


def _write_file(
    tensors: list[Tensor],
    target: str,
    dtype: torch.dtype | None,
    how: How,
    left_out: dict[str, int],
    objects: list[str],
) -> Assembled:
    output = _output(target, tensors, dtype, Mapped())
    check_wanted(how.manifest)
    forget([target], durable=how.durable)
    write([output], "", how, os.path.basename(target))
    if how.manifest:
        add(target, how.manifest, durable=how.durable, keep_cached=how.keep_cached)
    nbytes = len(output.head) + sum(item.nbytes for item in output.items)
    return Assembled(len(tensors), nbytes, left_out, objects)


def _write_folder(
    tensors: list[Tensor],
    folder: str,
    target: str,
    dtype: torch.dtype | None,
    max_shard_size: int | str,
    how: How,
    left_out: dict[str, int],
    objects: list[str],
) -> Assembled:
    sized = {
        tensor.name: torch.empty(_nbytes(tensor, dtype), dtype=torch.uint8, device="meta")
        for tensor in tensors
    }
    split = split_by_size(sized, HUB_PATTERN, max_shard_size)
    by_name = {tensor.name: tensor for tensor in tensors}
    nbytes = 0

    def outputs() -> Iterator[Output]:
        nonlocal nbytes
        files = Mapped()
        for filename, names in split.filename_to_tensors.items():
            output = _output(filename, [by_name[name] for name in names], dtype, files)
            nbytes += len(output.head) + sum(item.nbytes for item in output.items)
            yield output

    is_of_it = names_of(HUB_PATTERN).fullmatch
    in_place = same_file(folder, target)
    record = recorder(how.manifest, how.keep_cached)
    with replacing(
        target, lambda name: is_of_it(name) is not None, create=True, durable=how.durable, record=record
    ) as stage:
        if split.is_sharded:
            write_text(os.path.join(stage, index_of(HUB_PATTERN)), index_text(split, {}))
        if not in_place:
            copy((name for name in other_files(folder) if not is_part(name)), folder, stage)
        write(outputs(), stage, how, "Converting")
    return Assembled(len(tensors), nbytes, left_out, objects)
